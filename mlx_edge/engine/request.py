"""What is asked of the engine, and what comes back: plain frozen records, checked when they are built.

Knows neither models nor HTTP: chat templates are the caller's, and what depends on a model (its vocabulary, its
context) is checked by the engine.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from mlx_edge.errors import InvalidRequestError

FinishReason = Literal["stop", "length", "cancelled", "deadline"]
GrammarKind = Literal["json_schema", "regex", "lark"]
MAX_TOP_LOGPROBS = 20
MAX_STOPS = 1024
MAX_IMAGES = 64  # of a request
MAX_IMAGE_BYTES = 64 << 20  # of all their files together


@dataclass(frozen=True)
class Sampling:
    """How a token is chosen: the arguments of `make_sampler` and `make_logits_processors`."""

    temp: float = 0.0
    top_p: float = 1.0
    min_p: float = 0.0
    min_tokens_to_keep: int = 1
    top_k: int = 0
    xtc_probability: float = 0.0
    xtc_threshold: float = 0.1
    seed: int | None = None  # the same seed gives the same tokens at any load; None draws one
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    repetition_penalty: float | None = None
    repetition_context_size: int = 20
    presence_penalty: float | None = None
    presence_context_size: int = 20
    frequency_penalty: float | None = None
    frequency_context_size: int = 20

    def __post_init__(self) -> None:
        _check_number("temp", self.temp, self.temp >= 0, "a finite number from 0")
        _check_number("top_p", self.top_p, 0 < self.top_p <= 1, "above 0 and at most 1")
        _check_number("min_p", self.min_p, 0 <= self.min_p <= 1, "from 0 to 1")
        _check_integer("min_tokens_to_keep", self.min_tokens_to_keep, 1)
        _check_integer("top_k", self.top_k, 0)
        chance, threshold = self.xtc_probability, self.xtc_threshold
        _check_number("xtc_probability", chance, 0 <= chance <= 1, "from 0 to 1")
        _check_number("xtc_threshold", threshold, 0 <= threshold <= 0.5, "from 0 to 0.5")
        if self.seed is not None:
            _check_integer("seed", self.seed, 0, (1 << 64) - 1)
        for token, bias in self.logit_bias.items():
            _check_integer("a token of logit_bias", token, 0, (1 << 31) - 1)
            _check_number(f"the logit_bias of token {token}", bias, True, "a finite number")
        for name in ("repetition", "presence", "frequency"):
            _check_integer(f"{name}_context_size", getattr(self, f"{name}_context_size"), 1)
            penalty = getattr(self, f"{name}_penalty")
            if penalty is not None:
                is_good = name != "repetition" or penalty >= 0
                _check_number(f"{name}_penalty", penalty, is_good, "a finite number, from 0")

    @property
    def has_processors(self) -> bool:
        """Whether the logits are changed before a token is chosen."""
        penalties = (self.repetition_penalty, self.presence_penalty, self.frequency_penalty)
        return bool(self.logit_bias) or any(penalties)


@dataclass(frozen=True)
class Grammar:
    """What a text must match from its first character to its end; `make_constraint` says how each kind is written."""

    kind: GrammarKind
    source: str  # of a JSON schema its JSON text; any object is {"type": "object"}

    def __post_init__(self) -> None:
        if self.kind not in ("json_schema", "regex", "lark"):
            raise InvalidRequestError(
                f"the grammar's kind is {self.kind!r}, expected json_schema, regex or lark"
            )
        if not isinstance(self.source, str):
            raise InvalidRequestError(
                f"the grammar's source is {type(self.source).__name__}, expected text"
            )


@dataclass(frozen=True)
class Request:
    """One text to be generated.

    `deadline_s` counts from submission: what is there by then is the answer. `grammar_after` lets the grammar begin
    with the token after the one that completes this text, as after a model's reasoning; a text that ends without it
    was held to no grammar. Speculation (`prompt_lookup`; None: as the engine is set up) never changes the text.

    `images` are image files, as bytes; the prompt holds the model's placeholder once for each, in their order. Those of
    more than `max_pixels` are scaled down to it; None: to as many as the model's own settings say.

    Raises: InvalidRequestError for a value outside its range.
    """

    prompt: str | tuple[int, ...]
    max_tokens: int = 512
    sampling: Sampling = field(default_factory=Sampling)
    stop: tuple[str, ...] = ()
    stop_tokens: tuple[int, ...] = ()  # these end the text as the end-of-sequence tokens do
    logprobs: int | None = None  # n: the chosen token's and the n likeliest
    grammar: Grammar | None = None
    grammar_after: str | None = None
    prompt_lookup: bool | None = None
    priority: int = 0  # higher comes first
    deadline_s: float | None = None
    client: str = ""  # served tokens are balanced between clients of the same priority
    ignore_eos: bool = False
    use_prefix_cache: bool = True
    images: tuple[bytes, ...] = field(default=(), repr=False)
    max_pixels: int | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.prompt, str):
            object.__setattr__(self, "prompt", _check_tokens("the prompt", self.prompt))
        if not self.prompt:
            raise InvalidRequestError("the prompt is empty; expected one token or more")
        _check_integer("max_tokens", self.max_tokens, 1)
        _check_integer("priority", self.priority, None)
        if isinstance(self.stop, str) or not all(isinstance(text, str) for text in self.stop):
            raise InvalidRequestError(
                f"stop is {self.stop!r}, expected strings; write ({self.stop!r},) for one"
            )
        if "" in self.stop or len(self.stop) > MAX_STOPS:
            raise InvalidRequestError(f"stop holds an empty string, or more than {MAX_STOPS}")
        object.__setattr__(self, "stop", tuple(self.stop))
        object.__setattr__(self, "stop_tokens", _check_tokens("stop_tokens", self.stop_tokens))
        if self.logprobs is not None:
            _check_integer("logprobs", self.logprobs, 0, MAX_TOP_LOGPROBS)
        if self.deadline_s is not None:
            is_good = self.deadline_s >= 0
            _check_number("deadline_s", self.deadline_s, is_good, "a finite number from 0")
        if self.grammar_after is not None and (self.grammar is None or not self.grammar_after):
            raise InvalidRequestError(
                "grammar_after needs a grammar and a text after which it begins"
            )
        object.__setattr__(self, "images", _check_images(self.images))
        if self.max_pixels is not None:
            _check_integer("max_pixels", self.max_pixels, 1)

    @staticmethod
    def of(request: "Request | str", **options: Any) -> "Request":
        """A request with these fields changed, or one with this prompt."""
        unknown = sorted(set(options) - set(Request.__dataclass_fields__))
        if unknown:
            raise InvalidRequestError(
                f"a request has no {', '.join(unknown)}; its fields are "
                f"{', '.join(Request.__dataclass_fields__)}"
            )
        if isinstance(request, Request):
            return replace(request, **options) if options else request
        return Request(request, **options)


@dataclass(frozen=True)
class TokenLogprob:
    """A token and the natural logarithm of its probability, after processors and grammar, before the temperature."""

    token: int
    text: str  # what the token says by itself; bytes that are no characters show as U+FFFD
    bytes: bytes
    logprob: float
    top: tuple["TokenLogprob", ...] = ()  # the likeliest tokens there, likeliest first


@dataclass(frozen=True)
class Usage:
    """What a request took; times in seconds from its submission."""

    prompt_tokens: int
    completion_tokens: int
    cached_tokens: int  # of the prompt, those that were not computed anew
    cache_miss: str | None  # why not more of the prompt was cached, in words
    queued_s: float
    first_token_s: float  # 0.0 where none came
    total_s: float
    drafted: int = 0
    accepted: int = 0
    image_tokens: int = 0  # of the prompt


@dataclass(frozen=True)
class Piece:
    """What one step brought. Text lags behind tokens where characters or stop strings are incomplete."""

    text: str
    tokens: tuple[int, ...]
    logprobs: tuple[TokenLogprob, ...] = ()
    finish_reason: FinishReason | None = None  # with the last piece
    usage: Usage | None = None  # with the last piece
    stop_text: str | None = None  # which stop string ended the text


@dataclass(frozen=True)
class Completion:
    """A whole answer. `tokens` include the one that ended the text, as those of `stream_generate` do."""

    text: str
    tokens: tuple[int, ...]
    logprobs: tuple[TokenLogprob, ...]
    finish_reason: FinishReason
    usage: Usage
    stop_text: str | None = None


def _check_tokens(name: str, tokens: Any) -> tuple[int, ...]:
    found = tuple(tokens)
    if not all(type(token) is int and 0 <= token < 1 << 31 for token in found):
        raise InvalidRequestError(f"{name} must hold token ids: integers from 0 to 2^31 - 1")
    return found


def _check_images(images: Any) -> tuple[bytes, ...]:
    is_sequence = isinstance(images, list | tuple)
    if not is_sequence or not all(isinstance(image, bytes) and image for image in images):
        raise InvalidRequestError(
            "images must be a tuple of image files as bytes, none of them empty"
        )
    if len(images) > MAX_IMAGES:
        raise InvalidRequestError(
            f"the request has {len(images)} images, expected at most {MAX_IMAGES}"
        )
    total = sum(map(len, images))
    if total > MAX_IMAGE_BYTES:
        raise InvalidRequestError(
            f"the images are {total} bytes together, expected at most {MAX_IMAGE_BYTES}; send smaller ones"
        )
    return tuple(images)


def _check_number(name: str, value: object, is_good: bool, expected: str) -> None:
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    if not (is_number and is_good and math.isfinite(value)):  # type: ignore[arg-type]
        raise InvalidRequestError(f"{name} is {value!r}, expected {expected}")


def _check_integer(name: str, value: object, low: int | None, high: int | None = None) -> None:
    is_integer = isinstance(value, int) and not isinstance(value, bool)
    if not is_integer or (low is not None and value < low) or (high is not None and value > high):  # type: ignore[operator]
        limits = "" if low is None else f" from {low}"
        limits += "" if high is None else f" to {high}"
        raise InvalidRequestError(f"{name} is {value!r}, expected an integer{limits}")
