"""Flags that several commands share, and what they ask for: samplers, caches, template variables.

Names are mlx-lm's. Imports MLX only when something is made, so that a wrong flag is answered at once.
"""

import json
import sys
from argparse import Namespace
from collections.abc import Callable, Iterable
from functools import partial
from typing import TYPE_CHECKING, Any

from mlx_edge.command import Parser, integer, number
from mlx_edge.errors import InvalidRequestError

if TYPE_CHECKING:
    from mlx_edge.decoding.proposers import Proposer
    from mlx_edge.decoding.sampling import Sampler
    from mlx_edge.models.interface import Cache, LanguageModel
    from mlx_edge.text import Tokenizer

MAX_PROMPT_BYTES = 1 << 26
OWN_VARIABLES = {"messages", "add_generation_prompt", "chat_template", "tokenize"}


def add_sampling(parser: Parser) -> None:
    """The flags that choose a token."""
    add = parser.add_argument
    add("--temp", type=number(0), default=0.0, help="temperature; 0 takes the likeliest token")
    add(
        "--top-p", type=number(0, 1), default=1.0, help="keep the likeliest of this total; 1 is off"
    )
    add(
        "--min-p",
        type=number(0, 1),
        default=0.0,
        help="keep those this likely beside the likeliest",
    )
    add("--top-k", type=integer(0), default=0, help="keep this many of the likeliest; 0 is off")
    add("--min-tokens-to-keep", type=integer(1), default=1, help="what min-p keeps at least")
    add("--xtc-probability", type=number(0, 1), default=0.0, help="how often XTC applies; 0 is off")
    add(
        "--xtc-threshold",
        type=number(0, 0.5),
        default=0.1,
        help="XTC drops all but the last above it",
    )
    add("--seed", type=integer(0, 2**63), help="the same seed gives the same text")


def add_memory(parser: Parser) -> None:
    """The flags that say how much is remembered, and how."""
    add = parser.add_argument
    add("--max-kv-size", type=integer(5), help="remember the first 4 positions and the newest")
    add("--kv-bits", type=integer(4, 8), help="store keys and values in 4 or 8 bits")
    add("--kv-group-size", type=integer(32, 128), default=64, help="values that share a scale")
    add(
        "--quantized-kv-start",
        type=integer(0),
        default=5000,
        help="positions stored as floats first",
    )


def add_loading(parser: Parser) -> None:
    """The flags that say how weights are held."""
    add = parser.add_argument
    add(
        "--precision",
        choices=("int8", "float"),
        default="int8",
        help="of activations that meet quantized weights on a CPU; float is several times slower",
    )
    add("--no-mmap", action="store_true", help="copy the weights instead of mapping their files")
    add("--mlock", action="store_true", help="keep the weights in memory, never swapped out")


def loading_options(args: Namespace) -> "dict[str, Any]":
    """What `load` is told by these flags."""
    return {"precision": args.precision, "use_mmap": not args.no_mmap, "mlock": args.mlock}


def add_images(parser: Parser) -> None:
    """The flags that show a model images."""
    add = parser.add_argument
    add(
        "--image",
        action="append",
        default=[],
        metavar="PATH",
        help="show the model this image before the prompt; may be given again",
    )
    add(
        "--max-pixels",
        type=integer(1),
        help="scale images down to this many pixels, for fewer tokens; never up",
    )


def add_speculation(parser: Parser) -> None:
    """The flags that draft several tokens for one step to verify; the text stays the same."""
    group = parser.add_mutually_exclusive_group()
    group.add_argument(
        "--draft-model", help="a smaller model with the same vocabulary, which drafts tokens"
    )
    group.add_argument(
        "--prompt-lookup",
        action="store_true",
        help="draft what followed in the text before: fast for code edits, JSON, quotations",
    )
    parser.add_argument(
        "--num-draft-tokens",
        type=integer(1, 15),
        help="tokens per draft: 3 of a draft model, up to 15 of a lookup, unless told",
    )


def read_prompt(text: str) -> str:
    """The prompt itself, or stdin when it is "-"."""
    if text != "-":
        return text
    data = sys.stdin.buffer.read(MAX_PROMPT_BYTES + 1)
    if len(data) > MAX_PROMPT_BYTES:
        raise InvalidRequestError(f"stdin holds more than {MAX_PROMPT_BYTES >> 20} MiB of prompt")
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise InvalidRequestError(f"the prompt on stdin is not UTF-8: {error.reason}") from None


def read_template_config(text: str | None) -> dict[str, Any]:
    """The variables of --chat-template-config."""
    try:
        value = json.loads(text or "{}")
    except (ValueError, RecursionError) as error:
        raise InvalidRequestError(f"--chat-template-config is not JSON: {error}") from None
    if not isinstance(value, dict):
        raise InvalidRequestError('--chat-template-config must be an object: {"name": value}')
    if taken := sorted(OWN_VARIABLES & set(value)):
        raise InvalidRequestError(
            f"--chat-template-config sets {', '.join(taken)}, which the command sets itself"
        )
    return value


def make_cache(model: "LanguageModel[Cache]", args: Namespace) -> "list[Cache]":
    """The cache that the flags ask for."""
    from mlx_edge.models.interface import make_cache_of

    return make_cache_of(model, args)


def load_proposers(
    args: Namespace, model: "LanguageModel[Any]", tokenizer: "Tokenizer"
) -> "Callable[[], Proposer | None]":
    """What makes a new proposer, or None, as the flags ask; a draft model is loaded now.

    Raises: InvalidRequestError for flags that do not fit together, and a draft model with another vocabulary.
    """
    from mlx_edge.decoding.proposers import check_same_vocabulary, make_proposer
    from mlx_edge.models.load import load

    draft_model = None
    if args.draft_model is not None:
        draft_model, other = load(args.draft_model)
        check_same_vocabulary(tokenizer, other, args.draft_model)
    make = partial(
        make_proposer,
        model,
        draft_model=draft_model,
        num_draft_tokens=args.num_draft_tokens,
        prompt_lookup=args.prompt_lookup,
    )
    make()  # what does not fit is said now
    return make


def make_sampler(args: Namespace, special_tokens: Iterable[int] = ()) -> "Sampler":
    """A new sampler, as a seeded one has a state; XTC never drops the special tokens."""
    from mlx_edge.decoding.sampling import make_sampler

    return make_sampler(
        args.temp,
        args.top_p,
        args.min_p,
        args.min_tokens_to_keep,
        args.top_k,
        xtc_probability=args.xtc_probability,
        xtc_threshold=args.xtc_threshold,
        xtc_special_tokens=sorted(special_tokens),
        seed=args.seed,
    )
