"""The vocabulary in the `tokenizer.ggml.*` metadata of a GGUF file, checked: tokens, their types, merges or scores.

Keys: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md; what is absent is what llama.cpp takes it for. Knows
no tokenizer library.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from mlx_edge.errors import ModelFormatError, UnsupportedModelError
from mlx_edge.models.fields import Fields

PREFIX = "tokenizer.ggml."
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)  # types of tokens

_WORDS = {
    "bos": "bos",
    "eos": "eos",
    "unk": "unknown",
    "pad": "padding",
    "eot": "eot",
    "eom": "eom",
}


@dataclass(frozen=True)
class Vocabulary:
    """Tokens in the order of their ids, and which of them have a part to play."""

    tokens: Sequence[str]
    types: Sequence[int]
    named_ids: Mapping[str, int]  # "bos", "eos", "unk", "pad", "eot", "eom"
    adds_bos: bool
    adds_eos: bool

    def text(self, name: str) -> str | None:
        """The token that has a name, or None."""
        return self.tokens[self.named_ids[name]] if name in self.named_ids else None

    def ids(self) -> dict[str, int]:
        """The id of each token."""
        return {token: index for index, token in enumerate(self.tokens)}


def read_vocabulary(
    fields: Fields, vocab_size: int, *, adds_bos: bool, defaults: Mapping[str, int]
) -> Vocabulary:
    """`vocab_size` is the number of the token table's rows; `adds_bos` and `defaults` hold where the file is silent.

    Raises: ModelFormatError for what contradicts, UnsupportedModelError for a separator token.
    """
    tokens = fields.strings(f"{PREFIX}tokens")
    types = fields.integers(f"{PREFIX}token_type", high=1 << 16) or [NORMAL] * len(tokens)
    if not 0 < len(tokens) <= vocab_size or len(types) != len(tokens):
        raise ModelFormatError(
            f"{fields.name}: {len(tokens)} tokens with {len(types)} types for a token table of {vocab_size} rows; "
            "convert the model again"
        )
    if len(set(tokens)) != len(tokens) or "" in tokens:
        raise ModelFormatError(
            f"{fields.name}: {PREFIX}tokens has a token twice or an empty one; convert the model again"
        )
    if fields.boolean(f"{PREFIX}add_sep_token", False):
        raise UnsupportedModelError(
            f"{fields.name}: {PREFIX}add_sep_token is not supported; take the tokenizer from the model's own folder"
        )
    ids = _read_named_ids(fields, len(tokens), defaults)
    adds_bos = fields.boolean(f"{PREFIX}add_bos_token", adds_bos and "bos" in ids)
    adds_eos = fields.boolean(f"{PREFIX}add_eos_token", False)
    for name, is_added in (("bos", adds_bos), ("eos", adds_eos)):
        if is_added and name not in ids:
            raise ModelFormatError(
                f"{fields.name}: {PREFIX}add_{name}_token is true, but {PREFIX}{name}_token_id is missing; "
                "convert the model again"
            )
    return Vocabulary(tokens, types, ids, adds_bos, adds_eos)


def _read_named_ids(fields: Fields, num_tokens: int, defaults: Mapping[str, int]) -> dict[str, int]:
    ids = {}
    for name, word in _WORDS.items():
        key = f"{PREFIX}{word}_token_id"
        if key in fields.raw or defaults.get(name, num_tokens) < num_tokens:
            ids[name] = fields.integer(key, defaults.get(name), low=0, high=num_tokens - 1)
    return ids


def read_merges(fields: Fields) -> list[tuple[str, str]]:
    """The pairs of a byte-level BPE, the first merged first; each was written with one space between."""
    merges = []
    for merge in fields.strings(f"{PREFIX}merges"):
        cut = merge.find(" ", 1)
        if cut < 0 or cut == len(merge) - 1:
            raise ModelFormatError(
                f"{fields.name}: {PREFIX}merges has {merge[:40]!r}, expected two pieces with a space between; "
                "convert the model again"
            )
        merges.append((merge[:cut], merge[cut + 1 :]))
    return merges


def rank_merges(fields: Fields, vocabulary: Vocabulary) -> list[tuple[str, str]]:
    """All pairs of pieces that make a piece, the one of the highest score first: so SentencePiece merges."""
    kinds = zip(vocabulary.tokens, vocabulary.types, strict=True)
    ids = {token: index for index, (token, kind) in enumerate(kinds) if kind == NORMAL}
    scores = _read_scores(fields, len(vocabulary.tokens))
    pieces = sorted(ids, key=lambda piece: -scores[ids[piece]])  # equals stay in order of ids
    return [pair for piece in pieces for pair in _cut(piece, ids)]


def _read_scores(fields: Fields, num_tokens: int) -> list[float]:
    key = f"{PREFIX}scores"
    fields.unread.discard(key)
    scores = fields.raw.get(key)
    if (
        not isinstance(scores, list)
        or len(scores) != num_tokens
        or not all(isinstance(score, int | float) and not math.isnan(score) for score in scores)
    ):
        raise ModelFormatError(
            f"{fields.name}: {key} is not a list of {num_tokens} numbers, one for each token; convert the model again"
        )
    return scores


def _cut(piece: str, ids: Mapping[str, int]) -> list[tuple[str, str]]:
    """The pairs of pieces that make this one, by their ids."""
    cuts = ((piece[:at], piece[at:]) for at in range(1, len(piece)))
    known = [(left, right) for left, right in cuts if left in ids and right in ids]
    return sorted(known, key=lambda pair: (ids[pair[0]], ids[pair[1]]))
