"""`python -m mlx_edge.generate`: a prompt in, text out as it comes, then how fast it was."""

import sys
from argparse import Namespace

from mlx_edge.command import Parser, integer, number, run_command, truth
from mlx_edge.errors import InvalidRequestError

PROG = "mlx_edge.generate"
DEFAULT_PROMPT = "Once upon a time"
MAX_PROMPT_BYTES = 1 << 26


def make_parser() -> Parser:
    """The flags, with the names that mlx_lm.generate gives them."""
    parser = Parser(prog=PROG, description="Generate text with a language model.")
    add = parser.add_argument
    add("--model", default="pocket", help="a folder, a hub id (owner/name), or the bundled pocket")
    add("--revision", help="branch, tag or commit of a hub model")
    add("--prompt", "-p", default=DEFAULT_PROMPT, help='the prompt; "-" reads it from stdin')
    add("--max-tokens", "-m", type=integer(1), default=256, help="the most tokens to generate")
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
    add("--seed", type=integer(0, 2**63), help="the same seed gives the same text")
    add("--stop", action="append", default=[], help="end before this text; may be given again")
    add("--ignore-chat-template", action="store_true", help="give the model the prompt as it is")
    add("--prefill-step-size", type=integer(1), default=2048, help="prompt tokens per step")
    add(
        "--verbose",
        type=truth,
        nargs="?",
        const=True,
        default=True,
        help="False prints nothing but the text",
    )
    return parser


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


def generate_text(args: Namespace) -> None:
    """Load the model, generate, and print."""
    # Imported here, so that a wrong flag or --help is answered at once.
    from mlx_edge.decoding.sampling import make_sampler
    from mlx_edge.decoding.stream import describe, stream_generate
    from mlx_edge.models.load import load

    prompt = read_prompt(args.prompt)
    sampler = make_sampler(
        args.temp, args.top_p, args.min_p, args.min_tokens_to_keep, args.top_k, seed=args.seed
    )
    model, tokenizer = load(args.model, revision=args.revision)
    given: str | list[int] = prompt
    if tokenizer.has_chat_template and not args.ignore_chat_template:
        message = {"role": "user", "content": prompt}
        given = tokenizer.apply_chat_template([message], add_generation_prompt=True)
    responses = stream_generate(
        model,
        tokenizer,
        given,
        args.max_tokens,
        stop=args.stop,
        sampler=sampler,
        prefill_step_size=args.prefill_step_size,
    )
    for response in responses:
        if args.verbose and response.generation_tokens == 1:
            print("=" * 10)
        print(response.text, end="", flush=True)
    print()
    if args.verbose:
        print(f"{'=' * 10}\n{describe(response)}\nLoaded: {model.load_report}")


def main(argv: list[str] | None = None) -> int:
    """Run the command; 0, or 2 after a line that says what was wrong."""
    return run_command(PROG, lambda args: generate_text(make_parser().parse_args(args)), argv)


if __name__ == "__main__":
    sys.exit(main())
