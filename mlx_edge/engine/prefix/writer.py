"""The folder of the prefix cache's files, and the thread that writes them: bounded on the disk and in what waits.

Only files with names of its own are ever removed. Several processes may share a folder: a file is never changed once
it has its name, and whoever writes removes those that were used longest ago (by the time of change, which a use sets)
beyond the limit. A disk that refuses a write is left alone from then on. Knows bytes and names; what is in a file, and
who asks for it, is `prefix_disk.py`'s.
"""

import logging
import os
import re
import threading
from collections import deque
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from mlx_edge.engine.prefix.file import (
    SUFFIX,
    TEMPORARY_SUFFIX,
    PrefixRecord,
    remove_abandoned,
    write_record,
)
from mlx_edge.errors import InvalidRequestError

logger = logging.getLogger(__name__)

_NAME = re.compile(rf"[0-9a-f]{{32}}{re.escape(SUFFIX)}")
_TEMPORARY_NAME = re.compile(rf"[0-9a-f]{{32}}\.[0-9a-f]{{8}}{re.escape(TEMPORARY_SUFFIX)}")


def is_own_name(name: str) -> bool:
    """Whether a finished file has a name of ours."""
    return _NAME.fullmatch(name) is not None


@dataclass(frozen=True)
class WriteJob:
    """A record to be written under this name, as one that was last used at `used_s`."""

    name: str
    record: PrefixRecord
    used_s: float


class PrefixWriter:
    """Writes records into a folder, one after another."""

    def __init__(self, folder: Path, limit_bytes: int, queue_bytes: int) -> None:
        """Makes the folder if need be, and removes from it what dead writers left and what is beyond the limit.

        Raises: InvalidRequestError for a folder that cannot be used.
        """
        self.folder = folder
        self.limit_bytes = limit_bytes
        self.writes = self.skipped = 0
        self.off: str | None = None  # why nothing is written any more
        self._queue = _Queue(queue_bytes)
        self._thread: threading.Thread | None = None
        try:
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            for path in folder.iterdir():
                if _TEMPORARY_NAME.fullmatch(path.name):
                    remove_abandoned(path)
            self._make_room(0)
        except OSError as error:
            raise InvalidRequestError(
                f"{folder}: cannot keep prefixes there ({error.strerror}); choose another folder"
            ) from error

    @property
    def pending_bytes(self) -> int:
        """Bytes that wait to be written."""
        return self._queue.nbytes

    @property
    def file_bytes(self) -> int:
        """Bytes of all files of ours, whatever their model."""
        with suppress(OSError):
            return sum(size for _, size, _ in self._list_files())
        return 0

    def is_pending(self, name: str) -> bool:
        """Whether a file is about to be written."""
        return self._queue.has(name)

    def has_room(self, num_bytes: int, wait_s: float) -> bool:
        """Whether a record of about this size would be written, as far as one knows: now, or within `wait_s`."""
        if self.off is None and num_bytes <= self.limit_bytes:
            return self._queue.wait_for(num_bytes, wait_s)
        return False

    def put(self, job: WriteJob) -> None:
        """Have a record written; there must be room for it."""
        if self._thread is None:
            self._thread = threading.Thread(target=self._run, name="prefix-writer", daemon=True)
            self._thread.start()
        self._queue.put(job)

    def close(self, timeout_s: float | None) -> None:
        """Write what waits, for at most so long, and end the thread."""
        if self._thread is not None:
            self._queue.put(None)
            self._thread.join(timeout_s)
            self._thread = None

    def switch_off(self, error: OSError) -> None:
        """Leave the disk alone, with a warning."""
        if self.off is None:
            self.off = f"{self.folder}: {error.strerror or error}"
            logger.warning(
                "%s; prefixes are not kept on disk any more: free space or check the folder, and start again",
                self.off,
            )

    def _run(self) -> None:
        while (job := self._queue.wait()) is not None:
            try:
                if self.off is None:
                    self._write(job)
            except OSError as error:
                self.switch_off(error)
            finally:
                self._queue.done()
        self._queue.done()

    def _write(self, job: WriteJob) -> None:
        if not self._make_room(job.record.num_bytes):
            self.skipped += 1
            return
        write_record(self.folder / job.name, job.record, job.used_s)
        self.writes += 1

    def _make_room(self, num_bytes: int) -> bool:
        """Remove what was used longest ago until `num_bytes` more are within the limit; False when they never are."""
        if num_bytes > self.limit_bytes:
            return False
        files = sorted(self._list_files())
        total = sum(size for _, size, _ in files)
        for _, size, path in files:
            if total + num_bytes <= self.limit_bytes:
                break
            if is_own_name(path.name):
                path.unlink(missing_ok=True)
                total -= size
        return total + num_bytes <= self.limit_bytes

    def _list_files(self) -> list[tuple[float, int, Path]]:
        """Time of use in s, bytes and path of every file of ours, those being written too."""
        found = []
        with os.scandir(self.folder) as entries:
            for entry in entries:
                if is_own_name(entry.name) or _TEMPORARY_NAME.fullmatch(entry.name):
                    with suppress(FileNotFoundError):
                        info = entry.stat(follow_symlinks=False)
                        found.append((info.st_mtime, info.st_size, Path(entry.path)))
        return found


class _Queue:
    """What waits to be written, bounded by bytes; a single record always fits."""

    def __init__(self, limit_bytes: int) -> None:
        self._limit_bytes = limit_bytes
        self._jobs: deque[WriteJob | None] = deque()
        self._changed = threading.Condition()

    @property
    def nbytes(self) -> int:
        """Bytes of all that is not written yet."""
        with self._changed:
            return self._sum()

    def has(self, name: str) -> bool:
        """Whether a record waits."""
        with self._changed:
            return any(job.name == name for job in self._jobs if job)

    def wait_for(self, num_bytes: int, timeout_s: float) -> bool:
        """Whether there is room, or will be within the time."""
        with self._changed:
            return self._changed.wait_for(
                lambda: not self._jobs or self._sum() + num_bytes <= self._limit_bytes, timeout_s
            )

    def put(self, job: WriteJob | None) -> None:
        """Append; None asks the thread to end."""
        with self._changed:
            self._jobs.append(job)
            self._changed.notify_all()

    def wait(self) -> WriteJob | None:
        """The first, when there is one; it counts until `done`."""
        with self._changed:
            self._changed.wait_for(lambda: self._jobs)
            return self._jobs[0]

    def done(self) -> None:
        """The first is written."""
        with self._changed:
            self._jobs.popleft()
            self._changed.notify_all()

    def _sum(self) -> int:
        return sum(job.record.num_bytes for job in self._jobs if job)
