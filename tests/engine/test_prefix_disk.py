"""The disk tier: found again after a restart, bounded, private; no broken file, full disk or dead writer does harm."""

import errno
import fcntl
import hashlib
import json
import logging
import os
import random
import stat
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from mlx_edge import ops
from mlx_edge.cache import AnyKVCache, QuantizedRows
from mlx_edge.engine.prefix import file as prefix_file
from mlx_edge.engine.prefix import writer as prefix_writer
from mlx_edge.engine.prefix.cache import MIN_SAVED_TOKENS, PrefixCache
from mlx_edge.engine.prefix.disk import PrefixDisk
from mlx_edge.engine.prefix.index import pack_tokens
from mlx_edge.errors import InvalidRequestError
from mlx_edge.models.decoder import Decoder
from mlx_edge.models.load import load
from mlx_edge.weights.hub import find_model

LIMIT = 1 << 28
Tokens = list[int]


@pytest.fixture(scope="module")
def model() -> Decoder:
    return load()[0]


def prompt_of(length: int = 150, seed: int = 0) -> Tokens:
    return np.random.default_rng(seed).integers(1, 2000, length).tolist()


def process(model: Decoder, tokens: Tokens, caches: list[Any]) -> np.ndarray:
    """The logits (V,) behind the last token."""
    logits = model(mx.array([tokens]), caches, logits_to_keep=1)[0, -1].astype(mx.float32)
    mx.eval(logits, [array for cache in caches for array in cache.arrays])
    return np.array(logits)


def caches_of(model: Decoder, tokens: Tokens, **options: Any) -> list[AnyKVCache]:
    caches = model.make_cache(**options)
    process(model, tokens, caches)
    return caches


def keep(model: Decoder, folder: Path, *prompts: Tokens, kind: str = "k", **options: Any) -> None:
    """What one process leaves behind."""
    cache: PrefixCache[Any] = PrefixCache(LIMIT, PrefixDisk(folder, LIMIT, model))
    for prompt in prompts:
        cache.store(prompt, caches_of(model, prompt, **options), kind)
    cache.close()


def reopen(model: Decoder, folder: Path, limit_bytes: int = LIMIT) -> PrefixCache[Any]:
    return PrefixCache(LIMIT, PrefixDisk(folder, limit_bytes, model))


