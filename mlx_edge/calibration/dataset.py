"""A text file of a data set on the Hugging Face hub, by `owner/name` or `owner/name:file`. Reads nothing in it."""

import re
from pathlib import Path

from mlx_edge.errors import InvalidRequestError

SUFFIXES = (".txt", ".jsonl", ".json")  # in the order of preference
ANNOTATIONS = ("dataset_infos.json", "dataset_info.json", "README.txt", "LICENSE.txt")
MAX_BYTES = 1 << 28
_ID = re.compile(r"([\w-][\w.-]{0,95}/[\w-][\w.-]{0,95})(?::([^:\\]{1,255}))?", re.ASCII)
_TIMEOUT_S = 10.0


def fetch_text_file(source: str) -> tuple[Path, str]:
    """A text file of a data set in the hub's cache, downloaded if need be, and its name: `owner/name:file`.

    Without a file the first is taken that is a text: one for training before others, .txt before .jsonl before .json.

    Raises: InvalidRequestError when it is no id, there is no such data set or file, or the hub gives no answer.
    """
    found = _ID.fullmatch(source)
    if found is None:
        raise InvalidRequestError(
            f"{source[:200]!r}: no such file, and no id of a data set; give a text file, owner/name or "
            "owner/name:file of a data set on the hub, or built-in"
        )
    name, file = found.groups()
    try:
        file = file or _choose_file(name)
        return _download(name, file), f"{name}:{file}"
    except InvalidRequestError:
        raise
    except Exception as error:  # of httpx, json and the hub's library, by version
        raise InvalidRequestError(_explain(name, file, error)) from None


def _choose_file(name: str) -> str:
    from huggingface_hub import HfApi

    info = HfApi().dataset_info(name, files_metadata=True, timeout=_TIMEOUT_S)
    siblings = info.siblings or []
    names = [entry.rfilename for entry in siblings if (entry.size or 0) <= MAX_BYTES]
    texts = [n for n in names if n.endswith(SUFFIXES) and n.rpartition("/")[2] not in ANNOTATIONS]
    if not texts:
        kinds = sorted({Path(entry.rfilename).suffix for entry in siblings} - {"", ".md"})
        raise InvalidRequestError(
            f"{name}: the data set has no {', '.join(SUFFIXES)} of at most {MAX_BYTES >> 20} MiB, only "
            f"{', '.join(kinds[:5]) or 'no data'}; save some of its text to a file, and give that"
        )
    return min(texts, key=lambda n: ("train" not in n, SUFFIXES.index(Path(n).suffix), n))


def _download(name: str, file: str) -> Path:
    from huggingface_hub import hf_hub_download

    if not file.endswith(SUFFIXES):
        raise InvalidRequestError(f"{name}:{file} is none of {', '.join(SUFFIXES)}")
    return Path(hf_hub_download(name, file, repo_type="dataset", etag_timeout=_TIMEOUT_S))


def _explain(name: str, file: str | None, error: Exception) -> str:
    from huggingface_hub.errors import (
        EntryNotFoundError,
        GatedRepoError,
        LocalEntryNotFoundError,
        OfflineModeIsEnabled,
        RepositoryNotFoundError,
    )

    reason = " ".join(str(error).split("\n")[0].split())[:200] or type(error).__name__
    if isinstance(error, OfflineModeIsEnabled) or "HF_HUB_OFFLINE" in str(error):
        found = "HF_HUB_OFFLINE is set, and the data set is not in the hub's cache as a whole"
        remedy = "unset it, or give a text file"
    elif isinstance(error, GatedRepoError):
        found, remedy = "a gated data set", "ask for access on the hub, then log in: hf auth login"
    elif isinstance(error, RepositoryNotFoundError):
        found = "no such file here, and no such data set on the hub, or a private one"
        remedy = "check the name; for a private one log in: hf auth login"
    elif isinstance(error, EntryNotFoundError) and not isinstance(error, LocalEntryNotFoundError):
        found, remedy = f"the data set has no file {file}", "give one that it has"
    else:
        found = f"no such file here, and the hub gives no data set: {reason}"
        remedy = "check the name and the connection, or give a text file"
    return f"{name}: {found}; {remedy}"
