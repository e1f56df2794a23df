"""`python -m mlx_edge.benchmark`: how fast a model reads a prompt and writes tokens on this machine.

Reads flags and prints; the flags have the names that mlx_lm.benchmark gives them, what is timed is said in
`decoding/trials.py`. Beside the speeds stands what served: a figure without that means nothing.
"""

import json
import os
import platform
import sys
import time
from argparse import Namespace
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from statistics import mean, stdev
from typing import TYPE_CHECKING, Any

from mlx_edge.command import Parser, integer, number, run_command
from mlx_edge.options import add_loading, add_memory, loading_options, make_cache

if TYPE_CHECKING:
    from mlx_edge.decoding.trials import Plan, Trial, Trials

PROG = "mlx_edge.benchmark"
PROMPT_TOKENS, GENERATION_TOKENS = 512, 128  # where the flags say nothing and the context has room


def make_parser() -> Parser:
    """All flags."""
    parser = Parser(prog=PROG, description="Measure how fast a model reads and writes tokens.")
    add = parser.add_argument
    add("--model", default="pocket", help="a folder, a hub id (owner/name), or the bundled pocket")
    add("--revision", help="branch, tag or commit of a hub model")
    add(
        "--prompt-tokens",
        "-p",
        type=integer(1),
        help=f"length of the prompt (default: {PROMPT_TOKENS}, or half of a smaller context)",
    )
    add(
        "--generation-tokens",
        "-g",
        type=integer(2),
        help=f"tokens to generate (default: {GENERATION_TOKENS}, or what a smaller context leaves)",
    )
    add("--depth", "-d", type=integer(0), default=0, help="tokens in the cache before the prompt")
    add("--batch-size", "-b", type=integer(1), default=1, help="sequences at once")
    add("--num-trials", "-n", type=integer(1), default=5, help="how often to measure")
    add("--prefill-step-size", type=integer(1), default=2048, help="prompt tokens per step")
    add("--delay", type=number(0), default=0, help="seconds of rest before each trial")
    add_memory(parser)
    add_loading(parser)
    add(
        "--explain-kernels",
        action="store_true",
        help="say what serves each op, and measure nothing",
    )
    add("--output", "-o", choices=("json", "md"), help="print JSON, or a row of a Markdown table")
    return parser


