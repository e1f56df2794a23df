"""Vocabularies from GGUF files: the tokens that the original gives, and no guess where a file says too little."""

import json
import random
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers
from tokenizers.trainers import BpeTrainer

from mlx_edge.errors import MLXEdgeError, ModelFormatError, UnsupportedModelError
from mlx_edge.text import load_tokenizer
from mlx_edge.weights.hub import find_model
from tests.text.conftest import SENTENCES

gguf = pytest.importorskip("gguf", reason="reading GGUF needs the extra mlx-edge[gguf]")

from mlx_edge.conversion.gguf.tokenizer import make_tokenizer_files  # noqa: E402 (after the skip)
from mlx_edge.weights.gguf import GGUFFile  # noqa: E402
from tests.conversion.gguf_files import add_byte_level, add_sentencepiece  # noqa: E402

POCKET = find_model("pocket")
TEXTS = [
    *("", " ", "  ", "\n", "\t\n \r\n  x", "a", " a", "a ", "I'M we'LL they'd", "12345 1 22 333"),
    *(
        "naïve café — “quoted”",
        "你好 世界",
        "🙂👍🏽 é é",
        "\x00\x7f",
        "def f(x):\n    return x**2\n",
    ),
    *(
        "<user>hi</s>",
        "<|end|>x <|end|>",
        "<plain> and två ord",
        "a<plain>",
        "▁ and _",
        "ſ's",
        "cafe\u0301 A\u030a",
        "a qzx qzxa qzx",
    ),
    *SENTENCES[:6],
]
# As in the models' own tokenizer.json, written out.
PATTERNS = {
    "llama-bpe": r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+",
    "qwen2": r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+",
}


def random_texts(count: int) -> list[str]:
    """Words, spaces, digits and strange characters in any order."""
    source = random.Random(0)
    parts = [*" ".join(SENTENCES[:6]).split(), " ", "  ", "\n", "é", "界", "🙂", "7", "2024", "'s"]
    return ["".join(source.choices(parts, k=source.randint(1, 30))) for _ in range(count)]


def convert(folder: Path, add: Any, vocab_size: int = 1 << 20) -> Path:
    """The text files of a GGUF file that has a vocabulary alone."""
    folder.mkdir(exist_ok=True)
    writer = gguf.GGUFWriter(folder / "vocab.gguf", "llama")
    add(writer)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with GGUFFile(folder / "vocab.gguf") as file:
        files = make_tokenizer_files("vocab.gguf", file.metadata, vocab_size)
    for name, text in files.items():
        (folder / name).write_text(text)
    return folder


def train_byte_level(pre: str) -> Tokenizer:
    """A tokenizer as the family's tokenizer.json has it, trained on a few sentences."""
    tokenizer = Tokenizer(models.BPE(ignore_merges=pre == "llama-bpe"))
    if pre == "qwen2":
        tokenizer.normalizer = normalizers.NFC()
    spelling = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=pre == "smollm")
    if pre == "smollm":
        first: Any = pre_tokenizers.Digits(individual_digits=True)
    else:
        first = pre_tokenizers.Split(Regex(PATTERNS[pre]), "isolated")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([first, spelling])
    tokenizer.decoder = decoders.ByteLevel()
    trainer = BpeTrainer(
        vocab_size=500,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        special_tokens=["<|begin|>", "<|end|>"],
        show_progress=False,
    )
    tokenizer.train_from_iterator([*SENTENCES, "2024 12345 caféé naïve"] * 3, trainer)
    stored = json.loads(tokenizer.to_str())
    stored["model"]["vocab"]["Ġqzx"] = tokenizer.get_vocab_size()  # a word that no merge makes
    tokenizer = Tokenizer.from_str(json.dumps(stored))
    tokenizer.add_tokens([AddedToken(t, normalized=False) for t in ("<plain>", "två ord")])
    return tokenizer


@pytest.mark.parametrize("pre", ["llama-bpe", "qwen2", "smollm"])
def test_byte_level_tokens_are_the_originals(tmp_path: Path, pre: str) -> None:
    original = train_byte_level(pre)
    add = add_byte_level(json.loads(original.to_str()), pre, bos=0, eos=1)
    made = load_tokenizer(convert(tmp_path, add))
    for text in [*TEXTS, *random_texts(300)]:
        ids = original.encode(text, add_special_tokens=False).ids
        assert made.encode(text, add_special_tokens=False) == ids, text
        assert made.decode(ids) == original.decode(ids, skip_special_tokens=False)
    begins = [0] if pre == "llama-bpe" else []  # what llama.cpp does where the file is silent
    assert made.encode("x") == [*begins, *made.encode("x", add_special_tokens=False)]
    assert made.vocab_size == original.get_vocab_size()
    assert made.special_ids == {0, 1}
    assert made.eos_token_ids == {1}


