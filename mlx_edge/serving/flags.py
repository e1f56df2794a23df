"""The flags of `mlx_edge.serve`: mlx_lm.server's names where they mean something here, and ours.

A flag only says which key of which section it sets, so that what is not given leaves the file's value.
"""

import argparse
import json
from argparse import Namespace
from typing import Any

from mlx_edge.command import Parser, integer, number
from mlx_edge.options import OWN_VARIABLES

# mlx_lm.server's flags that cannot be followed, and what to use instead.
REFUSED = {
    "--adapter-path": "fuse the adapter into the model first (mlx_lm.fuse) and serve the result",
    "--trust-remote-code": "code of a model folder is never run; leave it out",
    "--use-default-chat-template": "a template is never guessed; give one with --chat-template",
    "--prompt-concurrency": "waiting prompts share each step; say how many tokens with --prefill-step-size",
    "--prompt-cache-size": "the prefix cache is bounded by bytes; use --prompt-cache-bytes",
    "--pipeline": "one machine serves one model; leave it out",
    "--quantize-activations": "it follows from the model; use --precision int8 or float",
}


class _Refuse(argparse.Action):
    """Says what to use instead."""

    def __call__(self, parser: Any, _namespace: Any, _values: Any, option: Any = None) -> None:
        """Exit with one line."""
        parser.error(f"{option} has no meaning here: {REFUSED[option]}")


def make_parser(prog: str) -> Parser:
    """All flags; each goes to "section.key", and is absent when not given."""
    parser = Parser(
        prog=prog,
        description="Serve language models over OpenAI's HTTP API, and a chat page at /. "
        "Flags go over the file of --config.",
    )
    parser.add_argument("--config", help="a TOML file: [server] [defaults] [engine] [models.NAME]")
    for add in (_add_server, _add_models, _add_defaults, _add_engine):
        add(parser)
    for flag in REFUSED:
        parser.add_argument(flag, action=_Refuse, nargs="?", help=argparse.SUPPRESS)
    return parser


def read_flags(args: Namespace) -> dict[str, dict[str, Any]]:
    """What was given, by section."""
    sections: dict[str, dict[str, Any]] = {}
    for name, value in vars(args).items():
        section, dot, key = name.partition(".")
        if dot:
            sections.setdefault(section, {})[key] = value
    return sections


def _adder(parser: Parser, section: str) -> Any:
    def add(flag: str, key: str = "", **how: Any) -> None:
        dest = f"{section}.{key or flag[2:].replace('-', '_')}"
        if "action" not in how:
            how.setdefault("metavar", flag[2:].rpartition("-")[2].upper())
        parser.add_argument(flag, dest=dest, default=argparse.SUPPRESS, **how)

    return add


def _add_server(parser: Parser) -> None:
    add = _adder(parser, "server")
    add("--host", help="the address to listen on (127.0.0.1); any other needs an API key")
    add("--port", type=integer(0, 65535), help="the port to listen on (8080)")
    add("--allowed-origins", nargs="+", help="web pages that may use this server: http://HOST:PORT")
    add("--allowed-hosts", nargs="+", help="names under which this server is reached")
    add("--api-key", help="a key that requests must bring; others can see it in ps, a file not")
    add("--api-key-file", help="a file of keys, one a line; MLX_EDGE_API_KEY counts too")
    add("--max-body-bytes", type=integer(1), help="the largest body that is read (32 MiB)")
    add("--max-images", type=integer(1, 64), help="the most images of a request (16)")
    add("--drain-timeout", "drain_timeout_s", type=integer(1), help="seconds to end in (30)")
    levels = ("DEBUG", "INFO", "WARNING", "ERROR", "CRITICAL")
    add("--log-level", choices=levels, help="the least that is logged (INFO)")
    add(
        "--log-prompts", action="store_true", help="log what is asked; without it logs have no text"
    )


