"""The disk tier of the prefix cache: entries in a folder, found again after a restart.

A file is named by a hash of the model, the options of its caches and the tokens. Whatever the disk does, a lookup goes
on without it: a broken file is removed with a warning, and where a write is refused the tier is switched off, with one
warning. Caches are read out and made in the engine's thread; `prefix_writer.py` has a thread of its own, which sees
plain bytes. Prompts are private: the folder is made with mode 0700, files with 0600.
"""

import hashlib
import json
import logging
import os
import time
from collections.abc import Hashable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mlx_edge.cache import AnyKVCache, CacheFacts
from mlx_edge.engine.prefix.file import (
    SUFFIX,
    BrokenPrefixError,
    OtherVersionError,
    PrefixRecord,
    read_head,
    read_planes,
)
from mlx_edge.engine.prefix.index import TOKEN_BYTES, PrefixIndex
from mlx_edge.engine.prefix.writer import PrefixWriter, WriteJob, is_own_name
from mlx_edge.errors import InvalidRequestError, MLXEdgeError
from mlx_edge.models.decoder import Decoder, describe_kernels
from mlx_edge.models.prompt_cache import (
    fingerprint_model,
    name_planes,
    restore_caches,
)
from mlx_edge.runtime import own_version
from mlx_edge.weights.writer import describe_tensor, view_bytes

logger = logging.getLogger(__name__)

QUEUE_BYTES = 256 << 20  # that may wait to be written
SETTLED_NS = 10**9  # a folder changed since then may have changed again within a tick of its clock


@dataclass(frozen=True)
class Place:
    """Where an entry is, or would be."""

    name: str  # of its file
    owner: str  # hash of the model and of the options of its caches
    tokens: bytes


@dataclass(frozen=True)
class Stored:
    """An entry on the disk."""

    place: Place
    is_windowed: bool  # its caches have dropped the past, and cannot go back far

    @property
    def num_tokens(self) -> int:
        """How many it holds."""
        return len(self.place.tokens) // TOKEN_BYTES


@dataclass(frozen=True)
class DiskStats:
    """What there is, and what was done since the start."""

    entries: int  # of this model
    nbytes: int  # of all models' files
    hits: int
    writes: int
    skipped: int  # not written: the queue was full, or the entry larger than the limit
    failures: int  # files that were broken or could not be read
    off: str | None  # why the tier does nothing any more


