"""Writes a JSON file whole or not at all. Knows nothing of what stands in it."""

import json
import secrets
from contextlib import suppress
from pathlib import Path

from mlx_edge.errors import InvalidRequestError


def write_json(path: str | Path, value: object) -> None:
    """Write `value` to `path`; an old file stays untouched until the new one is complete.

    Raises: InvalidRequestError where the disk refuses; ValueError for a number that JSON has not (nan, inf).
    """
    path = Path(path)
    partial = path.with_name(f".{path.name}.{secrets.token_hex(4)}.partial")
    text = json.dumps(value, allow_nan=False)
    try:
        partial.write_text(text + "\n", encoding="utf-8")
        partial.replace(path)
    except OSError as error:
        raise InvalidRequestError(
            f"{path} cannot be written: {error.strerror or error}; name another file"
        ) from error
    finally:
        with suppress(OSError):
            partial.unlink(missing_ok=True)
