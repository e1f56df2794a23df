"""Training lowers the divergence from the float model; what it yields is what is stored, and only that."""

import json
from collections.abc import Callable, Iterator
from pathlib import Path

import mlx.core as mx
import pytest

from mlx_edge.calibration.dwq import Codes, Student, quantize_dwq, schedule
from mlx_edge.calibration.layerwise import LayerwiseModel
from mlx_edge.calibration.sensitivity import kl_divergence, layer_shapes
from mlx_edge.errors import InvalidRequestError
from mlx_edge.models.config import ModelConfig
from mlx_edge.ops import Quantized
from mlx_edge.quant import Packing, dequantize, quantize, stored_tensors, unpack_codes
from mlx_edge.weights import Checkpoint
from tests.models.tiny import CONFIGS, make_model, save_model

ROWS = mx.random.randint(0, 131, (64, 16), key=mx.random.key(2)).astype(mx.int32)
PACKING = Packing(32, 3)
KEPT = "model.layers.1.mlp.up_proj"  # stays in floats
Tensors = dict[str, mx.array]
Open = Callable[[Path], LayerwiseModel]


@pytest.fixture(scope="module")
def open_folder() -> Iterator[Open]:
    opened: list[Checkpoint] = []

    def open_one(folder: Path) -> LayerwiseModel:
        opened.append(Checkpoint.open(folder))
        return LayerwiseModel(opened[-1], ModelConfig.from_folder(folder))

    yield open_one
    for checkpoint in opened:
        checkpoint.close()


@pytest.fixture(scope="module", params=["llama-tied", "qwen2", "granite"])
def model(
    request: pytest.FixtureRequest, open_folder: Open, tmp_path_factory: pytest.TempPathFactory
) -> LayerwiseModel:
    """With a tied head, and with a head and biases of its own."""
    config = CONFIGS[request.param]
    return open_folder(save_model(make_model(config), config, tmp_path_factory.mktemp("tiny")))


@pytest.fixture(scope="module")
def trained(model: LayerwiseModel) -> Tensors:
    return train(model)


def packings_of(model: LayerwiseModel) -> dict[str, Packing | None]:
    return {name: None if name == KEPT else PACKING for name in layer_shapes(model)}


def train(
    model: LayerwiseModel,
    *,
    epochs: int = 2,
    learning_rate: float = 0.01,
    seen: list[int] | None = None,
) -> Tensors:
    tensors: Tensors = {}
    for found in quantize_dwq(
        model,
        ROWS,
        packings_of(model),
        mx.float16,
        epochs=epochs,
        batch_tokens=64,
        learning_rate=learning_rate,
        on_progress=lambda done, of: None if seen is None else seen.append(of - done),
    ):
        assert not tensors.keys() & found.keys()
        tensors |= found
    return tensors


def round_to_nearest(model: LayerwiseModel) -> Tensors:
    """What dwq starts from."""
    tensors: Tensors = {}
    for name, packing in packings_of(model).items():
        if packing is not None:
            weight = model.checkpoint.read(f"{name}.weight")
            tensors |= stored_tensors(name, quantize(weight, packing, mx.float16))
    return tensors


def write(model: LayerwiseModel, tensors: Tensors, folder: Path) -> Path:
    """The folder that a conversion would leave."""
    checkpoint = model.checkpoint
    floats = {name: checkpoint.read(name) for name in checkpoint.names() if name not in tensors}
    mx.save_safetensors(str(folder / "model.safetensors"), {**floats, **tensors})
    config = json.loads((checkpoint.folder / "config.json").read_text())
    config["quantization"] = {"group_size": PACKING.group_size, "bits": PACKING.bits, KEPT: False}
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def logits(model: LayerwiseModel, rows: mx.array) -> mx.array:
    return mx.concatenate(list(model.logits(model.run(rows))))


def test_stored_scales_lower_the_divergence(
    model: LayerwiseModel, trained: Tensors, open_folder: Open, tmp_path: Path
) -> None:
    (tmp_path / "start").mkdir()
    (tmp_path / "end").mkdir()
    start = open_folder(write(model, round_to_nearest(model), tmp_path / "start"))
    end = open_folder(write(model, trained, tmp_path / "end"))
    expected = logits(model, ROWS)
    before = float(kl_divergence(expected, logits(start, ROWS)).mean())
    after = float(kl_divergence(expected, logits(end, ROWS)).mean())
    assert after < 0.95 * before, f"{after} {before}"


def test_codes_stay_and_scales_are_as_stored(model: LayerwiseModel, trained: Tensors) -> None:
    start = round_to_nearest(model)
    assert trained.keys() == start.keys()
    assert not any(name.startswith(KEPT) for name in trained)
    for name, tensor in trained.items():
        assert tensor.dtype == start[name].dtype
        assert tensor.shape == start[name].shape
        if name.endswith(".weight"):
            assert mx.array_equal(tensor, start[name]), name
    moved = [name for name in trained if not mx.array_equal(trained[name], start[name])]
    assert len(moved) == 2 * (len(packings_of(model)) - 1)


