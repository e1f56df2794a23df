"""Whatever is done to the files of a model folder, nothing but an error of ours comes out."""

import json
import random

import pytest

from mlx_edge.errors import MLXEdgeError, ModelFormatError
from mlx_edge.text import load_tokenizer
from mlx_edge.text.tokenizer_config import read_tokenizer_config

CONFIG = {
    "bos_token": {"content": "<s>", "lstrip": False},
    "eos_token": "</s>",
    "add_bos_token": True,
    "legacy": None,
    "added_tokens_decoder": {"400": {"content": "<|user|>", "special": True}},
    "additional_special_tokens": ["<|user|>"],
    "extra_special_tokens": {"image_token": "<tool>"},
    "chat_template": [{"name": "default", "template": "{{ messages }}"}],
}


def damage(data: bytes, rng: random.Random) -> bytes:
    damaged = bytearray(data)
    start = rng.randrange(len(damaged))
    match rng.randrange(3):
        case 0:
            del damaged[start:]
        case 1:
            del damaged[start : start + rng.randrange(1, 40)]
        case _:
            for _ in range(rng.randrange(1, 6)):
                damaged[rng.randrange(len(damaged))] = rng.randrange(256)
    return bytes(damaged)


def use(folder) -> str:
    """Load and use a tokenizer; return what happened in one word."""
    try:
        tokenizer = load_tokenizer(folder)
        tokenizer.decode(tokenizer.encode("the quick <s> 你好 😀 <|user|> fox"))
        tokenizer.decode(range(tokenizer.vocab_size))
    except MLXEdgeError as error:
        assert "\n" not in str(error)
        assert len(str(error)) < 700
        return type(error).__name__
    return "fine"


def test_damaged_sentencepiece_models(make_folder, sentencepiece_model):
    rng = random.Random(1)
    folder = make_folder(tokenizer_model=sentencepiece_model)
    outcomes = set()
    for _ in range(300):
        (folder / "tokenizer.model").write_bytes(damage(sentencepiece_model, rng))
        outcomes.add(use(folder))
    assert outcomes == {"fine", "ModelFormatError"}


def test_damaged_tokenizer_json(make_folder, byte_level):
    rng = random.Random(2)
    raw = byte_level.to_str().encode()
    folder = make_folder(tokenizer_json=raw)
    outcomes = set()
    for _ in range(300):
        (folder / "tokenizer.json").write_bytes(damage(raw, rng))
        outcomes.add(use(folder))
    assert "ModelFormatError" in outcomes


def test_damaged_tokenizer_config(make_folder, sentencepiece_model):
    rng = random.Random(3)
    raw = json.dumps(CONFIG).encode()
    folder = make_folder(tokenizer_model=sentencepiece_model, tokenizer_config_json=raw)
    assert use(folder) == "fine"
    for _ in range(300):
        (folder / "tokenizer_config.json").write_bytes(damage(raw, rng))
        use(folder)


WRONG_VALUES = [None, True, 7, -1, 1.5, "", "text", [], [1], ["a"], {}, {"a": 1}, {"content": 1}]
KEYS = [*CONFIG, "add_eos_token", "add_prefix_space", "clean_up_tokenization_spaces"]


@pytest.mark.parametrize("value", WRONG_VALUES, ids=repr)
def test_wrong_types(make_folder, sentencepiece_model, value):
    for key in KEYS:
        for config in ({**CONFIG, key: value}, value):
            folder = make_folder(tokenizer_model=sentencepiece_model, tokenizer_config_json=config)
            use(folder)
    for name in ("generation_config_json", "config_json", "added_tokens_json"):
        for content in ({"eos_token_id": value, "text_config": value}, value):
            use(make_folder(tokenizer_model=sentencepiece_model, **{name: content}))


@pytest.mark.parametrize("text", ["", "[" * 100_000, "nul", "[]", "3", '{"a": 1', b"\xff{}"])
@pytest.mark.parametrize("name", ["tokenizer_config", "special_tokens_map", "generation_config"])
def test_what_is_no_json_object(make_folder, name, text):
    with pytest.raises(ModelFormatError, match=rf"{name}\.json"):
        read_tokenizer_config(make_folder(**{f"{name}_json": text}))


@pytest.mark.parametrize("content", [b"", b"\0", b"IQ== 0\nIg== 1\n", b"\n" * 100])
def test_what_is_no_sentencepiece_model(make_folder, content):
    with pytest.raises(ModelFormatError, match=r"tokenizer\.model .* is not a sentencepiece model"):
        load_tokenizer(make_folder(tokenizer_model=content))


def test_a_panic_of_the_tokenizers_library(make_folder, byte_level):
    """A post-processor that lacks its token makes the library panic, which is no Exception."""
    broken = json.loads(byte_level.to_str())
    tokens = broken["post_processor"]["special_tokens"]
    tokens["<|other|>"] = tokens.pop("<|begin|>")
    with pytest.raises(ModelFormatError, match="no entry found for key") as caught:
        load_tokenizer(make_folder(tokenizer_json=broken))
    assert type(caught.value.__cause__).__name__ == "PanicException"


def test_folders_in_place_of_files(tmp_path):
    (tmp_path / "tokenizer.json").mkdir()
    assert use(tmp_path) == "ModelFormatError"
    (tmp_path / "tokenizer.json").rmdir()
    (tmp_path / "tokenizer.model").mkdir()
    assert use(tmp_path) == "ModelFormatError"
    (tmp_path / "tokenizer_config.json").mkdir()
    assert use(tmp_path) == "ModelFormatError"
