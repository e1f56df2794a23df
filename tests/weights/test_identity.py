"""A file that changes under us is found, cheaply; a fingerprint tells weights apart without reading them."""

import os
import shutil

import mlx.core as mx
import pytest

from mlx_edge.errors import InvalidRequestError, ModelFormatError
from mlx_edge.weights import Checkpoint, SafetensorsFile, safetensors, write_checkpoint
from mlx_edge.weights.identity import FileIdentity, fingerprint_file
from tests.weights.files import random_array, same

ARRAYS = {f"t{i}": random_array(mx.uint32, (300, 200), seed=i) for i in range(4)}


@pytest.fixture
def folder(tmp_path):
    write_checkpoint(tmp_path / "model", ARRAYS)
    return tmp_path / "model"


@pytest.fixture
def opened(folder, monkeypatch):
    """A checkpoint whose tensors count as shared, on every machine."""
    monkeypatch.setattr(
        safetensors,
        "find_adoption",
        lambda: lambda mapping, descriptor, run: mx.zeros(run.num_bytes // 4, mx.uint32),
    )
    with Checkpoint.open(folder) as checkpoint:
        checkpoint.read("t1")
        yield checkpoint


def write_in_place(path):
    with path.open("r+b") as file:
        file.seek(20_000)
        file.write(b"x")
    later(path)


def later(path):
    """A clock that ticks once in some milliseconds may not have ticked."""
    os.utime(path, ns=(0, path.stat().st_mtime_ns + 1))


def put_another_in_place(path):
    copy = path.with_suffix(".copy")
    shutil.copy2(path, copy)
    copy.replace(path)


CHANGES = {
    "written to": (write_in_place, "written to since"),
    "shortened": (lambda path: os.truncate(path, path.stat().st_size - 1), "bytes, before"),
    "lengthened": (lambda path: os.truncate(path, path.stat().st_size + 1), "bytes, before"),
    "replaced": (put_another_in_place, "put in its place"),
    "removed": (lambda path: path.unlink(), "gone since it was opened"),
    "made a folder": (lambda path: (path.unlink(), path.mkdir()), "another file"),
}


@pytest.mark.parametrize("change", CHANGES)
def test_changes_are_found(opened, folder, change):
    opened.check_unchanged()
    work, words = CHANGES[change]
    work(folder / "model.safetensors")
    with pytest.raises(ModelFormatError, match=words) as caught:
        opened.check_unchanged()
    assert "\n" not in str(caught.value)
    opened.close()
    with pytest.raises(ModelFormatError, match=words):
        opened.check_unchanged()


def test_reading_and_touching_nothing_is_no_change(opened, folder):
    (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").chmod(0o600)
    opened.check_unchanged()


@pytest.mark.parametrize("change", ["shortened", "removed", "replaced"])
def test_weights_that_were_copied_do_not_mind(folder, change):
    with Checkpoint.open(folder, use_mmap=False) as checkpoint:
        tensors = {name: checkpoint.read(name) for name in ARRAYS}
        mx.eval(tensors)
        CHANGES[change][0](folder / "model.safetensors")
        checkpoint.check_unchanged()
    assert all(same(tensors[name], array) for name, array in ARRAYS.items())


def test_a_file_that_shrinks_while_it_is_copied_is_an_error(folder):
    path = folder / "model.safetensors"
    with SafetensorsFile(path, use_mmap=False) as file:
        os.truncate(path, 20_000)
        # Past the check of the size, as in a race.
        with pytest.raises(ModelFormatError, match="became shorter"):
            file._materialise(file._mapping, file.tensors["t3"])


def test_fingerprint_is_of_the_weights_and_stable(folder):
    with Checkpoint.open(folder) as first, Checkpoint.open(folder) as second:
        assert first.fingerprint() == second.fingerprint()
        assert len(first.fingerprint()) == 32
        int(first.fingerprint(), 16)
    with pytest.raises(InvalidRequestError, match="closed"):
        first.fingerprint()


def fingerprint_at(folder):
    with Checkpoint.open(folder) as checkpoint:
        return checkpoint.fingerprint()


def keep_time(path, work):
    before = path.stat().st_mtime_ns
    work()
    os.utime(path, ns=(before, before))


def overwrite(path, offset):
    data = bytearray(path.read_bytes())
    data[offset] ^= 1
    path.write_bytes(data)


def test_fingerprint_changes_with_what_it_covers(folder):
    path = folder / "model.safetensors"
    seen = {fingerprint_at(folder)}
    later(path)
    seen.add(fingerprint_at(folder))
    for offset in (16384, path.stat().st_size - 1):  # the first and the last byte of data
        keep_time(path, lambda offset=offset: overwrite(path, offset))
        seen.add(fingerprint_at(folder))
    header = path.read_bytes()
    keep_time(path, lambda: path.write_bytes(header.replace(b'"t1"', b'"tX"', 1)))
    seen.add(fingerprint_at(folder))
    assert len(seen) == 5


def test_fingerprint_covers_all_shards(tmp_path):
    write_checkpoint(tmp_path, ARRAYS, max_shard_bytes=250_000)
    before = fingerprint_at(tmp_path)
    later(sorted(tmp_path.glob("*.safetensors"))[-1])
    assert fingerprint_at(tmp_path) != before


@pytest.mark.parametrize("num_bytes", [1, 4095, 4096, 4097, 1_000_000])
def test_fingerprint_of_files_of_any_size(num_bytes):
    data = bytes(num_bytes)
    identity = FileIdentity(num_bytes, 1, 2, 3)
    one = fingerprint_file(identity, data, header_bytes=min(8, num_bytes))
    assert one == fingerprint_file(
        FileIdentity(num_bytes, 1, 9, 9), data, header_bytes=min(8, num_bytes)
    )
    assert one != fingerprint_file(identity, data[:-1] + b"x", header_bytes=min(8, num_bytes))