def make_plan(args: Namespace, context_size: int) -> "Plan":
    """What the flags say; lengths that they leave open fit into the model's context."""
    from mlx_edge.decoding.trials import Plan

    room = context_size - args.depth
    wanted = args.generation_tokens or 2
    prompt = args.prompt_tokens or max(1, min(PROMPT_TOKENS, room // 2, room - wanted))
    generation = args.generation_tokens or max(2, min(GENERATION_TOKENS, room - prompt))
    return Plan(prompt, generation, args.depth, args.batch_size)


def warm_up(trials: "Trials") -> dict[str, dict[str, Any]]:
    """Run a trial that does not count; op -> the backend that serves it, and the refusals of those before."""
    from mlx_edge import ops

    backends: dict[str, dict[str, Any]] = {}

    def note(
        op: str,
        backend: str,
        compute: Callable[[], Any],
        args: tuple[Any, ...],
        kwargs: Mapping[str, Any],
    ) -> Any:
        if op not in backends:
            refusals = ops.choose(op, *args, **kwargs).refusals
            backends[op] = {"backend": backend, "refusals": list(refusals)}
        return compute()

    with ops.observe(note):
        trials.run()
    return backends


def describe_machine(backends: Mapping[str, Any]) -> dict[str, object]:
    """What the benchmark ran on."""
    from importlib.metadata import version

    import mlx.core as mx

    from mlx_edge import runtime
    from mlx_edge.ops import cpu
    from mlx_edge.profiler.roofline import usable_cores

    is_cpu = any(served["backend"] == "cpu" for served in backends.values())
    return {
        "system": f"{platform.system()} {platform.machine()}",
        "cores": usable_cores(),
        "processor": mx.device_info().get("device_name", ""),
        "device": "GPU" if runtime.has_gpu() else "CPU",
        "cpu_kernels": cpu.describe() if is_cpu else None,
        "mlx_edge": version("mlx-edge"),
        "mlx": version("mlx"),
        "MLX_EDGE_OPS": os.environ.get("MLX_EDGE_OPS", "auto"),
    }


def measure_share(step_bytes: float, tpot_ms: float) -> dict[str, float] | None:
    """How near decoding comes to reading its bytes at the machine's speed; None where a cache holds them all."""
    from mlx_edge.profiler import machine_bandwidth
    from mlx_edge.profiler.roofline import last_level_cache_bytes
    from mlx_edge.runtime import has_gpu

    if not has_gpu() and step_bytes < 2 * last_level_cache_bytes():
        return None
    read_gbs = machine_bandwidth().read_gbs
    gbs = step_bytes / 1e6 / tpot_ms
    return {
        "step_mb": step_bytes / 1e6,
        "step_gbs": gbs,
        "read_gbs": read_gbs,
        "share": gbs / read_gbs,
    }


def summarise(
    args: Namespace, trials: "Trials", found: Sequence["Trial"], backends: Mapping[str, Any]
) -> dict[str, Any]:
    """All that was measured and on what, ready for JSON; a deviation is null where there is one trial."""
    from mlx_edge.profiler import sample_memory

    rows = [asdict(trial) for trial in found]
    columns = {name: [row[name] for row in rows] for name in rows[0]}
    means = {name: mean(values) for name, values in columns.items()}
    process_peak = sample_memory().peak_resident / 1e9  # before the bandwidth's buffers count too
    return {
        "model": args.model,
        "model_type": trials.model.config.model_type,
        **asdict(trials.plan),
        "num_trials": len(rows),
        "mean": means,
        "deviation": {n: stdev(v) if len(v) > 1 else None for n, v in columns.items()},
        "trials": rows,
        "process_peak_memory": process_peak,
        "bandwidth": measure_share(trials.step_bytes(), means["tpot_ms"]),
        "backends": dict(backends),
        "machine": describe_machine(backends),
    }


def format_trial(trial: "Trial") -> str:
    """One line, as mlx_lm.benchmark writes it, with the two latencies."""
    return ", ".join(f"{name}={value:.3f}" for name, value in asdict(trial).items())


def format_mean(result: Mapping[str, Any], name: str, digits: int = 1) -> str:
    """`mean ± deviation`."""
    deviation = result["deviation"][name]
    text = f"{result['mean'][name]:.{digits}f}"
    return text if deviation is None else f"{text} ± {deviation:.{digits}f}"


def format_origin(result: Mapping[str, Any]) -> list[str]:
    """Lines that say what ran where."""
    machine = result["machine"]
    served: dict[str, list[str]] = {}
    for op, found in result["backends"].items():
        why = "; not ".join((found["backend"], *found["refusals"]))
        served.setdefault(why, []).append(op)
    return [
        f"Machine: {machine['processor']}, {machine['cores']} cores, {machine['system']}, "
        f"{machine['cpu_kernels'] or machine['device']}; "
        f"mlx-edge {machine['mlx_edge']}, mlx {machine['mlx']}",
        *(f"Ops: {', '.join(names)} on {why}" for why, names in served.items()),
    ]


def format_text(result: Mapping[str, Any]) -> str:
    """The summary for people."""
    lines = [
        f"Prompt: {format_mean(result, 'prompt_tps')} tokens-per-sec, "
        f"first token after {format_mean(result, 'ttft_ms')} ms",
        f"Generation: {format_mean(result, 'generation_tps')} tokens-per-sec, "
        f"{format_mean(result, 'tpot_ms', 2)} ms per token",
        f"Peak memory: {result['process_peak_memory']:.3f} GB in the process, "
        f"{result['mean']['peak_memory']:.3f} GB in MLX's arrays",
    ]
    if roof := result["bandwidth"]:
        lines.append(
            f"Bandwidth: {roof['step_gbs']:.1f} GB/s of weights and cache while generating, "
            f"{100 * roof['share']:.0f} % of the {roof['read_gbs']:.1f} GB/s that this machine reads"
        )
    return "\n".join([*lines, *format_origin(result)])


def format_markdown(result: Mapping[str, Any]) -> str:
    """A table of one row, and what it was measured on; rows of several runs can be put together."""
    cells = {
        "model": result["model"],
        "prompt": result["prompt_tokens"],
        "generation": result["generation_tokens"],
        "depth": result["depth"],
        "batch": result["batch_size"],
        "prompt tokens/s": format_mean(result, "prompt_tps"),
        "TTFT ms": format_mean(result, "ttft_ms"),
        "generation tokens/s": format_mean(result, "generation_tps"),
        "TPOT ms": format_mean(result, "tpot_ms", 2),
        "peak GB": f"{result['process_peak_memory']:.3f}",
    }
    rows = (cells, ["---"] * len(cells), cells.values())
    table = "\n".join(f"| {' | '.join(map(str, row))} |" for row in rows)
    count = result["num_trials"]
    trials = "One trial." if count == 1 else f"{count} trials, mean ± standard deviation."
    return f"{table}\n\n{' '.join([*(f'{line}.' for line in format_origin(result)), trials])}"


def run_benchmark(args: Namespace) -> None:
    """Load the model, measure, and print."""
    # Imported here, so that a wrong flag or --help is answered at once.
    from mlx_edge.decoding.trials import Trials
    from mlx_edge.models.explain import explain_kernels
    from mlx_edge.models.load import load

    model, _ = load(args.model, revision=args.revision, **loading_options(args))
    if args.explain_kernels:
        print(*explain_kernels(model), sep="\n")
        return
    plan = make_plan(args, model.config.context_size)
    step_size = args.prefill_step_size
    trials = Trials(model, plan, lambda: make_cache(model, args), prefill_step_size=step_size)
    # Where a program reads the result, what goes on is said beside it.
    log = sys.stdout if args.output is None else sys.stderr
    print("Running warmup..", file=log, flush=True)
    backends = warm_up(trials)
    values = ", ".join(f"{name}={value}" for name, value in asdict(plan).items())
    print(f"Timing with {values}.", file=log, flush=True)
    found = []
    for index in range(args.num_trials):
        time.sleep(args.delay)
        found.append(trials.run())
        print(f"Trial {index + 1}:  {format_trial(found[-1])}", file=log, flush=True)
    result = summarise(args, trials, found, backends)
    if args.output == "json":
        print(json.dumps(result, indent=1))
    else:
        print(format_text(result) if args.output is None else format_markdown(result))


def main(argv: list[str] | None = None) -> int:
    """Run the command; 0, or 2 after a line that says what was wrong."""
    return run_command(PROG, lambda args: run_benchmark(make_parser().parse_args(args)), argv)


if __name__ == "__main__":
    sys.exit(main())
