"""GPTQ chooses the paper's codes, errs less than rounding, and stores what was asked for and nothing else."""

from collections.abc import Mapping
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest

from mlx_edge.calibration.gptq import choose_codes, quantize_gptq, quantize_weight
from mlx_edge.calibration.grid_fitting import fit_grid
from mlx_edge.calibration.head import quantize_head
from mlx_edge.calibration.hessian import (
    InputSums,
    damp,
    output_error,
    sum_head_inputs,
    sum_inputs,
)
from mlx_edge.calibration.layerwise import LayerwiseModel
from mlx_edge.errors import InvalidRequestError
from mlx_edge.ops import Quantized
from mlx_edge.quant import Grid, Packing, dequantize, make_grid, quantize, unpack
from mlx_edge.weights.hub import find_model
from tests.calibration.converted import convert, divergence, layer_names, pocket_rows, uniform
from tests.calibration.pairs import change_weights, open_model, tiny_folder

ROWS = mx.random.randint(0, 131, (6, 24), key=mx.random.key(1)).astype(mx.int32)


def correlated_inputs(num_tokens: int, num_channels: int, seed: int = 0) -> mx.array:
    """Tokens whose channels go together and differ in size."""
    a, b, c = mx.random.split(mx.random.key(seed), 3)
    mixing = mx.random.normal((num_channels // 4, num_channels), key=a)
    tokens = mx.random.normal((num_tokens, num_channels // 4), key=b) @ mixing
    sizes = mx.exp(mx.random.normal((num_channels,), key=c))
    return (tokens + 0.3 * mx.random.normal(tokens.shape, key=a)) * sizes


def random_weight(num_rows: int, num_columns: int) -> mx.array:
    return mx.random.normal((num_rows, num_columns), key=mx.random.key(9))


def sums_of(x: mx.array) -> InputSums:
    sums = InputSums.empty(x.shape[-1])
    sums.add(x)
    return sums


def collect(
    model: LayerwiseModel, packings: Mapping[str, Packing | None], dtype: mx.Dtype = mx.float16
) -> dict[str, mx.array]:
    tensors: dict[str, mx.array] = {}
    for stored in quantize_gptq(model, ROWS, packings, dtype):
        assert not tensors.keys() & stored.keys()
        tensors |= stored
    return tensors


def paper_codes(
    weight: np.ndarray, grid: Grid, packing: Packing, hessian: np.ndarray, *, act_order: bool
) -> np.ndarray:
    """Algorithm 1 of Frantar et al. without blocks: a column, then all columns after it, by the inverse of X^T X."""
    order = np.argsort(-np.diag(hessian), kind="stable") if act_order else np.arange(len(hessian))
    left = weight[:, order].copy()
    factor = np.linalg.cholesky(np.linalg.inv(hessian[np.ix_(order, order)])).T
    scales, offsets = np.array(grid.scales, np.float64), np.array(grid.offsets, np.float64)
    codes = np.zeros_like(weight)
    for k, column in enumerate(order):
        scale = scales[:, column // packing.group_size]
        offset = offsets[:, column // packing.group_size]
        code = np.clip(np.rint((left[:, k] - offset) / scale), 0, packing.num_codes - 1)
        error = (left[:, k] - offset - scale * code) / factor[k, k]
        left[:, k:] -= np.outer(error, factor[k, k:])
        codes[:, column] = code
    return codes


@pytest.mark.parametrize("act_order", [False, True])
@pytest.mark.parametrize(
    ("packing", "num_columns", "num_tokens"),
    [(Packing(32, 4), 64, 300), (Packing(64, 3), 320, 500), (Packing(32, 2), 160, 20)],
)
def test_codes_are_the_papers(
    packing: Packing, num_columns: int, num_tokens: int, act_order: bool
) -> None:
    weight = random_weight(24, num_columns)
    hessian = damp(sums_of(correlated_inputs(num_tokens, num_columns)).hessian, 0.01)
    grid = make_grid(weight, packing, mx.float16)
    exact = np.array(weight, np.float64)
    codes = choose_codes(exact, grid, packing, hessian, act_order=act_order)
    wanted = paper_codes(exact, grid, packing, hessian, act_order=act_order)
    np.testing.assert_array_equal(codes, wanted)
    nearest, _ = unpack(quantize(weight, packing, mx.float16))
    assert (codes != np.array(nearest)).mean() > 0.1  # rounding alone would be found out


@pytest.mark.parametrize(("bits", "share"), [(4, 0.5), (3, 0.5), (2, 0.6)])
def test_errors_on_other_tokens_are_far_below_those_of_rounding(bits: int, share: float) -> None:
    weight, packing = random_weight(32, 128), Packing(32, bits)
    inputs = correlated_inputs(1200, 128)
    hessian = damp(sums_of(inputs[:800]).hessian, 0.01)
    unseen = sums_of(inputs[800:]).mean_hessian()
    chosen = dequantize(quantize_weight(weight, packing, mx.float16, hessian))
    rounded = dequantize(quantize(weight, packing, mx.float16))
    ratio = output_error(chosen - weight, unseen) / output_error(rounded - weight, unseen)
    assert ratio < share


@pytest.mark.parametrize("act_order", [False, True])
def test_channels_that_were_never_fed_keep_the_nearest_codes(act_order: bool) -> None:
    weight, packing = random_weight(16, 64), Packing(32, 4)
    is_dead = mx.arange(64) % 3 == 0
    inputs = mx.where(is_dead, 0.0, correlated_inputs(200, 64))
    grid = make_grid(weight, packing, mx.float16)
    hessian = damp(sums_of(inputs).hessian, 0.01)
    exact = np.array(weight, np.float64)
    codes = choose_codes(exact, grid, packing, hessian, act_order=act_order)
    nearest = np.array(unpack(quantize(weight, packing, mx.float16))[0])
    dead = np.array(is_dead)
    np.testing.assert_array_equal(codes[:, dead], nearest[:, dead])
    assert (codes[:, ~dead] != nearest[:, ~dead]).any()


def test_a_linear_that_was_never_fed_is_rounded() -> None:
    weight, packing = random_weight(8, 64), Packing(32, 4)
    hessian = damp(sums_of(mx.zeros((5, 64))).hessian, 0.01)
    codes, _ = unpack(quantize_weight(weight, packing, mx.float16, hessian))
    assert mx.array_equal(codes, unpack(quantize(weight, packing, mx.float16))[0])


@pytest.mark.parametrize("constant", [0.0, 0.75, -3.5])
def test_constant_groups_stay(constant: float) -> None:
    weight = mx.concatenate([mx.full((4, 32), constant), random_weight(4, 32)], axis=1)
    hessian = damp(sums_of(correlated_inputs(100, 64)).hessian, 0.01)
    values = dequantize(quantize_weight(weight, Packing(32, 4), mx.float32, hessian))
    assert mx.isfinite(values).all()
    assert mx.abs(values[:, :32] - constant).max() < 2e-6


def test_one_token_is_enough() -> None:
    weight, packing = random_weight(16, 64), Packing(32, 3)
    sums = sums_of(correlated_inputs(1, 64))
    hessian = damp(sums.hessian, 0.01)
    chosen = dequantize(quantize_weight(weight, packing, mx.float16, hessian))
    rounded = dequantize(quantize(weight, packing, mx.float16))
    seen = sums.mean_hessian()
    assert output_error(chosen - weight, seen) < 0.02 * output_error(rounded - weight, seen)


def test_the_grid_is_fitted_to_the_codes() -> None:
    weight, packing = random_weight(16, 64), Packing(32, 3)
    sums = sums_of(correlated_inputs(300, 64))
    hessian = damp(sums.hessian, 0.01)
    grid = make_grid(weight, packing, mx.float16)
    codes = mx.array(choose_codes(np.array(weight, np.float64), grid, packing, hessian))
    plain = grid.values(codes.reshape(16, 2, 32).astype(mx.float32)).reshape(16, 64)
    fitted = dequantize(quantize_weight(weight, packing, mx.float16, hessian))
    seen = sums.mean_hessian()
    assert output_error(fitted - weight, seen) < 0.97 * output_error(plain - weight, seen)


def test_a_fitted_grid_is_least_squares_and_never_worse() -> None:
    weight, packing = random_weight(12, 32), Packing(32, 3)
    x = correlated_inputs(90, 32)
    hessian = sums_of(x).hessian
    plain = make_grid(weight, packing, mx.float32)
    codes, _ = unpack(quantize(weight, packing, mx.float32))
    wide, exact = np.array(codes, np.float64), np.array(weight, np.float64)
    grid = fit_grid(exact, wide, plain, mx.float32, hessian)
    tokens = np.array(x, np.float64)
    for row in range(12):
        sides = np.stack([tokens @ wide[row], tokens.sum(1)], axis=1)
        wanted = np.linalg.lstsq(sides, tokens @ exact[row], rcond=None)[0]
        found = [float(grid.scales[row, 0]), float(grid.offsets[row, 0])]
        np.testing.assert_allclose(found, wanted, rtol=1e-4)

    def errors(found: Grid) -> np.ndarray:
        lost = exact - np.array(found.values(mx.array(wide)[:, None]), np.float64)[:, 0]
        return ((lost @ hessian) * lost).sum(1)

    assert (errors(grid) <= errors(plain) * 1.000001).all()
    coarse = fit_grid(exact, wide, grid, mx.bfloat16, hessian)  # rounding can only spoil it
    assert (errors(coarse) <= errors(grid) * 1.000001).all()


@pytest.mark.parametrize("name", ["llama2", "llama-tied", "qwen2"])
def test_layers_are_stored_as_asked(name: str, tmp_path: Path) -> None:
    model = open_model(tiny_folder(tmp_path / "m", name))
    packings = uniform(model, Packing(32, 4))
    packings["model.layers.0.self_attn.k_proj"] = None
    packings["model.layers.1.mlp.down_proj"] = Packing(32, 8)
    packings["model.layers.2.mlp.gate_proj"] = Packing(64, 3)
    parts = list(quantize_gptq(model, ROWS, packings, mx.bfloat16))
    assert len(parts) == model.num_layers + 1
    head = "model.embed_tokens" if name == "llama-tied" else "lm_head"
    assert {n.rpartition(".")[0] for n in parts[-1]} == {head}
    stored = {key: value for part in parts for key, value in part.items()}
    own = set(layer_names(model)) - {"model.embed_tokens", "model.layers.0.self_attn.k_proj"}
    wanted = {f"{n}.{part}" for n in own | {head} for part in ("weight", "scales", "biases")}
    assert stored.keys() == wanted
    assert stored["model.layers.1.mlp.down_proj.scales"].dtype == mx.bfloat16
    convert(model, packings, stored, mx.bfloat16, tmp_path / "q").run(ROWS)  # all shapes fit


def test_a_head_kept_as_floats_is_not_stored(tmp_path: Path) -> None:
    model = open_model(tiny_folder(tmp_path / "m"))
    packings = uniform(model, Packing(32, 4)) | {"lm_head": None}
    assert list(quantize_gptq(model, ROWS, packings, mx.float16))[-1] == {}


def test_same_inputs_same_bytes(tmp_path: Path) -> None:
    model = open_model(tiny_folder(tmp_path / "m", "llama-tied"))
    first, second = (collect(model, uniform(model, Packing(32, 3))) for _ in range(2))
    assert list(first) == list(second)
    assert all(mx.array_equal(first[name], second[name]) for name in first)


def test_layers_are_calibrated_behind_quantized_ones(tmp_path: Path) -> None:
    """The last layer's codes depend on how the first is stored."""
    model = open_model(tiny_folder(tmp_path / "m"))
    coarse = uniform(model, Packing(32, 2))
    mixed = coarse | {n: None for n in coarse if ".layers.0." in n}
    first, second = collect(model, coarse), collect(model, mixed)
    name = "model.layers.2.mlp.up_proj.weight"
    assert not mx.array_equal(first[name], second[name])


def test_sums_are_those_of_all_tokens() -> None:
    x = correlated_inputs(60, 32)
    sums = sums_of(x[:10])
    sums.add(x[10:].reshape(2, 25, 32))
    exact = np.array(x, np.float64)
    np.testing.assert_allclose(sums.hessian, exact.T @ exact, rtol=1e-4, atol=1e-3)
    np.testing.assert_allclose(sums.sizes, np.abs(exact).sum(0), rtol=1e-5)
    np.testing.assert_array_equal(sums.largest, np.abs(exact).max(0))
    assert sums.num_tokens == 60


@pytest.mark.parametrize(("name", "share"), [("llama-tied", 1.0), ("llama2", 0.01)])
def test_a_head_that_is_the_table_is_damped_more(name: str, share: float, tmp_path: Path) -> None:
    model = open_model(tiny_folder(tmp_path / "m", name))
    hidden = model.run(ROWS)
    given: list[np.ndarray] = []

    def keep(weight: mx.array, packing: Packing, hessian: np.ndarray) -> Quantized:
        given.append(hessian)
        return quantize(weight, packing, mx.float16)

    quantize_head(model, hidden, uniform(model, Packing(32, 4)), keep, 0.01)
    plain = sum_head_inputs(model, hidden).hessian
    np.testing.assert_allclose(given[0], plain + share * np.eye(64) * np.diag(plain).mean())


def test_linears_with_one_input_share_its_sums(tmp_path: Path) -> None:
    model = open_model(tiny_folder(tmp_path / "m"))
    hidden = model.embed(mx.concatenate([ROWS] * 30))  # more than one block of tokens
    sums, _ = sum_inputs(model, model.read_layer(0), 0, hidden)
    q, k, v, o, gate, up, down = (sums[n] for n in model.find_linears(model.read_layer(0), 0))
    assert q is k is v
    assert gate is up
    assert [s.num_tokens for s in (q, o, gate, down)] == [hidden.shape[0] * hidden.shape[1]] * 4


def test_other_modes_are_refused(tmp_path: Path) -> None:
    model = open_model(tiny_folder(tmp_path / "m"))
    packings = uniform(model, Packing(32, 4)) | {"lm_head": Packing(32, 4, "mxfp4")}
    with pytest.raises(InvalidRequestError, match="lm_head is to be mxfp4; gptq serves affine"):
        list(quantize_gptq(model, ROWS, packings, mx.float16))


def test_infinity_on_the_way_is_named(tmp_path: Path) -> None:
    folder = tiny_folder(tmp_path / "m")
    change_weights(folder, lambda n, w: mx.full(w.shape, mx.inf) if "0.mlp.up" in n else w)
    model = open_model(folder)
    with pytest.raises(
        InvalidRequestError, match=r"inputs of model.layers.0.mlp.down_proj hold NaN"
    ):
        list(quantize_gptq(model, ROWS, uniform(model, Packing(32, 4)), mx.float16))


def test_pocket_diverges_less_than_rounded(tmp_path: Path) -> None:
    model = open_model(find_model("pocket"))
    packings = uniform(model, Packing(64, 4))
    tensors: dict[str, mx.array] = {}
    rows = pocket_rows(6, is_held_out=False)
    for stored in quantize_gptq(model, rows, packings, mx.float16):
        tensors |= stored
    unseen = pocket_rows(6, is_held_out=True)
    chosen = convert(model, packings, tensors, mx.float16, tmp_path / "gptq")
    rounded = convert(model, packings, {}, mx.float16, tmp_path / "rtn")
    ratio = divergence(model, chosen, unseen) / divergence(model, rounded, unseen)
    assert ratio < 0.75
