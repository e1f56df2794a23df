"""Diagnoses: which layer, which weights, which tokens; and a picture where there is something to draw with."""

import importlib.util
import json

import numpy as np
import pytest

from mlx_edge.calibration import diagnosis as module
from mlx_edge.calibration import plot
from mlx_edge.calibration.diagnosis import diagnose
from mlx_edge.errors import InvalidRequestError
from mlx_edge.quant import Packing, dequantize, quantize
from mlx_edge.weights import Checkpoint
from mlx_edge.weights.hub import find_model
from tests.calibration.pairs import change_weights, pocket_folder

SMALL = {"num_rows": 2, "length": 64}


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    folder = pocket_folder(tmp_path_factory.mktemp("q4") / "q4", Packing(64, 4))
    return diagnose("pocket", str(folder), top_k=3, **SMALL)


def test_every_part_is_said(found) -> None:
    text = "\n".join(found.lines())
    c = found.comparison
    assert f"{c.kl_mean:.6f} nats/token" in text and f"{c.top1:.2%}" in text
    assert f"Top-3 agreement    {c.topk:.2%}" in text
    assert f"A {c.reference_perplexity:.4f}, B {c.other_perplexity:.4f}" in text
    assert "A  pocket, 16.00 bits per weight" in text and "4.51 bits per weight" in text
    assert "on 128 tokens of built-in" in text
    for index in range(4):
        assert f"layer {index} " in text
    assert "the 12 largest of 29" in text and "16.00 -> 4.50" in text
    assert text.count("  KL ") == 10 == text.count("    A  ") == text.count("    B  ")
    assert all(len(line) < 160 and line.isprintable() for line in found.lines())


def test_errors_of_weights_are_frobenius(found) -> None:
    assert found.weights[0].name == "model.embed_tokens"
    assert len(found.weights) == 1 + 4 * 7
    with Checkpoint.open(find_model("pocket")) as checkpoint:
        for weight in (found.weights[0], found.weights[-1]):
            values = checkpoint.read(f"{weight.name}.weight")
            exact = np.array(values, np.float64)
            other = np.array(dequantize(quantize(values, Packing(64, 4), values.dtype)))
            expected = np.linalg.norm(exact - other) / np.linalg.norm(exact)
            assert weight.error == pytest.approx(expected, rel=1e-5)
            assert (weight.first_bits, weight.second_bits) == (16, 4.5)


def test_the_damaged_layer_stands_out(tmp_path) -> None:
    folder = pocket_folder(tmp_path / "m")
    change_weights(folder, lambda name, w: w * 1.3 if "layers.2.mlp.up" in name else w)
    found = diagnose("pocket", str(folder), **SMALL)
    own = found.comparison.own_errors
    assert own[0] == own[1] == own[3] == 0 < own[2]
    assert [w.name for w in found.weights if w.error] == ["model.layers.2.mlp.up_proj"]
    bars = [line for line in found.lines() if "#" in line]
    assert len(bars) == 1 and bars[0].startswith("layer 2") and bars[0].count("#") == 24


def test_the_same_model_is_said_to_be_the_same() -> None:
    found = diagnose("pocket", "pocket", **SMALL)
    assert "No token differs: the models say the same." in found.lines()
    assert not any(w.error for w in found.weights)


def test_models_of_two_widths_are_compared_without_layers() -> None:
    found = diagnose("pocket", "pocket-draft", **SMALL)
    assert found.weights == () and found.comparison.layer_errors == ()
    assert any(line.startswith("Layers are not compared") for line in found.lines())


def test_other_vocabularies_are_refused(tmp_path) -> None:
    folder = pocket_folder(tmp_path / "m")
    raw = json.loads((folder / "tokenizer.json").read_text("utf-8"))
    vocabulary = raw["model"]["vocab"]
    names = sorted(vocabulary, key=vocabulary.get)
    last, before = names[-1], names[-2]
    vocabulary[last], vocabulary[before] = vocabulary[before], vocabulary[last]
    (folder / "tokenizer.json").write_text(json.dumps(raw), "utf-8")
    with pytest.raises(
        InvalidRequestError, match=r"token 2046 is .* to pocket, and .*same vocabulary"
    ):
        diagnose("pocket", str(folder), **SMALL)


@pytest.mark.parametrize("name", ["picture", "picture.jpeg", "none/picture.png"])
def test_a_bad_place_for_a_picture_is_said_first(tmp_path, name, monkeypatch) -> None:
    monkeypatch.setattr(module, "find_model", lambda _: pytest.fail("asked too late"))
    with pytest.raises(InvalidRequestError, match=r"a plot ends in .png|there is no folder"):
        diagnose("pocket", "pocket", plot=tmp_path / name)


def test_a_missing_matplotlib_is_said(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(plot, "find_spec", lambda _: None)
    with pytest.raises(InvalidRequestError, match=r"needs matplotlib, .*mlx-edge\[plot\]"):
        diagnose("pocket", "pocket", plot=tmp_path / "a.png")


@pytest.mark.skipif(
    importlib.util.find_spec("matplotlib") is None, reason="matplotlib is not installed"
)
@pytest.mark.parametrize("pair", [("pocket", "pocket"), ("pocket", "pocket-draft")])
def test_a_picture_is_drawn(tmp_path, pair) -> None:
    path = tmp_path / "a.png"
    diagnose(*pair, plot=path, **SMALL)
    assert path.read_bytes().startswith(b"\x89PNG")