def test_sentencepiece_tokens_are_the_originals(tmp_path: Path) -> None:
    original = load_tokenizer(POCKET)
    made = load_tokenizer(convert(tmp_path, add_sentencepiece(POCKET)))
    for text in [*TEXTS, *random_texts(500)]:
        ids = original.encode(text)
        assert made.encode(text) == ids, text
        assert made.decode(ids) == original.decode(ids)
    messages = [{"role": "user", "content": "hello"}, {"role": "assistant", "content": "hi"}]
    assert made.apply_chat_template(messages) == original.apply_chat_template(messages)
    assert (made.bos_token, made.eos_token) == (original.bos_token, original.eos_token)
    assert made.special_ids == original.special_ids
    assert made.vocab_size == original.vocab_size
    assert [made.id_to_token(i) for i in range(made.vocab_size)] == [
        original.id_to_token(i) for i in range(made.vocab_size)
    ]


def add_pieces(**changed: Any):
    """A SentencePiece vocabulary of a few pieces; `changed` replaces or adds what it says, None leaves it out."""
    words = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    pieces = [*words, "▁", "a", "b", "▁a", "ab", "▁ab"]
    facts: dict[str, Any] = {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.tokens": pieces,
        "tokenizer.ggml.scores": [float(-i) for i in range(len(pieces))],
        "tokenizer.ggml.token_type": [2, 3, 3, *[6] * 256, *[1] * 6],
    }
    return add_facts(facts | {key.replace("__", "."): v for key, v in changed.items()})


def add_facts(facts: dict[str, Any]):
    def add(writer: gguf.GGUFWriter) -> None:
        for key, value in facts.items():
            match value:
                case None:
                    continue
                case bool():
                    writer.add_bool(key, value)
                case int():
                    writer.add_uint32(key, value)
                case float():
                    writer.add_float32(key, value)
                case str():
                    writer.add_string(key, value)
                case list():
                    writer.add_array(key, value)

    return add


def test_what_a_sentencepiece_file_does_not_say(tmp_path: Path) -> None:
    """llama.cpp's defaults: BOS 1 before a text, EOS 2, a space before its first word and after a special token."""
    made = load_tokenizer(convert(tmp_path, add_pieces()))
    space, a, b, space_a = 259, 260, 261, 262
    assert made.encode("a") == [1, space_a]
    assert made.encode("ab ba", add_special_tokens=False) == [264, space, b, a]
    assert made.encode("</s>a", add_special_tokens=False) == [2, space_a]
    assert made.encode("é", add_special_tokens=False) == [space, 3 + 0xC3, 3 + 0xA9]
    assert made.decode([space_a, space, b]) == "a b"
    assert made.eos_token_ids == {2}


def test_templates_have_names(tmp_path: Path) -> None:
    made = convert(
        tmp_path,
        add_pieces(
            tokenizer__chat_template="plain",
            tokenizer__chat_templates=["tool_use"],
            **{"tokenizer__chat_template__tool_use": "tools"},
        ),
    )
    tokenizer = load_tokenizer(made)
    message = [{"role": "user", "content": "x"}]
    assert tokenizer.apply_chat_template(message, tokenize=False) == "plain"
    assert tokenizer.apply_chat_template(message, tokenize=False, tools=[{}]) == "tools"


def test_every_end_is_found(tmp_path: Path) -> None:
    stored = json.loads(train_byte_level("qwen2").to_str())
    first = max(token["id"] for token in stored["added_tokens"]) + 1
    for index, content in enumerate(("<|im_end|>", "<|eot_id|>", "<|other|>")):
        token = stored["added_tokens"][0]
        stored["added_tokens"].append({**token, "id": first + index, "content": content})
    folder = convert(tmp_path, add_byte_level(stored, "qwen2", eos=1, eot=first + 2))
    config = json.loads((folder / "generation_config.json").read_text())
    assert config["eos_token_id"] == [1, first + 2, first + 1, first]
    assert load_tokenizer(folder).eos_token_ids == set(config["eos_token_id"])


