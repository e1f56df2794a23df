"""The README's benchmark tables, made from bench/results: `python bench/table.py` writes them, `--check` compares.

Imports nothing of bench, so that it runs as a script; bench/peers.py prints its own result with the same functions.
"""

import json
import statistics
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
README = ROOT / "README.md"
RESULTS = ROOT / "bench" / "results"
Result = dict[str, Any]
NOISE = 0.1  # what ours against ours may be off before a run is called noisy
RATES = {"prefill": "prompt of {}", "decode": "decode after {}", "batch_8": "8 rows, {}"}
PROCESSES = {
    "first_token_s": "first token, s",
    "process_s": "whole process, s",
    "load_s": "load, s",
    "peak_bytes": "peak memory, MB",
    "weight_bytes": "weights read per token, MB",
    "gbs": "read, GB/s",
}


def make_processes_table(result: Result) -> str:
    """Markdown: one row per pair of processes, medians, and the ratio with its spread."""
    versions = ", ".join(f"{name} {number}" for name, number in result["versions"].items())
    lines = [
        "| what, as a whole process | mlx_edge | mlx-lm | ratio (spread) |",
        "|---|---|---|---|",
    ]
    for row in result["pairs"]:
        ours, theirs = (statistics.median(row[key]) for key in ("ours_s", "theirs_s"))
        ratio = f"{row['ratio_median']:.3f} ({row['ratio_min']:.3f} to {row['ratio_max']:.3f})"
        lines.append(f"| {row['name']} | {ours:.3f} s | {theirs:.3f} s | {ratio} |")
    lines.append("")
    lines.append(
        f"{result['machine']}; {versions}; {result['rounds']} interleaved rounds, medians. "
        "On an Apple machine: not measured."
    )
    return "\n".join(lines) + "\n"


def make_summary_table(result: Result) -> str:
    """Markdown: every key of the summary with its spread, rounds and what it was compared with."""
    lines = [
        "| ratio, ours / theirs | median | spread | rounds | ahead in | what |",
        "|" + "---|" * 6,
    ]
    for key, value in result["summary"].items():
        rounds, note = result["rounds"][key], result["notes"][key]
        if value is None:
            lines.append(f"| `{key}` | not measured | | 0 | | {note} |")
            continue
        low, high = result["spread"][key]
        ahead = result["ahead"][key]
        cells = [f"{value:.2f}", f"{low:.2f} to {high:.2f}", str(rounds), str(ahead), note]
        lines.append(f"| `{key}` | {' | '.join(cells)} |")
    nulls = [f"{name} {null['median']:.2f}" for name, null in result["null"].items()]
    lines += ["", f"Ours against ours: {', '.join(nulls) or 'not run'}."]
    if any(abs(null["median"] - 1) > NOISE for null in result["null"].values()):
        lines.append(
            "**The machine was not quiet**: ours against ours is off, and so is everything else."
        )
    return "\n".join(lines) + "\n"


def make_peer_table(result: Result) -> str:
    """Markdown: for each model what every peer gave, median and spread, each at each of its settings."""
    lines = []
    for group in result["measured"]:
        what = f"**{group['shape']}**, {group['threads']} threads"
        rates = [c for c in sorted(group["columns"], key=_order) if _rate_title(c)]
        processes = [c for c in PROCESSES if c in group["columns"]]
        lines += _grid(f"{what}: tokens/s", group, {c: _rate_title(c) for c in rates})
        lines += _grid(f"{what}: processes", group, {c: PROCESSES[c] for c in processes})
        lines += _sentences(group)
    facts = result["machine"]
    versions = ", ".join(f"{name} {number}" for name, number in result["versions"].items())
    lines.append(
        f"{facts['processor']} ({facts['instruction_sets']}), {facts['cores']} cores, {facts['system']}; {versions}. "
        "Medians over interleaved rounds, the spread in brackets."
    )
    return "\n".join(lines) + "\n"


def _rate_title(column: str) -> str:
    kind, _, number = column.rpartition("_")
    is_rate = kind in RATES and (number.isdigit() or kind.startswith("batch"))
    return RATES[kind].format(number) if is_rate else ""


def _order(column: str) -> tuple[bool, str, int]:
    kind, _, number = column.rpartition("_")
    return kind != "prefill", kind, int(number) if number.isdigit() else 0


def _grid(title: str, group: dict[str, Any], columns: dict[str, str]) -> list[str]:
    """A table of the peers that have any of these columns."""
    lines = [
        f"| {title} | " + " | ".join(columns.values()) + " |",
        "|" + "---|" * (len(columns) + 1),
    ]
    for peer, values in group["peers"].items():
        cells = [_cell(column, values.get(column)) for column in columns]
        if any(cells):
            lines.append(f"| {peer} | {' | '.join(cells)} |")
    return [*lines, ""] if len(lines) > 2 else []


def _sentences(group: dict[str, Any]) -> list[str]:
    """Speculation, and two processes with one model."""
    said = []
    replay = group["peers"].get("mlx_edge replay", {})
    for column in group["columns"]:
        if column.startswith("replay_") and column.endswith("_ngram_accepted") and column in replay:
            text = column.removesuffix("_accepted")
            kinds = ("tokens", "forward_passes", "drafted", "accepted")
            if not all(f"{text}_{kind}" in replay for kind in kinds):
                continue
            tokens, passes, drafted, accepted = (replay[f"{text}_{k}"]["median"] for k in kinds)
            name = text.removeprefix("replay_").removesuffix("_ngram")
            said.append(
                f"Replay of `{name}` with n-gram speculation: {tokens:.0f} tokens in {passes:.0f} passes, "
                f"{accepted:.0f} of {drafted:.0f} drafts accepted."
            )
    twice = group["peers"].get("mlx_edge twice", {})
    if "pss_0" in twice and "pss_1" in twice:
        shares = " and ".join(f"{twice[f'pss_{i}']['median'] / 1e6:.0f} MB" for i in (0, 1))
        said.append(f"Two processes with the model at once: proportional set sizes {shares}.")
    return [*said, ""] if said else []


