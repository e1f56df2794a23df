"""A layer's damage is that of the whole model with this layer quantized; what is no table is refused."""

import json
from collections.abc import Iterator
from typing import Any

import mlx.core as mx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mlx_edge import ops
from mlx_edge.calibration.layerwise import LayerwiseModel, forward_layer
from mlx_edge.calibration.sensitivity import (
    Sensitivity,
    hash_rows,
    kl_divergence,
    layer_shapes,
    measure_sensitivity,
)
from mlx_edge.errors import InvalidRequestError
from mlx_edge.models.config import ModelConfig
from mlx_edge.models.linears import replace_linears
from mlx_edge.quant import Packing, dequantize, quantize
from mlx_edge.weights import Checkpoint
from tests.models.tiny import CONFIGS, make_model, save_model

CANDIDATES = (Packing(64, 3), Packing(32, 4), Packing(32, 4, "mxfp4"))
ROWS = mx.random.randint(0, 131, (3, 9), key=mx.random.key(1)).astype(mx.int32)


@pytest.fixture(scope="module", params=["llama-tied", "qwen2", "granite"])
def model(request: Any, tmp_path_factory: pytest.TempPathFactory) -> Iterator[LayerwiseModel]:
    config = CONFIGS[request.param]
    folder = save_model(make_model(config), config, tmp_path_factory.mktemp("tiny"))
    with Checkpoint.open(folder) as checkpoint:
        yield LayerwiseModel(checkpoint, ModelConfig.from_folder(folder))


@pytest.fixture(scope="module")
def table(model: LayerwiseModel) -> Sensitivity:
    return measure_sensitivity(model, ROWS, CANDIDATES, mx.float16)


def logits_with(model: LayerwiseModel, changed: str, packing: Packing | None) -> mx.array:
    """Logits (R, L, V) of the whole model, one layer quantized; the long way."""

    def values(name: str, linear: ops.Linear) -> ops.Dense:
        assert isinstance(linear, ops.Dense)
        if name != changed or packing is None:
            return linear
        return ops.Dense(dequantize(quantize(linear.weight, packing, mx.float16)), linear.bias)

    names = model.checkpoint.names()
    head = model.read_head()
    table = ops.Dense(model.checkpoint.read("model.embed_tokens.weight").astype(mx.float32))
    table = values("model.embed_tokens", table)
    projection = values("lm_head", head.projection) if "lm_head.weight" in names else table
    hidden = table.weight[ROWS] * model.config.scales.embedding
    for index in range(model.num_layers):
        layer = model.read_layer(index)
        linears = model.find_linears(layer, index)
        dense = {name: values(name, linear) for name, linear in linears.items()}
        hidden = forward_layer(replace_linears(layer, model.config, index, dense), hidden)
    with ops.reference():
        scale = model.config.scales.logits
        return ops.head(hidden, ops.HeadWeights(head.norm, projection, scale))


def test_damage_is_that_of_the_whole_model(model: LayerwiseModel, table: Sensitivity) -> None:
    clean = logits_with(model, "", None)
    for name, row in table.damages.items():
        for packing, damage in zip(CANDIDATES, row, strict=True):
            if packing.refusal(table.shapes[name]) is None:
                direct = kl_divergence(clean, logits_with(model, name, packing)).mean()
                assert float(direct) > 0, (name, packing)
                assert damage == pytest.approx(float(direct), rel=1e-3, abs=1e-6), (name, packing)
            else:
                assert damage is None, (name, packing)


def test_every_layer_is_in_the_table(model: LayerwiseModel, table: Sensitivity) -> None:
    assert table.shapes == layer_shapes(model)
    assert len(table.shapes) == 3 * 7 + (1 if model.is_tied else 2)
    assert table.shapes["model.layers.2.mlp.down_proj"] == (64, 96)
    assert table.damages["model.layers.2.mlp.down_proj"][0] is None  # 96 columns, groups of 64
    assert table.num_tokens == 27


