"""Seeds bugs into the Metal kernels, one at a time, and counts how many the kernels' tests catch.

    python scripts/mutate_kernels.py --json bench/results/mutants.json      # 300 mutants, hours on two cores
    python scripts/mutate_kernels.py --list --number 20                     # what would be seeded

The operators are mechanical and know no kernel: they see text without comments. A mutant that does not compile is
drawn again; one that compiles to the same machine code everywhere the tests look is equivalent, and is not counted
as seeded. What the tests let through is listed; `tests/metal/survivors.json` explains what is equivalent for a reason
that no compiler sees.
"""

import argparse
import json
import os
import random
import re
import shutil
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path

from tqdm import tqdm

ROOT = Path(__file__).parents[1]
KERNELS = ROOT / "metal_kernels"
EXPLAINED = ROOT / "tests" / "metal" / "survivors.json"
LIMIT_S = 3600  # a mutant that loops for ever is caught by this

# Which tests exercise a file, those first that see most of it. What they share is in all of their kernels.
PRODUCTS = ("test_qmv_launches.py", "test_qmv.py", "test_qmm_small.py")
ATTENTION = ("test_attention.py", "test_attention_bits.py", "test_attention_launch.py")
TESTS = {
    "unpack.metal": PRODUCTS,
    "epilogue.metal": PRODUCTS,
    "qmv.metal": PRODUCTS,
    "qmm_small.metal": PRODUCTS[::-1],
    "rows.metal": ATTENTION,
    "attend.metal": ATTENTION,
    "attn_decode.metal": ATTENTION,
    "attn_decode_q.metal": ATTENTION,
    "attn_combine.metal": ATTENTION,
}


@dataclass(frozen=True)
class Mutant:
    """One seeded bug: `before` at `offset` of the file becomes `after`."""

    file: str
    operator: str
    line: int
    offset: int
    before: str
    after: str

    def apply(self, text: str) -> str:
        """The file's text with the bug."""
        assert text[self.offset :].startswith(self.before)
        return text[: self.offset] + self.after + text[self.offset + len(self.before) :]

    def __str__(self) -> str:
        return f"{self.file}:{self.line}: {self.operator}: {self.before!r} -> {self.after!r}"


Change = tuple[str, Callable[[re.Match[str]], str]]


def _to(template: str) -> Callable[[re.Match[str]], str]:
    return lambda match: match.expand(template)


def _other(pairs: dict[str, str]) -> Callable[[re.Match[str]], str]:
    return lambda match: match[0].replace(match[1], pairs[match[1]], 1)


_OPERAND = r"[\w.]+(?:\[[^\[\]]*\])?"
OPERATORS: dict[str, Change] = {
    "drop a barrier": (r"\b(?:threadgroup|simdgroup)_barrier\([^;]*\);", _to(";")),
    "shift a bound": (
        r" (<=|>=|<|>) (?=[\w(])",
        _other({"<": "<=", "<=": "<", ">": ">=", ">=": ">"}),
    ),
    "turn a comparison": (
        r" (<=|>=|==|!=|<|>) (?=[\w(])",
        _other({"<": ">=", "<=": ">", ">": "<=", ">=": "<", "==": "!=", "!=": "=="}),
    ),
    "swap operands": (rf"({_OPERAND}) (-|/|%|<<|>>) ({_OPERAND})", _to(r"\3 \2 \1")),
    "change an index": (r"\[([^\[\]]+)\](?!\])", _to(r"[(\1) + 1]")),
    "drop a guard": (r"\bif \(((?:[^()]|\([^()]*\))*)\)", _to("if (true)")),
    "close a guard": (r"\bif \(((?:[^()]|\([^()]*\))*)\)", _to("if (false)")),
    "drop a rescale": (rf"{_OPERAND} \*= [^;]+;", _to(";")),
    "drop an update": (rf"{_OPERAND} (?:\+|-|\|)= [^;]+;", _to(";")),
    "set, not add": (r" \+= ", _to(" = ")),
    "wrong lane": (r"\blane\b(?!\s*[=;])", _to("(lane ^ 1)")),
    "wrong simdgroup": (r"\bsimdgroup\b(?!\s*[=;_])", _to("(simdgroup ^ 1)")),
    "wrong shuffle": (r"(simd_shuffle\w*\([^;,]+, )([^)]+)\)", _to(r"\g<1>(\2) + 1)")),
    "drop a reduction": (r"\bsimd_(?:sum|max|min)\(", _to("(")),
    "plus to minus": (r" \+ ", _to(" - ")),
    "minus to plus": (r" - ", _to(" + ")),
    "times to plus": (r" \* ", _to(" + ")),
    "max to min": (r"\bmax\(", _to("min(")),
    "min to max": (r"\bmin\(", _to("max(")),
    "and to or": (r" (&&|&) ", _other({"&&": "||", "&": "|"})),
    "or to and": (r" (\|\||\|) ", _other({"||": "&&", "|": "&"})),
    "a constant more": (
        r"(?<![\w.#])([1-9]\d*)(u?)(?![\w.])",
        lambda m: f"{int(m[1]) + 1}{m[2]}",
    ),
    "a float constant": (r"(?<![\w.])(\d+\.\d+)f", _to(r"(\1f + 1.0f)")),
    "wrong branch": (r" \? ([^:?;]+) : ([^:?;,)]+)", _to(r" ? \2 : \1")),
}
_NOT_CODE = re.compile(
    r"//[^\n]*|/\*.*?\*/|^\s*#[^\n]*|\btemplate <[^;{]*?>(?=\s)|\bstatic_assert\([^;]*;|\busing [^;]*;",
    re.DOTALL | re.MULTILINE,
)


