"""Where a model's folder is: the bundled one, a local folder, or a download from the Hugging Face hub.

The hub's own library downloads, into its own cache, under its own settings: HF_HOME, HF_HUB_CACHE, HF_ENDPOINT,
HF_TOKEN, HF_HUB_OFFLINE, HF_HUB_DISABLE_PROGRESS_BARS. It is imported only when a name is a hub id. This module adds
what that library leaves to its callers: to look at the list of files before the download, to fetch no pickle and no
code, and to say in one line what went wrong. Knows no model and does not look into the files: whether they are sound
is judged where they are read.
"""

import errno
import logging
import re
import sys
from collections.abc import Collection
from fnmatch import fnmatchcase
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple

from mlx_edge.errors import InvalidRequestError, MLXEdgeError, ModelFormatError

if TYPE_CHECKING:
    from huggingface_hub.errors import HfHubHTTPError

logger = logging.getLogger(__name__)

ASSETS = Path(__file__).parents[1] / "assets"
BUNDLED = ("pocket", "pocket-draft", "pocket-vision")  # folders in it
DEFAULT_MODEL = BUNDLED[0]

# What is fetched, in the patterns of fnmatch, where * also matches a slash. No code, no pickles.
TEXT_FILES = ("*.json", "*.jinja", "tokenizer.model")
# In a repository that has both, other safetensors are the same weights again (consolidated.safetensors).
WEIGHT_FILES = "model*.safetensors"
OTHER_WEIGHT_FILES = "*.safetensors"
IN_SUBFOLDERS = ("*/*.json", "*/*.safetensors")  # of other runtimes; templates alone may lie in one
FOREIGN_WEIGHTS = ("*.bin", "*.gguf", "*.pt", "*.pth", "*.ckpt", "*.npz", "*.h5", "*.onnx")

# The hub's rules for a name, and git's for a revision.
_PART = r"(?=.{1,96}(?:/|$))\w(?:[\w.-]*\w)?"
_HUB_ID = re.compile(rf"(?!.*(?:--|\.\.|\.git$)){_PART}/{_PART}", re.ASCII)
_REVISION = re.compile(r"(?!.*\.\.)[^\s\x00-\x1f\x7f~^:?*\[\\/.-][^\s\x00-\x1f\x7f~^:?*\[\\]*")

_LIST_TIMEOUT_S = 10.0
_AGAIN = "run it again: finished files are kept, the rest is fetched anew"
_LOG_IN = "log in with `hf auth login` or set HF_TOKEN"


def find_model(name: str, *, revision: str | None = None) -> Path:
    """The folder of a bundled model ("pocket"), of a path, or of a hub id ("owner/name"), downloaded if need be.

    `revision` is a branch, tag or commit of a hub model. When the hub gives no answer, a complete copy in its
    cache is used and a warning logged.

    Raises: InvalidRequestError when something else must be asked for: the name or the revision is malformed or
    unknown to the hub, access is not granted, a revision of a local folder. ModelFormatError when there is no such
    folder, or the repository is there but no sound folder can be had: it holds no safetensors, the hub is out of
    reach, the download broke, the disk is full.
    """
    folder = Path(name).expanduser()
    if name in BUNDLED and not folder.exists():
        _refuse_revision(name, revision)
        return ASSETS / name.replace("-", "_")
    if name and folder.is_dir():
        _refuse_revision(name, revision)
        return folder
    choices = f"give a model folder, a hub id (owner/name) or one of {', '.join(BUNDLED)}"
    if name and folder.exists():
        raise ModelFormatError(f"{name} is a file; {choices}")
    if not _HUB_ID.fullmatch(name):
        raise ModelFormatError(
            f"{name or repr(name)}: no such folder, and no well-formed hub id either; {choices}"
        )
    if revision is not None and not _REVISION.fullmatch(revision):
        raise InvalidRequestError(
            f"{name}: found the revision {revision!r}; expected a branch, a tag or a commit"
        )
    return _download(name, revision)


def _refuse_revision(name: str, revision: str | None) -> None:
    if revision is not None:
        raise InvalidRequestError(
            f"{name} is a local folder, and has no revision {revision!r}; leave the revision out, or give a hub id"
        )


def _download(name: str, revision: str | None) -> Path:
    from huggingface_hub import HfApi

    try:
        info = HfApi().model_info(name, revision=revision, timeout=_LIST_TIMEOUT_S)
    except Exception as error:  # of httpx, json and the hub's library, by version
        return _find_cached(name, revision, error)
    names = [file.rfilename for file in info.siblings or []]
    _check_list(name, names)
    try:
        return _fetch(name, revision, names)
    except Exception as error:  # the same, and hf_xet's
        raise _judge(error, name, downloading=True).as_error(name, revision) from None


