"""A model in memory, quantized: what changes, what stays, and what is refused in words."""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from mlx_edge import ops
from mlx_edge.errors import InvalidRequestError
from mlx_edge.models.load import load_model
from mlx_edge.ops import cpu
from mlx_edge.quant import Packing, Quantizer, QuantMode, find_grid, make_grid, quantize_onto
from mlx_edge.quant.tree import find_weights
from tests.models.tiny import CONFIGS, make_model, save_model
from tests.ops.oracle import f64
from tests.quant.oracle import values_of

lacking = cpu.missing()
needs_kernels = pytest.mark.skipif(lacking is not None, reason=f"no CPU kernels: {lacking}")
DYNAMIC, STATIC = QuantMode.DYNAMIC, QuantMode.STATIC


@dataclass(frozen=True)
class Chain:
    """The smallest model: a table, two linears one after the other, the table again."""

    table: ops.Embedding
    parts: tuple[ops.Linear, ...]
    head: ops.Linear
    name: str = "chain"

    def __call__(self, tokens: mx.array) -> mx.array:
        x = ops.embed(tokens, self.table)
        for part in self.parts:
            x = x + ops.linear(x, part)
        return ops.linear(x, self.head)


@pytest.fixture
def chain() -> Chain:
    mx.random.seed(2)
    table = ops.Dense(mx.random.normal((50, 64)))
    parts = tuple(
        ops.Dense(mx.random.normal((64, 64)) / 8, mx.random.normal((64,))) for _ in range(2)
    )
    return Chain(ops.Embedding(table), parts, table)


TOKENS = mx.array([[1, 2, 3, 4, 5, 6], [9, 8, 7, 6, 5, 4]])


def names(model: object, kind: type) -> list[str]:
    return [one.name for one in find_weights(model) if isinstance(one.weight, kind)]


def error(first: Any, second: Any) -> float:
    a, b = (np.array(model(TOKENS)) for model in (first, second))
    return float(np.linalg.norm(a - b) / np.linalg.norm(a))


@pytest.mark.parametrize(("bits", "wanted"), [(8, 0.012), (6, 0.045), (4, 0.2)])
@pytest.mark.parametrize("symmetric", [False, True])
def test_dynamic_quantizes_every_weight_once(
    chain: Chain, bits: int, wanted: float, symmetric: bool
) -> None:
    quantized = Quantizer(DYNAMIC, bits=bits, symmetric=symmetric).quantize(chain)
    assert names(quantized, ops.Quantized) == ["table.table", "parts.0", "parts.1"]
    assert quantized.head is quantized.table.table
    assert quantized.name == "chain" and isinstance(chain.head, ops.Dense)
    assert 0 < error(chain, quantized) < wanted


def test_static_inputs_have_a_step_and_lookups_none(chain: Chain) -> None:
    untied = replace(chain, head=ops.Dense(mx.random.normal((50, 64))))
    quantized = Quantizer(STATIC).with_calibration(TOKENS).quantize(untied)
    steps = {one.name: one.weight.input_scale for one in find_weights(quantized)}
    assert steps.pop("table.table") is None
    assert all(step and 0.001 < step < 1 for step in steps.values()) and len(steps) == 3
    assert 0 < error(untied, quantized) < 0.05
    tied = Quantizer(STATIC).with_calibration(TOKENS).quantize(chain)
    assert tied.head is tied.table.table and tied.head.input_scale


def test_static_asks_for_calibration(chain: Chain) -> None:
    with pytest.raises(InvalidRequestError, match=r"call with_calibration\(tokens\) first"):
        Quantizer(STATIC).quantize(chain)


def test_calibration_makes_a_new_quantizer() -> None:
    plain = Quantizer(STATIC, bits=4)
    calibrated = plain.with_calibration(TOKENS)
    assert plain.calibration == () and len(calibrated.calibration) == 1
    assert replace(calibrated, calibration=()) == plain


def generate() -> Iterator[list[int]]:
    yield from TOKENS.tolist()


@pytest.mark.parametrize(
    "data",
    [
        TOKENS,
        TOKENS.tolist(),
        [TOKENS[:1], TOKENS[1:]],
        [TOKENS[0], TOKENS[1].tolist()],
        generate(),
        np.array(TOKENS, np.int64),
        list(np.array(TOKENS)),
    ],
    ids=["array", "lists", "batches", "mixed", "generator", "numpy", "rows of numpy"],
)
def test_calibration_data_come_in_many_forms(chain: Chain, data: Any) -> None:
    wanted = Quantizer(STATIC).with_calibration(TOKENS).quantize(chain)
    found = Quantizer(STATIC).with_calibration(data).quantize(chain)
    for one, other in zip(find_weights(wanted), find_weights(found), strict=True):
        assert one.weight.input_scale == pytest.approx(other.weight.input_scale)