def files(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def warnings_in(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]


KINDS: dict[str, dict[str, Any]] = {
    "plain": {},
    "window": {"max_kv_size": 100},
    "8 bit": {"row_format": QuantizedRows(8, 32)},
    "4 bit window": {"row_format": QuantizedRows(4, 32), "max_kv_size": 100},
    "8 bit later": {"row_format": QuantizedRows(8, 32), "float_until": 200},
}


@pytest.mark.parametrize("backend", ["fast", "reference"])
@pytest.mark.parametrize("kind", KINDS)
def test_after_a_restart_it_goes_on_bit_for_bit(tmp_path: Path, kind: str, backend: str) -> None:
    with ops.reference() if backend == "reference" else contextmanager(lambda: iter([0]))():
        model = load()[0]
        prompt, more = prompt_of(), [3, 1, 4, 1, 5]
        keep(model, tmp_path, prompt, kind=kind, **KINDS[kind])
        cache = reopen(model, tmp_path)
        found = cache.lookup(prompt + more, kind)
        assert found.num_tokens == len(prompt), found.miss
        assert found.caches is not None
        wanted = process(model, more, caches_of(model, prompt, **KINDS[kind]))
        assert np.array_equal(process(model, more, found.caches), wanted)
        assert cache.stats.disk is not None
        assert (cache.stats.disk.hits, cache.stats.entries) == (1, 1)
        cache.lookup(prompt + more, kind)  # now from memory
        assert cache.stats.disk.hits == 1
        cache.close()


def test_a_part_of_a_longer_entry_and_the_longest_of_several(
    model: Decoder, tmp_path: Path
) -> None:
    long = prompt_of(300)
    keep(model, tmp_path, long, [*long[:140], *prompt_of(60, 1)], prompt_of(130, 2))
    found = reopen(model, tmp_path).lookup([*long[:250], 9, 9], "k")
    assert (found.num_tokens, found.miss) == (250, "the nearest entry differs after 250 tokens")
    assert found.caches is not None
    mine = process(model, [9, 9], found.caches)
    assert np.array_equal(mine, process(model, [9, 9], caches_of(model, long[:250])))


def test_a_window_that_moved_on_is_not_read(model: Decoder, tmp_path: Path) -> None:
    prompt = prompt_of(300)
    keep(model, tmp_path, prompt, max_kv_size=100)
    cache = reopen(model, tmp_path)
    found = cache.lookup([*prompt[:200], 9], "k")
    assert found.miss == "200 tokens are stored, but on disk, with a window that has moved on"
    assert cache.stats.disk is not None
    assert cache.stats.disk.hits == 0


def test_only_its_owner_may_read(model: Decoder, tmp_path: Path) -> None:
    folder = tmp_path / "a" / "b"
    keep(model, folder, prompt_of())
    (path,) = folder.iterdir()
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    assert stat.S_IMODE(path.stat().st_mode) == 0o600


def test_other_models_options_and_versions_are_left_alone(
    model: Decoder, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    prompt = prompt_of()
    with ops.reference():  # computes other numbers with the same weights
        keep(load()[0], tmp_path, prompt)
    keep(load(str(find_model("pocket").parent / "pocket_draft"))[0], tmp_path, prompt)
    keep(model, tmp_path, prompt, kind="other options")
    newer = tmp_path / ("ab" * 16 + ".prefix")
    newer.write_bytes(b"MLXEPREF" + (99).to_bytes(4, "little") + bytes(100))
    before = files(tmp_path)
    cache = reopen(model, tmp_path)
    assert cache.lookup(prompt, "k").caches is None
    assert files(tmp_path) == before
    assert not warnings_in(caplog)
    assert cache.stats.disk is not None
    assert cache.stats.disk.entries == 1
    assert cache.stats.disk.nbytes == sum(path.stat().st_size for path in tmp_path.iterdir())


def test_short_entries_are_not_written(model: Decoder, tmp_path: Path) -> None:
    keep(model, tmp_path, prompt_of(MIN_SAVED_TOKENS - 1), prompt_of(MIN_SAVED_TOKENS, 1))
    assert len(files(tmp_path)) == 1


def test_the_limit_holds_and_the_least_recently_used_goes(model: Decoder, tmp_path: Path) -> None:
    prompts = [prompt_of(seed=seed) for seed in range(4)]
    keep(model, tmp_path, *prompts[:3])
    size = max(path.stat().st_size for path in tmp_path.iterdir())
    disk = PrefixDisk(tmp_path, LIMIT, model)
    places = [disk.place(pack_tokens(prompt), "k") for prompt in prompts]
    for age, place in zip((30, 20, 10), places, strict=False):
        disk.touch(place, time.time() - age)
    (tmp_path / "mine.txt").write_text("not of ours" * 1000)
    cache = reopen(model, tmp_path, 3 * size + size // 2)
    assert cache.lookup(prompts[0], "k").caches is not None  # a use
    cache.store(prompts[3], caches_of(model, prompts[3]), "k")
    cache.close()
    left = [(tmp_path / place.name).exists() for place in places]
    assert left == [True, False, True, True]
    assert (tmp_path / "mine.txt").exists()
    reopen(model, tmp_path, 2 * size)  # a lower limit holds at once
    assert sum((tmp_path / place.name).exists() for place in places) == 2
    cache = reopen(model, tmp_path, size // 2)
    cache.store(prompts[3], caches_of(model, prompts[3]), "k")
    cache.close()
    assert files(tmp_path) == ["mine.txt"]
    assert cache.stats.disk is not None
    assert cache.stats.disk.skipped == 1


def test_what_leaves_memory_goes_to_the_disk_and_comes_back(model: Decoder, tmp_path: Path) -> None:
    prompts = [prompt_of(seed=seed) for seed in range(3)]
    one = caches_of(model, prompts[0])
    limit = 4 * len(prompts[0]) + sum(cache.nbytes for cache in one)
    cache: PrefixCache[Any] = PrefixCache(limit, PrefixDisk(tmp_path, LIMIT, model))
    for prompt in prompts:
        cache.store(prompt, caches_of(model, prompt), "k")
    assert cache.stats.evictions == 2
    wait_until(lambda: len(list(tmp_path.glob("*.prefix"))) == 2)
    found = cache.lookup([*prompts[0], 5], "k")
    assert found.num_tokens == len(prompts[0])
    assert cache.evict(1) > 0
    assert cache.lookup([*prompts[1], 5], "k").num_tokens == len(prompts[1])
    cache.close()


def save_all(cache: PrefixCache[Any]) -> int:
    """Use idle time until nothing is left to do; returns how often."""
    return sum(1 for _ in iter(cache.save_some, False))


def test_idle_time_saves_layer_by_layer(model: Decoder, tmp_path: Path) -> None:
    cache = reopen(model, tmp_path)
    prompts = [prompt_of(seed=seed) for seed in range(3)]
    for prompt in prompts:
        cache.store(prompt, caches_of(model, prompt), "k")
    assert [cache.save_some() for _ in range(3)] == [True] * 3
    assert cache.evict(1) > 0  # the one that was being read out
    assert save_all(cache) == 2 * (len(model.layers) + 1)
    assert not cache.save_some()
    cache.close()
    assert cache.stats.disk is not None
    assert cache.stats.disk.writes == 2
    found = reopen(model, tmp_path).lookup([*prompts[2], 1], "k")
    assert found.caches is not None
    assert planes_of(found.caches) == planes_of(caches_of(model, prompts[2]))


def test_files_are_as_old_as_their_last_use_in_memory(model: Decoder, tmp_path: Path) -> None:
    disk = PrefixDisk(tmp_path, LIMIT, model)
    cache: PrefixCache[Any] = PrefixCache(LIMIT, disk)
    first, second = prompt_of(seed=0), prompt_of(seed=1)
    for prompt in (first, second):
        cache.store(prompt, caches_of(model, prompt), "k")
    save_all(cache)
    cache.lookup(first, "k")
    cache.close()
    paths = [tmp_path / disk.place(pack_tokens(prompt), "k").name for prompt in (first, second)]
    assert paths[0].stat().st_mtime > paths[1].stat().st_mtime


def wait_until(is_true: Any, timeout_s: float = 20) -> None:
    deadline = time.monotonic() + timeout_s
    while not is_true():
        assert time.monotonic() < deadline, "it never came true"
        time.sleep(0.01)


def test_two_processes_share_a_folder(model: Decoder, tmp_path: Path) -> None:
    first, second = reopen(model, tmp_path), reopen(model, tmp_path)
    prompt = prompt_of()
    assert second.lookup(prompt, "k").caches is None
    first.store(prompt, caches_of(model, prompt), "k")
    first.close()
    assert second.lookup(prompt, "k").num_tokens == len(prompt) - 1
    second.evict(LIMIT)
    (path,) = tmp_path.iterdir()
    path.unlink()
    found = second.lookup(prompt, "k")
    assert found.caches is None
    assert found.miss == "128 tokens or more were computed before, but were evicted"


def test_a_change_within_a_tick_of_the_clock_is_noticed(
    model: Decoder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("mlx_edge.engine.prefix.disk.SETTLED_NS", 10**18)  # however slow this is
    cache = reopen(model, tmp_path)
    before = tmp_path.stat()
    keep(model, tmp_path, prompt_of())
    os.utime(tmp_path, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert cache.lookup(prompt_of(), "k").num_tokens == len(prompt_of()) - 1


def test_what_dead_writers_left_is_removed_and_nothing_else(model: Decoder, tmp_path: Path) -> None:
    stem = "0123456789abcdef" * 2
    dead, living = (tmp_path / f"{stem}.{end}.prefix.part" for end in ("00000000", "11111111"))
    others = [f"{stem}.part", f"{stem}.prefix.bak", f"{stem.upper()}.prefix", ".x.tmp"]
    for path in (dead, living, *(tmp_path / name for name in others)):
        path.write_bytes(b"half")
    (tmp_path / f"{stem}.prefix").mkdir()
    with living.open("rb") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        PrefixDisk(tmp_path, LIMIT, model)
        assert files(tmp_path) == sorted([living.name, f"{stem}.prefix", *others])


@pytest.mark.parametrize("what", ["a file", "a bridged model"])
def test_what_cannot_work_is_refused_at_once(model: Decoder, tmp_path: Path, what: str) -> None:
    folder: Path = tmp_path
    served: Any = model
    if what == "a file":
        (folder := tmp_path / "file").write_text("")
    else:
        served = object()
    with pytest.raises(InvalidRequestError, match="cannot"):
        PrefixDisk(folder, LIMIT, served)


# Disks that refuse.


def refuse(*_: Any, **__: Any) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@pytest.mark.parametrize("call", ["os.fsync", "Path.replace", "os.open"])
def test_a_full_disk_switches_the_tier_off(
    model: Decoder,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    call: str,
) -> None:
    cache = reopen(model, tmp_path)
    monkeypatch.setattr(f"mlx_edge.engine.prefix.file.{call}", refuse)
    check_that_it_goes_off(model, cache, tmp_path, caplog)


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 1 MiB: room for one entry of pocket's, not for two."""
    command = ["mount", "-t", "tmpfs", "-o", "size=1m", "none", str(tmp_path)]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    except FileNotFoundError:
        pytest.skip("this machine has no mount command")
    if done.returncode:
        pytest.skip(f"this user may not mount a small file system: {done.stderr.strip()}")
    yield tmp_path
    subprocess.run(["umount", str(tmp_path)], check=True)


def test_a_disk_that_is_really_full_switches_the_tier_off(
    model: Decoder, small_disk: Path, caplog: pytest.LogCaptureFixture
) -> None:
    keep(model, small_disk, prompt_of(400, 9))
    (before,) = files(small_disk)
    cache = reopen(model, small_disk)
    check_that_it_goes_off(model, cache, small_disk, caplog, left=[before])


def check_that_it_goes_off(
    model: Decoder,
    cache: PrefixCache[Any],
    folder: Path,
    caplog: pytest.LogCaptureFixture,
    left: list[str] | None = None,
) -> None:
    prompts = [prompt_of(400, seed) for seed in range(3)]
    for prompt in prompts:
        cache.store(prompt, caches_of(model, prompt), "k")
        save_all(cache)
    cache.close()
    disk = cache.stats.disk
    assert disk is not None
    assert "No space left" in str(disk.off)
    assert files(folder) == (left or [])
    (line,) = warnings_in(caplog)
    assert str(folder) in line
    assert "No space left" in line
    assert "\n" not in line
    for prompt in prompts:  # memory goes on
        assert cache.lookup(prompt, "k").num_tokens == len(prompt) - 1
    assert cache.lookup(prompt_of(400, 9), "k").caches is None


def test_a_folder_that_vanishes_switches_the_tier_off(
    model: Decoder, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    cache = reopen(model, tmp_path / "gone")
    (tmp_path / "gone").rmdir()
    assert cache.lookup(prompt_of(), "k").caches is None
    assert len(warnings_in(caplog)) == 1


def test_a_full_queue_skips_and_counts(
    model: Decoder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    may_write = threading.Event()

    def slowly(*arguments: Any) -> None:
        assert may_write.wait(60)
        prefix_file.write_record(*arguments)

    monkeypatch.setattr(prefix_writer, "write_record", slowly)
    disk = PrefixDisk(tmp_path, LIMIT, model, queue_bytes=1000)
    cache: PrefixCache[Any] = PrefixCache(LIMIT, disk)
    for seed in range(5):  # room for three: the first two give way
        cache.store(prompt_of(seed=seed), caches_of(model, prompt_of(seed=seed)), "k")
        if seed == 0:
            cache.limit_bytes = 3 * cache.nbytes
            assert save_all(cache) == len(model.layers) + 1
    assert cache.stats.evictions == 2
    assert not cache.save_some()
    assert cache.nbytes == cache.limit_bytes + disk.pending_bytes > cache.limit_bytes
    may_write.set()
    cache.close()  # waits for room
    assert len(files(tmp_path)) == 4
    assert disk.stats.skipped == 1
    assert disk.pending_bytes == 0


# Broken files.


@pytest.fixture(scope="module")
def sound(model: Decoder, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A file that is right."""
    folder = tmp_path_factory.mktemp("sound")
    keep(model, folder, prompt_of(130))
    (path,) = folder.iterdir()
    return path


def planes_of(caches: list[AnyKVCache]) -> list[bytes]:
    states = [cache.state() for cache in caches]
    return [
        np.array(plane).tobytes() for s in states for _, _, planes in s.planes() for plane in planes
    ]


def put_broken(disk: PrefixDisk, name: str, data: bytes) -> None:
    """Put a file there as another process would."""
    (disk.folder / "new").write_bytes(data)
    (disk.folder / "new").rename(disk.folder / name)


def damage(data: bytes, rng: random.Random) -> bytes:
    kind = rng.randrange(5)
    if kind == 0:
        return rng.randbytes(rng.randrange(2000))
    if kind == 1:
        return data[: rng.randrange(len(data))]
    if kind == 2:
        return data + rng.randbytes(rng.randrange(1, 100))
    where = rng.randrange(len(data) if kind == 3 else 3000)  # mostly data, or mostly head
    return data[:where] + bytes([data[where] ^ (1 << rng.randrange(8))]) + data[where + 1 :]


def test_no_damage_is_an_error_or_a_wrong_cache(
    model: Decoder, sound: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    rng, data, prompt = random.Random(7), sound.read_bytes(), prompt_of(130)
    right = planes_of(caches_of(model, prompt))
    disk = PrefixDisk(tmp_path, LIMIT, model)
    cache: PrefixCache[Any] = PrefixCache(0, disk)  # keeps nothing in memory
    num_lost = 0
    for _ in range(150):
        put_broken(disk, sound.name, damage(data, rng))
        found = cache.lookup([*prompt, 1], "k")
        assert found.caches is None
        num_lost += not (tmp_path / sound.name).exists()
        (tmp_path / sound.name).unlink(missing_ok=True)
        assert disk.stats.entries == 0  # notices that it is gone
    assert num_lost > 140  # but for those that seem to be of another version
    assert len(warnings_in(caplog)) == num_lost
    assert all(str(tmp_path) in line and "\n" not in line for line in warnings_in(caplog))
    put_broken(disk, sound.name, data)
    found = cache.lookup([*prompt, 1], "k")
    assert found.caches is not None
    assert planes_of(found.caches) == right


def seal(table: dict[str, Any], tokens: bytes, data: bytes) -> bytes:
    """A file whose checksums are right, whatever it tells."""
    raw = json.dumps(table).encode()
    start = prefix_file._START.pack(
        prefix_file.MAGIC, prefix_file.VERSION, len(raw), len(data), len(tokens) // 4
    )
    return (
        start + hashlib.blake2b(start + raw + tokens, digest_size=32).digest() + raw + tokens + data
    )


def edits(table: dict[str, Any], rng: random.Random) -> dict[str, Any]:
    """The table with one value, anywhere, that is something else."""
    changed = json.loads(json.dumps(table))
    place, key = changed, rng.choice(["facts", "facts", "planes", "planes", "data", "owner"])
    while isinstance(place[key], list | dict) and place[key] and rng.random() < 0.85:
        place = place[key]
        key = rng.choice(list(place) if isinstance(place, dict) else range(len(place)))
    place[key] = rng.choice(
        [None, -1, 0, 1, 7, 130, 1 << 40, 1.5, "F16", "x", [], {}, [[]], True, [1] * 5, "U64"]
    )
    return changed


def test_a_file_that_lies_with_right_checksums_is_no_error(
    model: Decoder, sound: Path, tmp_path: Path
) -> None:
    rng, raw, prompt = random.Random(3), sound.read_bytes(), prompt_of(130)
    head, _ = prefix_file.read_planes(sound)
    data = raw[head.data_begin :]
    disk = PrefixDisk(tmp_path, LIMIT, model)
    cache: PrefixCache[Any] = PrefixCache(0, disk)
    right = planes_of(caches_of(model, prompt))
    for _ in range(250):
        table = edits(dict(head.table), rng)
        put_broken(disk, sound.name, seal(table, head.tokens, data))
        found = cache.lookup([*prompt, 1], "k")
        if found.caches is not None:
            assert planes_of(found.caches) == right
            process(model, [5], found.caches)
        (tmp_path / sound.name).unlink(missing_ok=True)
        assert disk.stats.entries == 0  # notices that it is gone
    put_broken(disk, sound.name, seal(dict(head.table), head.tokens, data))
    assert cache.lookup([*prompt, 1], "k").num_tokens == 130  # the seal itself is right


def test_a_file_under_anothers_name_is_not_taken_for_it(model: Decoder, tmp_path: Path) -> None:
    keep(model, tmp_path, prompt_of(130, 1), prompt_of(130, 2))
    first, second = tmp_path.iterdir()
    cache = reopen(model, tmp_path)
    assert cache.stats.disk is not None
    assert cache.stats.disk.entries == 2
    first.replace(second)  # after the index was made
    for seed in (1, 2):
        prompt = prompt_of(130, seed)
        found = cache.lookup([*prompt, 1], "k")
        if found.caches is not None:
            assert planes_of(found.caches) == planes_of(caches_of(model, prompt))


# Writers that die.

WRITER = """
import sys, mlx.core as mx, numpy as np
from mlx_edge.engine.prefix.cache import PrefixCache
from mlx_edge.engine.prefix.disk import PrefixDisk
from mlx_edge.models.load import load

model = load()[0]
disk = PrefixDisk(sys.argv[1], 1 << 28, model)
cache = PrefixCache(1 << 28, disk)
seed, told = int(sys.argv[2]), 0
while True:
    tokens = np.random.default_rng(seed).integers(1, 2000, 300).tolist()
    caches = model.make_cache()
    model(mx.array([tokens]), caches)
    mx.eval([array for one in caches for array in one.arrays])
    cache.store(tokens, caches, "k")
    while cache.save_some():
        pass
    seed += 1
    written = disk._writer.writes
    if written > told:
        print(written, flush=True)
        told = written
"""


def test_a_killed_writer_loses_nothing_but_what_it_was_writing(
    model: Decoder, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    rng = random.Random(11)
    for round_ in range(3):
        command = [sys.executable, "-c", WRITER, str(tmp_path), str(1000 * round_)]
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as writer:
            assert writer.stdout is not None
            assert writer.stdout.readline()
            time.sleep(rng.uniform(0, 0.15))
            writer.kill()
            told = [int(line) for line in writer.stdout if line.endswith("\n")]
        cache = reopen(model, tmp_path)
        assert all(name.endswith(".prefix") and name.count(".") == 1 for name in files(tmp_path))
        assert len(files(tmp_path)) >= max(told, default=1)
        for seed in range(1000 * round_, 1000 * round_ + max(told, default=1)):
            prompt = prompt_of(300, seed)
            assert cache.lookup([*prompt, 1], "k").num_tokens == 300
        assert cache.stats.disk is not None
        assert cache.stats.disk.entries == len(files(tmp_path))
        assert cache.stats.disk.failures == 0
        for name in files(tmp_path):
            prefix_file.read_planes(tmp_path / name)  # whole, by its checksums
            (tmp_path / name).unlink()
    assert not warnings_in(caplog)


def test_a_writer_killed_with_all_but_the_name_written(model: Decoder, tmp_path: Path) -> None:
    die = "import os, signal; os.fsync = lambda _: os.kill(os.getpid(), signal.SIGKILL)"
    command = [sys.executable, "-c", die + WRITER, str(tmp_path), "0"]
    subprocess.run(command, check=False, timeout=120, stdout=subprocess.DEVNULL)
    (name,) = files(tmp_path)
    assert name.endswith(".prefix.part")
    cache = reopen(model, tmp_path)
    assert cache.lookup([*prompt_of(300), 1], "k").caches is None
    assert files(tmp_path) == []


def test_records_can_be_of_no_planes(tmp_path: Path) -> None:
    record = prefix_file.PrefixRecord("o", "m", pack_tokens([1, 2]), [], [], [])
    path = tmp_path / "x"
    prefix_file.write_record(path, record, 1000.0)
    head, planes = prefix_file.read_planes(path)
    assert (head.owner, head.tokens, planes.tensors) == ("o", record.tokens, {})
    assert path.stat().st_mtime == 1000.0
    prefix_file.write_record(path, replace(record, owner="p"), 2000.0)  # takes its place
    assert prefix_file.read_head(path).owner == "p"
