"""Model folders with tiny tokenizers, trained on a few sentences: one of each kind that is served."""

import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import sentencepiece
from tokenizers import AddedToken as Added
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from tokenizers.processors import TemplateProcessing

SENTENCES = [
    "the quick brown fox jumps over the lazy dog",
    "hello world, how are you today? I'm fine.",
    "Call me Ishmael. Some years ago, never mind how long precisely",
    "你好 世界 naïve café",
    "  two leading spaces   and three between",
    "def add(a, b):\n    return a + b\n",
] * 20

MakeFolder = Callable[..., Path]


def train_sentencepiece(**options: Any) -> bytes:
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(SENTENCES),
        model_writer=model,
        **{
            "vocab_size": 400,
            "model_type": "bpe",
            "byte_fallback": True,
            "character_coverage": 0.98,
            "remove_extra_whitespaces": False,
            "normalization_rule_name": "identity",
            "user_defined_symbols": ["<tool>"],
            "control_symbols": ["<ctl>"],
            "minloglevel": 5,
            **options,
        },
    )
    return model.getvalue()


def train_byte_level() -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        special_tokens=["<|begin|>", "<|end|>"],
        show_progress=False,
    )
    tokenizer.train_from_iterator(SENTENCES, trainer)
    tokenizer.post_processor = TemplateProcessing(
        single="<|begin|> $A", pair="<|begin|> $A $B", special_tokens=[("<|begin|>", 0)]
    )
    tokenizer.add_tokens([Added("<plain>", normalized=False), Added("två ord", normalized=False)])
    return tokenizer


def train_byte_fallback() -> Tokenizer:
    """A converted Llama: pieces with ▁, 256 byte pieces, Replace-ByteFallback-Fuse-Strip."""
    trained = Tokenizer(models.BPE())
    trained.normalizer = normalizers.Sequence(
        [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    )
    trained.train_from_iterator(
        SENTENCES, trainers.BpeTrainer(vocab_size=150, show_progress=False, limit_alphabet=40)
    )
    learned = json.loads(trained.to_str())["model"]
    names = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), *learned["vocab"]]
    tokenizer = Tokenizer(
        models.BPE(
            vocab={name: index for index, name in enumerate(dict.fromkeys(names))},
            merges=[tuple(merge) for merge in learned["merges"]],
            unk_token="<unk>",
            byte_fallback=True,
        )
    )
    tokenizer.normalizer = trained.normalizer
    tokenizer.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    tokenizer.add_special_tokens(["<unk>", "<s>", "</s>"])
    return tokenizer


def train_word_piece() -> Tokenizer:
    tokenizer = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece()
    tokenizer.train_from_iterator(
        SENTENCES,
        trainers.WordPieceTrainer(vocab_size=200, special_tokens=["[UNK]"], show_progress=False),
    )
    return tokenizer


def train_metaspace() -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    tokenizer.train_from_iterator(
        SENTENCES, trainers.BpeTrainer(vocab_size=150, show_progress=False)
    )
    return tokenizer


def unknown_decoder() -> Tokenizer:
    tokenizer = train_metaspace()
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace(Regex("▁+"), " "), decoders.ByteFallback(), decoders.Fuse()]
    )
    return tokenizer


@pytest.fixture(scope="session")
def sentencepiece_model() -> bytes:
    return train_sentencepiece()


@pytest.fixture(scope="session")
def byte_level() -> Tokenizer:
    return train_byte_level()


@pytest.fixture(scope="session")
def byte_fallback() -> Tokenizer:
    return train_byte_fallback()


@pytest.fixture
def make_folder(tmp_path: Path) -> MakeFolder:
    """Write a model folder: `files` by name, with _ for the last dot; objects become JSON."""

    def make(**files: Any) -> Path:
        folder = tmp_path / f"model{len(list(tmp_path.iterdir()))}"
        folder.mkdir()
        for key, content in files.items():
            stem, _, suffix = key.rpartition("_")
            match content:
                case bytes():
                    data = content
                case str():
                    data = content.encode()
                case Tokenizer():
                    data = content.to_str().encode()
                case _:
                    data = json.dumps(content).encode()
            (folder / f"{stem}.{suffix}").write_bytes(data)
        return folder

    return make