def _add_models(parser: Parser) -> None:
    server, model = _adder(parser, "server"), _adder(parser, "model")
    model("--model", "path", help="a folder, a hub id (owner/name), or the bundled pocket")
    model("--revision", help="branch, tag or commit of a hub model")
    model("--precision", choices=("int8", "float"), help="of activations on a CPU (int8)")
    model("--no-mmap", "use_mmap", action="store_false", help="copy the weights")
    model("--mlock", action="store_true", help="keep the weights in memory")
    model("--chat-template", help="a Jinja template, or the name of one of the model's")
    server("--model-dir", help="serve every model folder inside this one, under its name")
    server("--lazy", action="store_true", help="load the first model when it is first asked for")
    server("--keep-alive", help="unload an idle model after this: 30m, 300, 0 at once, -1 never")
    server("--max-loaded-models", type=integer(1, 64), help="models in memory at a time (1)")


def _add_defaults(parser: Parser) -> None:
    add = _adder(parser, "defaults")
    add("--temp", type=number(0), help="temperature of a request that names none (0)")
    add("--top-p", type=number(0, 1), help="keep the likeliest of this total (1, off)")
    add("--top-k", type=integer(0), help="keep this many of the likeliest (0, off)")
    add("--min-p", type=number(0, 1), help="keep those this likely beside the likeliest (0)")
    add("--max-tokens", type=integer(1), help="the most tokens of an answer (512)")
    add(
        "--reasoning-in-content",
        "separate_reasoning",
        action="store_false",
        help="leave a model's thoughts in the content of its answers",
    )
    add("--chat-template-args", type=_json_object, help="variables of the template, as JSON")
    add(
        "--grammar",
        help="of replies to requests that bring no response_format and no tools: autoglm, or a file of Lark",
    )


def _add_engine(parser: Parser) -> None:
    add = _adder(parser, "engine")
    add(
        "--decode-concurrency", "max_batch_size", type=integer(1, 4096), help="requests a step (16)"
    )
    add("--prefill-step-size", "prefill_chunk", type=integer(1), help="prompt tokens a step (512)")
    add("--prompt-cache-bytes", "prefix_cache_bytes", type=_num_bytes, help="for shared prefixes")
    add("--prefix-cache-dir", help="keep prefixes on this disk too, over restarts")
    add("--prefix-disk-bytes", type=_num_bytes, help="the most bytes on that disk")
    add("--memory-budget", "memory_budget_bytes", type=_num_bytes, help="of a model: 8G, 500M")
    add("--max-context", type=integer(1), help="the most tokens of a request")
    add("--max-pixels", type=integer(1), help="scale images down to this many; the model's own")
    add("--max-queue-size", type=integer(1), help="requests that may wait (256)")
    add("--batch-timeout-ms", type=number(0), help="what a first request waits for others (10)")
    add("--added-latency-ms", type=number(0), help="what prompts may add to a step (15)")
    add("--max-kv-size", type=integer(5), help="remember the first 4 positions and the newest")
    add("--kv-bits", type=integer(4, 8), help="store keys and values in 4 or 8 bits")
    add("--kv-group-size", type=integer(32, 128), help="values that share a scale (64)")
    add("--quantized-kv-start", type=integer(0), help="positions stored as floats first (0)")
    add("--draft-model", help="a smaller model with the same vocabulary, which drafts tokens")
    add("--num-draft-tokens", type=integer(1, 15), help="tokens per draft")
    add("--prompt-lookup", action="store_true", help="draft what followed in the text before")


def _num_bytes(text: str) -> int:
    """500M, 8G or a whole number."""
    units = {"K": 1 << 10, "M": 1 << 20, "G": 1 << 30, "T": 1 << 40}
    digits, unit = (text[:-1], units[text[-1]]) if text[-1:] in units else (text, 1)
    if not digits.isdecimal() or len(digits) > 15:
        raise argparse.ArgumentTypeError(f"{text!r} is no number of bytes, expected 500M, 8G, ...")
    return int(digits) * unit


def _json_object(text: str) -> dict[str, Any]:
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise argparse.ArgumentTypeError(f"it is not JSON: {error}") from None
    if not isinstance(value, dict):
        raise argparse.ArgumentTypeError('expected an object: {"enable_thinking": false}')
    if taken := sorted(OWN_VARIABLES & set(value)):
        raise argparse.ArgumentTypeError(f"{', '.join(taken)} is set by the server itself")
    return value