def find_mutants(file: str) -> Iterator[Mutant]:
    """Every place where an operator fits."""
    text = (KERNELS / file).read_text()
    code = _NOT_CODE.sub(lambda match: re.sub(r"[^\n]", " ", match[0]), text)
    for name, (pattern, change) in OPERATORS.items():
        for match in re.finditer(pattern, code):
            line = code.count("\n", 0, match.start()) + 1
            after = change(match)
            if after != match[0]:
                before = text[match.start() : match.end()]  # a comment may stand in it
                yield Mutant(file, name, line, match.start(), before, after)


def draw(seed: int, files: list[str]) -> Iterator[Mutant]:
    """Mutants in an order given by the seed, the operators of all files by turns, so that none is rare."""
    source = random.Random(seed)
    heaps: dict[tuple[str, str], list[Mutant]] = {}
    for file in files:
        for mutant in find_mutants(file):
            heaps.setdefault((mutant.operator, file), []).append(mutant)
    for heap in heaps.values():
        source.shuffle(heap)
    while heaps:
        for key in source.sample(sorted(heaps), len(heaps)):
            yield heaps[key].pop()
            if not heaps[key]:
                del heaps[key]


@dataclass(frozen=True)
class Verdict:
    """What became of a mutant: caught, survived, equivalent, or stillborn; and by what."""

    mutant: Mutant
    outcome: str
    by: str = ""


@dataclass(frozen=True)
class Bench:
    """Where mutants are tried: the digests of the machine code of each file's tests, with nothing seeded."""

    cache: Path  # the emulator's, warm
    codes: dict[str, str]

    def try_mutant(self, mutant: Mutant) -> Verdict:
        """Run the tests of the mutant's file on it."""
        with tempfile.TemporaryDirectory() as folder:
            kernels = Path(folder) / "kernels"
            shutil.copytree(KERNELS, kernels)
            place = kernels / mutant.file
            place.write_text(mutant.apply(place.read_text()))
            cache = Path(folder) / "cache"
            shutil.copytree(
                self.cache, cache, copy_function=os.link
            )  # what it compiles goes with it
            try:
                found = run_tests(mutant.file, kernels, cache, Path(folder))
            except subprocess.TimeoutExpired:
                return Verdict(mutant, "caught", f"no end within {LIMIT_S} s")
        if found.get("kind") == "compile":
            return Verdict(mutant, "stillborn", found["message"])
        if found.get("test"):
            return Verdict(mutant, "caught", f"{found['test']}: {found['message']}")
        is_same = found["code"] == self.codes[mutant.file]
        return Verdict(mutant, "equivalent" if is_same else "survived")


def run_tests(file: str, kernels: Path, cache: Path, folder: Path) -> dict[str, str]:
    """Run a file's tests on a folder of kernels, up to the first failure: what failed, or a digest of the code run."""
    report = folder / "report.json"
    command = [sys.executable, "-m", "pytest", "-x", "-q", "-n0", "-p", "no:cacheprovider"]
    command += ["--metal-kernels", str(kernels), "--first-failure", str(report)]
    ended = subprocess.run(
        [*command, *(f"tests/metal/{name}" for name in TESTS[file])],
        cwd=ROOT,
        env=os.environ | {"METAL_EMULATOR_CACHE": str(cache)},
        capture_output=True,
        timeout=LIMIT_S,
        check=False,
    )
    if not report.exists():  # not even pytest has survived it
        return {"test": "pytest", "message": f"ended with code {ended.returncode} and no report"}
    return dict(json.loads(report.read_text()))


