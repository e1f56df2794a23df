"""A pack file is whole or not there, whatever dies, fills up or is forbidden; and its pages are shared."""

import errno
import os
import resource
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest

from mlx_edge.weights import Part, list_packed, open_packed, pack_file, remove_packed
from tests.weights.packs import Filler, in_child, is_right, open_at, warnings_in

BIG = 32 * 2**20

# Forking with MLX's threads around is what these tests are about; Python 3.12 warns of it.
pytestmark = pytest.mark.filterwarnings("ignore:.*use of fork:DeprecationWarning")


def test_two_processes_at_once_each_get_whole_parts(tmp_path):
    def work():
        def slowly(part, view):
            time.sleep(0.05)
            Filler()(part, view)

        return 0 if is_right(open_at(tmp_path, slowly)) else 1

    pids = []
    for _ in range(3):
        pid = os.fork()
        if pid == 0:
            os._exit(work())
        pids.append(pid)
    assert [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in pids] == [0, 0, 0]
    assert [path.suffix for path in tmp_path.iterdir()] == [".pack"]
    fill = Filler()
    assert is_right(open_at(tmp_path, fill))
    assert not fill.calls


def test_a_writer_killed_half_way_leaves_nothing_that_stays(tmp_path):
    def work():
        def die(part, view):
            if part.name == "head":
                os.kill(os.getpid(), signal.SIGKILL)
            Filler()(part, view)

        open_at(tmp_path, die)
        return 0

    assert in_child(work) == -signal.SIGKILL
    assert [path.suffix for path in tmp_path.iterdir()] == [".tmp"]
    assert list_packed(tmp_path) == []
    file = open_at(tmp_path)
    assert file.report.how == "built"
    assert is_right(file)
    assert [path.suffix for path in tmp_path.iterdir()] == [".pack"]


def test_a_living_writer_is_left_alone_and_a_dead_one_is_cleaned_up(tmp_path):
    seen = []

    def fill(part, view):
        seen.append((pack_file.remove_abandoned(tmp_path), len(list(tmp_path.glob("*.tmp")))))
        Filler()(part, view)

    (tmp_path / "0123.abcd.tmp").write_bytes(bytes(5000))
    assert open_at(tmp_path, fill).report.how == "built"
    assert set(seen) == {(0, 1)}
    (tmp_path / "0123.abcd.tmp").write_bytes(bytes(5000))
    assert remove_packed(tmp_path) > 5000
    assert not list(tmp_path.iterdir())


def test_a_file_system_without_locks_is_used_but_never_cleaned(tmp_path, monkeypatch):
    def cannot(*_):
        raise OSError(errno.ENOLCK, "no locks")

    monkeypatch.setattr(pack_file.fcntl, "flock", cannot)
    (tmp_path / "0123.abcd.tmp").write_bytes(bytes(5000))
    assert is_right(open_at(tmp_path))
    assert open_at(tmp_path).report.how == "reused"
    assert sorted(path.suffix for path in tmp_path.iterdir()) == [".pack", ".tmp"]


def test_a_file_taken_for_abandoned_before_it_was_locked_is_made_again(tmp_path, monkeypatch):
    lock, taken = pack_file.fcntl.flock, []

    def too_late(descriptor, how):
        if not taken:
            (path,) = tmp_path.glob("*.tmp")
            taken.append(path)
            path.unlink()
        lock(descriptor, how)

    monkeypatch.setattr(pack_file.fcntl, "flock", too_late)
    file = open_at(tmp_path)
    assert taken
    assert file.report.how == "built"
    assert is_right(file)


@pytest.mark.parametrize(
    "error", [ValueError("mine"), KeyboardInterrupt(), OSError(errno.ENOSPC, "mine")]
)
def test_what_fill_raises_passes_through_and_leaves_nothing(tmp_path, error, caplog):
    def fill(part, view):
        raise error

    with pytest.raises(type(error), match="mine" if error.args else None):
        open_at(tmp_path, fill)
    assert not list(tmp_path.iterdir())
    assert not warnings_in(caplog)


