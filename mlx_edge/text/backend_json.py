"""tokenizer.json through the `tokenizers` library.

Encoding is the library's. Decoding is ours where `pieces.py` knows the decoder, so that it can go
token by token. Deliberately not used from the file: truncation and padding, which would change a
prompt without a word.
"""

from __future__ import annotations

import contextlib
import functools
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, ClassVar, Literal

from mlx_edge.errors import (
    InvalidRequestError,
    MLXEdgeError,
    ModelFormatError,
    UnsupportedModelError,
)
from mlx_edge.text.backend import PieceReader
from mlx_edge.text.message import one_line
from mlx_edge.text.pieces import NeighbourReader, PieceStream, Recipe, read_recipe
from mlx_edge.text.tokenizer_config import AddedToken, TokenizerConfig


class JsonBackend:
    """A vocabulary read from tokenizer.json."""

    named_tokens: ClassVar[Mapping[str, str]] = {}
    post_processes = True

    def __init__(self, path: Path, config: TokenizerConfig):
        """Read the file; one that is broken or contradicts `config` is a ModelFormatError."""
        import tokenizers

        with _translated(f"{path} is not a tokenizer", "download it again", ModelFormatError):
            self._tokenizer: Any = tokenizers.Tokenizer.from_file(str(path))
            self._tokenizer.no_truncation()
            self._tokenizer.no_padding()
            self._tokenizer.encode("")  # a post-processor of unknown tokens panics only now
        for token in (*config.added_tokens, *config.named_tokens.values()):
            self._add(token, path)
        added = self._tokenizer.get_added_tokens_decoder()
        self.vocab_size: int = max([self._tokenizer.get_vocab_size() - 1, *added]) + 1
        self.special_ids = frozenset(index for index, token in added.items() if token.special)
        self._recipe = self._read_recipe(path)
        self._refuse_clean_up(config, path)

    @property
    def bad_bytes(self) -> Literal["replace", "surrogateescape"]:
        """How bytes that are not UTF-8 are marked."""
        alone = self._recipe is not None and self._recipe.bytes_run_alone
        return "surrogateescape" if alone else "replace"

    def encode(self, text: str, *, post_process: bool) -> list[int]:
        """Return the ids of `text`, with what the file's post-processor adds if `post_process`."""
        with _translated("the prompt cannot be tokenized", "mend it", InvalidRequestError):
            ids: list[int] = self._tokenizer.encode(text, add_special_tokens=post_process).ids
        return ids

    def token_to_id(self, token: str) -> int | None:
        """Return the id of a piece or added token, None if there is none."""
        index: int | None = self._tokenizer.token_to_id(token)
        return index

    def id_to_token(self, token_id: int) -> str | None:
        """Return the piece or added token of an id, None if there is none."""
        known = 0 <= token_id < self.vocab_size
        token: str | None = self._tokenizer.id_to_token(token_id) if known else None
        return token

    def new_reader(self) -> PieceReader:
        """Return a reader for the tokens of one text."""
        if self._recipe is None:
            return NeighbourReader(self._decode)
        num_spaces = self._recipe.num_stripped_spaces
        return PieceStream(self._token_bytes, num_stripped_spaces=num_spaces)

    def _decode(self, ids: list[int]) -> str:
        known = [index for index in ids if 0 <= index < self.vocab_size]
        text: str = self._tokenizer.decode(known, skip_special_tokens=False)
        return text

    def _token_bytes(self, token_id: int, first: bool) -> bytes | None:
        """Return what a token says, None if there is no such token."""
        recipe, token = self._recipe, self.id_to_token(token_id)
        assert recipe is not None
        if token is None:
            return None
        if first and recipe.first_loses:
            token = token.replace(recipe.first_loses, "")
        return recipe.piece_bytes(token)

    def _add(self, token: AddedToken, path: Path) -> None:
        """Make the library match a token that only the files beside tokenizer.json tell of."""
        import tokenizers

        if token.content in self._added_contents:
            return
        if token.id is None and self.token_to_id(token.content) is None:
            return  # no id and no piece: whether that matters is for whoever asks for it
        new = tokenizers.AddedToken(
            token.content,
            special=token.special,
            lstrip=token.lstrip,
            rstrip=token.rstrip,
            single_word=token.single_word,
            normalized=token.normalized,
        )
        self._tokenizer.add_tokens([new])
        self._added_contents.add(token.content)
        found = self.token_to_id(token.content)
        if token.id not in (None, found):
            raise ModelFormatError(
                f"tokenizer_config.json gives {token.content!r} the id {token.id}, but in "
                f"{path} it would be {found}; take both files from the same revision of the model"
            )

    @functools.cached_property
    def _added_contents(self) -> set[str]:
        return {token.content for token in self._tokenizer.get_added_tokens_decoder().values()}

    def _read_recipe(self, path: Path) -> Recipe | None:
        if self._tokenizer.decoder is None:
            return None
        section = json.loads(self._tokenizer.decoder.__getstate__())
        recipe = read_recipe(section)
        if recipe is None and any(
            kind in json.dumps(section) for kind in ('"ByteLevel"', '"ByteFallback"')
        ):
            raise UnsupportedModelError(
                f"{path}: the decoder {json.dumps(section)[:160]} mixes bytes with "
                "unknown steps, expected ByteLevel, Metaspace or Replace, ByteFallback, Fuse, "
                "Strip; report the model"
            )
        return recipe

    def _refuse_clean_up(self, config: TokenizerConfig, path: Path) -> None:
        """Ignore the cleaning of spaces for BPE, as transformers 5 does; others would miss it."""
        if config.clean_up_spaces and type(self._tokenizer.model).__name__ != "BPE":
            raise UnsupportedModelError(
                f"{path.parent / 'tokenizer_config.json'} asks for "
                "clean_up_tokenization_spaces, which is not done because it alters text; "
                "set it to false"
            )


@contextlib.contextmanager
def _translated(what: str, remedy: str, error: type[MLXEdgeError]) -> Iterator[None]:
    """Turn the library's errors into ours: bare `Exception`s, and panics (`BaseException`s)."""
    try:
        yield
    except BaseException as failure:
        if isinstance(failure, Exception) or type(failure).__name__ == "PanicException":
            raise error(f"{what} ({one_line(failure)}); {remedy}") from failure
        raise
