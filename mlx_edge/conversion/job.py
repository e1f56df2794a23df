"""A folder that is made beside its place and gets its name when it is complete: a killed run is continued.

    .NAME.partial/lock       held while somebody works here
    .NAME.partial/key        what the work is; work with another key begins anew
    .NAME.partial/model/     the new folder
    .NAME.partial/scratch/   what is of use only meanwhile
    .NAME.partial/old/       the folder that is replaced, for the moment between two renamings

Knows nothing of models but that their folder holds a `config.json`.
"""

import fcntl
import logging
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from mlx_edge.errors import InvalidRequestError, MLXEdgeError
from mlx_edge.weights.writer import disk_errors, is_temporary, replacing, sync_folder

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Job:
    """Work on one new folder, under a lock."""

    target: Path
    place: Path  # the hidden folder beside the target

    @property
    def folder(self) -> Path:
        """Where the new folder grows."""
        return self.place / "model"

    @property
    def scratch(self) -> Path:
        """A place for files that do not belong into the result; they are kept for a run that takes up the work."""
        return self.place / "scratch"

    def finish(self) -> None:
        """Gives the new folder its name; an old one goes only now."""
        with disk_errors(self.target):
            for path in self.folder.iterdir():
                _sync_file(path)
            sync_folder(self.folder)
            if self.target.exists():
                self.target.rename(self.place / "old")
            self.folder.rename(self.target)
            sync_folder(self.target.parent)
        shutil.rmtree(self.place, ignore_errors=True)


def find_place(target: Path) -> Path:
    """The hidden folder in which the work on `target` is done."""
    target = Path(os.path.abspath(target))  # noqa: PTH100 (a link stays a link; "." has a name)
    return target.with_name(f".{target.name}.partial")


def check_target(target: Path, *, is_forced: bool) -> None:
    """Raises InvalidRequestError for a target that is there, unless it is a model that may be replaced by force."""
    place = find_place(target)
    if (place / "old").exists() and not target.exists():  # killed between the two renamings
        with disk_errors(target):
            (place / "old").rename(target)
    if not os.path.lexists(target):
        return
    if not is_forced:
        if not (place / "model").exists():  # killed after them
            shutil.rmtree(place, ignore_errors=True)
        raise InvalidRequestError(
            f"{target} is there already; give --force to replace it, or another --mlx-path"
        )
    if target.is_symlink() or not (target / "config.json").is_file():
        raise InvalidRequestError(
            f"{target} is no model folder (it has no config.json), so --force does not remove it; "
            "give another --mlx-path"
        )


@contextmanager
def open_job(target: Path, key: str, *, is_forced: bool = False) -> Iterator[Job]:
    """Work on `target` that begins where an earlier run with the same key stopped.

    When the block ends by an error and no file of weights is whole, nothing is left.

    Raises: InvalidRequestError as `check_target`, and while another process works on the same folder.
    """
    target = Path(os.path.abspath(target))  # noqa: PTH100
    check_target(target, is_forced=is_forced)
    job = Job(target, find_place(target))
    with _locked(job.place):
        _take_up(job, key)
        try:
            yield job
        except MLXEdgeError:
            if not any(job.folder.glob("*.safetensors")):
                shutil.rmtree(job.place, ignore_errors=True)
            raise


@contextmanager
def _locked(place: Path) -> Iterator[None]:
    with disk_errors(place):
        place.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(place / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise InvalidRequestError(
                f"{place} is in use: another conversion to the same folder runs; wait for it, or stop it"
            ) from None
        except OSError:  # a file system without locks
            logger.debug("%s cannot be locked", place)
        yield
    finally:
        os.close(descriptor)


def _take_up(job: Job, key: str) -> None:
    with disk_errors(job.place):
        known = None
        with suppress(FileNotFoundError):
            known = (job.place / "key").read_text("utf-8")
        if known == key:
            logger.info("%s: an earlier run is continued", job.place)
        else:
            for name in ("model", "scratch", "key", "old"):
                _remove(job.place / name)
            with replacing(job.place / "key") as file:
                file.write(key.encode())
        for path in (job.place, job.folder, job.scratch):
            path.mkdir(exist_ok=True)
            for stray in filter(lambda p: is_temporary(p.name), list(path.iterdir())):
                stray.unlink()


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def _sync_file(path: Path) -> None:
    if path.is_file():
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
