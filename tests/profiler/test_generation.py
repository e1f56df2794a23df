"""The bundled model under observation: phases cover the time, every op is named, the text stays the same."""

from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest

from mlx_edge import load, make_sampler, ops, stream_generate
from mlx_edge.models.decoder import find_arrays, find_weights
from mlx_edge.ops import select
from mlx_edge.ops.select import observe
from mlx_edge.profiler import OpProfile, Phases, Profiler, format_report, make_report
from tests.profiler.trace_reader import read_trace

PROMPT = "Once upon a time there was a duck"
TOKENS = 12
BLOCKS = {"attention_block", "mlp_block"}
CHOICE = {"log_softmax", "argmax"}


@pytest.fixture(scope="module")
def loaded() -> Any:
    return load()


def generate(loaded: Any, watch: Profiler, phases: Phases, **options: Any) -> str:
    """As the command line wires it."""
    model, tokenizer = loaded
    sampler = phases.sampler(make_sampler(0))
    steps = stream_generate(
        model, phases.tokenizer(tokenizer), PROMPT, TOKENS, sampler=sampler, **options
    )
    return "".join(response.text for response in phases.steps(steps))


def plain(loaded: Any) -> Iterator[Any]:
    return stream_generate(*loaded, PROMPT, TOKENS)


@pytest.fixture(scope="module")
def observed(loaded: Any) -> tuple[Profiler, OpProfile, str]:
    watch = Profiler()
    op_profile = OpProfile(watch)
    with observe(op_profile):
        text = generate(loaded, watch, Phases(watch))
    return watch, op_profile, text


@pytest.mark.parametrize("evaluates", [True, False])
def test_phases_cover_the_generation(loaded: Any, evaluates: bool) -> None:
    watch = Profiler()
    text = generate(loaded, watch, Phases(watch, evaluates=evaluates))
    assert text == "".join(response.text for response in plain(loaded))
    report = make_report(watch)
    names = [row.name for row in report.phases]
    assert set(names) == {"tokenise", "prefill", "decode", "sample", "detokenise"}
    covered = sum(row.total_s for row in report.phases)
    assert 0.9 * report.wall_s <= covered <= report.wall_s * (1 + 1e-6)
    assert [row.total_s for row in report.phases] == sorted(
        (row.total_s for row in report.phases), reverse=True
    )
    calls = {row.name: row.calls for row in report.phases}
    assert calls["prefill"] == 1
    assert calls["sample"] == TOKENS


def test_children_take_no_longer_than_their_parents(observed: Any) -> None:
    totals = observed[0].totals()
    for path, total in totals.items():
        inside = [t for p, t in totals.items() if p[:-1] == path]
        assert sum(t.total_ns for t in inside) == total.total_ns - total.self_ns
        assert total.self_ns >= 0


def test_every_op_that_ran_is_named(loaded: Any, observed: Any, monkeypatch: Any) -> None:
    ran = []
    choose = select.choose

    def noting(op: str, *args: Any, **kwargs: Any) -> Any:
        choice = choose(op, *args, **kwargs)
        ran.append((op, choice.backend.name))
        return choice

    monkeypatch.setattr(select, "choose", noting)
    for _ in plain(loaded):
        pass
    report = make_report(observed[0], ops=observed[1])
    assert {(row.op, row.backend) for row in report.ops} == set(ran)
    for op in {op for op, _ in ran}:
        assert sum(row.calls for row in report.ops if row.op == op) == [o for o, _ in ran].count(op)
    assert sum(row.share for row in report.ops) == pytest.approx(1)


def test_layers_are_told_apart(loaded: Any, observed: Any) -> None:
    num_layers = len(loaded[0].layers)
    for key, total in observed[1].totals().items():
        assert (key.layer is not None) == (key.op in BLOCKS)
        # The prompt is one pass, and every token after the first another.
        assert total.calls == {"prefill": 1, "decode": TOKENS - 1, "sample": TOKENS}[key.phase]
    report = make_report(observed[0], ops=observed[1])
    layers = {(row.phase, row.layer): row for row in report.layers}
    assert set(layers) == {(p, n) for p in ("prefill", "decode") for n in range(num_layers)}
    assert all(row.calls == 2 * (TOKENS - 1) for (p, _), row in layers.items() if p == "decode")
    in_blocks = sum(row.total_s for row in report.ops if row.op in BLOCKS)
    assert sum(row.total_s for row in report.layers) == pytest.approx(in_blocks)


