"""tokenizer.model through the `sentencepiece` library.

The reference is `SentencePieceProcessor.encode` of each stretch of text between special tokens. The
library does not see special tokens in a text (control pieces such as `<s>`, and added tokens, which
it does not know at all), so the text is split at them here. After a special token no space is
invented (transformers' `legacy=false`): those stretches go through a second copy of the model whose
dummy prefix is switched off.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

from mlx_edge.errors import ModelFormatError, UnsupportedModelError
from mlx_edge.text.backend import PieceReader
from mlx_edge.text.message import one_line
from mlx_edge.text.pieces import SPACE_MARK, PieceStream, byte_piece
from mlx_edge.text.tokenizer_config import AddedToken, TokenizerConfig

# ModelProto.normalizer_spec (field 3, 2 bytes long) { add_dummy_prefix (field 3) = false }.
# Appended to a serialized model, protobuf merges it into the spec that is there (the last one
# wins, field by field: https://protobuf.dev/programming-guides/encoding/#last-one-wins).
_NO_DUMMY_PREFIX = bytes([0x1A, 0x02, 0x18, 0x00])


class SentencePieceBackend:
    """A vocabulary read from tokenizer.model."""

    post_processes = False
    bad_bytes: Literal["replace", "surrogateescape"] = "surrogateescape"

    def __init__(self, path: Path, config: TokenizerConfig):
        """Read the file; one that is broken or contradicts `config` is a ModelFormatError."""
        self._path = path
        try:
            self._model = path.read_bytes()
        except OSError as failure:
            raise ModelFormatError(
                f"{path} cannot be read ({one_line(failure)}); download it again"
            ) from failure
        self._processor = self._open(self._model)
        self._num_pieces: int = self._processor.vocab_size()
        self._added = {
            token.id: token.content for token in config.added_tokens if token.id is not None
        }
        self._added_ids = {content: index for index, content in self._added.items()}
        self.vocab_size = max([self._num_pieces - 1, *self._added]) + 1
        self._refuse_contradictions()
        self.named_tokens = self._find_named_tokens()
        control_ids = set(filter(self._processor.is_control, range(self._num_pieces)))
        self.special_ids = frozenset(
            {*control_ids, *(t.id for t in config.added_tokens if t.id is not None and t.special)}
        )
        self._split_tokens = self._find_split_tokens(config, control_ids)
        self._probe_spaces(config)

    def encode(self, text: str, *, post_process: bool) -> list[int]:
        """Return the ids of `text`; sentencepiece has no post-processor, so nothing is added."""
        ids: list[int] = []
        end = 0
        for found in self._splitter.finditer(text) if self._split_tokens else ():
            ids += self._encode_stretch(text[end : found.start()], starts_text=end == 0)
            index = self.token_to_id(found[found.lastindex or 0])
            assert index is not None
            ids.append(index)
            end = found.end()
        return ids + self._encode_stretch(text[end:], starts_text=end == 0)

    def token_to_id(self, token: str) -> int | None:
        """Return the id of a piece or added token, None if there is none."""
        if token in self._added_ids:
            return self._added_ids[token]
        index: int = self._processor.piece_to_id(token)  # the unknown piece's id if there is none
        return index if self._added.get(index) is None and self._piece(index) == token else None

    def id_to_token(self, token_id: int) -> str | None:
        """Return the piece or added token of an id, None if there is none."""
        if token_id in self._added:
            return self._added[token_id]
        return self._piece(token_id) if 0 <= token_id < self._num_pieces else None

    def new_reader(self) -> PieceReader:
        """Return a reader for the tokens of one text."""
        return PieceStream(self._token_bytes, start_lasts=self._removes_spaces)

    def _open(self, model: bytes) -> Any:
        import sentencepiece

        processor = sentencepiece.SentencePieceProcessor()
        try:
            # Not `model_proto=`: an empty one would silently leave the processor without a model.
            processor.LoadFromSerializedProto(model)
            num_pieces = processor.vocab_size()
        except (RuntimeError, OSError, ValueError) as failure:
            raise self._broken(failure) from failure
        if not num_pieces:
            raise self._broken(ValueError("no pieces"))
        return processor

    def _broken(self, failure: Exception) -> ModelFormatError:
        return ModelFormatError(
            f"{self._path} ({len(self._model)} bytes) is not a sentencepiece model "
            f"({one_line(failure)}); "
            "download it again, or convert it to tokenizer.json if it is of another kind (tiktoken)"
        )

    def _piece(self, index: int) -> str:
        try:
            piece: str = self._processor.id_to_piece(index)
        except UnicodeDecodeError as failure:
            raise self._broken(failure) from failure
        return piece

    def _token_bytes(self, token_id: int, at_start: bool) -> bytes | None:
        """Return what a token says, None if there is no such token."""
        if token_id in self._added:
            return self._added[token_id].encode()
        if not 0 <= token_id < self._num_pieces:
            return None
        piece = self._piece(token_id)
        if self._processor.is_byte(token_id):
            return byte_piece(piece)
        if at_start and self._strips_start:
            piece = piece.removeprefix(SPACE_MARK)
        return piece.replace(SPACE_MARK, " ").encode()

    def _encode_stretch(self, text: str, *, starts_text: bool) -> list[int]:
        if not text:
            return []
        as_it_is = not self._has_prefix or (
            self._add_prefix_space and self._wants_prefix(text, starts_text=starts_text)
        )
        processor = self._processor if as_it_is else self._processor_without_prefix
        ids: list[int] = processor.encode(text)
        return ids

    def _wants_prefix(self, text: str, *, starts_text: bool) -> bool:
        if self._removes_spaces and text.startswith(" "):
            return True  # the library drops the space, and the prefix takes its place
        return self._legacy or (starts_text and not text.startswith(self._user_defined))

    @functools.cached_property
    def _processor_without_prefix(self) -> Any:
        return self._open(self._model + _NO_DUMMY_PREFIX)

    @functools.cached_property
    def _user_defined(self) -> tuple[str, ...]:
        """User-defined pieces, which the library matches itself, but writes a space before."""
        pieces = (self._piece(index) for index in _user_defined_ids(self._model))
        return tuple(piece for piece in pieces if SPACE_MARK not in piece)

    @functools.cached_property
    def _splitter(self) -> re.Pattern[str]:
        """Matches the longest special token; its content is the group that took part."""
        longest_first = sorted(self._split_tokens, key=lambda token: -len(token.content))
        return re.compile("|".join(map(_pattern, longest_first)))

    def _find_named_tokens(self) -> dict[str, str]:
        processor = self._processor
        ids = {
            "bos_token": processor.bos_id(),
            "eos_token": processor.eos_id(),
            "unk_token": processor.unk_id(),
            "pad_token": processor.pad_id(),
        }
        tokens = {name: self.id_to_token(index) for name, index in ids.items()}
        return {name: token for name, token in tokens.items() if token is not None}

    def _find_split_tokens(
        self, config: TokenizerConfig, control_ids: set[int]
    ) -> tuple[AddedToken, ...]:
        """What is searched before sentencepiece sees a text; the flags in the files come first."""
        declared = (*config.added_tokens, *config.named_tokens.values())
        own = (*self.named_tokens.values(), *map(self._piece, sorted(control_ids)))
        by_content: dict[str, AddedToken] = {}
        for token in (*declared, *map(AddedToken, own)):
            if self.token_to_id(token.content) is not None:
                by_content.setdefault(token.content, token)
        return tuple(by_content.values())

    def _probe_spaces(self, config: TokenizerConfig) -> None:
        """Find the rules for leading spaces, which the library applies but does not tell."""
        one, two = ("".join(self._processor.encode(text, out_type=str)) for text in ("a", "  a"))
        self._has_prefix = one.startswith(SPACE_MARK)
        if one.endswith(SPACE_MARK):
            raise UnsupportedModelError(
                f"{self._path} writes spaces behind words (treat_whitespace_as_suffix), "
                "expected before; use the model's tokenizer.json"
            )
        self._add_prefix_space = config.add_prefix_space is not False
        self._legacy = config.legacy
        self._removes_spaces = two.count(SPACE_MARK) == int(self._has_prefix)
        self._strips_start = self._removes_spaces or (self._has_prefix and self._add_prefix_space)

    def _refuse_contradictions(self) -> None:
        for index, content in self._added.items():
            piece_id = self._processor.piece_to_id(content)
            if piece_id != index and self._piece(piece_id) == content:
                raise ModelFormatError(
                    f"tokenizer_config.json gives {content!r} the id {index}, but in "
                    f"{self._path} it is {piece_id}; take both files from the same revision of the model"
                )


def _user_defined_ids(model: bytes) -> Iterator[int]:
    """Walk over a serialized model: the library tells no piece's type but control, unknown, byte.

    A ModelProto begins with its pieces (field 1), each of which ends with its type (field 3)
    unless that is NORMAL; USER_DEFINED is 4.
    """
    position, index = 0, 0
    while position < len(model) and model[position] == 0x0A:
        size, shift, more = 0, 0, 0x80
        while more:  # the length, as a varint
            position += 1
            size |= (model[position] & 0x7F) << shift
            shift, more = shift + 7, model[position] & 0x80
        position += 1 + size
        if model[position - 2 : position] == b"\x18\x04":
            yield index
        index += 1


def _pattern(token: AddedToken) -> str:
    """Return an expression for an added token, with the spaces and word borders it asks for."""
    content = f"({re.escape(token.content)})"
    if token.single_word:
        content = rf"(?<!\w){content}(?!\w)"
    return (r"\s*" if token.lstrip else "") + content + (r"\s*" if token.rstrip else "")