def _find_cached(name: str, revision: str | None, error: Exception) -> Path:
    """The copy in the hub's cache, because asking the hub ended in `error`."""
    from huggingface_hub.errors import (
        LocalEntryNotFoundError,
        OfflineModeIsEnabled,
        RevisionNotFoundError,
    )

    verdict = _judge(error, name)
    if isinstance(error, RevisionNotFoundError):  # the hub knows better than a cache
        raise verdict.as_error(name, revision) from None
    try:
        folder = _fetch(name, revision, cached=True)
    except LocalEntryNotFoundError as missing:
        # Only the subclass for copies that lack files, which the oldest versions do not have, names a folder.
        state = "incomplete" if hasattr(missing, "snapshot_path") else "missing"
        raise verdict.as_error(name, revision, state) from None
    except OSError as unreadable:
        raise _judge(unreadable, name).as_error(name, revision) from None
    # An older library, or one that fetches single files, leaves no list to judge the copy by.
    names = [path.name for path in folder.iterdir() if path.is_file()]
    if "config.json" not in names or not _select(names, OTHER_WEIGHT_FILES):
        raise verdict.as_error(name, revision, "incomplete") from None
    if not isinstance(error, OfflineModeIsEnabled):
        logger.warning("%s: %s; the copy in the cache is used", name, verdict.found)
    return folder


def _fetch(
    name: str, revision: str | None, names: Collection[str] = (), *, cached: bool = False
) -> Path:
    """Have the hub's library bring in what is missing; `names` are the repository's files, where they are known."""
    from huggingface_hub import snapshot_download

    others = names and not _select(names, WEIGHT_FILES)
    weights = OTHER_WEIGHT_FILES if others else WEIGHT_FILES
    bar = _make_bar(name)
    try:
        folder = snapshot_download(
            name,
            revision=revision,
            allow_patterns=[*TEXT_FILES, weights],
            ignore_patterns=list(IN_SUBFOLDERS),
            local_files_only=cached,
            tqdm_class=bar,
        )
    finally:
        # The library leaves that to the garbage collector: too late for a message of an error.
        for made in bar.made:
            made.close()
    return Path(folder)


def _select(names: Collection[str], *patterns: str) -> list[str]:
    """The files beside config.json, not in subfolders, that match one of the patterns."""
    return [
        name
        for name in names
        if "/" not in name and any(fnmatchcase(name, pattern) for pattern in patterns)
    ]


def _check_list(name: str, names: Collection[str]) -> None:
    """Refuse a repository that cannot be loaded, before anything of it is downloaded."""
    if not _select(names, OTHER_WEIGHT_FILES):
        foreign = _select(names, *FOREIGN_WEIGHTS)
        more = f" and {len(foreign) - 1} more such files" if foreign[1:] else ""
        found = f"{foreign[0]}{more}, but no safetensors" if foreign else "no weights"
        raise ModelFormatError(
            f"{name}: found {found} in the repository; expected model.safetensors; "
            "choose a repository with safetensors; nothing was downloaded"
        )
    if "config.json" not in names:
        raise ModelFormatError(
            f"{name}: found no config.json in the repository; expected a whole model, not an adapter or a part; "
            "choose another; nothing was downloaded"
        )


def _make_bar(title: str) -> Any:
    """The class of the library's progress bars: of all that it draws, bytes written is shown, on a terminal only.

    HF_HUB_DISABLE_PROGRESS_BARS is obeyed. `made` holds the bars made so far.
    """
    from huggingface_hub.utils.tqdm import tqdm

    class BytesBar(tqdm):
        made: ClassVar[list["BytesBar"]] = []

        def __init__(self, *args: Any, **kwargs: Any) -> None:
            transfer = str(kwargs.get("name")).endswith(".transfer")  # bytes received, compressed
            if transfer or kwargs.get("unit") != "B" or not sys.stderr.isatty():
                kwargs["disable"] = True
            kwargs.update(desc=title, leave=False)
            super().__init__(*args, **kwargs)  # type: ignore[no-untyped-call]
            self.made.append(self)

        def set_description(self, desc: str | None = None, refresh: bool | None = True) -> None:
            """Keep the title: the library's own words are about its inner steps."""

    return BytesBar


