"""Conversions of whole folders: what is written loads here and in mlx-lm, and bad input is told in words."""

import errno
import os

import mlx.core as mx
import mlx_lm
import mlx_lm.utils
import numpy as np
import pytest

from mlx_edge.conversion.pipeline import Rounding
from mlx_edge.conversion.source import FolderSource
from mlx_edge.errors import InvalidRequestError, ModelFormatError, UnsupportedModelError
from mlx_edge.models.config import ModelConfig
from mlx_edge.models.load import load_model
from mlx_edge.quant import Packing
from mlx_edge.weights import Checkpoint, stream_writer
from mlx_edge.weights.hub import find_model
from tests.conversion.folders import edit_tensors, make_folder, read_config, read_weights, run

POCKET = find_model("pocket")
TOKENS = mx.array([[1, 17, 290, 5, 801, 44, 2]], dtype=mx.int32)


def our_logits(folder):
    return np.array(load_model(folder, precision="float")(TOKENS).astype(mx.float32))


def their_logits(folder):
    """In float32: mlx-lm would sum in the type of the scales."""
    model, _ = mlx_lm.utils.load_model(folder)
    model.apply(lambda x: x.astype(mx.float32) if mx.issubdtype(x.dtype, mx.floating) else x)
    return np.array(model(TOKENS).astype(mx.float32))


@pytest.mark.parametrize(
    "options",
    [
        {"packing": Packing(64, 4)},
        {"packing": Packing(32, 8)},
        {"packing": Packing(128, 3)},
        {"packing": Packing(32, 4, "mxfp4")},
        {"packing": Packing(32, 8, "mxfp8")},
        {"packing": Packing(16, 4, "nvfp4")},
        {"recipe": "mixed_3_6"},
        {"packing": Packing(64, 8), "rounding": Rounding(is_symmetric=True, per="channel")},
    ],
    ids=lambda options: "-".join(map(str, options.values())),
)
def test_a_quantized_folder_gives_the_same_logits_here_and_in_mlx_lm(tmp_path, options):
    done = run(POCKET, tmp_path / "m", action="quantize", **options)
    ours, theirs = our_logits(tmp_path / "m"), their_logits(tmp_path / "m")
    assert np.abs(ours - theirs).max() < 1e-2 * theirs.std()
    assert done.plan.num_bytes == sum(
        array.nbytes for array in mx.load(str(tmp_path / "m" / "model.safetensors")).values()
    )
    config = ModelConfig.from_folder(tmp_path / "m")
    assert {n: config.quantization.packing(n) for n in done.plan.packings} == done.plan.packings


def test_uniform_four_bits_are_as_near_to_the_floats_as_mlx_lms(tmp_path):
    mlx_lm.convert(str(POCKET), str(tmp_path / "theirs"), quantize=True)
    run(POCKET, tmp_path / "ours", action="quantize")
    for key in ("quantization", "quantization_config"):
        theirs, ours = (read_config(tmp_path / name)[key] for name in ("theirs", "ours"))
        assert theirs == ours
    shapes = [
        {name: (array.shape, array.dtype) for name, array in mx.load(str(path)).items()}
        for path in sorted(tmp_path.glob("*/model.safetensors"))
    ]
    assert shapes[0] == shapes[1]
    floats = our_logits(POCKET)
    errors = [np.abs(our_logits(tmp_path / n) - floats).mean() for n in ("theirs", "ours")]
    assert errors[1] < 1.1 * errors[0]


def test_real_bits_per_weight_count_scales_and_norms(tmp_path):
    done = run(
        make_folder(tmp_path / "a"), tmp_path / "m", action="quantize", packing=Packing(32, 4)
    )
    tensors = mx.load(str(tmp_path / "m" / "model.safetensors"))
    num_bytes = sum(array.nbytes for array in tensors.values())
    with FolderSource(tmp_path / "a") as source:
        num_weights = sum(int(np.prod(source.shape(name))) for name in source.names())
    assert done.plan.bits_per_weight == pytest.approx(8 * num_bytes / num_weights)
    assert done.plan.bits_per_weight > 4 + 2 * 32 / 32  # scales and offsets are float32 here


def test_columns_that_do_not_divide_stay_floats_and_are_named(tmp_path):
    folder = make_folder(tmp_path / "a", intermediate_size=80, vocab_size=2048)  # 80 = 2.5 * 32
    done = run(folder, tmp_path / "m", action="quantize", packing=Packing(32, 4))
    assert sorted(done.plan.kept) == [f"model.layers.{i}.mlp.down_proj" for i in range(3)]
    assert "80 columns" in done.plan.kept["model.layers.0.mlp.down_proj"]
    assert read_config(tmp_path / "m")["quantization"]["model.layers.0.mlp.down_proj"] is False
    assert np.allclose(our_logits(tmp_path / "m"), their_logits(tmp_path / "m"), atol=0.05)