def refuse(*_):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@pytest.mark.parametrize("call", ["posix_fallocate", "pwrite", "fsync", "ftruncate"])
def test_a_full_disk_means_memory_and_one_line(tmp_path, monkeypatch, caplog, call):
    monkeypatch.setattr(os, call, refuse, raising=False)
    fill = Filler()
    file = open_at(tmp_path, fill)
    assert is_right(file)
    assert (file.report.how, file.report.place) == ("packed", "memory")
    assert not list(tmp_path.iterdir())
    (line,) = warnings_in(caplog)
    assert "No space left on device" in line
    assert str(tmp_path) in line
    assert "\n" not in line
    if call == "posix_fallocate":  # known before any work is done
        assert fill.calls == ["q", "norm", "head"]


def test_a_file_system_that_cannot_reserve_is_written_all_the_same(tmp_path, monkeypatch):
    def cannot(*_):
        raise OSError(errno.EOPNOTSUPP, "not supported")

    monkeypatch.setattr(os, "posix_fallocate", cannot, raising=False)
    file = open_at(tmp_path)
    assert file.report.how == "built"
    assert is_right(file)
    assert open_at(tmp_path).report.how == "reused"


def test_a_limit_on_file_sizes_means_memory(tmp_path):
    def work():
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
        file = open_at(tmp_path)
        return (
            0
            if is_right(file) and file.report.how == "packed" and not list(tmp_path.iterdir())
            else 1
        )

    assert in_child(work) == 0


def test_a_folder_that_cannot_be_used_means_memory(tmp_path, caplog):
    (tmp_path / "file").write_text("in the way")
    file = open_at(tmp_path / "file" / "cache")
    assert is_right(file)
    assert file.report.how == "packed"
    assert len(warnings_in(caplog)) == 1


def test_a_read_only_folder_serves_what_it_has():
    with tempfile.TemporaryDirectory() as name:  # pytest's own folders are closed to other users
        folder = Path(name)
        open_at(folder)
        folder.chmod(0o555)

        def work():
            if os.geteuid() == 0:
                os.seteuid(65534)  # root may write everywhere
            reused = open_at(folder)
            anew = open_at(folder, key="other")
            hows = (reused.report.how, anew.report.how)
            return 0 if hows == ("reused", "packed") and is_right(reused) and is_right(anew) else 1

        assert in_child(work) == 0
        folder.chmod(0o755)


READER = """
import sys
from pathlib import Path
from mlx_edge.weights import Part, open_packed
def fill(part, view):
    raise AssertionError("packed again")
file = open_packed("k", [Part("big", int(sys.argv[2]))], fill, folder=Path(sys.argv[1]))
sum(file.parts["big"][::4096])
print("ready", flush=True)
sys.stdin.readline()
size = {}
lines = iter(open("/proc/self/smaps"))
for line in lines:
    if file.report.place in line:
        for line in lines:
            name, _, rest = line.partition(":")
            if name in ("Rss", "Pss"):
                size[name] = int(rest.split()[0])
            if name == "VmFlags":
                break
print(size["Rss"], size["Pss"], flush=True)
sys.stdin.readline()
"""


@pytest.mark.skipif(
    not Path("/proc/self/smaps").exists(), reason="this system has no /proc/self/smaps"
)
def test_two_processes_share_the_pages(tmp_path):
    part = Part("big", BIG)
    open_packed("k", [part], lambda part, view: None, folder=tmp_path)
    command = [sys.executable, "-c", READER, str(tmp_path), str(BIG)]
    pipe = subprocess.PIPE
    readers = [subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True) for _ in range(2)]
    try:
        for reader in readers:
            assert reader.stdout.readline() == "ready\n"
        for reader in readers:
            reader.stdin.write("\n")
            reader.stdin.flush()
            resident, proportional = map(int, reader.stdout.readline().split())
            assert resident * 1024 >= BIG
            assert proportional <= 0.52 * resident
    finally:
        for reader in readers:
            reader.communicate("\n")
