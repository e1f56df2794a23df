"""Constraints: which token may come next, so that a text is sure to match a JSON schema, a regex or a grammar.

`Constraint` is all that the loop knows. Behind it stands llguidance (https://github.com/guidance-ai/llguidance),
an optional package that is imported when it is first needed. Knows no model and no logits.

What a token says is asked of our own tokenizer, byte by byte, so that the text which the user reads is the text
that was checked. The first token is read as the start of a text, which in some vocabularies loses a space; one
that says nothing is never allowed. Special tokens are never text. Any spelling of the text in tokens is allowed
(`no_forcing`): the model chooses.
"""

from __future__ import annotations

import contextlib
import json
import re
import weakref
from collections.abc import Iterator, Mapping
from typing import Any, ClassVar, Protocol

import numpy as np
from numpy.typing import NDArray

from mlx_edge.decoding.json_schema import schema_rule
from mlx_edge.errors import InvalidRequestError, UnsupportedModelError
from mlx_edge.text import Tokenizer
from mlx_edge.text.message import one_line
from mlx_edge.text.pieces import NeighbourReader

_NO_FORCING = '\n%llguidance {"no_forcing": true}\n'
_TEMPERATURE = re.compile(r"\w\[[^\]\n]*\btemperature\s*=")


class Constraint(Protocol):
    """What may follow, for one generation. Not shared between sequences or threads."""

    @property
    def is_finished(self) -> bool:
        """Whether the text is complete and nothing can follow: the generation ends without one more token."""
        ...

    @property
    def is_accepting(self) -> bool:
        """Whether the text is complete as it stands; something may still be allowed to follow."""
        ...

    def mask(self) -> NDArray[np.bool_]:
        """Which tokens may come next, (tokenizer.vocab_size,), read-only; an end token where it accepts.

        Raises: InvalidRequestError when the grammar turns out to be too costly, or no token can follow.
        """
        ...

    def advance(self, token: int) -> None:
        """Take the next token, an end token included.

        Raises: InvalidRequestError for a token that is not allowed; the state stays as it was.
        """
        ...

    def rollback(self, num_tokens: int) -> None:
        """Take back the newest tokens, as if they had never come: drafts that were rejected.

        Raises: InvalidRequestError for more than were taken, or a grammar that cannot go back.
        """
        ...


def make_constraint(
    tokenizer: Tokenizer,
    *,
    json_schema: Mapping[str, Any] | str | None = None,
    regex: str | None = None,
    lark: str | None = None,
) -> Constraint:
    """A constraint at the start of a text: a JSON schema (dict or JSON text), a regex, or a Lark grammar.

    The whole text matches, from its first character to its end. Regexes are in the syntax of Rust's regex crate,
    without look-around and backreferences; grammars in llguidance's dialect of Lark (docs/syntax.md there).
    Properties of a JSON object come in the order of the schema.

    Raises: InvalidRequestError for a broken schema, regex or grammar, one that asks for what cannot be promised,
    or where llguidance is not installed; UnsupportedModelError for a vocabulary whose tokens have no bytes.
    """
    given = {"JSON schema": json_schema, "regex": regex, "grammar": lark}
    kinds = [kind for kind, source in given.items() if source is not None]
    if len(kinds) != 1:
        raise InvalidRequestError(
            f"a constraint has {' and '.join(kinds) or 'nothing'}, expected one of a JSON schema, "
            "a regex and a Lark grammar"
        )
    kind = kinds[0]
    library = _import_library()
    vocabulary = _Vocabulary.of(tokenizer, library)
    with _translated(kind):
        if regex is not None:
            source = json.loads(library.LLMatcher.grammar_from_regex(regex))
            grammar = source["grammars"][0]["lark_grammar"]
        elif lark is not None:
            grammar = _check_lark(lark)
        else:
            assert json_schema is not None
            grammar = f"start: {schema_rule(json_schema)}"
        return _Grammar(library, vocabulary, grammar + _NO_FORCING, kind)


def _check_lark(lark: str) -> str:
    if _TEMPERATURE.search(lark):
        raise InvalidRequestError(
            "the grammar sets a temperature, which would be ignored; leave it out"
        )
    return lark