def test_nothing_that_divides_is_an_error(tmp_path):
    folder = make_folder(tmp_path / "a", hidden_size=48, intermediate_size=80, head_dim=10)
    with pytest.raises(ModelFormatError, match=r"no layer can be quantized .* 48 columns"):
        run(folder, tmp_path / "m", action="quantize", packing=Packing(128, 4))
    assert not (tmp_path / "m").exists()


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("action", ["quantize", "copy"])
def test_weights_that_are_not_finite_are_named(tmp_path, value, action):
    weight = np.ones((64, 128), np.float32)
    weight[63, 127] = value
    name = "model.layers.1.self_attn.o_proj.weight"
    folder = edit_tensors(
        make_folder(tmp_path / "a"), **{name.replace(".", "__"): mx.array(weight)}
    )
    with pytest.raises(ModelFormatError, match=f"(NaN|infinity) in tensor {name}"):
        run(folder, tmp_path / "m", action=action)
    assert [path.name for path in tmp_path.iterdir()] == ["a"]


def test_a_value_that_leaves_the_range_of_float16_is_named(tmp_path):
    folder = make_folder(tmp_path / "a")
    edit_tensors(folder, model__norm__weight=mx.full((64,), 70000.0))
    with pytest.raises(ModelFormatError, match=r"infinity in tensor model.norm.weight .as float16"):
        run(folder, tmp_path / "m", dtype=mx.float16)
    run(folder, tmp_path / "m", dtype=mx.bfloat16)


def test_realign_changes_no_byte_of_a_tensor_and_makes_them_map(tmp_path):
    run(POCKET, tmp_path / "q", action="quantize")
    tensors = mx.load(str(tmp_path / "q" / "model.safetensors"))
    mx.save_safetensors(str(tmp_path / "q" / "model.safetensors"), dict(tensors), {"format": "mlx"})
    (tmp_path / "q" / "quality.json").write_text("{}")
    run(tmp_path / "q", tmp_path / "m", action="realign")
    assert (tmp_path / "m" / "quality.json").read_text() == "{}"  # still about these weights
    assert read_config(tmp_path / "m") == read_config(tmp_path / "q")
    with Checkpoint.open(tmp_path / "m") as new, Checkpoint.open(tmp_path / "q") as old:
        assert new.names() == old.names()
        for name in new.names():
            assert bytes(new.read_bytes(name)) == bytes(old.read_bytes(name))
            assert new.entry(name).begin % 64 == 0 or new.entry(name).num_bytes % 64


def test_dequantized_weights_are_what_the_packs_stand_for(tmp_path):
    run(POCKET, tmp_path / "q", action="quantize", recipe="mixed_4_6")
    run(tmp_path / "q", tmp_path / "d", action="dequantize", dtype=mx.float32)
    assert not {"quantization", "quantization_config"} & set(read_config(tmp_path / "d"))
    with FolderSource(POCKET) as source, FolderSource(tmp_path / "d") as floats:
        assert floats.names() == source.names()
    packed, floats = (mx.load(str(tmp_path / n / "model.safetensors")) for n in ("q", "d"))
    for name in ("model.embed_tokens", "model.layers.0.mlp.down_proj"):
        parts = [packed[f"{name}.{part}"] for part in ("weight", "scales", "biases")]
        bits = parts[0].shape[1] * 32 // floats[f"{name}.weight"].shape[1]
        scales, offsets = (part.astype(mx.float32) for part in parts[1:])
        expected = mx.dequantize(parts[0], scales, offsets, bits=bits)
        assert mx.allclose(floats[f"{name}.weight"], expected, rtol=1e-6, atol=1e-7).item()


def test_what_does_not_fit_the_source_is_refused_in_words(tmp_path):
    run(POCKET, tmp_path / "q", action="quantize")
    with pytest.raises(InvalidRequestError, match=r"quantized already.*-d first"):
        run(tmp_path / "q", tmp_path / "m", action="quantize")
    with pytest.raises(InvalidRequestError, match="leave out -d"):
        run(POCKET, tmp_path / "m", action="dequantize")


def test_a_mixture_of_experts_is_refused_and_another_family_is_not(tmp_path):
    folder = make_folder(tmp_path / "a")
    config = (folder / "config.json").read_text().replace('"llama"', '"unheard"')
    (folder / "config.json").write_text(config)
    done = run(folder, tmp_path / "m", action="quantize", packing=Packing(32, 4), has_receipt=True)
    assert len(done.plan.packings) == 3 * 7 + 2
    assert done.receipt.kl_mean is None and "unheard" in done.receipt.reason
    edit_tensors(folder, model__layers__0__mlp__experts__0__up_proj__weight=mx.ones((64, 64)))
    with pytest.raises(UnsupportedModelError, match="mixture of experts"):
        run(folder, tmp_path / "n", action="quantize")