@pytest.mark.parametrize(
    ("data", "said"),
    [
        ([], "hold no tokens"),
        (mx.zeros((0, 4), mx.int32), "hold no tokens"),
        (["a text"], "hold a str, expected rows of token ids"),
        ("a text", "hold a str, expected rows of token ids"),
        (mx.zeros((2, 4)), r"hold mlx.core.float32 \[2, 4\]"),
        (mx.zeros((2, 2, 4), mx.int32), r"\[2, 2, 4\], expected rows of token ids"),
        ([[1, 2], ["3"]], "hold a list, expected rows of token ids"),
        (7, "are 7, expected rows of token ids"),
    ],
)
def test_other_calibration_data_are_refused(data: Any, said: str) -> None:
    with pytest.raises(InvalidRequestError, match=said):
        Quantizer(STATIC).with_calibration(data)


def test_calibrated_weights_cost_the_output_less(chain: Chain) -> None:
    mx.random.seed(4)
    skewed = replace(
        chain, table=ops.Embedding(ops.Dense(chain.head.weight * mx.linspace(0.01, 3, 64)))
    )
    plain = Quantizer(DYNAMIC, bits=3, keep=("table", "head"))
    assert error(skewed, plain.with_calibration(TOKENS).quantize(skewed)) < 0.97 * error(
        skewed, plain.quantize(skewed)
    )


@pytest.mark.parametrize("per", ["group", "channel", "tensor"])
@pytest.mark.parametrize("symmetric", [False, True])
def test_a_searched_grid_is_never_worse(per: Any, symmetric: bool) -> None:
    mx.random.seed(8)
    packing, weight = Packing(32, 3), mx.random.normal((16, 128))
    importance = mx.exp(2 * mx.random.normal((128,)))
    options = {"is_symmetric": symmetric, "per": per}
    grids = [
        make_grid(weight, packing, mx.float16, **options),
        find_grid(weight, packing, mx.float16, importance, **options),
    ]
    squares = [
        np.square(values_of(quantize_onto(weight, grid, packing, mx.float16)) - f64(weight))
        for grid in grids
    ]
    plain, searched = ((square * f64(importance)).sum() for square in squares)
    assert searched <= plain
    assert per == "tensor" or searched < 0.97 * plain


def test_what_is_kept_stays(chain: Chain) -> None:
    quantized = Quantizer(DYNAMIC, keep=["parts.1", "table"]).quantize(chain)
    assert names(quantized, ops.Quantized) == ["parts.0"]
    assert quantized.parts[1] is chain.parts[1] and quantized.head is chain.head
    by_rule = Quantizer(DYNAMIC, keep=lambda name: not name.startswith("parts"))
    assert names(by_rule.quantize(chain), ops.Quantized) == ["parts.0", "parts.1"]


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"bits": 7}, "bits is 7, expected one of 2, 3, 4, 5, 6, 8"),
        ({"group_size": 16}, "group_size is 16, expected one of 32, 64, 128"),
        ({"per": "row"}, "per is 'row', expected one of group, channel, tensor"),
        ({"keep": "head"}, "keep is 'head', expected a collection of names"),
    ],
)
def test_options_are_checked_when_given(options: dict[str, Any], said: str) -> None:
    with pytest.raises(InvalidRequestError, match=said):
        Quantizer(DYNAMIC, **options)


def test_an_unknown_mode_is_refused() -> None:
    with pytest.raises(InvalidRequestError, match="mode is 'static'"):
        Quantizer("static")  # type: ignore[arg-type]


def test_models_that_cannot_be_quantized(chain: Chain) -> None:
    def refused(model: object, said: str, **options: Any) -> None:
        with pytest.raises(InvalidRequestError, match=said):
            Quantizer(DYNAMIC, **options).quantize(model)

    broken = ops.Dense(mx.full((64, 64), mx.nan))
    refused(replace(chain, parts=(broken,)), "parts.0 cannot be quantized: it holds NaN")
    refused(chain, "its 64 columns do not divide into groups of 128; name it in", group_size=128)
    refused(chain, "keep names parts.7, which the model does not have", keep=["parts.7"])
    refused(Quantizer(DYNAMIC).quantize(chain), "table.table has 8 bits already")
    refused((), "no weights of linears")


