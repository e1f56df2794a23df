"""The bundled folders: complete, small, with two tokenizer files that agree, and a template that fits the training."""

from __future__ import annotations

import importlib
import json
import sys
from itertools import islice
from pathlib import Path

import jinja2
import pytest
import sentencepiece
import tokenizers

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "scripts"))
corpus = importlib.import_module("pocket_corpus")

DEFAULT_PROMPT_IDS = [1, 4, 438, 455, 264, 367, 5]
FOLDERS = [ROOT / "mlx_edge" / "assets" / name for name in ("pocket", "pocket_draft")]


@pytest.fixture(params=FOLDERS, ids=lambda folder: folder.name)
def folder(request: pytest.FixtureRequest) -> Path:
    return request.param


def read(path: Path) -> dict:
    return json.loads(path.read_text(encoding="utf-8"))


def test_configuration_is_a_plain_small_llama(folder):
    config = read(folder / "config.json")
    assert config["model_type"] == "llama"
    assert config["tie_word_embeddings"] is True
    assert config["head_dim"] == 64
    assert config["hidden_size"] % 64 == config["intermediate_size"] % 64 == 0
    assert config["num_attention_heads"] % config["num_key_value_heads"] == 0
    assert (folder / "model.safetensors").stat().st_size <= 12_000_000


def test_tokenizer_files_agree(folder):
    pieces = sentencepiece.SentencePieceProcessor(model_file=str(folder / "tokenizer.model"))
    fast = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
    assert (
        pieces.vocab_size() == fast.get_vocab_size() == read(folder / "config.json")["vocab_size"]
    )
    for document in islice(corpus.documents(3), 300):
        text = f"<user>{document.prompt}<assistant>{document.answer}"
        assert fast.encode(text, add_special_tokens=False).ids == pieces.encode(text)
    for text in ("", "  a  b\n", "Grüße, 你好 🙂", "<user><assistant>", "Zoltán's"):
        assert fast.encode(text, add_special_tokens=False).ids == pieces.encode(text)


def test_chat_template_is_the_form_of_training(folder):
    config = read(folder / "tokenizer_config.json")
    template = jinja2.Template(config["chat_template"])
    special = {"bos_token": config["bos_token"], "eos_token": config["eos_token"]}
    messages = [{"role": "user", "content": "Once upon a time"}]
    prompt = template.render(messages=messages, add_generation_prompt=True, **special)
    assert prompt == "<s><user>Once upon a time<assistant>"
    fast = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
    assert fast.encode(prompt, add_special_tokens=False).ids == DEFAULT_PROMPT_IDS
    messages.append({"role": "assistant", "content": "The end."})
    whole = template.render(messages=messages, add_generation_prompt=False, **special)
    assert whole == prompt + "The end.</s>"


def test_both_models_share_one_tokenizer():
    first, second = ((folder / "tokenizer.model").read_bytes() for folder in FOLDERS)
    assert first == second
