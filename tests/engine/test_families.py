"""Families of models in the engine: the tokens of the single loop, and memory that is known; also behind the bridge."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest

from mlx_edge import ops
from mlx_edge.decoding.loop import generate_step
from mlx_edge.engine.blocking import BlockingEngine
from mlx_edge.engine.config import EngineConfig
from mlx_edge.engine.memory.model import MemoryModel
from mlx_edge.engine.request import Request
from mlx_edge.models.bridge import load_bridged
from mlx_edge.models.decoder import find_arrays
from mlx_edge.models.load import load_model
from mlx_edge.text import load_tokenizer
from mlx_edge.weights.hub import find_model
from tests.goldens.weights import draw_tokens
from tests.models.test_goldens import FOLDER, read_golden, write_model
from tests.models.tiny import CONFIGS, save_model
from tests.models.tiny import make_model as make_other

# One of each that has something of its own: experts, sinks, windows, caps, fused matrices, partial rope.
FAMILIES = (
    "mixtral",
    "qwen3_moe",
    "gpt_oss",
    "gemma2",
    "gemma3",
    "phi3-long",
    "glm4",
    "olmo2",
    "granite",
)
LENGTHS = (3, 40, 17, 90)
NEW = 8


def make_folder(name: str, folder: Path) -> Path:
    return write_model(read_golden(FOLDER / f"{name}.json"), "saved", folder)


def tokens_alone(model: Any, prompt: Sequence[int]) -> list[int]:
    steps = generate_step(mx.array(list(prompt), dtype=mx.int32), model, max_tokens=NEW)
    return [token for token, _ in steps]


def check_engine(model: Any) -> None:
    """Requests together have the tokens that each has alone."""
    prompts = [tuple(draw_tokens(length, model.config.vocab_size)) for length in LENGTHS]
    wanted = [tokens_alone(model, prompt) for prompt in prompts]
    config = EngineConfig(max_batch_size=3, prefill_chunk=16, added_latency_ms=1.0)
    with BlockingEngine((model, load_tokenizer(find_model("pocket"))), config) as engine:
        for _ in range(2):  # the second time prefixes are found
            futures = [
                engine.enqueue(Request(prompt, max_tokens=NEW, ignore_eos=True))
                for prompt in prompts
            ]
            assert [list(future.result(60).tokens) for future in futures] == wanted


@pytest.mark.parametrize("name", FAMILIES)
def test_a_family_in_the_engine_has_the_tokens_of_the_single_loop(
    name: str, tmp_path: Path
) -> None:
    check_engine(load_model(make_folder(name, tmp_path)))


@pytest.mark.parametrize("name", ["llama3", "qwen3", "smollm3"])
def test_so_has_a_model_behind_the_bridge(name: str, tmp_path: Path) -> None:
    pytest.importorskip("mlx_lm", reason="the bridge needs mlx-lm")
    folder = save_model(make_other(CONFIGS[name]), CONFIGS[name], tmp_path)
    check_engine(load_bridged(folder, lazy=False))


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("backend", ["plain", "cpu"])
def test_a_familys_weights_are_counted(name: str, backend: str, tmp_path: Path) -> None:
    folder = make_folder(name, tmp_path)
    sizes = MemoryModel.of_folder(folder, EngineConfig(), backend=backend).weights  # type: ignore[arg-type]
    with ops.use("reference"):
        arrays = {id(array): array.nbytes for array in find_arrays(load_model(folder))}
    held = sum(arrays.values())
    assert sizes.mapped + sizes.private == pytest.approx(held, rel=0.05)
