"""MLX's float products on OpenBLAS beside those on the BLAS of its wheel: `python -m bench.blas`.

Each kind measures in processes of its own, which take turns: in every round OpenBLAS, the wheel's BLAS, and OpenBLAS
once more as the null run; every other round goes backwards. A process times every case until it has 200 calls or half a
second of them and keeps the median; the ratio is made within a round. Writes bench/results/blas.json. Linux only:
elsewhere both kinds are the same.
"""

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median

RESULT = Path(__file__).parent / "results" / "blas.json"
KINDS = {"OpenBLAS": "auto", "the wheel's BLAS": "mlx", "OpenBLAS again": "auto"}
SHAPES = ((1, 2048, 2048), (128, 2048, 2048), (512, 512, 512), (64, 64, 64))  # (M, K, N)
CALLS, ENOUGH_S = 200, 0.5


def make_cases() -> dict[str, Callable[[], object]]:
    """What is timed, by name; each call computes its result whole."""
    import mlx.core as mx

    cases: dict[str, Callable[[], object]] = {}
    for m, k, n in SHAPES:
        a, b = mx.random.normal((m, k)), mx.random.normal((n, k))
        cases[f"product {m} x {k} x {n}"] = lambda a=a, b=b: mx.eval(a @ b.T)  # type: ignore[misc]
    x, up, down = (mx.random.normal(shape) for shape in ((64, 512), (512, 2048), (2048, 512)))

    def loss(up: mx.array, down: mx.array) -> mx.array:
        return mx.square(mx.maximum(x @ up, 0) @ down).mean()

    step = mx.value_and_grad(loss, argnums=(0, 1))
    cases["loss and gradients, 512 - 2048 - 512, 64 rows"] = lambda: mx.eval(step(up, down))
    square = x.T @ x / 64 + mx.eye(512)
    mx.eval(square)
    cases["Cholesky factor of 512 x 512"] = lambda: mx.eval(
        mx.linalg.cholesky(square, stream=mx.cpu)
    )
    return cases


def measure() -> dict[str, float]:
    """Seconds per call of every case, in this process."""
    from mlx_edge.runtime import connect_blas

    reason = connect_blas()
    if reason and os.environ.get("MLX_EDGE_BLAS") != "mlx":
        sys.exit(f"bench.blas: OpenBLAS is not there to be measured: {reason}")
    found = {}
    for name, call in make_cases().items():
        call()
        times: list[float] = []
        while len(times) < CALLS and sum(times) < ENOUGH_S:
            start = time.perf_counter()
            call()
            times.append(time.perf_counter() - start)
        found[name] = median(times)
    return found


def measure_apart(kind: str) -> dict[str, float]:
    """The same in a process of its own."""
    command = [sys.executable, "-m", "bench.blas", "--measure"]
    environment = os.environ | {"MLX_EDGE_BLAS": KINDS[kind]}
    done = subprocess.run(command, env=environment, check=True, stdout=subprocess.PIPE, text=True)
    found: dict[str, float] = json.loads(done.stdout)
    return found


def spread(values: list[float]) -> dict[str, float]:
    """Median, smallest and largest."""
    return {
        "median": round(median(values), 3),
        "low": round(min(values), 3),
        "high": round(max(values), 3),
    }


def main() -> None:
    """Measure in turns, print a table, write the result."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--measure", action="store_true", help="one process's part; prints JSON")
    args = parser.parse_args()
    if args.measure:
        print(json.dumps(measure()))
        return
    rounds = []
    for index in range(args.rounds):
        order = list(KINDS) if index % 2 == 0 else list(reversed(KINDS))
        rounds.append({kind: measure_apart(kind) for kind in order})
    fast, slow, again = KINDS
    cases = {
        name: {
            "openblas_ms": spread([1e3 * found[fast][name] for found in rounds]),
            "wheel_ms": spread([1e3 * found[slow][name] for found in rounds]),
            "speedup": spread([found[slow][name] / found[fast][name] for found in rounds]),
            "null": spread([found[again][name] / found[fast][name] for found in rounds]),
        }
        for name in rounds[0][fast]
    }
    print("| case | OpenBLAS | wheel | speedup (spread) | null |\n|---|---|---|---|---|")
    for name, case in cases.items():
        ratio = case["speedup"]
        print(
            f"| {name} | {case['openblas_ms']['median']:.3g} ms | {case['wheel_ms']['median']:.3g} ms | "
            f"{ratio['median']:.1f} ({ratio['low']:.1f} to {ratio['high']:.1f}) | {case['null']['median']:.2f} |"
        )
    RESULT.write_text(json.dumps({"rounds": args.rounds, "cases": cases}, indent=1) + "\n")


if __name__ == "__main__":
    main()
