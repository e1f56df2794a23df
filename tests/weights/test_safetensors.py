"""One file: it is read exactly, every byte is accounted for, and what is broken is said."""

import os

import mlx.core as mx
import numpy as np
import pytest

from mlx_edge.errors import InvalidRequestError, ModelFormatError
from mlx_edge.weights import SafetensorsFile
from mlx_edge.weights.dtypes import ELEMENT_TYPES
from tests.weights.files import SHAPES, item, random_array, same, save


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("name", ELEMENT_TYPES)
@pytest.mark.parametrize("lead", [0, 1], ids=["aligned", "odd"])
def test_every_type_and_shape_is_read_exactly(tmp_path, name, shape, lead):
    element = ELEMENT_TYPES[name]
    rng = np.random.default_rng(0)
    count = int(np.prod(shape, dtype=int))
    raw = rng.integers(0, 2 if name == "BOOL" else 256, count * element.size, dtype=np.uint8)
    header = {"t": item(name, list(shape), [lead, lead + raw.nbytes])}
    if lead:
        header["first"] = item("U8", [1], [0, 1])
    path = save(tmp_path / "f.safetensors", header, bytes(lead) + raw.tobytes())
    with SafetensorsFile(path) as file:
        array = file.read("t")
        assert file.report.copied_bytes + file.report.shared_bytes == raw.nbytes
    assert array.dtype == element.mlx
    assert array.shape == shape
    with mx.stream(mx.cpu):
        seen = array.view(mx.uint16) if name == "BF16" else array
        assert np.asarray(seen).tobytes() == raw.tobytes()


@pytest.mark.parametrize("dtype", [mx.bfloat16, mx.float16, mx.uint32, mx.int64, mx.bool_])
def test_reads_what_mlx_writes(tmp_path, dtype):
    arrays = {f"t{i}": random_array(dtype, shape, seed=i) for i, shape in enumerate(SHAPES)}
    mx.save_safetensors(str(tmp_path / "f.safetensors"), arrays)
    with SafetensorsFile(tmp_path / "f.safetensors") as file:
        assert file.metadata == {}
        assert set(file.tensors) == set(arrays)
        assert all(same(file.read(name), array) for name, array in arrays.items())


def test_bool_bytes_become_zero_or_one(tmp_path):
    path = save(tmp_path / "f", {"t": item("BOOL", [4], [0, 4])}, bytes([0, 1, 2, 255]))
    with SafetensorsFile(path) as file:
        seen = file.read("t").view(mx.uint8)
    assert seen.tolist() == [0, 1, 1, 1]


def test_report_counts_each_copy_and_opening_reads_nothing(tmp_path):
    table = {"a": item("U8", [4], [0, 4]), "b": item("F64", [1], [4, 12])}
    with SafetensorsFile(save(tmp_path / "f", table, bytes(12))) as file:
        before = file.report
        assert (before.num_tensors, before.total_bytes) == (2, 12)
        assert (before.copied_bytes, before.shared_bytes, before.materialise_s) == (0, 0, 0.0)
        file.read("b")
        file.read("b")
        after = file.report
    assert after.copied_bytes == 16
    assert after.materialise_s > 0
    assert after.map_s > 0
    assert after.parse_s > 0
    assert len(after.reasons) == 1


def test_arrays_outlive_the_file(tmp_path):
    path = save(tmp_path / "f", {"a": item("U8", [4], [0, 4])}, b"\1\2\3\4")
    file = SafetensorsFile(path)
    array = file.read("a")
    file.close()
    del file
    path.unlink()
    assert array.tolist() == [1, 2, 3, 4]


def test_missing_tensor_and_closed_file(tmp_path):
    file = SafetensorsFile(save(tmp_path / "f", {"a": item("U8", [1], [0, 1])}, b"\0"))
    with file, pytest.raises(ModelFormatError, match="no tensor 'b' among 1"):
        file.read("b")
    with pytest.raises(InvalidRequestError, match="closed"):
        file.read("a")
    file.close()


def test_file_that_was_cut_after_opening_is_refused_not_touched(tmp_path):
    path = save(tmp_path / "f", {"a": item("U8", [100_000], [0, 100_000])}, bytes(100_000))
    with SafetensorsFile(path) as file:
        os.truncate(path, 4096)
        with pytest.raises(ModelFormatError, match="fewer than when it was opened"):
            file.read("a")


def test_paths_that_are_no_files(tmp_path):
    (tmp_path / "empty").write_bytes(b"")
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    for name, words in [
        ("absent", "cannot be opened"),
        ("empty", "an empty file"),
        ("pipe", "not a file"),
        (".", "not a file"),
        ("loop", "cannot be opened"),
        ("nul\0", "cannot be opened"),
    ]:
        with pytest.raises(ModelFormatError, match=words):
            SafetensorsFile(tmp_path / name)


@pytest.mark.parametrize("cut", [1, 7, 8, 20, 60])
def test_truncated_file(tmp_path, cut):
    path = save(tmp_path / "f", {"a": item("F32", [2], [0, 8])}, bytes(8))
    path.write_bytes(path.read_bytes()[:-cut])
    with pytest.raises(ModelFormatError, match=r"f: found .*; expected "):
        SafetensorsFile(path)
