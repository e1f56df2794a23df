"""The README's benchmark table, made from bench/results: `python bench/table.py` writes it, `--check` compares."""

import json
import statistics
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
README = ROOT / "README.md"
BEGIN, END = "<!-- bench: begin -->\n", "<!-- bench: end -->\n"


def make_table() -> str:
    """Markdown: one row per pair of processes, medians, and the ratio with its spread."""
    result = json.loads((ROOT / "bench" / "results" / "peers.json").read_text())
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


def replaced(text: str) -> str:
    """The README's text with the table put between its marks."""
    before, rest = text.split(BEGIN)
    _, after = rest.split(END)
    return before + BEGIN + make_table() + END + after


def main() -> int:
    """Write the table, or say whether it is the one that the results make."""
    text = README.read_text()
    wanted = replaced(text)
    if "--check" in sys.argv[1:]:
        return int(text != wanted)
    README.write_text(wanted)
    return 0


if __name__ == "__main__":
    sys.exit(main())