class _Grammar:
    """A constraint by one of llguidance's matchers; end tokens never reach it."""

    def __init__(self, library: Any, vocabulary: _Vocabulary, grammar: str, kind: str) -> None:
        self._vocabulary = vocabulary
        self._kind = kind
        limits = library.LLParserLimits(verbose_errors=False)
        self._matcher = library.LLMatcher(
            vocabulary.library_view, grammar, log_level=0, limits=limits
        )
        self._tokens: list[int] = []
        self._mask: NDArray[np.bool_] | None = None
        self.mask()  # some errors show only now

    @property
    def is_finished(self) -> bool:
        return self._has_ended or (bool(self._tokens) and self._is_stopped())

    @property
    def is_accepting(self) -> bool:
        return bool(self._matcher.is_accepting())

    @property
    def _has_ended(self) -> bool:
        return bool(self._tokens) and self._tokens[-1] in self._vocabulary.eos_ids

    def mask(self) -> NDArray[np.bool_]:
        if self._mask is None:
            self._mask = self._compute_mask()
            self._mask.flags.writeable = False
        return self._mask

    def advance(self, token: int) -> None:
        is_allowed = self._allows(token)
        self._check_error()
        if not is_allowed:
            raise InvalidRequestError(
                f"token {token} cannot follow: the {self._kind} does not allow it; choose from the mask"
            )
        if token not in self._vocabulary.eos_ids:
            self._matcher.consume_token(self._inner_id(token))
            self._check_error()
        self._tokens.append(token)
        self._mask = None

    def rollback(self, num_tokens: int) -> None:
        if not 0 <= num_tokens <= len(self._tokens):
            raise InvalidRequestError(
                f"{num_tokens} tokens cannot be taken back, expected at most {len(self._tokens)}"
            )
        if num_tokens == 0:
            return
        num_inner = num_tokens - self._has_ended
        if num_inner and not self._matcher.rollback(num_inner):
            self._check_error()
        del self._tokens[len(self._tokens) - num_tokens :]
        self._mask = None

    def _allows(self, token: int) -> bool:
        if token in self._vocabulary.eos_ids:
            return self.is_accepting and not self._has_ended
        if self.is_finished or not 0 <= token < self._vocabulary.size:
            return False
        return bool(self._matcher.validate_tokens([self._inner_id(token)]) == 1)

    def _inner_id(self, token: int) -> int:
        return token if self._tokens else self._vocabulary.start_ids.get(token, token)

    def _compute_mask(self) -> NDArray[np.bool_]:
        vocabulary = self._vocabulary
        if self.is_finished:
            return vocabulary.end_mask()
        packed = self._matcher.compute_bitmask()
        self._check_error()
        mask = vocabulary.read_mask(
            packed, at_start=not self._tokens, is_accepting=self._matcher.is_accepting()
        )
        if not mask.any():
            raise InvalidRequestError(
                f"no token of this vocabulary can follow: the {self._kind} cannot be written with it"
            )
        return mask

    def _is_stopped(self) -> bool:
        stopped = bool(self._matcher.is_stopped())
        self._check_error()
        return stopped

    def _check_error(self) -> None:
        message = self._matcher.get_error()
        reason = self._matcher.stop_reason()
        if not message and reason in ("NotStopped", "NoExtension", "NoExtensionBias"):
            return
        raise InvalidRequestError(
            f"the {self._kind} cannot be followed ({_gist(message) or reason}); mend or simplify it"
        )


