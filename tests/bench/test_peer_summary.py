"""The arithmetic of bench/peers.py on records that are written by hand."""

from typing import Any

import pytest

from bench.peer_report import make_result
from bench.peer_summary import LLAMA, OURS, Figure, Rounds, cold, compare, memory, ngram, rate
from bench.table import make_markdown

KEYS = {
    "prefill_vs_llamacpp_1b",
    "decode_vs_llamacpp_1b",
    "decode_gbs_vs_llamacpp_1b",
    "prefill_vs_llamacpp_06b",
    "decode_vs_llamacpp_06b",
    "prefill_vs_openvino_1b",
    "decode_vs_openvino_1b",
    "decode_vs_mlxlm_1b",
    "prefill_vs_mlxlm_1b",
    "decode_fraction_of_stream_1b",
    "cold_first_token_vs_llamacpp",
    "peak_memory_over_weights",
    "ngram_speedup_repetitive",
    "ngram_ratio_plain_text",
}
FACTS = {
    "mode": "test",
    "machine": {"processor": "none", "instruction_sets": "", "cores": 2, "system": "none"},
    "versions": {"llama.cpp": "0"},
}
SHAPES = {"1b": "big", "06b": "small"}


def record(
    index: int, peer: str, shape: str = "big", error: str | None = None, **values: float
) -> Any:
    facts = {"round": index, "peer": peer, "shape": shape, "threads": 2, "error": error}
    return facts | {"job": f"{shape} / {peer}", "values": values}


def test_a_peer_is_taken_at_its_best_setting_over_all_rounds() -> None:
    rounds = Rounds(
        [
            record(0, OURS, decode_0=30.0),
            record(1, OURS, decode_0=20.0),
            record(0, f"{LLAMA} Q4_0", decode_0=10.0),
            record(1, f"{LLAMA} Q4_0", decode_0=20.0),
            record(0, f"{LLAMA} Q4_K_M", decode_0=25.0),  # better once, worse by the median
            record(1, f"{LLAMA} Q4_K_M", decode_0=4.0),
        ]
    )
    figure = rate(rounds, "big", "decode_", LLAMA)
    assert figure.ratios == (3.0, 1.0)
    assert figure.median == 2.0
    assert "Q4_0" in figure.note


def test_a_key_of_several_measurements_is_the_worst_for_us() -> None:
    rounds = Rounds(
        [
            record(0, OURS, prefill_128=300.0, prefill_512=200.0),
            record(0, f"{LLAMA} Q4_0", prefill_128=100.0, prefill_512=100.0),
        ]
    )
    assert rate(rounds, "big", "prefill_", LLAMA).median == 2.0


def test_gigabytes_are_those_that_each_reads() -> None:
    rounds = Rounds(
        [
            record(0, OURS, decode_0=50.0, decode_2048=1.0, weight_bytes=600e6),
            record(0, f"{LLAMA} Q4_0", decode_0=40.0, weight_bytes=800e6),
            record(0, f"{LLAMA} Q4_K_M", decode_0=39.0, weight_bytes=1000e6),
        ]
    )
    figure = rate(rounds, "big", "decode_", LLAMA, "gbs")
    assert figure.median == pytest.approx(30 / 39)
    assert "Q4_K_M" in figure.note


def test_only_rounds_that_both_have_are_compared() -> None:
    rounds = Rounds(
        [
            record(0, OURS, decode_0=30.0),
            record(1, OURS, decode_0=30.0),
            record(1, f"{LLAMA} Q4_0", decode_0=10.0),
            record(2, f"{LLAMA} Q4_0", decode_0=1.0),
        ]
    )
    ours = rounds.series("big", OURS, "decode_0")
    theirs = rounds.series("big", f"{LLAMA} Q4_0", "decode_0")
    assert compare(ours, theirs).ratios == (3.0,)