def test_a_linear_that_calibration_never_reaches(chain: Chain) -> None:
    @dataclass(frozen=True)
    class Idle:
        chain: Chain
        spare: ops.Linear

        def __call__(self, tokens: mx.array) -> mx.array:
            return self.chain(tokens)

    idle = Idle(chain, ops.Dense(mx.ones((64, 64))))
    quantizer = Quantizer(STATIC).with_calibration(TOKENS)
    with pytest.raises(InvalidRequestError, match="nothing went into spare while calibrating"):
        quantizer.quantize(idle)
    assert replace(quantizer, keep=["spare"]).quantize(idle).spare is idle.spare


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("MLX_EDGE_CACHE", str(tmp_path / "cache"))
    config = CONFIGS["llama-bias"]
    return save_model(make_model(config), config, tmp_path / "model")


@pytest.mark.parametrize("backend", ["auto", "reference"])
@pytest.mark.parametrize(
    ("mode", "bits", "wanted"), [(DYNAMIC, 8, 0.04), (DYNAMIC, 4, 0.3), (STATIC, 8, 0.06)]
)
def test_a_loaded_model_runs_quantized(
    folder: Path, backend: str, mode: QuantMode, bits: int, wanted: float
) -> None:
    if backend == "reference":
        with ops.reference():
            quantize_loaded(folder, mode, bits, wanted)
    else:
        quantize_loaded(folder, mode, bits, wanted)


def quantize_loaded(folder: Path, mode: QuantMode, bits: int, wanted: float) -> None:
    model = load_model(folder)
    quantizer = Quantizer(mode, bits=bits, group_size=32).with_calibration(TOKENS)
    quantized = quantizer.quantize(model)
    assert len(find_weights(quantized)) == len(find_weights(model)) == 23
    assert 0 < error(model, quantized) < wanted
    cache = quantized.make_cache()
    parts = [quantized(TOKENS[:, :4], cache), quantized(TOKENS[:, 4:], cache)]
    whole = np.array(quantized(TOKENS))
    assert np.allclose(mx.concatenate(parts, axis=1), whole, atol=0.05 * np.abs(whole).max())


@needs_kernels
def test_weights_of_the_kernels_stay_theirs(folder: Path) -> None:
    model = load_model(folder, precision="float")
    quantized = Quantizer(DYNAMIC, group_size=32).quantize(model)
    packed = [one.weight for one in find_weights(quantized)]
    assert all(isinstance(weight, ops.Packed) and weight.is_quantized for weight in packed)
    assert {weight.precision for weight in packed} == {"int8"}
    again = Quantizer(DYNAMIC, group_size=32)
    with pytest.raises(InvalidRequestError, match="has 8 bits already"):
        again.quantize(quantized)


@needs_kernels
def test_layers_of_both_kinds_run_together(folder: Path) -> None:
    """Some inputs in fixed steps, others as the kernels round them; also within one block."""
    model = load_model(folder)
    for keep in (["layers.0.attention.k"], ["layers.1.mlp", "head"], ["embedding", "layers.2"]):
        quantizer = Quantizer(STATIC, group_size=32, keep=keep).with_calibration(TOKENS)
        quantized = quantizer.quantize(model)
        assert len(names(quantized, ops.Packed)) >= 1
        assert 0 < error(model, quantized) < 0.05


@pytest.mark.parametrize("mode", [DYNAMIC, STATIC])
def test_routers_stay_and_experts_need_no_text(mode: QuantMode, tmp_path: Path) -> None:
    config = CONFIGS["gpt_oss"]
    with ops.reference():
        model = load_model(save_model(make_model(config), config, tmp_path))
        quantizer = Quantizer(mode, group_size=32).with_calibration(TOKENS)
        quantized = quantizer.quantize(model)
        assert 0 < error(model, quantized) < 0.1
    roles = {one.name: one.role for one in find_weights(model)}
    assert roles["layers.0.mlp.router"] == "router" and roles["layers.0.mlp.up"] == "expert"
    assert names(quantized, ops.Dense) == [n for n, role in roles.items() if role == "router"]
    steps = {one.name: getattr(one.weight, "input_scale", None) for one in find_weights(quantized)}
    has_step = {name for name, step in steps.items() if step is not None}
    linears = {name for name, role in roles.items() if role == "linear"}
    assert has_step == (linears if mode is STATIC else set())