class PrefixDisk:
    """Entries in a folder; to be used by one thread, the one that runs the model."""

    def __init__(
        self,
        folder: str | Path,
        limit_bytes: int,
        model: Decoder,
        *,
        queue_bytes: int = QUEUE_BYTES,
    ) -> None:
        """Finds what is there already: of each file its head and tokens are read.

        Raises: InvalidRequestError for a folder that cannot be used, or a model whose caches cannot be saved.
        """
        if not isinstance(model, Decoder):
            raise InvalidRequestError(
                f"caches of a {type(model).__name__} cannot be saved to disk; leave out the prefix cache's folder"
            )
        self.folder = Path(folder)
        self._model = model
        self._identity = _identify(model)
        self._indices: dict[str, PrefixIndex[Stored]] = {}  # by owner
        self._files: dict[str, Stored | None] = {}  # by name; None for one that is of no use here
        self._seen_ns: int | None = None
        self._hits = self._skipped = self._failures = 0
        self._writer = PrefixWriter(self.folder, limit_bytes, queue_bytes)
        self._refresh()

    @property
    def pending_bytes(self) -> int:
        """Bytes of memory that wait to be written."""
        return self._writer.pending_bytes

    @property
    def stats(self) -> DiskStats:
        """A snapshot; lists the folder."""
        self._refresh()
        return DiskStats(
            sum(map(len, self._indices.values())),
            self._writer.file_bytes,
            self._hits,
            self._writer.writes,
            self._skipped + self._writer.skipped,
            self._failures,
            self._writer.off,
        )

    def place(self, tokens: bytes, kind: Hashable) -> Place:
        """Where an entry belongs. `kind` must have a repr that is alike in every process."""
        owner = self._owner(kind)
        digest = hashlib.blake2b(owner.encode() + tokens, digest_size=16)
        return Place(digest.hexdigest() + SUFFIX, owner, tokens)

    def holds(self, place: Place) -> bool:
        """Whether an entry is on the disk, or about to be."""
        self._refresh()
        return self._files.get(place.name) is not None or self._writer.is_pending(place.name)

    def find(self, tokens: bytes, kind: Hashable) -> Iterator[tuple[int, Stored]]:
        """Entries, and how many first tokens they share with `tokens`; those that share most come first."""
        self._refresh()
        index = self._indices.get(self._owner(kind))
        if self._writer.off is not None or index is None:
            return
        for common, alike in index.matches(tokens):
            for stored in alike:
                yield common, stored

    def load(self, stored: Stored) -> list[AnyKVCache] | None:
        """The evaluated caches of an entry, or None when its file is gone, broken or not to be read.

        Reads, checks and unpacks the whole file in this thread: the sequences that run wait for it, a few milliseconds
        for a small model, up to a second for a long prompt of a model with a billion parameters.
        """
        place = stored.place
        try:
            head, planes = read_planes(self.folder / place.name)
            if (head.owner, head.tokens) != (place.owner, place.tokens):
                raise BrokenPrefixError("it is another entry than its name says")
            layers = [CacheFacts.from_json(facts) for facts in head.facts]
            caches = restore_caches(planes, layers, self._model, (stored.num_tokens,))
        except OtherVersionError:
            self._forget(place.name)
        except (BrokenPrefixError, MLXEdgeError) as error:
            self._discard(place.name, str(error))
        except OSError as error:
            self._ignore(place.name, error)
        else:
            self._hits += 1
            self.touch(place, time.time())
            return caches
        return None

    def touch(self, place: Place, used_s: float) -> None:
        """An entry was used at this time."""
        with suppress(OSError):  # removed by another process
            os.utime(self.folder / place.name, (used_s, used_s))

    def save(
        self, place: Place, caches: Sequence[AnyKVCache], used_s: float, *, wait_s: float = 0
    ) -> bool:
        """Read the caches out and have them written; waits for steps in flight.

        False when there is no room for that, also not within `wait_s`, or the tier is switched off.
        """
        if not self.has_room(caches, wait_s):
            self._skipped += 1
            return False
        for _ in self.save_by_layers(place, caches, used_s):
            pass
        return True

    def has_room(self, caches: Sequence[AnyKVCache], wait_s: float = 0) -> bool:
        """Whether caches would be written, now or within `wait_s`."""
        return self._writer.has_room(sum(cache.stored_bytes for cache in caches), wait_s)

    def save_by_layers(
        self, place: Place, caches: Sequence[AnyKVCache], used_s: float
    ) -> Iterator[None]:
        """As `save` with room, a layer at a time: between two, others may have the thread."""
        facts: list[dict[str, Any]] = []
        planes: list[tuple[str, str, tuple[int, ...]]] = []
        data: list[bytes] = []
        for layer, cache in enumerate(caches):
            state = cache.state()
            facts.append(state.facts.to_json())
            for name, array in name_planes([state], layer).items():
                plan = describe_tensor(name, array.dtype, array.shape)
                planes.append((plan.name, plan.dtype, plan.shape))
                data.append(bytes(view_bytes(array)))  # no array leaves this thread
            yield
        record = PrefixRecord(place.owner, self._identity, place.tokens, facts, planes, data)
        self._writer.put(WriteJob(place.name, record, used_s))

    def close(self, timeout_s: float | None = None) -> None:
        """Write what waits, for at most `timeout_s`."""
        self._writer.close(timeout_s)

    def _owner(self, kind: Hashable) -> str:
        text = repr(kind)
        assert " at 0x" not in text, "a kind is told by its repr, in every process alike"
        return hashlib.blake2b(f"{self._identity} {text}".encode(), digest_size=16).hexdigest()

    def _refresh(self) -> None:
        """Learn of files that came or went, by whatever process."""
        if self._writer.off is not None:
            return
        try:
            changed_ns = self.folder.stat().st_mtime_ns
            if changed_ns == self._seen_ns:
                return
            names = {path.name for path in self.folder.iterdir() if is_own_name(path.name)}
        except OSError as error:
            self._writer.switch_off(error)
            return
        for name in self._files.keys() - names:
            self._forget(name)
        for name in names - self._files.keys():
            self._learn(name)
        is_settled = time.time_ns() - changed_ns > SETTLED_NS
        self._seen_ns = changed_ns if is_settled else None

    def _learn(self, name: str) -> None:
        self._files[name] = None
        try:
            head = read_head(self.folder / name)
            if head.model != self._identity:
                return
            is_windowed = any(facts["window"] is not None for facts in head.facts)
        except OtherVersionError:
            return
        except OSError as error:
            self._ignore(name, error)
        except BrokenPrefixError as error:
            self._discard(name, str(error))
        except (TypeError, LookupError):
            self._discard(name, "its table tells of no layers")
        else:
            stored = Stored(Place(name, head.owner, head.tokens), is_windowed)
            self._files[name] = stored
            self._indices.setdefault(head.owner, PrefixIndex()).add(head.tokens, stored)

    def _forget(self, name: str) -> None:
        stored = self._files.pop(name, None)
        if stored is not None:
            index = self._indices[stored.place.owner]
            if index.get(stored.place.tokens) is stored:
                index.remove(stored.place.tokens)

    def _ignore(self, name: str, error: OSError) -> None:
        """A file that cannot be read stays where it is, and is not asked for again; one that is gone is no news."""
        self._forget(name)
        if not isinstance(error, FileNotFoundError):
            self._files[name] = None
            self._failures += 1
            logger.warning("%s: ignored, reading it fails: %s", self.folder / name, error.strerror)

    def _discard(self, name: str, found: str) -> None:
        self._forget(name)
        self._failures += 1
        logger.warning("%s: %s; the prefix is lost, the file removed", self.folder / name, found)
        with suppress(OSError):
            (self.folder / name).unlink(missing_ok=True)


def _identify(model: Decoder) -> str:
    """A hash of all that the numbers in a cache depend on, but its options and the tokens."""
    told = [fingerprint_model(model), describe_kernels(model), own_version()]
    return hashlib.blake2b(json.dumps(told).encode(), digest_size=16).hexdigest()