def _cell(column: str, value: dict[str, float] | None) -> str:
    if value is None:
        return ""
    scale = 1e-6 if column.endswith("_bytes") else 1.0
    middle, low, high = (value[key] * scale for key in ("median", "low", "high"))
    digits = 0 if middle >= 100 else 1 if middle >= 10 else 2
    if low == high:
        return f"{middle:.{digits}f}"
    return f"{middle:.{digits}f} ({low:.{digits}f}-{high:.{digits}f})"


def make_markdown(result: Result) -> str:
    """What bench/peers.py prints and the README shows."""
    return make_summary_table(result) + "\n" + make_peer_table(result)


def make_table() -> str:
    """All tables of the README: those whose results are there."""
    text = make_processes_table(json.loads((RESULTS / "processes.json").read_text()))
    peers = RESULTS / "peers.json"
    if peers.exists():
        text += "\n" + make_markdown(json.loads(peers.read_text()))
    return text


def make_counts_table(result: Result) -> str:
    """Markdown: the keys of bench/metal_counts.py, ours beside MLX's."""

    def cell(value: float | None) -> str:
        return "not counted" if value is None else f"{value:.3f}"

    lines = ["| counted | ours | MLX | what |", "|---|---|---|---|"]
    for key, note in result["notes"].items():
        ours, mlx = (result["summary"][name] for name in (key, f"mlx_{key}"))
        lines.append(f"| `{key}` | {cell(ours)} | {cell(mlx)} | {note} |")
    versions = ", ".join(f"{name} {number}" for name, number in result["versions"].items())
    lines += ["", f"{versions}; {result['mode']} run. No figure was measured on a GPU."]
    nulls = ", ".join(f"{name} {value:.2f}" for name, value in result["null"].items())
    return "\n".join([*lines, f"Counted twice, the second over the first: {nulls}.", ""])


def make_metal_table() -> str:
    """What the README shows of the Metal kernels."""
    counts = RESULTS / "metal_counts.json"
    return make_counts_table(json.loads(counts.read_text())) if counts.exists() else ""


# The formats that the README shows; all of them stand in bench/results/quantization.md.
FORMAT_CELLS = 8
SHOWN_FORMATS = (
    *("float32", "float16", "rtn 8 bit g64", "smooth 8 bit g64", "mxfp8", "rtn 6 bit g64", "mxfp4"),
    *(f"{method} 4 bit g64" for method in ("rtn", "gptq", "awq", "dwq")),
    "gptq 4 bit g32",
    *("rtn mixed 4.5", "gptq mixed 4.5", "rtn 3 bit g64", "gptq 3 bit g64"),
)


def make_quantization_table() -> str:
    """What the README shows of quantization: the report of bench/quantization_report.py with fewer formats."""
    report = RESULTS / "quantization.md"
    if not report.exists():
        return ""
    return "".join(line for line in report.read_text().splitlines(True) if _is_shown(line))


def _is_shown(line: str) -> bool:
    """Not a format's row among those of a model, or one of those formats that are shown."""
    cells = [cell.strip() for cell in line.split("|")[1:-1]]
    is_format = len(cells) == FORMAT_CELLS and not cells[1].startswith(("bits", "-"))
    return not is_format or cells[0] in SHOWN_FORMATS


def make_serving_table() -> str:
    """Markdown: the keys of bench/serving.py; all loads stand in bench/results/serving.md."""
    path = RESULTS / "serving.json"
    if not path.exists():
        return ""
    result: Result = json.loads(path.read_text())
    lines = ["| figure | median | spread | rounds | what |", "|" + "---|" * 5]
    for key, value in result["summary"].items():
        spread = result["spread"].get(key)
        shown = "not measured" if value is None else f"{value:.3g}"
        said = f"{spread[0]:.3g} to {spread[1]:.3g}" if spread else ""
        rounds = result["rounds"].get(key, "")
        lines.append(f"| `{key}` | {shown} | {said} | {rounds} | {result['notes'][key]} |")
    nulls = ", ".join(f"{name} {null['median']:.2f}" for name, null in result["null"].items())
    return "\n".join([*lines, "", f"Ours against ours: {nulls or 'not run'}.", ""])


BLOCKS = {
    "bench": make_table,
    "metal": make_metal_table,
    "quantization": make_quantization_table,
    "serving": make_serving_table,
}


def replaced(text: str) -> str:
    """The README's text with the tables put between their marks."""
    for name, make in BLOCKS.items():
        begin, end = f"<!-- {name}: begin -->\n", f"<!-- {name}: end -->\n"
        before, rest = text.split(begin)
        _, after = rest.split(end)
        text = before + begin + make() + end + after
    return text


def main() -> int:
    """Write the tables, or say whether they are those that the results make."""
    text = README.read_text()
    wanted = replaced(text)
    if "--check" in sys.argv[1:]:
        return int(text != wanted)
    README.write_text(wanted)
    return 0


if __name__ == "__main__":
    sys.exit(main())