class _Vocabulary:
    """A tokenizer as llguidance sees it: the bytes of each token, and which are no text.

    A token that says something else at the start of a text has a second id beyond the vocabulary for it.
    """

    _known: ClassVar[weakref.WeakKeyDictionary[Tokenizer, _Vocabulary]] = (
        weakref.WeakKeyDictionary()
    )

    @classmethod
    def of(cls, tokenizer: Tokenizer, library: Any) -> _Vocabulary:
        """The vocabulary of a tokenizer, made once (a second for 10^5 tokens) as long as its end tokens stay."""
        found = cls._known.get(tokenizer)
        if found is None or found.eos_ids != tokenizer.eos_token_ids:
            found = cls._known[tokenizer] = cls(tokenizer, library)
        return found

    def __init__(self, tokenizer: Tokenizer, library: Any) -> None:
        self.size = tokenizer.vocab_size
        self.eos_ids = tokenizer.eos_token_ids
        if not self.eos_ids:
            raise InvalidRequestError(
                "the model names no end-of-sequence token, which a constraint needs; name one "
                "with --extra-eos-token"
            )
        special = set(tokenizer.special_ids | self.eos_ids)
        tokens, starts = _read_tokens(tokenizer)
        self.start_ids = {
            token: self.size + rank
            for rank, token in enumerate(t for t in starts if t not in special)
        }
        self._started = np.array(list(self.start_ids), dtype=np.int64)
        self._ends = np.array(sorted(self.eos_ids), dtype=np.int64)
        table = _Table()
        table.tokens = [*tokens, *(starts[token] for token in self.start_ids)]
        table.special_token_ids = sorted(special)
        table.eos_token_id = int(self._ends[0])
        self.library_view: Any = library.LLTokenizer(table, eos_token=self._ends.tolist())

    def end_mask(self) -> NDArray[np.bool_]:
        """The end tokens alone (size,)."""
        mask = np.zeros(self.size, np.bool_)
        mask[self._ends] = True
        return mask

    def read_mask(self, packed: bytes, *, at_start: bool, is_accepting: bool) -> NDArray[np.bool_]:
        """The allowed tokens (size,) from the library's bits, one a token, lowest first."""
        num_bits = self.size + len(self._started)
        bits = np.unpackbits(
            np.frombuffer(packed, dtype=np.uint8), count=num_bits, bitorder="little"
        )
        mask = bits[: self.size].view(np.bool_)
        if at_start:
            mask[self._started] = bits[self.size :]
        mask[self._ends] = is_accepting
        return mask


class _Table:
    """The attributes that llguidance reads from a tokenizer (its python/llguidance/_tokenizer.py)."""

    is_tokenizer_wrapper = True
    bos_token_id: int | None = None
    eos_token_id: int
    tokens: list[bytes]
    special_token_ids: list[int]

    def __call__(self, text: str) -> list[int]:
        raise AssertionError(f"no_forcing is set, nothing is tokenized: {text!r}")


def _read_tokens(tokenizer: Tokenizer) -> tuple[list[bytes], dict[int, bytes]]:
    """What each id says within a text, and what those say at its start that say something else there."""
    within = tokenizer.new_reader()
    if isinstance(within, NeighbourReader):
        raise UnsupportedModelError(
            "the tokenizer's decoder reads tokens together with their neighbours; a constraint needs "
            "one whose tokens have bytes of their own (ByteLevel, ByteFallback, Metaspace)"
        )
    ids = range(tokenizer.vocab_size)
    next(index for index in ids if within.read(index))  # the text has begun
    tokens = [within.read(index) for index in ids]
    starts = ((index, tokenizer.new_reader().read(index)) for index in ids)
    return tokens, {index: data for index, data in starts if data != tokens[index]}


def _import_library() -> Any:
    try:
        import llguidance
    except ImportError as failure:
        raise InvalidRequestError(
            f"a constraint needs the package llguidance ({one_line(failure)}); "
            "pip install 'mlx-edge[grammar]'"
        ) from failure
    return llguidance


@contextlib.contextmanager
def _translated(kind: str) -> Iterator[None]:
    """Turn the library's errors into ours: `ValueError`s and their like, and panics (`BaseException`s)."""
    try:
        yield
    except InvalidRequestError:
        raise
    except BaseException as failure:
        if isinstance(failure, Exception) or type(failure).__name__ == "PanicException":
            raise InvalidRequestError(
                f"the {kind} cannot be used ({one_line(failure)}); mend it"
            ) from failure
        raise


def _gist(message: str) -> str:
    """What a message of the library says in one line: its last `error:`, else without the source it shows."""
    if message.startswith("NoExtension"):
        return "nothing matches it"
    errors = re.findall(r"^\s*error: (.+)$", message, re.MULTILINE)
    if errors:
        return one_line(errors[-1])
    return one_line(re.split(r"\n\s*\d+ \| ", message)[0])