def make_bench(files: list[str], folder: Path) -> Bench:
    """Run all tests once with nothing seeded; raises SystemExit when one fails."""
    cache = folder / "warm"
    cache.mkdir(parents=True, exist_ok=True)
    codes: dict[tuple[str, ...], str] = {}
    for file in tqdm({TESTS[file]: file for file in files}.values(), desc="nothing seeded"):
        with tempfile.TemporaryDirectory() as place:
            found = run_tests(file, KERNELS, cache, Path(place))
        if found.get("test"):
            raise SystemExit(f"{found['test']} fails with nothing seeded: {found['message']}")
        codes[TESTS[file]] = found["code"]
    return Bench(cache, {file: codes[TESTS[file]] for file in files})


class Journal:
    """Verdicts on disk as they come, so that a run that was ended goes on where it was."""

    def __init__(self, path: Path) -> None:
        self._path = path
        lines = path.read_text().splitlines() if path.exists() else []
        self._known = {v.mutant: v for v in map(_read_verdict, lines)}

    def find(self, mutant: Mutant) -> Verdict | None:
        """What an earlier run has found."""
        return self._known.get(mutant)

    def add(self, verdict: Verdict) -> None:
        """Keep a new one."""
        with self._path.open("a") as file:
            file.write(json.dumps(asdict(verdict)) + "\n")


def _read_verdict(line: str) -> Verdict:
    raw = json.loads(line)
    return Verdict(Mutant(**raw["mutant"]), raw["outcome"], raw["by"])


def try_all(
    bench: Bench, mutants: Iterator[Mutant], number: int, workers: int, journal: Journal
) -> list[Verdict]:
    """Verdicts on `number` mutants that are neither stillborn nor equivalent; those are listed too."""
    verdicts: list[Verdict] = []
    progress = tqdm(total=number, unit="mutant")

    def note(verdict: Verdict) -> None:
        verdicts.append(verdict)
        progress.update(verdict.outcome in {"caught", "survived"})
        counts = Counter(v.outcome for v in verdicts)
        progress.set_postfix(survived=counts["survived"], equivalent=counts["equivalent"])
        if verdict.outcome == "survived":
            progress.write(f"survived: {verdict.mutant}")

    with ThreadPoolExecutor(workers) as pool:
        running: set[Future[Verdict]] = set()
        while progress.n < number:
            while progress.n + len(running) < number and len(running) < workers:
                mutant = next(mutants, None)
                if mutant is None:
                    break
                known = journal.find(mutant)
                if known is not None:
                    note(known)
                else:
                    running.add(pool.submit(bench.try_mutant, mutant))
            if not running:
                break
            done, running = wait(running, return_when=FIRST_COMPLETED)
            for verdict in (future.result() for future in done):
                journal.add(verdict)
                note(verdict)
    progress.close()
    return verdicts


def summarise(verdicts: list[Verdict], seed: int) -> dict[str, object]:
    """Counts, and what nobody has caught; an explained survivor is equivalent, for the reason given."""
    reasons = dict(json.loads(EXPLAINED.read_text())) if EXPLAINED.exists() else {}
    survivors = [v.mutant for v in verdicts if v.outcome == "survived"]
    unexplained = [m for m in survivors if str(m) not in reasons]
    caught = [v for v in verdicts if v.outcome == "caught"]
    seeded = len(caught) + len(unexplained)
    counts = Counter(v.outcome for v in verdicts)
    return {
        "seed": seed,
        "seeded": seeded,
        "caught": len(caught),
        "caught_share": round(len(caught) / seeded, 4) if seeded else None,
        "survivors": [asdict(m) for m in unexplained],
        "equivalent_by_code": counts["equivalent"],
        "equivalent_by_reason": {str(m): reasons[str(m)] for m in survivors if str(m) in reasons},
        "stillborn": counts["stillborn"],
        "operators": dict(Counter(v.mutant.operator for v in caught)),
        "mutants": [f"{v.outcome}: {v.mutant}  [{v.by[:160]}]" for v in verdicts],
    }


def main() -> None:
    """Draw, try, count, write."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--number", type=int, default=300, help="mutants that are tried and count")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--file", choices=TESTS, action="append", help="all of them, unless told")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--list", action="store_true", help="print the mutants and run nothing")
    parser.add_argument("--work", type=Path, help="keep what is found there, and go on from it")
    parser.add_argument("--json", type=Path, help="where to write the result")
    args = parser.parse_args()
    files = args.file or list(TESTS)
    mutants = draw(args.seed, files)
    if args.list:
        print(*islice(mutants, args.number), sep="\n")
        return
    with tempfile.TemporaryDirectory() as folder:
        work = args.work or Path(folder)
        bench = make_bench(files, work)
        journal = Journal(work / "verdicts.jsonl")
        verdicts = try_all(bench, mutants, args.number, args.workers, journal)
        found = summarise(verdicts, args.seed)
    print(f"{found['caught']} of {found['seeded']} caught")
    if args.json:
        args.json.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