ADD = "tokenizer__ggml__"
BROKEN: dict[str, tuple[dict[str, Any], str]] = {
    "another kind": ({f"{ADD}model": "bert"}, "'bert', expected gpt2 or llama"),
    "no kind": ({f"{ADD}model": None}, "tokenizer.ggml.model is missing"),
    "no tokens": ({f"{ADD}tokens": None}, "0 tokens with 265 types"),
    "too few scores": ({f"{ADD}scores": [1.0]}, "not a list of 265 numbers"),
    "no scores": ({f"{ADD}scores": None}, "not a list of 265 numbers"),
    "scores as texts": ({f"{ADD}scores": ["a"] * 265}, "not a list of 265 numbers"),
    "scores that are no numbers": ({f"{ADD}scores": [float("nan")] * 265}, "265 numbers"),
    "too few types": ({f"{ADD}token_type": [1]}, "265 tokens with 1 types"),
    "a token twice": ({f"{ADD}tokens": ["a"] * 265}, "a token twice"),
    "an empty token": ({f"{ADD}tokens": [*map(str, range(264)), ""]}, "an empty one"),
    "an id outside": ({f"{ADD}eos_token_id": 265}, "eos_token_id is 265"),
    "a flag as a number": ({f"{ADD}add_bos_token": 1}, "add_bos_token is 1"),
    "a separator": ({f"{ADD}add_sep_token": True}, "add_sep_token is not supported"),
    "spaces removed": ({f"{ADD}remove_extra_whitespaces": True}, "is not supported"),
    "a key that is not known": ({f"{ADD}surprise": 3}, r"ggml\.surprise = 3"),
    "a template that is no text": ({"tokenizer__chat_template": 3}, "chat_template is 3"),
    "an unknown pre-tokenizer": (
        {f"{ADD}model": "gpt2", f"{ADD}pre": "mystery"},
        "'mystery', expected one of llama-bpe.*qwen2.*default",
    ),
    "a merge of unknown pieces": (
        {f"{ADD}model": "gpt2", f"{ADD}merges": ["a zz"], f"{ADD}scores": None},
        "vocabulary is not one",
    ),
    "a merge of one piece": (
        {f"{ADD}model": "gpt2", f"{ADD}merges": ["ab"], f"{ADD}scores": None},
        "'ab', expected two pieces",
    ),
    "bos without an id": (
        {f"{ADD}model": "gpt2", f"{ADD}add_bos_token": True, f"{ADD}scores": None},
        "bos_token_id is missing",
    ),
}


@pytest.mark.parametrize("case", BROKEN)
def test_broken_vocabularies_are_refused(tmp_path: Path, case: str) -> None:
    changed, message = BROKEN[case]
    with pytest.raises((ModelFormatError, UnsupportedModelError), match=message) as caught:
        convert(tmp_path, add_pieces(**changed))
    assert "\n" not in str(caught.value)


def test_more_tokens_than_rows(tmp_path: Path) -> None:
    with pytest.raises(ModelFormatError, match="for a token table of 100 rows"):
        convert(tmp_path, add_pieces(), vocab_size=100)


KEYS = [
    *("model", "pre", "tokens", "scores", "token_type", "merges", "bos_token_id", "eos_token_id"),
    *("add_bos_token", "add_space_prefix", "unknown_token_id"),
]
scalars = st.one_of(
    st.booleans(), st.integers(-3, 300), st.floats(), st.sampled_from(["llama", "gpt2", "a b", ""])
)
values = scalars | st.lists(scalars, max_size=4) | st.lists(st.text(max_size=3), max_size=6)


@settings(max_examples=300, deadline=None, suppress_health_check=list(HealthCheck))
@given(st.dictionaries(st.sampled_from([f"tokenizer.ggml.{key}" for key in KEYS]), values))
def test_random_metadata_become_files_or_one_line(metadata: dict[str, Any]) -> None:
    sound = {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.tokens": ["<unk>", "a", "b", "ab"],
        "tokenizer.ggml.scores": [0.0, -1.0, -2.0, -3.0],
    }
    for facts in (metadata, sound | metadata):
        try:
            files = make_tokenizer_files("f", facts, 10)
        except MLXEdgeError as error:
            assert "\n" not in str(error)
        else:
            assert set(files) == {
                "tokenizer.json",
                "tokenizer_config.json",
                "generation_config.json",
            }