def test_many_variants_at_once_give_what_one_gives(
    model: LayerwiseModel, table: Sensitivity, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("mlx_edge.calibration.sensitivity.VARIANT_TOKENS", 1)
    again = measure_sensitivity(model, ROWS, CANDIDATES[1:2], mx.float16)
    for name, (damage,) in again.damages.items():
        assert damage == pytest.approx(table.damages[name][1], rel=1e-3, abs=1e-6)


def test_a_long_text_is_measured_in_part(model: LayerwiseModel) -> None:
    part = measure_sensitivity(model, ROWS, CANDIDATES[:1], mx.float16, max_tokens=20)
    assert part.num_tokens == 18
    assert part.sha256 == hash_rows(ROWS[mx.array([0, 1])])


def test_progress_reaches_its_end(model: LayerwiseModel) -> None:
    seen: list[tuple[int, int]] = []
    measure_sensitivity(
        model, ROWS[:1], CANDIDATES[:1], mx.float32, on_progress=lambda *step: seen.append(step)
    )
    assert [done for done, _ in seen] == list(range(1, len(seen) + 1))
    assert {of for _, of in seen} == {len(seen)}


def test_weights_that_are_no_numbers_have_no_damage(
    model: LayerwiseModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    hidden = mx.full((1, 9, 64), mx.nan)
    monkeypatch.setattr(LayerwiseModel, "run", lambda *_: hidden)
    with pytest.raises(InvalidRequestError, match=r"embed_tokens: .* not finite"):
        measure_sensitivity(model, ROWS[:1], CANDIDATES, mx.float16)


def test_json_there_and_back(table: Sensitivity) -> None:
    assert Sensitivity.from_json(table.to_json()) == table


def test_a_table_serves_some_of_its_candidates(table: Sensitivity) -> None:
    chosen = table.select(table.shapes, [CANDIDATES[2], CANDIDATES[0]], mx.float16)
    assert chosen.candidates == (CANDIDATES[2], CANDIDATES[0])
    for name, row in table.damages.items():
        assert chosen.damages[name] == (row[2], row[0])


@pytest.mark.parametrize(
    ("shapes", "candidates", "dtype", "message"),
    [
        ({"extra": (8, 64)}, CANDIDATES, mx.float16, "extra is missing, the model's is 8 x 64"),
        ({"model.embed_tokens": (7, 64)}, CANDIDATES, mx.float16, "embed_tokens is 131 x 64, .* 7"),
        (
            {"model.embed_tokens": None},
            CANDIDATES,
            mx.float16,
            "embed_tokens .* model's is missing",
        ),
        ({}, [Packing(64, 5)], mx.float16, "5 bit, groups of 64 was not measured"),
        ({}, CANDIDATES, mx.bfloat16, "scales in float16, asked for bfloat16"),
    ],
)
def test_a_table_of_something_else_is_refused_by_name(
    table: Sensitivity, shapes: dict[str, Any], candidates: Any, dtype: mx.Dtype, message: str
) -> None:
    wanted = {k: v for k, v in {**table.shapes, **shapes}.items() if v is not None}
    with pytest.raises(InvalidRequestError, match=message):
        table.select(wanted, candidates, dtype)


SMALL = Sensitivity(
    {"a": (8, 64), "b": (8, 32)}, CANDIDATES, {"a": (0.5, 0.1, 0.2), "b": (None, 0.0, 1.5)},
    "float16", 27, "00",
)  # fmt: skip


@pytest.mark.parametrize(
    ("path", "value"),
    [
        (["dtype"], "int8"),
        (["dtype"], ["float16"]),
        (["num_tokens"], "many"),
        (["sha256"], 5),
        (["layers"], {}),
        (["layers"], [1]),
        (["layers", "a"], None),
        (["layers", "a", "shape"], [8, 64, 1]),
        (["layers", "a", "shape"], [8, 0]),
        (["layers", "a", "shape"], [8, 1e300]),
        (["layers", "a", "damage"], [0.5, 0.1]),
        (["layers", "a", "damage"], [0.5, 0.1, None]),
        (["layers", "a", "damage"], [0.5, 0.1, -0.1]),
        (["layers", "a", "damage"], [0.5, 0.1, float("nan")]),
        (["layers", "a", "damage"], [0.5, 0.1, float("inf")]),
        (["layers", "a", "damage"], [0.5, 0.1, "0.2"]),
        (["layers", "b", "damage"], [0.5, 0.1, 0.2]),
        (["candidates"], [{"bits": 7, "group_size": 64, "mode": "affine"}] * 3),
        (["candidates", 0, "mode"], "int2"),
        (["candidates", 0, "mode"], ["affine"]),
        (["candidates", 0, "bits"], None),
        (["candidates", 0], {"bits": 4, "group_size": 32, "mode": "affine"}),
        (["candidates", 0, "more"], 1),
    ],
)
def test_a_broken_table_is_refused(path: list[Any], value: Any) -> None:
    fields = json.loads(SMALL.to_json())
    inner = fields
    for key in path[:-1]:
        inner = inner[key]
    inner[path[-1]] = value
    with pytest.raises(InvalidRequestError, match="sensitivity table"):
        Sensitivity.from_json(json.dumps(fields))


@settings(deadline=None, max_examples=150)
@given(at=st.integers(0, 10_000), length=st.integers(0, 9), inserted=st.text(max_size=4))
def test_an_edited_file_is_read_or_refused(at: int, length: int, inserted: str) -> None:
    text = SMALL.to_json()
    at %= len(text)
    try:
        read = Sensitivity.from_json(text[:at] + inserted + text[at + length :])
    except InvalidRequestError as error:
        assert "\n" not in str(error)
    else:
        assert Sensitivity.from_json(read.to_json()) == read


@pytest.mark.parametrize("text", ["", "[]", "null", "7", "{}", "[" * 100_000, "\x00"])
def test_another_file_is_refused(text: str) -> None:
    with pytest.raises(InvalidRequestError, match="sensitivity table"):
        Sensitivity.from_json(text)
