"""The cache of packed weights: one file a key, used only if it is whole and the right one."""

import re
from pathlib import Path

import pytest

from mlx_edge.errors import MemoryBudgetError
from mlx_edge.weights import Part, list_packed, open_packed, pack_file, packed, remove_packed
from tests.weights.packs import PARTS, Filler, content, in_child, is_right, open_at, warnings_in

# Forking with MLX's threads around is what these tests are about; Python 3.12 warns of it.
pytestmark = pytest.mark.filterwarnings("ignore:.*use of fork:DeprecationWarning")


def test_packed_once_then_reused(tmp_path, caplog):
    fill, told = Filler(), []
    first = open_at(
        tmp_path / "a" / "b", fill, on_progress=lambda done, all: told.append((done, all))
    )
    again = open_at(tmp_path / "a" / "b", fill, on_progress=lambda *_: told.append("again"))
    assert is_right(first)
    assert is_right(again)
    assert fill.calls == ["q", "norm", "head"]
    total = sum(part.num_bytes for part in PARTS)
    assert told[0] == (0, total)
    assert told[-1] == (total, total)
    assert "again" not in told
    assert (first.report.how, again.report.how) == ("built", "reused")
    (path,) = (tmp_path / "a" / "b").iterdir()
    assert str(path) == first.report.place
    assert path.stat().st_size == first.report.num_bytes
    assert not warnings_in(caplog)


@pytest.mark.parametrize("use_file", [True, False])
@pytest.mark.parametrize("populate", [True, False])
def test_parts_are_aligned_and_cannot_be_written(tmp_path, use_file, populate):
    file = open_at(tmp_path, use_file=use_file, populate=populate)
    for part in PARTS:
        address, num_bytes = file.address(part.name)
        assert address % 64 == 0
        assert num_bytes == part.num_bytes
        assert file.parts[part.name].readonly
    assert is_right(file)
    assert bool(list(tmp_path.iterdir())) == use_file


def test_parts_outlive_the_object_and_the_file(tmp_path):
    view = open_at(tmp_path).parts["head"]
    assert remove_packed(tmp_path) > 300_000
    assert not list(tmp_path.iterdir())
    assert bytes(view) == content(PARTS[-1]).tobytes()
    assert in_child(lambda: bytes(view) != content(PARTS[-1]).tobytes()) == 0


def test_each_key_has_its_file_and_can_be_listed_and_removed(tmp_path):
    keys = ["weights-1/layout-1", "weights-2/layout-1", "weights-1/Schlüssel"]
    for key in keys:
        open_at(tmp_path, key=key)
    listed = list_packed(tmp_path)
    assert {entry.key for entry in listed} == set(keys)
    assert all(entry.num_bytes == entry.path.stat().st_size for entry in listed)
    assert remove_packed(tmp_path, key=keys[0]) == listed[0].num_bytes
    assert {entry.key for entry in list_packed(tmp_path)} == set(keys[1:])
    assert remove_packed(tmp_path, key="no such key") == 0
    remove_packed(tmp_path)
    assert list_packed(tmp_path) == list_packed(tmp_path / "absent") == []


def damage(path, how):
    data = bytearray(path.read_bytes())
    parts_begin = data.index(content(PARTS[0]).tobytes())
    if how == "truncated":
        del data[-4096:]
    elif how == "empty":
        data.clear()
    elif how == "longer":
        data += bytes(64)
    elif how == "zeros":  # what a power cut leaves of a file that was not synced
        data[:] = bytes(len(data))
    elif how == "zeros in parts":
        data[parts_begin:] = bytes(len(data) - parts_begin)
    elif how == "start":
        data[9] ^= 1
    elif how == "table":
        data[80] ^= 1
    elif how == "first page":
        data[parts_begin + 17] ^= 1
    elif how == "last page":
        data[-64] ^= 1
    path.chmod(0o644)
    path.write_bytes(data)


@pytest.mark.parametrize(
    "how",
    [
        "truncated",
        "empty",
        "longer",
        "zeros",
        "zeros in parts",
        "start",
        "table",
        "first page",
        "last page",
    ],
)
def test_a_broken_file_is_packed_again_with_one_line(tmp_path, caplog, how):
    path = Path(open_at(tmp_path).report.place)
    damage(path, how)
    fill = Filler()
    file = open_at(tmp_path, fill)
    assert fill.calls
    assert file.report.how == "built"
    assert is_right(file)
    (line,) = warnings_in(caplog)
    assert re.search("not usable, it is packed again: ", line)
    assert "\n" not in line
    assert open_at(tmp_path, fill).report.how == "reused"


def test_every_bit_of_the_head_counts(tmp_path):
    path = Path(open_at(tmp_path).report.place)
    data = path.read_bytes()
    layout = pack_file.PackLayout.plan("k", PARTS)
    head_bytes = len(data[: layout.begins[0]].rstrip(b"\0"))
    for place in range(head_bytes):
        broken = bytearray(data)
        broken[place] ^= 4
        with pytest.raises(pack_file.BrokenPackError):
            layout.verify(memoryview(broken))
    layout.verify(memoryview(data))


@pytest.mark.parametrize("other", ["key", "parts"])
def test_a_file_of_another_key_or_other_parts_is_packed_again(tmp_path, caplog, other):
    place = open_at(tmp_path).report.place
    if other == "key":
        foreign = open_at(tmp_path, key="other").report.place
        Path(foreign).replace(place)
        fewer = PARTS
    else:
        fewer = PARTS[:-1]
    file = open_at(tmp_path, parts=fewer)
    assert file.report.how == "built"
    assert is_right(file, fewer)
    (line,) = warnings_in(caplog)
    assert ("for other weights" if other == "key" else "other sizes") in line


def test_no_memory_to_pack_in_is_said(tmp_path):
    with pytest.raises(MemoryBudgetError, match="of memory, which the system refuses"):
        open_packed("k", [Part("huge", 2**46)], Filler(), use_file=False)


@pytest.mark.parametrize(
    ("variables", "folder"),
    [
        ({"MLX_EDGE_CACHE": "/own", "XDG_CACHE_HOME": "/x"}, "/own"),
        ({"XDG_CACHE_HOME": "/x"}, "/x/mlx_edge/packed"),
        ({"XDG_CACHE_HOME": "relative", "HOME": "/me"}, "/me/.cache/mlx_edge/packed"),
        ({"HOME": "/me"}, "/me/.cache/mlx_edge/packed"),
    ],
)
def test_default_folder(monkeypatch, variables, folder):
    for name in ("MLX_EDGE_CACHE", "XDG_CACHE_HOME", "HOME"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert packed.default_folder() == Path(folder)


def test_no_home_means_memory(monkeypatch, caplog):
    for name in ("MLX_EDGE_CACHE", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)

    def no_home():
        raise RuntimeError("no home")

    monkeypatch.setattr(Path, "home", no_home)
    assert is_right(open_at(None))
    assert len(warnings_in(caplog)) == 1