@pytest.mark.parametrize("tied", [True, False, None])
def test_a_head_that_is_saved_beside_a_tied_embedding(tmp_path, tied):
    folder = make_folder(tmp_path / "a", tie_word_embeddings=False, vocab_size=2048)
    config = read_config(folder)
    config.pop("tie_word_embeddings")
    (folder / "config.json").write_text(
        str(config | ({} if tied is None else {"tie_word_embeddings": tied}))
        .replace("'", '"')
        .replace("True", "true")
        .replace("False", "false")
    )
    run(folder, tmp_path / "m", action="quantize", packing=Packing(32, 4))
    assert ("lm_head.scales" in mx.load(str(tmp_path / "m/model.safetensors"))) is (
        tied is not True
    )
    assert np.allclose(our_logits(tmp_path / "m"), their_logits(tmp_path / "m"), atol=0.05)


@pytest.mark.parametrize(
    "max_shard_bytes", [1, 9000]
)  # 1: the parts of a layer in files of their own
@pytest.mark.parametrize("num_puts", [2, 3, 4, 50])
def test_a_run_that_stopped_goes_on_and_ends_with_the_same_bytes(
    tmp_path, monkeypatch, max_shard_bytes, num_puts
):
    options = {"action": "quantize", "packing": Packing(32, 4), "max_shard_bytes": max_shard_bytes}
    folder = make_folder(tmp_path / "a")
    run(folder, tmp_path / "whole", **options)
    put, count = stream_writer.StreamWriter.put, [0]

    def stop_after(self, *arguments):
        put(self, *arguments)
        count[0] += 1
        if count[0] == num_puts:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(stream_writer.StreamWriter, "put", stop_after)
        run(folder, tmp_path / "m", **options)
    kept = list((tmp_path / ".m.partial" / "model").glob("*.safetensors"))
    before = {path.name: path.stat().st_ino for path in kept}
    assert before or max_shard_bytes > 1
    run(folder, tmp_path / "m", **options)
    assert read_weights(tmp_path / "m") == read_weights(tmp_path / "whole")
    after = {name: (tmp_path / "m" / name).stat().st_ino for name in before}
    assert after == before


def test_a_full_disk_is_one_line_and_the_target_does_not_appear(tmp_path, monkeypatch):
    left = [300_000]

    def pwrite(descriptor, data, offset):
        left[0] -= len(data)
        if left[0] < 0:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return real(descriptor, data, offset)

    real = os.pwrite
    monkeypatch.setattr(stream_writer.os, "pwrite", pwrite)
    with pytest.raises(InvalidRequestError, match="No space left on device") as caught:
        run(POCKET, tmp_path / "m", action="quantize")
    assert "\n" not in str(caught.value)
    assert not list(tmp_path.iterdir())


def test_too_little_space_is_said_before_anything_is_written(tmp_path, monkeypatch):
    monkeypatch.setattr(
        "mlx_edge.conversion.converter.shutil.disk_usage",
        lambda _: type("Usage", (), {"free": 1000})(),
    )
    with pytest.raises(
        InvalidRequestError, match=r"2\.1 MB are to be written, the disk has 1\.0 kB"
    ):
        run(POCKET, tmp_path / "m", action="quantize")
    assert not list(tmp_path.iterdir())


def test_texts_come_along_and_code_does_not(tmp_path):
    folder = make_folder(tmp_path / "a")
    wanted = {"tokenizer.json", "vocab.txt", "chat_template.jinja", "tokenizer.model", "LICENSE"}
    for name in wanted | {"modeling.py", "pytorch_model.bin", "quality.json", ".hidden.json"}:
        (folder / name).write_text("{}")
    run(folder, tmp_path / "m")
    found = {path.name for path in (tmp_path / "m").iterdir()}
    assert found == wanted | {"config.json", "model.safetensors"}


def test_per_tensor_grids_do_not_depend_on_the_blocks(tmp_path, monkeypatch):
    options = {"action": "quantize", "rounding": Rounding(per="tensor"), "packing": Packing(64, 8)}
    run(POCKET, tmp_path / "a", **options)
    monkeypatch.setattr("mlx_edge.conversion.pipeline.BLOCK_ELEMENTS", 5000)
    run(POCKET, tmp_path / "b", **options)
    assert read_weights(tmp_path / "a") == read_weights(tmp_path / "b")
    scales = mx.load(str(tmp_path / "a/model.safetensors"))["model.layers.0.mlp.up_proj.scales"]
    assert mx.all(scales == scales[0, 0]).item()
