"""Receipts: written, read back strictly, said in words, made from two models, and tied to their weights."""

import json
import shutil
from dataclasses import replace

import pytest

from mlx_edge.calibration.comparison import compare
from mlx_edge.calibration.measurement import (
    Facts,
    count_weights,
    fingerprint_weights,
    make_receipt,
    measure_receipt,
)
from mlx_edge.calibration.receipt import (
    FILE_NAME,
    Receipt,
    Run,
    TextSource,
    read_receipt,
    write_receipt,
)
from mlx_edge.calibration.text import Sample
from mlx_edge.errors import ModelFormatError
from mlx_edge.generate import main
from mlx_edge.quant import Packing
from tests.calibration.pairs import change_weights, open_model, pocket_folder, tiny_folder
from tests.calibration.test_comparison import ROWS

TEXT = TextSource("built-in", "cd" * 32)
RECEIPT = Receipt(
    mlx_edge_version="0.1.0",
    weights="ab" * 32,
    model="owner/Model-1B",
    method="gptq",
    packing="4 bit, groups of 64",
    num_exceptions=3,
    bits_per_weight=4.512,
    weights_bytes_before=7361024,
    weights_bytes_after=2100000,
    kl_mean=0.01234,
    kl_p99=0.2,
    top1_agreement=0.971,
    perplexity_before=3.18,
    perplexity_after=3.21,
    num_tokens=4096,
    calibrated_on=TEXT,
    measured_on=TEXT,
    reason=None,
    run=Run(12.34, 310_000_000),
)
UNMEASURED = replace(
    RECEIPT,
    kl_mean=None,
    kl_p99=None,
    top1_agreement=None,
    perplexity_before=None,
    perplexity_after=None,
    measured_on=None,
    calibrated_on=None,
    num_tokens=0,
    reason="the model has no tokenizer",
)
FACTS = Facts("tiny", "rtn", "4 bit, groups of 32", 0, 1000, None, Run(1.0, 2))


@pytest.mark.parametrize("receipt", [RECEIPT, UNMEASURED])
def test_a_receipt_is_read_back_as_it_was(tmp_path, receipt) -> None:
    write_receipt(tmp_path, receipt)
    assert read_receipt(tmp_path) == receipt
    assert read_receipt(tmp_path / "none") is None
    assert json.loads((tmp_path / FILE_NAME).read_text())["run"] == {
        "seconds": 12.34,
        "peak_memory_bytes": 310_000_000,
    }


def test_lines_are_aligned_and_say_every_figure() -> None:
    lines = RECEIPT.lines()
    assert len({line.index("  ") <= 15 and len(line) < 100 for line in lines}) == 1
    assert lines[0] == "Method           gptq, 4 bit, groups of 64; 3 layers otherwise"
    said = "\n".join(lines)
    for figure in (
        "4.512",
        "2.1 MB",
        "28.5%",
        "0.0123 nats",
        "P99 0.200",
        "97.10%",
        "3.21",
        "3.18",
    ):
        assert figure in said
    for figure in ("+0.94%", "4096 tokens of built-in (sha256 cdcdcdcdcdcd)", "12.3 s", "310.0 MB"):
        assert figure in said
    assert RECEIPT.summary() == (
        "4.51 bits/weight, KL 0.0123 nats/token, top-1 97.1% (gptq, measured on built-in)"
    )
    assert "not measured: the model has no tokenizer" in "\n".join(UNMEASURED.lines())
    assert UNMEASURED.summary() == (
        "4.51 bits/weight, not measured: the model has no tokenizer (gptq)"
    )


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"kl_median": 1, "colour": 2}, "unknown fields: colour, kl_median"),
        ({"method": ...}, "missing fields: method"),
        ({"run": {"seconds": 1.0}}, "run: found missing fields: peak_memory_bytes"),
        ({"version": 2}, "version 2, from a later mlx_edge; this one reads version 1"),
        ({"version": "1"}, "version '1', expected 1"),
        ({"version": ...}, "version 'None', expected 1"),
        ({"kl_mean": "0.1"}, "kl_mean '0.1', expected float"),
        ({"kl_mean": -0.1}, "kl_mean '-0.1', expected float"),
        ({"num_tokens": True}, "num_tokens 'True', expected int"),
        ({"num_tokens": 1.5}, "num_tokens '1.5', expected int"),
        ({"method": None}, "method 'None', expected str"),
        ({"measured_on": "text"}, "measured_on 'text', expected TextSource"),
        ({"kl_p99": None}, "only some of its measures"),
        ({"reason": "why"}, "only some of its measures"),
    ],
)
def test_a_receipt_that_is_not_one_is_named(change, message) -> None:
    raw = json.loads(RECEIPT.to_json()) | change
    raw = {key: value for key, value in raw.items() if value is not ...}
    with pytest.raises(ModelFormatError) as caught:
        Receipt.from_json(json.dumps(raw), "here/quality.json")
    assert message in str(caught.value) and str(caught.value).startswith("here/quality.json")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("text", ["", "[]", "{", '{"version": NaN}', "[" * 100_000])
