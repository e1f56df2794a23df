"""From a GGUF file to a folder by the command: the same greedy tokens, and whatever is broken ends in one line."""

import json
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from mlx.utils import tree_flatten

from mlx_edge import convert
from mlx_edge.decoding.stream import generate
from mlx_edge.errors import MLXEdgeError
from mlx_edge.models.load import load, load_model
from mlx_edge.weights.hub import find_model
from mlx_edge.weights.safetensors import SafetensorsFile
from tests.models.tiny import CONFIGS, make_model, save_model

pytest.importorskip("gguf", reason="reading GGUF needs the extra mlx-edge[gguf]")

from mlx_edge.conversion.gguf.source import GGUFSource
from tests.conversion.gguf_files import add_sentencepiece, write_model

POCKET = find_model("pocket")
PROMPTS = ["The little dog", "12 + 30 =", "Once upon a time there was"]


@pytest.fixture(scope="module")
def pocket_gguf(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("gguf") / "pocket.gguf"
    config = json.loads((POCKET / "config.json").read_text())
    with SafetensorsFile(POCKET / "model.safetensors") as file:
        weights = {name: file.read(name) for name in file.tensors}
        return write_model(path, config, weights, tokenizer=add_sentencepiece(POCKET))


def answers(folder: Path) -> list[str]:
    model, tokenizer = load(str(folder))
    return [generate(model, tokenizer, prompt, max_tokens=40) for prompt in PROMPTS]


def test_pocket_comes_back_word_for_word(tmp_path: Path, pocket_gguf: Path) -> None:
    folder = tmp_path / "pocket"
    assert convert.main(["--model", str(pocket_gguf), "--mlx-path", str(folder)]) == 0
    assert answers(folder) == answers(POCKET)
    tokens = mx.array([[5, 100, 200, 300, 400]])
    found, wanted = (load_model(path)(tokens) for path in (folder, POCKET))
    assert np.array_equal(np.array(found), np.array(wanted))


def test_pocket_is_quantized_as_from_its_own_folder(tmp_path: Path, pocket_gguf: Path) -> None:
    files = []
    for name, model in (("ours", "pocket"), ("theirs", str(pocket_gguf))):
        folder = tmp_path / name
        flags = ["--model", model, "--mlx-path", str(folder), "-q", "--q-bits", "4"]
        assert convert.main([*flags, "--no-receipt"]) == 0
        files.append(folder / "model.safetensors")
    with SafetensorsFile(files[0]) as ours, SafetensorsFile(files[1]) as theirs:
        assert set(ours.tensors) == set(theirs.tensors)
        for name in ours.tensors:
            assert bytes(ours.read_bytes(name)) == bytes(theirs.read_bytes(name)), name


@pytest.mark.parametrize("wanted", ["llama3", "llama-bias", "qwen2", "qwen3-tied", "yarn"])
def test_logits_are_those_of_the_original(tmp_path: Path, wanted: str) -> None:
    config = {**CONFIGS[wanted], "torch_dtype": "float16"}
    model = make_model(config)
    model.set_dtype(mx.float16)
    weights = dict(tree_flatten(model.parameters()))
    path = write_model(tmp_path / "m.gguf", config, weights)
    original = save_model(model, config, tmp_path / "original")
    folder = tmp_path / "folder"
    folder.mkdir()
    with GGUFSource(path) as source:
        tensors = {name: source.read(name).astype(mx.float16) for name in source.names()}
        mx.save_safetensors(str(folder / "model.safetensors"), tensors, {"format": "mlx"})
        (folder / "config.json").write_text(json.dumps(source.config))
    tokens = mx.random.randint(0, config["vocab_size"], (2, 50))
    found, expected = (load_model(place)(tokens) for place in (folder, original))
    assert np.array_equal(np.array(found), np.array(expected))


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    config = CONFIGS["llama3"] | {"num_hidden_layers": 1, "vocab_size": 2048}
    model = make_model(config)
    path = tmp_path_factory.mktemp("gguf") / "small.gguf"
    weights = dict(tree_flatten(model.parameters()))
    return write_model(path, config, weights, tokenizer=add_sentencepiece(POCKET)).read_bytes()


@settings(max_examples=100, deadline=None, suppress_health_check=list(HealthCheck))
@given(st.data())
def test_a_mutated_model_is_read_or_refused(tmp_path: Path, small: bytes, data) -> None:
    """Bytes of the metadata but the vocabulary, and of the table of tensors."""
    facts, table = small.index(b"tokenizer.ggml.tokens"), small.index(b"rope_freqs.weight") - 8
    end = small.index(b"blk.0.ffn_up.weight") + 60
    raw = bytearray(small)
    for _ in range(data.draw(st.integers(1, 3))):
        begin, stop = data.draw(st.sampled_from([(24, facts), (table, end)]))
        at = data.draw(st.integers(begin, stop - 1))
        raw[at] = data.draw(st.integers(0, 255))
    path = tmp_path / "m.gguf"
    path.write_bytes(raw)
    try:
        with GGUFSource(path) as source:
            for name in source.names():
                assert source.read(name).shape == source.shape(name)
            source.copy_text_files(tmp_path)
    except MLXEdgeError as error:
        assert "\n" not in str(error)


def test_a_broken_file_ends_the_command_in_one_line(
    tmp_path: Path, small: bytes, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "m.gguf"
    path.write_bytes(small[: len(small) // 2])
    assert convert.main(["--model", str(path), "--mlx-path", str(tmp_path / "out")]) == 2
    message = capsys.readouterr().err
    assert "truncated" in message
    assert len(message.strip().splitlines()) == 1
    assert not (tmp_path / "out").exists()