class _Verdict(NamedTuple):
    """What an error of the hub's library means: what was found, and what to do."""

    kind: type[MLXEdgeError]
    found: str
    remedy: str

    def as_error(self, name: str, revision: str | None, cached: str = "") -> MLXEdgeError:
        """The error to raise; `cached` says in a word what was found in the cache, if it was searched."""
        from huggingface_hub import constants

        at = f" at revision {revision}" if revision else ""
        searched = (
            f", and the copy in the cache ({constants.HF_HUB_CACHE}) is {cached}" if cached else ""
        )
        if self.kind is InvalidRequestError and cached == "missing":
            searched = ""
        return self.kind(f"{name}{at}: {self.found}{searched}; {self.remedy}")


def _judge(error: BaseException, name: str, *, downloading: bool = False) -> _Verdict:
    """What to tell about an exception out of the hub's library, while a list was asked for or files came in."""
    from huggingface_hub import constants
    from huggingface_hub.errors import (
        HfHubHTTPError,
        LocalEntryNotFoundError,
        OfflineModeIsEnabled,
    )

    if isinstance(error, LocalEntryNotFoundError) and error.__cause__ is not None:
        return _judge(error.__cause__, name)
    if isinstance(error, OfflineModeIsEnabled):
        found, remedy = "HF_HUB_OFFLINE is set", "unset it, or download the model first"
        return _Verdict(ModelFormatError, found, remedy)
    if isinstance(error, HfHubHTTPError):
        return _judge_answer(error, name)
    # The first line: the library's own advice comes after it.
    reason = _clean(str(error).strip().partition("\n")[0]) or type(error).__name__
    full = getattr(error, "errno", None) in {errno.ENOSPC, errno.EDQUOT}
    if full or "No space left" in str(error):  # hf_xet has only words
        found = f"the disk of the hub's cache ({constants.HF_HUB_CACHE}) is full"
        return _Verdict(ModelFormatError, found, f"free space or set HF_HOME, then {_AGAIN}")
    if isinstance(error, OSError) and error.filename is not None:
        found = f"the hub's cache ({constants.HF_HUB_CACHE}) cannot be used: {reason}"
        return _Verdict(ModelFormatError, found, "mend its permissions, or set HF_HOME")
    if downloading:
        return _Verdict(ModelFormatError, f"the download broke off: {reason}", _AGAIN)
    if type(error).__module__.startswith("httpx"):  # httpx or httpx2, by version
        found = f"the hub ({constants.ENDPOINT}) cannot be reached: {reason}"
        return _Verdict(ModelFormatError, found, "check the name and the connection")
    found = f"the hub ({constants.ENDPOINT}) answers with something else than a model: {reason}"
    remedy = "check HF_ENDPOINT, and whether a proxy answers instead"
    return _Verdict(ModelFormatError, found, remedy)


def _clean(text: str) -> str:
    """A message from outside as one line without control characters."""
    return "".join(filter(str.isprintable, " ".join(text.split())))[:200]


def _judge_answer(error: "HfHubHTTPError", name: str) -> _Verdict:
    """What the hub means by an answer that is an HTTP error."""
    from huggingface_hub import constants
    from huggingface_hub.errors import (
        GatedRepoError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    status = error.response.status_code
    said = _clean(error.server_message or error.response.reason_phrase)
    answer = f"the hub ({constants.ENDPOINT}) answers {status} ({said})"
    if isinstance(error, GatedRepoError):
        found = "a gated repository, to which access is granted on request"
        remedy = f"ask for it at {constants.ENDPOINT}/{name}, then {_LOG_IN}"
        return _Verdict(InvalidRequestError, found, remedy)
    if isinstance(error, RepositoryNotFoundError):
        found = "no such folder here, and no such repository on the hub, or a private one"
        remedy = f"check the name; for a private one {_LOG_IN}"
        return _Verdict(InvalidRequestError, found, remedy)
    if isinstance(error, RevisionNotFoundError):
        found = "the repository has no such revision"
        return _Verdict(InvalidRequestError, found, "give one of its branches, tags or commits")
    if status in {401, 403}:
        remedy = f"{_LOG_IN}, with a token that may read this model"
        return _Verdict(InvalidRequestError, answer, remedy)
    if status == 429:
        after = error.response.headers.get("Retry-After", "")
        when = f"in {after} s" if after.isdigit() else "in some minutes"
        remedy = f"try again {when}; the limit is higher for users who {_LOG_IN}"
        return _Verdict(ModelFormatError, answer, remedy)
    return _Verdict(ModelFormatError, answer, "try again later; if it stays so, check HF_ENDPOINT")
