"""bench/peers.py around the measurements: what is kept, what is skipped, what a child may do."""

import json
import re
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from bench.child import run_child
from bench.peer_jobs import ALL, FULL, QUICK, Job, Jobs
from bench.peer_runs import Measured
from bench.peer_setup import Workplace
from bench.peers import Journal, run_job
from bench.table import ROOT

IDENTITY = {"mode": "quick", "code": "1"}


def job(measure: Any = Measured) -> Job:
    return Job("llama.cpp", "big", 2, measure, ("llama.cpp",))


def record(index: int) -> dict[str, Any]:
    return {"round": index, "job": job().name}


def test_a_journal_goes_on_where_it_was(tmp_path: Path) -> None:
    path = tmp_path / "run.jsonl"
    Journal(path, IDENTITY, is_fresh=False).add(record(0))
    path.write_text(path.read_text() + '{"round": 1, "jo')  # killed while it was written
    again = Journal(path, IDENTITY, is_fresh=False)
    assert again.has(0, job())
    assert not again.has(1, job())
    again.add(record(1))
    assert Journal(path, IDENTITY, is_fresh=False).has(1, job())


@pytest.mark.parametrize(("identity", "is_fresh"), [(IDENTITY, True), ({"code": "2"}, False)])
def test_a_journal_of_something_else_is_put_aside(
    tmp_path: Path, identity: dict[str, str], is_fresh: bool
) -> None:
    path = tmp_path / "run.jsonl"
    Journal(path, IDENTITY, is_fresh=False).add(record(0))
    assert not Journal(path, identity, is_fresh=is_fresh).has(0, job())
    assert len((tmp_path / "run.old.jsonl").read_text().splitlines()) == 2


def test_a_job_that_fails_is_a_record_with_the_reason(tmp_path: Path) -> None:
    def explode() -> Measured:
        raise ValueError("no such thing")

    place = Workplace(tmp_path)
    found = run_job(0, job(explode), place, time.monotonic() + 9)
    assert found["error"] == "ValueError: no such thing"
    assert found["values"] == {}
    late = run_job(0, job(), place, time.monotonic() - 1)
    assert "time" in late["error"]
    place.failures["llama.cpp"] = "no compiler"
    assert run_job(0, job(), place, time.monotonic() + 9)["error"] == "llama.cpp: no compiler"


@pytest.mark.parametrize("mode", [QUICK, FULL, ALL], ids=lambda mode: mode.name)
def test_every_round_has_ours_beside_each_peer(mode: Any, tmp_path: Path) -> None:
    jobs = Jobs(mode, Workplace(tmp_path))
    for index in range(mode.rounds):
        names = [job.name for job in jobs.round(index)]
        assert len(set(names)) == len(names)
        for shape in (mode.big, mode.small):
            peers = [job.peer for job in jobs.round(index) if job.shape == shape]
            for wanted in ("mlx_edge", "mlx_edge again", "llama.cpp Q4_0, no repack"):
                assert wanted in peers
    first, second = ([job.peer for job in jobs.round(i) if job.peer == "STREAM"] for i in (0, 1))
    assert first == second


def test_a_child_that_is_late_is_ended_and_its_words_are_kept(tmp_path: Path) -> None:
    program = "import time; print('said', flush=True); time.sleep(60)"
    child = run_child([sys.executable, "-c", program], limit_s=1.5, cores=1, folder=tmp_path)
    assert child.out == "said\n"
    assert child.error == "took longer than 2 s"
    assert child.first_byte_s is not None
    assert child.wall_s < 30


def test_a_child_that_fails_says_its_last_line(tmp_path: Path) -> None:
    program = "import sys; print('a\\nthe reason', file=sys.stderr); sys.exit(3)"
    child = run_child([sys.executable, "-c", program], limit_s=30, cores=1, folder=tmp_path)
    assert child.error == "ended with 3: the reason"
    assert child.peak_bytes > 0
    missing = run_child([tmp_path / "none"], limit_s=1, cores=1, folder=tmp_path)
    assert missing.error is not None and "No such file" in missing.error


def test_every_key_has_its_line_in_the_readme() -> None:
    from tests.bench.test_peer_summary import KEYS

    text = (ROOT / "bench" / "README.md").read_text().split("## Quantized models")[0]
    lines = re.findall(r"^\| `(\w+)` \|", text, re.MULTILINE)
    assert sorted(lines) == sorted(KEYS)


def test_the_recorded_texts_have_a_prompt_and_a_continuation() -> None:
    from bench.ours import BREAK, TEXTS

    texts = sorted(TEXTS.glob("*.txt"))
    assert [text.stem for text in texts] == ["code_edit", "json_list", "prose"]
    for text in texts:
        before, after = text.read_text().split(BREAK)
        assert len(before) > 300
        assert len(after) > 900


def test_lines_of_a_driver_become_values(tmp_path: Path) -> None:
    from bench.child import Finished
    from bench.peer_runs import _from_lines

    lines = [
        {"name": "prefill_128", "samples": [1.0, 3.0], "peak_bytes": 7},
        {"name": "load", "s": 0.5},
    ]
    out = "a library prints\n" + "\n".join(map(json.dumps, lines)) + '\n{"name": "decode_0", "sam'
    child = Finished(out, "", "took longer than 9 s", 9.0, 0.1, 5, 0.0)
    measured = _from_lines(child)
    assert measured.values == {"prefill_128": 2.0, "peak_bytes": 7, "load_s": 0.5}
    assert measured.error == "took longer than 9 s"
