"""The text in a file: plain, or the "text" of each document in .jsonl and .json. Knows no tokens."""

import json
from pathlib import Path
from typing import Any

from mlx_edge.errors import InvalidRequestError

MAX_CHARACTERS = 4 << 20  # a million tokens, of which a calibration takes some ten thousand
MAX_BYTES = 1 << 28  # of a .json file, which must be read as a whole
FIELD = "text"
BETWEEN = "\n\n"  # documents


def extract_text(path: Path, name: str) -> str:
    """What a file says, at least its first MAX_CHARACTERS; `name` is what messages call it.

    Raises: InvalidRequestError for a file that cannot be read, is not UTF-8, or has no texts.
    """
    try:
        with path.open(encoding="utf-8") as file:
            if path.suffix == ".jsonl":
                return _join(_parse(line, name, number) for number, line in enumerate(file, 1))
            if path.suffix != ".json":
                return file.read(MAX_CHARACTERS + 1)
            if path.stat().st_size > MAX_BYTES:
                raise InvalidRequestError(
                    f"{name}: over {MAX_BYTES >> 20} MiB of JSON; give .jsonl"
                )
            return _join(_read_list(file.read(), name))
    except UnicodeDecodeError as error:
        raise InvalidRequestError(
            f"{name}: byte {error.start} is not UTF-8 ({error.reason}); expected a text file, .jsonl or .json"
        ) from None
    except OSError as error:
        raise InvalidRequestError(f"{name} cannot be read: {error.strerror or error}") from None


def cut_text(text: str, name: str) -> tuple[str, str]:
    """The first MAX_CHARACTERS of a text, and its name, which tells when it was cut."""
    if len(text) <= MAX_CHARACTERS:
        return text, name
    return text[:MAX_CHARACTERS], f"{name} (first {MAX_CHARACTERS >> 20} Mi characters)"


def _join(texts: Any) -> str:
    found: list[str] = []
    size = 0
    for text in texts:
        found.append(text)
        size += len(text) + len(BETWEEN)
        if size > MAX_CHARACTERS + len(BETWEEN):
            break
    return BETWEEN.join(text for text in found if text)


def _parse(line: str, name: str, number: int) -> str:
    if not line.strip():
        return ""
    try:
        value = json.loads(line)
    except (ValueError, RecursionError):
        raise InvalidRequestError(f"{name}: line {number} is no JSON") from None
    return _text_of(value, f"{name}: line {number}")


def _read_list(content: str, name: str) -> list[str]:
    try:
        value = json.loads(content)
    except (ValueError, RecursionError):
        raise InvalidRequestError(
            f"{name} is no JSON; documents in lines are named .jsonl"
        ) from None
    documents = value if isinstance(value, list) else [value]
    return [_text_of(entry, f"{name}: entry {i}") for i, entry in enumerate(documents, 1)]


def _text_of(value: Any, place: str) -> str:
    if isinstance(value, str):
        return value
    if isinstance(value, dict) and isinstance(value.get(FIELD), str):
        text: str = value[FIELD]
        return text
    found = f"fields {', '.join(map(str, value))[:80]}" if isinstance(value, dict) else "no object"
    raise InvalidRequestError(f'{place} has {found}; expected {{"{FIELD}": "..."}}')
