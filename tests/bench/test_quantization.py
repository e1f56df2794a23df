"""The bench of quantization: its text is held out, its losses are paired, its summary takes the right rows."""

import re
from pathlib import Path

import mlx.core as mx
import pytest

from bench.quantization_report import choose_int4, make_table, summarize
from bench.quantization_score import relative_loss
from bench.quantization_text import LENGTH, PocketText, fill_rows
from mlx_edge.text import load_tokenizer
from mlx_edge.weights.hub import find_model

ROOT = Path(__file__).parents[2]


def row(name, kl, num_bytes=14, **values):
    return {
        "name": name,
        "kl": kl,
        "kl_samples": [kl],
        "bytes": num_bytes,
        "bits_per_weight": num_bytes / 100 * 32,
        "top1": 0.9,
        "perplexity": 2.0,
        "exact_match": 0.8,
        "loss": 0.01,
        "low": 0.0,
        "high": 0.02,
        "items": 10,
    } | values


@pytest.fixture
def result():
    rows = [
        row("float32", 0.0, 100),
        row("rtn 8 bit g64", 0.001, 27),
        row("rtn 4 bit g64", 0.2),
        row("gptq 4 bit g64", 0.1),
        row("gptq 4 bit g32", 0.08, 16, loss=0.03),
        row("dwq 4 bit g128", 0.01),
        row("awq 4 bit g64", 0.15),
        row("rtn mixed 4.5", 0.05),
    ]
    rate = {"tokens_per_s": 10.0, "ratio": 2.0, "spread": [1.9, 2.1]}
    rates = {"float32": rate, "rtn 8 bit g64": rate, "rtn 4 bit g32": rate | {"ratio": 3.0}}
    return {
        "models": {"pocket": {"rows": rows, "items": 10, "held_out_tokens": 64}},
        "speed": {"shape": "some", "rates": rates},
        "versions": {"mlx": "0.1"},
        "mode": "quick",
    }


def test_the_summary_has_ratios_and_the_best_int4_by_kl(result):
    summarize(result)
    assert result["summary"] == {
        "int8_loss": 0.01,
        "int8_bytes_ratio": 0.27,
        "int8_speedup": 2.0,
        "int4_loss": 0.03,
        "int4_bytes_ratio": 0.16,
        "int4_speedup": 3.0,
        "kl_awq_over_rtn": 0.75,
        "kl_gptq_over_rtn": 0.5,
        "kl_dwq_over_rtn": None,
        "kl_mixed_over_uniform_4p5": 0.25,
    }
    table = make_table(result)
    assert "gptq 4 bit g32" in table and "not run" in table


def test_every_key_has_its_line_in_the_readme(result):
    summarize(result)
    text = (ROOT / "bench" / "README.md").read_text().split("## Quantized models")[1]
    lines = re.findall(r"^\| (`.*?`) \|", text.split("\n## ")[0], re.MULTILINE)
    assert {key for line in lines for key in re.findall(r"`(\w+)`", line)} == set(result["summary"])


def test_int4_has_a_limit_of_bytes(result):
    summarize(result)
    rows = {row["name"]: row for row in result["models"]["pocket"]["rows"]}
    rows["gptq 4 bit g32"]["bytes_ratio"] = 0.18
    assert choose_int4(rows) == "gptq 4 bit g64"


def test_a_loss_is_net_and_its_interval_holds_it():
    reference = [True] * 900 + [False] * 100
    other = [True] * 880 + [False] * 20 + [True] * 10 + [False] * 90
    found = relative_loss(reference, other)
    assert found["loss"] == pytest.approx(10 / 900)
    # The standard error of 30 changed items in 900, in a normal interval.
    half = 1.96 * 30**0.5 / 900
    assert found["high"] - found["low"] == pytest.approx(2 * half, rel=0.1)
    assert relative_loss(reference, reference)["high"] == 0


def test_rows_begin_with_a_document():
    documents = [[1] + [7] * 30, [1] + [8] * 50, [1] * 100, [1] + [9] * 63]
    rows = fill_rows(iter(documents), 3)
    assert rows.shape == (3, LENGTH)
    assert rows[:, 0].tolist() == [1, 1, 1]
    assert rows[0].tolist() == (documents[0] + documents[1])[:LENGTH]
    assert rows[2].tolist() == documents[3]


def test_what_measures_is_not_what_calibrates():
    text = PocketText(load_tokenizer(find_model("pocket")))
    held = {tuple(line) for line in text.held_out_rows(64).rows.tolist()}
    samples = [text.calibration_rows(64, seed) for seed in range(2)]
    assert len(held) == 64
    for sample in samples:
        assert not held & {tuple(line) for line in sample.rows.tolist()}
    assert not mx.array_equal(samples[0].rows, samples[1].rows)
    assert samples[0].sha256 != samples[1].sha256
    items = text.items({"command": 5, "qa": 5})
    assert len(items) == 10 and all(item.answer[-1] == 2 for item in items)
