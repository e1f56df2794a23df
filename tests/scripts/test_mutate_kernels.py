"""Seeding bugs: every mutant can be seeded and changes code, a seed draws the same, verdicts are kept."""

import json
import sys
from itertools import islice
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "scripts"))

import mutate_kernels as mutate  # noqa: E402


@pytest.mark.parametrize("file", mutate.TESTS)
def test_every_mutant_changes_code_and_nothing_else(file):
    text = (mutate.KERNELS / file).read_text()
    lines = text.splitlines()
    mutants = list(mutate.find_mutants(file))
    assert len(mutants) >= 10
    for mutant in mutants:
        mutated = mutant.apply(text)
        assert mutated != text
        first = mutant.line - 1
        assert mutated.splitlines()[:first] == lines[:first]
        code = lines[first].split("//")[0].strip()
        assert code or "\n" in mutant.before


def test_files_without_tests_and_tests_without_files_are_noticed():
    assert set(mutate.TESTS) == {path.name for path in mutate.KERNELS.glob("*.metal")}
    for names in mutate.TESTS.values():
        assert all((ROOT / "tests" / "metal" / name).exists() for name in names)


def test_a_seed_draws_the_same_and_mixes_files_and_operators():
    files = list(mutate.TESTS)
    first, again = (list(islice(mutate.draw(1, files), 200)) for _ in range(2))
    assert first == again != list(islice(mutate.draw(2, files), 200))
    assert len({m.file for m in first}) == len(files) and len({m.operator for m in first}) > 15
    assert len(set(first)) == 200


def test_verdicts_are_kept_and_a_run_goes_on(tmp_path):
    files = ["qmv.metal"]
    tried = []

    class Bench:
        def try_mutant(self, mutant):
            tried.append(mutant)
            outcome = ("caught", "survived", "equivalent", "stillborn")[len(tried) % 4]
            return mutate.Verdict(mutant, outcome, "it")

    def run(number):
        journal = mutate.Journal(tmp_path / "verdicts.jsonl")
        found = mutate.draw(1, files)
        return mutate.try_all(Bench(), found, number, 1, journal)

    run(6)
    num_tried = len(tried)
    verdicts = run(10)
    counted = [v for v in verdicts if v.outcome in {"caught", "survived"}]
    assert len(counted) == 10 and len(tried) > num_tried
    assert len(set(tried)) == len(tried) == len(verdicts)


def test_an_explained_survivor_is_not_counted(tmp_path, monkeypatch):
    one, two, three = islice(mutate.draw(1, ["rows.metal"]), 3)
    explained = tmp_path / "survivors.json"
    explained.write_text(json.dumps({str(two): "the same sum"}))
    monkeypatch.setattr(mutate, "EXPLAINED", explained)
    verdicts = [mutate.Verdict(m, o) for m, o in ((one, "caught"), (two, "survived"))]
    found = mutate.summarise([*verdicts, mutate.Verdict(three, "survived")], 1)
    assert (found["seeded"], found["caught"]) == (2, 1)
    assert [s["line"] for s in found["survivors"]] == [three.line]
    assert found["equivalent_by_reason"] == {str(two): "the same sum"}


def test_reasons_are_of_mutants_that_exist():
    known = {str(mutant) for file in mutate.TESTS for mutant in mutate.find_mutants(file)}
    assert set(json.loads(mutate.EXPLAINED.read_text())) <= known