def test_bytes_of_a_layer_hold_its_weights(loaded: Any, observed: Any) -> None:
    mlp = loaded[0].layers[0].mlp
    weights = sum(w.weight_bytes for w in find_weights(mlp) if isinstance(w, ops.Packed))
    weights += sum(array.nbytes for array in find_arrays(mlp))
    decode = {
        key.op: total.num_bytes / total.calls
        for key, total in observed[1].totals().items()
        if key.phase == "decode" and key.layer in (0, None)
    }
    hidden = loaded[0].config.hidden_size * 4
    assert decode["mlp_block"] == weights + 2 * hidden
    row = sum(
        w.weight_bytes // w.shape[0]
        for w in find_weights(loaded[0].embedding)
        if isinstance(w, ops.Packed)
    )
    row += sum(array.nbytes // array.shape[0] for array in find_arrays(loaded[0].embedding))
    assert decode["embed"] == 4 + row + hidden
    assert decode["head"] > loaded[0].config.vocab_size * row


def test_the_report_and_the_trace_of_a_generation(
    loaded: Any, observed: Any, tmp_path: Path
) -> None:
    watch, op_profile, text = observed
    cost = Phases(watch).compare(plain(loaded))
    assert cost.num_plain_steps == TOKENS
    assert cost.plain_s > 0
    table = format_report(make_report(watch, ops=op_profile))
    for name in ("prefill", "decode", "sample", "detokenise", *BLOCKS, "embed", "head"):
        assert f"\n{name} " in table
    watch.dump_trace(tmp_path / "trace.json")
    events = read_trace(tmp_path / "trace.json")
    ops_in_trace = [e for e in events if e["ph"] == "X" and e["cat"] == "op"]
    assert {e["name"] for e in ops_in_trace} == {*BLOCKS, *CHOICE, "embed", "head"}
    assert all(e["args"]["bytes"] > 0 and e["args"]["backend"] for e in ops_in_trace)
    assert any(e["ph"] == "C" and e["args"]["active"] > 0 for e in events)
    assert text == "".join(response.text for response in plain(loaded))


def test_observing_is_compared_with_the_same_run(loaded: Any) -> None:
    watch = Profiler()
    phases = Phases(watch)
    generate(loaded, watch, phases)
    cost = phases.compare(plain(loaded))
    assert cost.num_steps == cost.num_plain_steps == TOKENS
    assert cost.ratio == cost.observed_s / cost.plain_s > 0


def test_a_long_prompt_in_chunks_is_one_prefill(loaded: Any) -> None:
    watch = Profiler()
    op_profile = OpProfile(watch)
    with observe(op_profile):
        generate(loaded, watch, Phases(watch), prefill_step_size=2)
    prefill = {k.op: t.calls for k, t in op_profile.totals().items() if k.phase == "prefill"}
    assert prefill["embed"] > 1
    assert prefill["attention_block"] == prefill["embed"]  # of each layer
    assert {row.name: row.calls for row in make_report(watch).phases}["prefill"] == 1


@pytest.mark.parametrize("leaves", ["raise", "close"])
def test_leaving_early_closes_every_span(loaded: Any, leaves: str) -> None:
    watch = Profiler()
    phases = Phases(watch)
    steps = phases.steps(stream_generate(*loaded, PROMPT, TOKENS))
    with pytest.raises(ZeroDivisionError) if leaves == "raise" else nullcontext():
        for count, _ in enumerate(steps):
            if count == 3:
                if leaves == "raise":
                    raise ZeroDivisionError
                break
    steps.close()  # type: ignore[attr-defined]
    assert watch.current_phase() is None
    with watch.start("after"):
        pass
    assert ("after",) in watch.totals()


def test_an_error_within_a_step_is_named_in_its_phase(loaded: Any) -> None:
    watch = Profiler()
    phases = Phases(watch)

    def fail(_logprobs: mx.array) -> mx.array:
        raise ZeroDivisionError

    steps = stream_generate(*loaded, PROMPT, TOKENS, sampler=phases.sampler(fail))
    with pytest.raises(ZeroDivisionError):
        next(phases.steps(steps))
    errors = [(e.path[-1], e.details.get("error")) for e in watch.events()]
    assert ("sample", "ZeroDivisionError") in errors
    assert ("decode", "ZeroDivisionError") in errors
    assert ("prefill", None) in errors


def test_off_nothing_is_wrapped_and_no_op_is_evaluated(loaded: Any) -> None:
    watch = Profiler(is_on=False)
    phases, op_profile = Phases(watch), OpProfile(watch)
    tokenizer, sampler = loaded[1], make_sampler(0)
    assert phases.tokenizer(tokenizer) is tokenizer
    assert phases.sampler(sampler) is sampler
    with observe(op_profile):
        text = generate(loaded, watch, phases)
    assert text == "".join(response.text for response in plain(loaded))
    assert op_profile.totals() == {}
    assert watch.events() == []


def test_a_timed_tokenizer_is_the_tokenizer(loaded: Any) -> None:
    tokenizer = loaded[1]
    watch = Profiler()
    stand_in = Phases(watch).tokenizer(tokenizer)
    ids = stand_in.encode(PROMPT)
    assert ids == tokenizer.encode(PROMPT)
    assert stand_in.decode(ids) == tokenizer.decode(ids)
    assert stand_in.eos_token_ids == tokenizer.eos_token_ids
    with pytest.raises(AttributeError):
        stand_in.eos_token_id = 3  # type: ignore[misc]
    with pytest.raises(AttributeError):
        _ = stand_in.missing  # type: ignore[attr-defined]
