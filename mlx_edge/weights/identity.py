"""Which file it was that was opened, and whether its name still leads to it, unchanged.

A mapping shows a file as it is, not as it was. Asking costs one system call and no byte is read, so that a server can
do it at every request. It finds a file that was replaced, shortened, lengthened or written to; it cannot find what
happens while a step runs: the process that touches a page which is no longer there ends by SIGBUS.
"""

import hashlib
import os
from dataclasses import dataclass
from mmap import mmap
from pathlib import Path

from mlx_edge.weights.header import fail

_NUM_SAMPLES = 32
_SAMPLE_BYTES = 4096


@dataclass(frozen=True)
class FileIdentity:
    """A regular file at one moment: size in bytes, time of its last change in ns, device and inode."""

    num_bytes: int
    changed_ns: int
    device: int
    inode: int

    @classmethod
    def of(cls, info: os.stat_result) -> "FileIdentity":
        """Returns the identity in what `stat` or `fstat` said."""
        return cls(info.st_size, info.st_mtime_ns, info.st_dev, info.st_ino)

    def check_unchanged(self, path: Path) -> None:
        """Raises ModelFormatError unless `path` still is this file as it was."""
        try:
            now = FileIdentity.of(path.stat())
        except OSError as error:
            found = f"that the file is gone since it was opened ({error.strerror})"
        else:
            if now == self:
                return
            found = f"another file than was opened: {now._differences(self)}"
        fail(str(path), found, "the weights to stay as they are while in use", "load them again")

    def _differences(self, opened: "FileIdentity") -> str:
        words = []
        if self.num_bytes != opened.num_bytes:
            words.append(f"{self.num_bytes} bytes, before {opened.num_bytes}")
        if self.changed_ns != opened.changed_ns:
            words.append("written to since")
        if (self.device, self.inode) != (opened.device, opened.inode):
            words.append("put in its place")
        return ", ".join(words)


def fingerprint_file(identity: FileIdentity, mapping: mmap, *, header_bytes: int) -> bytes:
    """Returns 16 bytes that differ where two weight files do, without reading the files.

    They cover size, time of change, the first `header_bytes` and 32 samples of 4 KiB spread over the rest. Two
    files of one size, time and header that differ only between the samples are taken for the same: an edit in place
    by a program that also sets the time back.
    """
    digest = hashlib.blake2b(digest_size=16)
    digest.update(b"%d %d %d " % (identity.num_bytes, identity.changed_ns, header_bytes))
    digest.update(mapping[:header_bytes])
    room = max(0, identity.num_bytes - header_bytes - _SAMPLE_BYTES)
    for index in range(_NUM_SAMPLES):
        begin = header_bytes + room * index // (_NUM_SAMPLES - 1)
        digest.update(mapping[begin : begin + _SAMPLE_BYTES])
    return digest.digest()
