"""The summary of a bench/quantization.py result, and its tables in markdown. Imports nothing heavy."""

from typing import Any

Result = dict[str, Any]
MODEL = "pocket"  # whose figures the summary has
INT8 = "rtn 8 bit g64"
UNIFORM = "rtn 4 bit g64"
MIXED = "rtn mixed 4.5"
MOST_INT4_BYTES = 0.17  # of float32's


def summarize(result: Result) -> None:
    """Adds `summary`, flat, and `notes` on what each figure is."""
    rows = {row["name"]: row for row in result["models"][MODEL]["rows"]}
    float_bytes = rows["float32"]["bytes"]
    for model in result["models"].values():
        whole = next(row["bytes"] for row in model["rows"] if row["name"] == "float32")
        for row in model["rows"]:
            row["bytes_ratio"] = row["bytes"] / whole
    best = choose_int4(rows)
    rates = result["speed"]["rates"]
    uniform = rows.get(UNIFORM)
    summary: dict[str, float | None] = {}
    notes: dict[str, str] = {}

    def put(key: str, value: float | None, note: str) -> None:
        summary[key] = None if value is None else round(value, 4)
        notes[key] = note

    for key, name in (("int8", INT8), ("int4", best)):
        row = rows.get(name or "")
        speed = rates.get(INT8 if key == "int8" else speed_case(name))
        put(f"{key}_loss", row and row["loss"], f"{name}: {loss_text(row)}" if row else "not run")
        put(f"{key}_bytes_ratio", row and row["bytes"] / float_bytes, "over float32's")
        put(
            f"{key}_speedup",
            speed and speed["ratio"],
            f"decoding over float32's, {result['speed']['shape']}",
        )
    for method in ("awq", "gptq", "dwq"):
        row = rows.get(f"{method} 4 bit g64")
        value = row["kl"] / uniform["kl"] if row and uniform else None
        put(f"kl_{method}_over_rtn", value, "4 bit, groups of 64; the median over the samples")
    mixed = rows.get(MIXED)
    value = mixed["kl"] / uniform["kl"] if mixed and uniform else None
    put("kl_mixed_over_uniform_4p5", value, "round to nearest both, 4.5 bits with scales")
    result["summary"], result["notes"] = summary, notes


def choose_int4(rows: dict[str, Result]) -> str | None:
    """The 4-bit row of least KL in at most 17 % of float32's bytes; the items that measure its loss decide nothing."""
    found = {
        name: row["kl"]
        for name, row in rows.items()
        if " 4 bit g" in name
        and not name.endswith("g128")
        and row["bytes_ratio"] <= MOST_INT4_BYTES
    }
    return min(found, key=lambda name: found[name]) if found else None


def speed_case(name: str | None) -> str:
    """The case that decodes as fast: codes do not matter, the group does."""
    return "rtn 4 bit g32" if name and name.endswith("g32") else UNIFORM


def loss_text(row: Result) -> str:
    """A loss with its interval."""
    return (
        f"{100 * row['loss']:.2f} % of the exact answers lost, 95 % interval {100 * row['low']:.2f} to "
        f"{100 * row['high']:.2f} over {row['items']} items"
    )


def make_table(result: Result) -> str:
    """Markdown: the summary, then a table for each model."""
    lines = ["| figure | value | what |", "|---|---|---|"]
    for key, value in result["summary"].items():
        shown = "not run" if value is None else f"{value:.3f}"
        lines.append(f"| `{key}` | {shown} | {result['notes'][key]} |")
    for name, model in result["models"].items():
        lines += ["", *_model_table(name, model)]
    lines += ["", *_speed_table(result["speed"])]
    versions = ", ".join(f"{name} {number}" for name, number in result["versions"].items())
    lines += ["", f"{versions}; {result['mode']} run on a CPU."]
    return "\n".join(lines) + "\n"


def _model_table(name: str, model: Result) -> list[str]:
    lines = [
        f"| {name} | bits/weight | of float32 | KL (spread) | top-1 | perplexity | exact | lost (95 %) |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in model["rows"]:
        kls = row["kl_samples"]
        spread = f" ({min(kls):.4f} to {max(kls):.4f})" if len(kls) > 1 else ""
        cells = [
            row["name"],
            f"{row['bits_per_weight']:.2f}",
            f"{100 * row['bytes_ratio']:.1f} %",
            f"{row['kl']:.4f}{spread}",
            f"{100 * row['top1']:.1f} %",
            f"{row['perplexity']:.3f}",
            *_answer_cells(row),
        ]
        lines.append("| " + " | ".join(cells) + " |")
    items, tokens = model["items"], model["held_out_tokens"]
    return [*lines, "", f"{items} items, KL over {tokens} tokens, none of them in training."]


def _answer_cells(row: Result) -> tuple[str, str]:
    if row["exact_match"] is None:
        return "not run", "not run"
    lost = f"{100 * row['loss']:.1f} % ({100 * row['low']:.1f} to {100 * row['high']:.1f})"
    return f"{100 * row['exact_match']:.1f} %", lost


def _speed_table(speed: Result) -> list[str]:
    lines = [f"| decoding, {speed['shape']} | tokens/s | over float32 (spread) |", "|---|---|---|"]
    for name, rate in speed["rates"].items():
        low, high = rate["spread"]
        lines.append(
            f"| {name} | {rate['tokens_per_s']:.1f} | {rate['ratio']:.2f} ({low:.2f} to {high:.2f}) |"
        )
    return lines