def test_same_inputs_same_bytes(model: LayerwiseModel) -> None:
    first, second = train(model, epochs=1), train(model, epochs=1)
    assert all(mx.array_equal(first[name], second[name]) for name in first)


def test_steps_that_only_harm_are_not_taken(model: LayerwiseModel) -> None:
    tensors, start = train(model, epochs=1, learning_rate=1e3), round_to_nearest(model)
    assert all(mx.array_equal(tensors[name], start[name]) for name in start)


def test_progress_reaches_its_end(model: LayerwiseModel) -> None:
    left: list[int] = []
    train(model, epochs=2, seen=left)
    assert left == list(range(len(left)))[::-1]


def test_the_student_starts_as_what_round_to_nearest_stores(
    model: LayerwiseModel, open_folder: Open, tmp_path: Path
) -> None:
    start = open_folder(write(model, round_to_nearest(model), tmp_path))
    student = Student(model, packings_of(model), mx.float16, {})
    found = student.logits(student.no_shifts(), ROWS)
    assert mx.allclose(found, logits(start, ROWS), rtol=1e-4, atol=1e-4)


def test_only_affine_scales_can_be_trained(model: LayerwiseModel) -> None:
    packings = packings_of(model) | {"model.embed_tokens": Packing(32, 4, "mxfp4")}
    with pytest.raises(InvalidRequestError, match=r"embed_tokens: dwq trains affine .* mxfp4"):
        next(iter(quantize_dwq(model, ROWS, packings, mx.float16)))


def test_codes_of_another_method_are_kept(model: LayerwiseModel) -> None:
    other = round_to_nearest(model)
    name = "model.layers.0.self_attn.q_proj"
    codes = mx.full(other[f"{name}.weight"].shape, 0x12345678, mx.uint32)
    start = {f"{name}.{part}": other[f"{name}.{part}"] for part in ("scales", "biases")}
    start[f"{name}.weight"] = codes
    found: Tensors = {}
    for tensors in quantize_dwq(
        model, ROWS[:4], packings_of(model), mx.float16, start=start, epochs=0
    ):
        found |= tensors
    assert all(mx.array_equal(found[key], start[key]) for key in start)
    key = "model.layers.0.self_attn.k_proj.weight"
    assert mx.array_equal(found[key], other[key])


@pytest.mark.parametrize("name", ["model.norm.weight", f"{KEPT}.weight"])
def test_a_start_that_changes_other_layers_is_refused(model: LayerwiseModel, name: str) -> None:
    with pytest.raises(InvalidRequestError, match=f"changes {name}"):
        next(
            iter(
                quantize_dwq(
                    model, ROWS, packings_of(model), mx.float16, start={name: mx.zeros((4,))}
                )
            )
        )


def test_one_row_is_too_few(model: LayerwiseModel) -> None:
    with pytest.raises(InvalidRequestError, match="dwq got 1 row of"):
        next(iter(quantize_dwq(model, ROWS[:1], packings_of(model), mx.float16)))


@pytest.mark.parametrize("bits", [1, 2, 4, 8])
def test_shifts_are_in_steps_of_the_grid(bits: int) -> None:
    weight = mx.random.normal((2, 64), key=mx.random.key(0))
    codes = Codes.of(quantize(weight, Packing(32, bits), mx.float32), mx.float32)
    middle, ends = mx.full((2, 2), 0.25), mx.full((2, 2), 0.5)
    steps = (codes.moved((middle, ends)).offsets - codes.start.offsets) / codes.start.scales
    assert mx.allclose(steps, mx.array(0.25 - 0.5), atol=1e-4)
    top = mx.full((2, 2, 1), float(2**bits - 1))
    high = codes.moved((middle, ends)).values(top) - codes.start.values(top)
    assert mx.allclose(high[..., 0] / codes.start.scales, mx.array(0.25 + 0.5), atol=1e-4)


@pytest.mark.parametrize("dtype", [mx.float16, mx.bfloat16])
def test_trained_on_are_the_values_that_are_stored(dtype: mx.Dtype) -> None:
    start = quantize(mx.random.normal((4, 64), key=mx.random.key(0)), PACKING, dtype)
    codes = Codes.of(start, dtype)
    shift = mx.random.normal((4, 2), key=mx.random.key(1)), mx.full((4, 2), 0.3)
    stored = codes.stored("a", shift)
    weight = Quantized(stored["a.weight"], stored["a.scales"], stored["a.biases"], 32, 3)
    assert weight.scales.dtype == dtype
    assert mx.array_equal(dequantize(weight), codes.dense(shift).weight)
    assert mx.array_equal(unpack_codes(weight.weight, 3), codes.codes.reshape(4, 64))


@pytest.mark.parametrize("num_steps", [1, 2, 9, 100])
def test_the_rate_rises_then_falls(num_steps: int) -> None:
    rates = [schedule(step, num_steps) for step in range(num_steps)]
    top = rates.index(max(rates))
    assert all(0 < rate <= 1 for rate in rates)
    assert rates[: top + 1] == sorted(rates[: top + 1])
    assert rates[top:] == sorted(rates[top:], reverse=True)