def test_cold_start_is_against_the_faster_of_their_files_with_defaults() -> None:
    rounds = Rounds(
        [
            record(0, f"{OURS} cold", first_token_s=0.5),
            record(0, f"{LLAMA} cold default Q4_0", first_token_s=2.0),
            record(0, f"{LLAMA} cold default Q4_K_M", first_token_s=1.0),
            record(0, f"{LLAMA} cold no-repack Q4_0", first_token_s=0.1),
        ]
    )
    assert cold(rounds, "big").ratios == (0.5,)


def test_memory_counts_the_cache_of_the_deepest_measurement() -> None:
    values = {"prefill_128": 1.0, "decode_2048": 1.0, "weight_bytes": 1000.0, "peak_bytes": 6192.0}
    rounds = Rounds([record(0, OURS, **values)])
    assert memory(rounds, "big", lambda shape, positions: positions).ratios == (6192 / 3048,)


def test_speculation_is_the_worst_of_the_texts() -> None:
    values = {
        "replay_a_plain_seconds": 4.0,
        "replay_a_ngram_seconds": 1.0,
        "replay_b_plain_seconds": 4.0,
        "replay_b_ngram_seconds": 2.0,
    }
    rounds = Rounds([record(0, f"{OURS} replay", **values)])
    assert ngram(rounds, "big", ("a", "b")).median == 2.0


def test_every_key_is_there_without_a_single_measurement() -> None:
    result = make_result([], SHAPES, {"big": 1, "small": 1}, FACTS)
    assert set(result["summary"]) == KEYS
    assert set(result["summary"].values()) == {None}
    assert all(result["notes"][key] for key in KEYS)


def test_a_peer_that_failed_is_null_and_says_why() -> None:
    records = [
        record(0, OURS, decode_0=30.0, prefill_128=300.0),
        record(0, f"{LLAMA} Q4_0", error="llama-bench ended with 1"),
    ]
    result = make_result(records, SHAPES, {"big": 1, "small": 1}, FACTS)
    assert result["summary"]["decode_vs_llamacpp_1b"] is None
    assert "llama-bench ended with 1" in result["notes"]["decode_vs_llamacpp_1b"]
    assert result["failures"] == [f"big / {LLAMA} Q4_0: llama-bench ended with 1"]


def test_tables_show_every_key_and_every_peer() -> None:
    records = [
        record(0, OURS, decode_0=30.0, weight_bytes=1e9, peak_bytes=2e9),
        record(0, f"{LLAMA} Q4_0", decode_0=10.0, weight_bytes=1e9),
        record(0, "STREAM", gbs=40.0),
    ]
    text = make_markdown(make_result(records, SHAPES, {"big": 1, "small": 1}, FACTS))
    assert all(f"`{key}`" in text for key in KEYS)
    assert "| llama.cpp Q4_0 | 10.0 |" in text
    assert "| `decode_vs_llamacpp_1b` | 3.00 |" in text
    assert "| `decode_fraction_of_stream_1b` | 0.75 |" in text


def test_a_figure_without_rounds_has_no_median() -> None:
    assert Figure().median is None


def test_a_peer_too_slow_for_the_same_numbers_counts_with_those_it_has() -> None:
    rounds = Rounds(
        [
            record(0, OURS, prefill_128=300.0, decode_0=40.0, decode_2048=30.0),
            record(0, "mlx-lm float32", prefill_16=1.0, decode_0=0.5),
            record(0, "mlx-lm as stored", prefill_2=0.1, decode_0=0.1),
        ]
    )
    assert rate(rounds, "big", "prefill_", "mlx-lm").median == 300.0
    assert rate(rounds, "big", "decode_", "mlx-lm").median == 60.0


@pytest.mark.parametrize(("again", "is_quiet"), [(29.0, True), (20.0, False)])
def test_a_noisy_run_says_so(again: float, is_quiet: bool) -> None:
    records = [record(0, OURS, decode_0=30.0), record(0, f"{OURS} again", decode_0=again)]
    text = make_markdown(make_result(records, SHAPES, {"big": 1, "small": 1}, FACTS))
    assert ("not quiet" in text) is not is_quiet