def test_what_is_no_json_object_is_said(text) -> None:
    with pytest.raises(ModelFormatError, match="it is no receipt"):
        Receipt.from_json(text)


def test_a_file_that_is_no_text_is_said(tmp_path) -> None:
    (tmp_path / FILE_NAME).write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ModelFormatError, match="cannot be read"):
        read_receipt(tmp_path)
    (tmp_path / FILE_NAME).write_bytes(b" " * (2 << 20))
    with pytest.raises(ModelFormatError, match="more than 1048576 bytes"):
        read_receipt(tmp_path)


def test_a_receipt_holds_what_was_compared(tmp_path) -> None:
    source, written = (
        open_model(tiny_folder(tmp_path / n, noise=x)) for n, x in (("a", 0), ("b", 0.02))
    )
    sample = Sample(ROWS, "rows", "00")
    receipt = measure_receipt(source, written, sample, FACTS)
    found = compare(source, written, ROWS)
    assert (receipt.kl_mean, receipt.kl_p99) == (found.kl_mean, found.kl_p99)
    assert (receipt.top1_agreement, receipt.num_tokens) == (found.top1, 85)
    assert receipt.perplexity_before == found.reference_perplexity
    assert receipt.perplexity_after == found.other_perplexity
    assert receipt.measured_on == TextSource("rows", "00") and receipt.reason is None
    assert measure_receipt(source, written, sample, FACTS) == receipt  # to the last bit
    assert Receipt.from_json(receipt.to_json()) == receipt


def test_what_cannot_be_measured_has_a_reason(tmp_path) -> None:
    source = open_model(tiny_folder(tmp_path / "a"))
    broken = tiny_folder(tmp_path / "b")
    change_weights(broken, lambda _, w: w * float("inf"))
    receipt = measure_receipt(source, open_model(broken), Sample(ROWS, "rows", "00"), FACTS)
    assert receipt.kl_mean is None and receipt.reason is not None
    assert "NaN or infinity" in receipt.reason
    assert Receipt.from_json(receipt.to_json()) == receipt


@pytest.mark.parametrize(
    ("packing", "bits"), [(None, 16.0), (Packing(64, 4), 4.5), (Packing(32, 3), 4.0)]
)
def test_bits_per_weight_count_scales_and_norms(tmp_path, packing, bits) -> None:
    model = open_model(pocket_folder(tmp_path / "m", packing))
    count = count_weights(model.checkpoint, model.config)
    assert count.num_values == 3_672_320
    norms = 9 * 256 / count.num_values  # of 16 bits in every case
    assert count.bits_per_weight == pytest.approx(bits + (16 - bits) * norms, rel=1e-9)
    receipt = make_receipt(model.checkpoint, count, FACTS, reason="not asked for")
    assert (receipt.bits_per_weight, receipt.weights_bytes_after) == (
        count.bits_per_weight,
        count.num_bytes,
    )


def test_a_fingerprint_is_of_the_numbers_not_of_the_file(tmp_path) -> None:
    first = open_model(tiny_folder(tmp_path / "a")).checkpoint
    copy = shutil.copytree(tmp_path / "a", tmp_path / "b")
    (copy / "model.safetensors").touch()
    assert fingerprint_weights(open_model(copy).checkpoint) == fingerprint_weights(first)
    other = open_model(tiny_folder(tmp_path / "c", noise=1e-3)).checkpoint
    assert fingerprint_weights(other) != fingerprint_weights(first)
    assert fingerprint_weights(open_model(tiny_folder(tmp_path / "d", seed=1)).checkpoint) != (
        fingerprint_weights(first)
    )


def test_generate_prints_the_receipt_of_these_weights_alone(tmp_path, capfd) -> None:
    folder = pocket_folder(tmp_path / "m", Packing(64, 4))
    model = open_model(folder)

    def said() -> str:
        assert main(["--model", str(folder), "--max-tokens", "2"]) == 0
        return capfd.readouterr().out.splitlines()[-1]

    assert said().startswith("Loaded: ")
    weights = fingerprint_weights(model.checkpoint)
    write_receipt(folder, replace(RECEIPT, weights=weights))
    assert said() == f"Quality: {RECEIPT.summary()}"
    write_receipt(folder, RECEIPT)
    assert said() == "Quality: unknown; quality.json is the receipt of other weights"
    (folder / FILE_NAME).write_text("{}")
    assert said().startswith("Quality: unknown; ") and "version 'None'" in said()
