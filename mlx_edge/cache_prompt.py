"""`python -m mlx_edge.cache_prompt`: what a model remembers of a prompt, stored for later prompts to continue.

The prompt is written as the beginning of a user's turn: without the turn's end and without what asks for the
answer, which `python -m mlx_edge.generate --prompt-cache-file` adds behind its own prompt. Reads flags and
prints; the flags have the names that mlx_lm.cache_prompt gives them.
"""

import sys
import time
from argparse import Namespace
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from mlx_edge.command import Parser, integer, run_command
from mlx_edge.errors import InvalidRequestError
from mlx_edge.options import (
    add_loading,
    add_memory,
    loading_options,
    make_cache,
    read_prompt,
    read_template_config,
)

if TYPE_CHECKING:
    from mlx_edge.text import Tokenizer

PROG = "mlx_edge.cache_prompt"
CUT = "<query>"  # stands in the template for the prompt to come


def make_parser() -> Parser:
    """All flags."""
    parser = Parser(prog=PROG, description="Store what a model remembers of a prompt.")
    add = parser.add_argument
    add("--model", default="pocket", help="a folder, a hub id (owner/name), or the bundled pocket")
    add("--revision", help="branch, tag or commit of a hub model")
    add("--prompt", "-p", required=True, help='the prompt; "-" reads it from stdin')
    add("--prompt-cache-file", required=True, help="the file to write; an old one is replaced")
    add("--system-prompt", help="what the chat template says before the prompt")
    add("--ignore-chat-template", action="store_true", help="give the model the prompt as it is")
    add(
        "--chat-template-config",
        help='variables of the template, as JSON: {"enable_thinking": false}',
    )
    add_memory(parser)
    add_loading(parser)
    add("--prefill-step-size", type=integer(1), default=2048, help="prompt tokens per step")
    return parser


def encode_beginning(tokenizer: "Tokenizer", args: Namespace) -> list[int]:
    """The tokens of the prompt as far as they do not depend on what will follow it."""
    prompt = read_prompt(args.prompt)
    variables = read_template_config(args.chat_template_config)
    if not tokenizer.has_chat_template or args.ignore_chat_template:
        if args.system_prompt is not None or variables:
            raise InvalidRequestError(
                "--system-prompt and --chat-template-config need a chat template, and none is used"
            )
        return tokenizer.encode(prompt)
    messages = [{"role": "user", "content": prompt + CUT}]
    if args.system_prompt is not None:
        messages.insert(0, {"role": "system", "content": args.system_prompt})
    text = tokenizer.apply_chat_template(
        messages, add_generation_prompt=False, tokenize=False, **variables
    )
    beginning, found, _ = str(text).rpartition(CUT)
    if not found:
        raise InvalidRequestError(
            "the chat template does not write the prompt as it is; try --ignore-chat-template"
        )
    return tokenizer.encode(beginning, add_special_tokens=False)


def check_target(path: Path) -> None:
    """Say at once, not after a long prompt, that a file cannot be written there."""
    if path.is_dir() or not path.parent.is_dir():
        raise InvalidRequestError(f"{path}: expected the name of a file in a folder that exists")


def print_progress() -> Callable[[int, int], None]:
    """A callback that keeps one line up to date; on a terminal only, so that a log has no half lines."""
    start = time.perf_counter()

    def show(done: int, total: int) -> None:
        speed = done / max(time.perf_counter() - start, 1e-9)
        is_last = done == total
        if is_last or sys.stdout.isatty():
            line = f"\rProcessed {done:6d} of {total} tokens ({speed:6.2f} tok/s)"
            print(line.lstrip("\r") if is_last and not sys.stdout.isatty() else line, end="")
            print(end="\n" if is_last else "", flush=True)

    return show


def cache_prompt(args: Namespace) -> None:
    """Load the model, read the prompt, and store what is remembered of it."""
    path = Path(args.prompt_cache_file)
    check_target(path)
    # Imported here, so that a wrong flag or --help is answered at once.
    import mlx.core as mx

    from mlx_edge.decoding.loop import generate_step
    from mlx_edge.models.interface import refuse_places
    from mlx_edge.models.load import load
    from mlx_edge.models.prompt_cache import describe_prompt, save_prompt_cache
    from mlx_edge.runtime import peak_memory_gb

    model, tokenizer = load(args.model, revision=args.revision, **loading_options(args))
    tokens = encode_beginning(tokenizer, args)
    refuse_places(model, mx.array(tokens, dtype=mx.int32))
    caches = make_cache(model, args)
    # One token is chosen and thrown away: the prompt, and nothing else, has then been stored.
    for _ in generate_step(
        mx.array(tokens, dtype=mx.int32),
        model,
        max_tokens=1,
        prompt_cache=caches,
        prefill_step_size=args.prefill_step_size,
        prompt_progress_callback=print_progress(),
    ):
        pass
    print(f"Peak memory: {peak_memory_gb():.3f} GB")
    metadata = describe_prompt(
        model,
        [tokens],
        uses_chat_template=tokenizer.has_chat_template and not args.ignore_chat_template,
        # A folder is found again from wherever the file is used.
        name=str(Path(args.model).resolve()) if Path(args.model).is_dir() else args.model,
        revision=args.revision,
    )
    save_prompt_cache(path, caches, metadata)
    print(f"Saved: {len(tokens)} tokens, {path.stat().st_size / 1e6:.3f} MB in {path}")


def main(argv: list[str] | None = None) -> int:
    """Run the command; 0, or 2 after a line that says what was wrong."""
    return run_command(PROG, lambda args: cache_prompt(make_parser().parse_args(args)), argv)


if __name__ == "__main__":
    sys.exit(main())
