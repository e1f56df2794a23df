"""From a client's fields to the engine's requests, and from the engine's figures to a client's, for both routes."""

from collections.abc import Sequence
from typing import Any

from mlx_edge.engine.request import Grammar, Request, Sampling, TokenLogprob, Usage
from mlx_edge.serving.errors import ApiError, invalid
from mlx_edge.serving.models import Served
from mlx_edge.serving.settings import Defaults
from mlx_edge.serving.wire import GenerationFields

IGNORED_HEADER = "x-mlx-edge-ignored-fields"
SEED_STEP = 0x9E3779B97F4A7C15  # 2^64 over the golden ratio: choices' seeds are far apart
MAX_SHRINKAGE = 3  # bytes of a text over bytes of its pieces: composing characters shortens it


def make_sampling(body: GenerationFields, defaults: Defaults, vocab_size: int) -> Sampling:
    """How tokens are chosen. Penalties that change nothing are left out, which keeps the fast path."""
    bias = {int(token): value for token, value in (body.logit_bias or {}).items()}
    if over := [token for token in bias if token >= vocab_size]:
        raise invalid(
            f"logit_bias names token {over[0]}, the vocabulary has {vocab_size}", "logit_bias"
        )
    top_p = _or(body.top_p, defaults.top_p)
    top_k = _or(body.top_k, defaults.top_k)
    return Sampling(
        temp=_or(body.temperature, defaults.temp),
        top_p=top_p,
        top_k=max(top_k, 0),  # -1 is others' word for "off"
        min_p=_or(body.min_p, defaults.min_p),
        min_tokens_to_keep=_or(body.min_tokens_to_keep, 1),
        xtc_probability=_or(body.xtc_probability, 0.0),
        xtc_threshold=_or(body.xtc_threshold, 0.1),
        seed=None if body.seed is None else body.seed % (1 << 63),
        logit_bias=bias,
        repetition_penalty=None if body.repetition_penalty == 1 else body.repetition_penalty,
        repetition_context_size=_or(body.repetition_context_size, 20),
        presence_penalty=body.presence_penalty or None,
        presence_context_size=_or(body.presence_context_size, 20),
        frequency_penalty=body.frequency_penalty or None,
        frequency_context_size=_or(body.frequency_context_size, 20),
    )


def make_request(
    body: GenerationFields,
    tokens: Sequence[int],
    served: Served,
    defaults: Defaults,
    *,
    max_tokens: int | None,
    logprobs: int | None,
    client: str,
    grammar: Grammar | None = None,
    grammar_after: str | None = None,
    images: tuple[bytes, ...] = (),
    max_pixels: int | None = None,
) -> Request:
    """The engine's request. Raises: ApiError or InvalidRequestError for what cannot be served."""
    engine = served.engine
    left = engine.context_size - len(tokens)
    if left < 1:
        raise ApiError(
            400,
            f"the prompt has {len(tokens)} tokens, which leaves no room for an answer in the context of "
            f"{engine.context_size}; shorten it",
            code="context_length_exceeded",
        )
    stop = (body.stop,) if isinstance(body.stop, str) else tuple(body.stop or ())
    return Request(
        prompt=tuple(tokens),
        max_tokens=min(defaults.max_tokens, left) if max_tokens is None else max_tokens,
        sampling=make_sampling(body, defaults, engine.vocab_size),
        stop=tuple(text for text in stop if text),
        stop_tokens=tuple(body.stop_token_ids or ()),
        logprobs=logprobs,
        grammar=grammar,
        grammar_after=grammar_after,
        prompt_lookup=body.prompt_lookup,
        priority=body.priority or 0,
        deadline_s=body.deadline_s,
        client=body.user or client,
        ignore_eos=bool(body.ignore_eos),
        use_prefix_cache=body.use_prefix_cache is not False,
        images=images,
        max_pixels=max_pixels,
    )


def make_choices(request: Request, count: int) -> list[Request]:
    """`count` requests that differ in their seeds; the first is the one that a single choice would be."""
    seed = request.sampling.seed
    if seed is None or count == 1:
        return [request] * count
    choices = []
    for index in range(count):
        sampling = {**vars(request.sampling), "seed": (seed + index * SEED_STEP) % (1 << 63)}
        choices.append(Request.of(request, sampling=Sampling(**sampling)))
    return choices


def check_length(served: Served, text: str) -> None:
    """Refuse a text that cannot fit before it is read: reading 10 MB takes seconds. Raises: ApiError."""
    context = served.engine.context_size
    if len(text) > context * served.longest_piece * MAX_SHRINKAGE:
        raise ApiError(
            400,
            f"the prompt has {len(text)} characters, which cannot fit the context of {context} tokens; shorten it",
            code="context_length_exceeded",
        )


def describe_usage(usages: Sequence[Usage], num_choices: int) -> dict[str, Any]:
    """OpenAI's `usage` of all choices, with our `x_` fields: why a prompt was not cached, and times.

    The prompt of several choices counts once.
    """
    first = usages[0]
    prompt = sum(usage.prompt_tokens for usage in usages[::num_choices])
    generated = sum(usage.completion_tokens for usage in usages)
    return {
        "prompt_tokens": prompt,
        "completion_tokens": generated,
        "total_tokens": prompt + generated,
        "prompt_tokens_details": {
            "cached_tokens": sum(usage.cached_tokens for usage in usages[::num_choices]),
            "image_tokens": sum(usage.image_tokens for usage in usages[::num_choices]),
        },
        "x_cache_miss": first.cache_miss,
        "x_timings": {
            "queued_s": round(first.queued_s, 6),
            "first_token_s": round(first.first_token_s, 6),
            "total_s": round(max(usage.total_s for usage in usages), 6),
        },
        "x_speculation": {
            "drafted": sum(usage.drafted for usage in usages),
            "accepted": sum(usage.accepted for usage in usages),
        },
    }


def describe_logprob(item: TokenLogprob) -> dict[str, Any]:
    """One token as /v1/chat/completions writes it."""
    return {
        **_describe_token(item),
        "top_logprobs": [_describe_token(other) for other in item.top],
    }


def _describe_token(item: TokenLogprob) -> dict[str, Any]:
    logprob = max(item.logprob, -9999.0)  # JSON has no infinity
    return {"token": item.text, "logprob": logprob, "bytes": list(item.bytes)}


def _or(value: Any, default: Any) -> Any:
    return default if value is None else value
