"""What loading did: bytes shared with the file, bytes copied, and where the time went.

Only counts and says; measures nothing itself. "Shared" is what MLX confirmed, never what was hoped
for.
"""

from collections.abc import Iterable
from dataclasses import dataclass

_UNITS = ((10**9, "GB"), (10**6, "MB"), (10**3, "kB"))


@dataclass(frozen=True)
class PackReport:
    """The account of weights that were repacked for this processor.

    `place` is the cache file or "memory"; `how` is "built" (packed now, and kept in the file), "reused" (the file was
    there) or "packed" (now, in memory only); `pack_s` is the time that took, in seconds.
    """

    num_bytes: int
    place: str
    how: str
    pack_s: float

    def summary(self) -> str:
        """The packed weights in a few words."""
        return (
            f"{format_bytes(self.num_bytes)} {self.how} in {self.place}, {self.pack_s * 1e3:.1f} ms"
        )


@dataclass(frozen=True)
class LoadReport:
    """The account of one file or checkpoint at one moment. Sizes in bytes, times in seconds.

    `num_tensors` and `total_bytes` describe what is in the files. `shared_bytes` counts each tensor
    that is a view of the mapped file once; `copied_bytes` counts every copy that `read` made, so
    that reading twice shows. `map_s` is opening and mapping, `parse_s` checking headers,
    `materialise_s` making arrays: for copies it contains the reading, for shared tensors it does
    not (their pages come in at first use). `convert_s` is left to the model loader, which may
    turn the arrays into another type. `reasons` says why bytes were copied. `packed` is left to the
    model loader, too: the weights that it had repacked, in memory beside those counted here.
    """

    num_tensors: int = 0
    total_bytes: int = 0
    shared_bytes: int = 0
    copied_bytes: int = 0
    map_s: float = 0.0
    parse_s: float = 0.0
    materialise_s: float = 0.0
    convert_s: float = 0.0
    reasons: tuple[str, ...] = ()
    packed: PackReport | None = None

    @classmethod
    def combine(cls, reports: Iterable["LoadReport"]) -> "LoadReport":
        """Returns the sum of several reports, the reasons without doubles."""
        parts = list(reports)
        return cls(
            num_tensors=sum(part.num_tensors for part in parts),
            total_bytes=sum(part.total_bytes for part in parts),
            shared_bytes=sum(part.shared_bytes for part in parts),
            copied_bytes=sum(part.copied_bytes for part in parts),
            map_s=sum(part.map_s for part in parts),
            parse_s=sum(part.parse_s for part in parts),
            materialise_s=sum(part.materialise_s for part in parts),
            convert_s=sum(part.convert_s for part in parts),
            reasons=tuple(dict.fromkeys(reason for part in parts for reason in part.reasons)),
            packed=next((part.packed for part in parts if part.packed), None),
        )

    def summary(self) -> str:
        """One honest line for a log or a terminal."""
        why = f" ({'; '.join(self.reasons)})" if self.reasons else ""
        convert = f", convert {self.convert_s * 1e3:.1f} ms" if self.convert_s else ""
        work = "view" if self.shared_bytes and not self.copied_bytes else "copy"
        later = "; shared pages are read from disk at first use" if self.shared_bytes else ""
        packed = f"; repacked: {self.packed.summary()}" if self.packed else ""
        return (
            f"{self.num_tensors} tensors, {format_bytes(self.total_bytes)}: "
            f"{format_bytes(self.shared_bytes)} shared with the file, "
            f"{format_bytes(self.copied_bytes)} copied{why}; "
            f"map {self.map_s * 1e3:.1f} ms, parse {self.parse_s * 1e3:.1f} ms, "
            f"{work} {self.materialise_s * 1e3:.1f} ms{convert}{later}{packed}"
        )

    def __str__(self) -> str:
        return self.summary()


def format_bytes(num_bytes: int) -> str:
    """Returns a size in decimal units with one digit: "10.5 MB", "0 B"."""
    for unit_bytes, unit in _UNITS:
        if num_bytes >= unit_bytes:
            return f"{num_bytes / unit_bytes:.1f} {unit}"
    return f"{num_bytes} B"
