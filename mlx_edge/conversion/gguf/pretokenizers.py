"""How a byte-level vocabulary of a GGUF file cuts a text into words: by the name in `tokenizer.ggml.pre`.

A file has the name alone. What it stands for is said by the tokenizer.json of the models that it was made for, and by
the table of names in llama.cpp (https://github.com/ggml-org/llama.cpp/blob/master/src/llama-vocab.cpp).
"""

from collections.abc import Mapping
from dataclasses import dataclass

_CONTRACTIONS = r"'s|'t|'re|'ve|'m|'ll|'d"
_SPACES = r"\s+(?!\S)|\s+"
_GPT2 = rf"{_CONTRACTIONS}| ?\p{{L}}+| ?\p{{N}}+| ?[^\s\p{{L}}\p{{N}}]+|{_SPACES}"


def _words(digits: str) -> str:
    """The pattern of cl100k and its heirs, which differ in how many digits make a word."""
    letters = r"[^\r\n\p{L}\p{N}]?\p{L}+"
    signs = r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
    return rf"(?i:{_CONTRACTIONS})|{letters}|{digits}|{signs}|{_SPACES}"


_LLAMA3 = _words(r"\p{N}{1,3}")
_QWEN2 = _words(r"\p{N}")
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_TEKKEN = (
    rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+|[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*|\p{{N}}|"
    rf" ?[^\s\p{{L}}\p{{N}}]+[\r\n/]*|\s*[\r\n]+|{_SPACES}"
)


@dataclass(frozen=True)
class PreTokenizer:
    """Patterns that cut a text one after the other, each match by itself, and what belongs to the name besides."""

    splits: tuple[str, ...]
    ignores_merges: bool = False  # a word that is a token is that token, whatever its merges
    normalizes: bool = False  # to Unicode's NFC, before all else
    adds_bos: bool = False  # where the file does not say


PRE_TOKENIZERS: Mapping[str, PreTokenizer] = {
    **dict.fromkeys(
        ("llama-bpe", "llama3", "llama-v3", "falcon3"),
        PreTokenizer((_LLAMA3,), ignores_merges=True, adds_bos=True),
    ),
    "smaug-bpe": PreTokenizer((_LLAMA3,)),
    "tekken": PreTokenizer((_TEKKEN,), ignores_merges=True, adds_bos=True),
    "qwen2": PreTokenizer((_QWEN2,), normalizes=True),
    **dict.fromkeys(("deepseek-r1-qwen", "megrez"), PreTokenizer((_QWEN2,))),
    "gpt-2": PreTokenizer((_GPT2,)),
    **dict.fromkeys(("smollm", "starcoder", "refact"), PreTokenizer((r"\p{N}", _GPT2))),
    # Of files that were made before there were names.
    "default": PreTokenizer(
        (r"[\p{P}\$\+<=>\^~\|]+", _GPT2, r"\p{N}+", "[0-9][0-9][0-9]"),
    ),
}
