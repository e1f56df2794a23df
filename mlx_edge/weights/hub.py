"""Where a model's folder is: the bundled one, a local folder, or a download from the Hugging Face hub."""

import re
from importlib.resources import files
from pathlib import Path

from mlx_edge.errors import ModelFormatError

BUNDLED = ("pocket", "pocket-draft")
DEFAULT_MODEL = BUNDLED[0]

# No code, no pickles: only these are fetched.
FILES = ["*.json", "*.safetensors", "*.jinja", "tokenizer.model", "*.txt"]


def find_model(name: str, *, revision: str | None = None) -> Path:
    """The folder of a bundled model ("pocket"), of a path, or of a hub id ("owner/name"), downloaded if need be.

    Raises: ModelFormatError when there is no such folder and no such repository within reach.
    """
    if name in BUNDLED and not Path(name).exists():
        return Path(str(files("mlx_edge") / "assets" / name.replace("-", "_")))
    folder = Path(name).expanduser()
    if name and folder.is_dir():
        return folder
    if name and folder.exists():
        raise ModelFormatError(
            f"{name} is a file; expected a model folder, a hub id or {BUNDLED[0]}"
        )
    if not re.fullmatch(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*", name):
        raise ModelFormatError(
            f"{name or repr(name)}: no such folder; "
            f"give a model folder, a hub id (owner/name) or {' or '.join(BUNDLED)}"
        )
    return _download(name, revision)


def _download(name: str, revision: str | None) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(name, revision=revision, allow_patterns=FILES))
    except LocalEntryNotFoundError:
        raise ModelFormatError(
            f"{name}: no such folder here, not in the hub's cache, and the hub cannot be reached; "
            "check the name and the connection"
        ) from None
    except (HfHubHTTPError, OSError, ValueError) as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise ModelFormatError(
            f"{name}: no such folder here, and it could not be had from the hub: {reason}"
        ) from None
