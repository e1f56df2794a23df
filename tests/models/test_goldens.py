"""Logits against those that transformers computed, stored by scripts/make_goldens.py: the other implementation."""

import json
from itertools import pairwise
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from mlx_edge.models.config import ModelConfig
from mlx_edge.models.decoder import Decoder
from mlx_edge.models.families import FAMILIES
from mlx_edge.models.load import load_model
from mlx_edge.weights.writer import write_checkpoint
from tests.goldens.weights import draw_tokens, draw_weight

FOLDER = Path(__file__).parents[1] / "goldens"
GOLDENS = sorted(path for path in FOLDER.glob("*.json") if not path.stem.startswith("vision_"))
TOLERANCE = 1e-4  # of the largest logit
CHUNKS = ([90], [31, 1, 1, 20, 37], [64, 1, 1, 24])


def read_golden(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text())


def write_model(golden: dict[str, Any], spelling: str, folder: Path) -> Path:
    """The folder that a hub would hold, without a tokenizer."""
    tensors = {name: mx.array(draw_weight(name, shape)) for name, shape in golden["shapes"].items()}
    write_checkpoint(folder, tensors)
    (folder / "config.json").write_text(json.dumps(golden[spelling]))
    return folder


def logits_in_chunks(model: Decoder, tokens: list[int], chunks: list[int]) -> np.ndarray:
    """Logits (L, V) of a sequence that is given in parts of these lengths."""
    cache = model.make_cache()
    bounds = np.cumsum([0, *chunks])
    parts = [model(mx.array([tokens[a:b]]), cache) for a, b in pairwise(bounds)]
    return np.array(mx.concatenate(parts, axis=1))[0]


def test_the_table_of_families_lists_them_all() -> None:
    """docs/families.md is written by scripts/parity_table.py."""
    text = (Path(__file__).parents[2] / "docs" / "families.md").read_text()
    table = text.split("<!-- parity: begin -->")[1].split("<!-- parity: end -->")[0]
    rows = [line.split("|") for line in table.splitlines() if line.startswith("| `")]
    assert [row[1].strip(" `") for row in rows] == list(FAMILIES)
    assert all(0 < float(row[3]) <= TOLERANCE for row in rows)


def test_every_family_has_goldens() -> None:
    seeing = {"glm4v", "qwen2_5_vl"}  # whole, in tests/models/vision
    assert {read_golden(path)["given"]["model_type"] for path in GOLDENS} | seeing == set(FAMILIES)


@pytest.mark.parametrize("path", GOLDENS, ids=lambda path: path.stem)
def test_logits_equal_transformers(path: Path, tmp_path: Path) -> None:
    golden = read_golden(path)
    model = load_model(write_model(golden, "saved", tmp_path))
    tokens = draw_tokens(golden["num_tokens"], model.config.vocab_size)
    wanted = np.array(golden["logits"])
    for chunks in CHUNKS:
        assert sum(chunks) == len(tokens)
        found = logits_in_chunks(model, tokens, chunks)[golden["positions"]]
        assert np.abs(found - wanted).max() <= TOLERANCE * np.abs(wanted).max(), chunks


@pytest.mark.parametrize("path", GOLDENS, ids=lambda path: path.stem)
def test_old_and_new_spelling_mean_the_same(path: Path) -> None:
    golden = read_golden(path)
    assert ModelConfig.from_hf(golden["given"]) == ModelConfig.from_hf(golden["saved"])
