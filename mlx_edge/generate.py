"""`python -m mlx_edge.generate`: a prompt in, text out as it comes, then how fast it was.

Reads flags and prints; the flags have the names that mlx_lm.generate gives them.
"""

import sys
from argparse import Namespace
from collections.abc import Iterable, Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING

from mlx_edge.command import Parser, integer, run_command, truth
from mlx_edge.errors import InvalidRequestError
from mlx_edge.options import (
    add_memory,
    add_sampling,
    make_cache,
    make_sampler,
    read_template_config,
)

if TYPE_CHECKING:
    from mlx_edge.decoding.constraints import Constraint
    from mlx_edge.decoding.sampling import Sampler
    from mlx_edge.decoding.stream import GenerationResponse
    from mlx_edge.profiler import Profiler
    from mlx_edge.text import Tokenizer

PROG = "mlx_edge.generate"
DEFAULT_PROMPT = "Once upon a time"
MAX_PROMPT_BYTES = 1 << 26


def make_parser() -> Parser:
    """All flags."""
    parser = Parser(prog=PROG, description="Generate text with a language model.")
    add = parser.add_argument
    add("--model", default="pocket", help="a folder, a hub id (owner/name), or the bundled pocket")
    add("--revision", help="branch, tag or commit of a hub model")
    add("--prompt", "-p", default=DEFAULT_PROMPT, help='the prompt; "-" reads it from stdin')
    add("--system-prompt", help="what the chat template says before the prompt")
    add("--prefill-response", help="how the answer begins")
    add("--ignore-chat-template", action="store_true", help="give the model the prompt as it is")
    add(
        "--chat-template-config",
        help='variables of the template, as JSON: {"enable_thinking": false}',
    )
    add("--max-tokens", "-m", type=integer(1), default=256, help="the most tokens to generate")
    add("--stop", action="append", default=[], help="end before this text; may be given again")
    add("--extra-eos-token", nargs="+", default=[], help="tokens that end the text as well")
    add_sampling(parser)
    add_grammar(parser)
    add_memory(parser)
    add("--prefill-step-size", type=integer(1), default=2048, help="prompt tokens per step")
    add(
        "--verbose",
        type=truth,
        nargs="?",
        const=True,
        default=True,
        help="False prints nothing but the text",
    )
    add(
        "--profile",
        nargs="?",
        const="phases",
        choices=("phases", "ops"),
        help="say where the time went; ops: for every op and layer too, which costs time itself",
    )
    add("--profile-out", help="write a trace for ui.perfetto.dev (with --profile)")
    return parser


def add_grammar(parser: Parser) -> None:
    """The flags that say what the text must look like; they need the extra `grammar`."""
    group = parser.add_mutually_exclusive_group()
    group.add_argument(
        "--json-schema", help="write JSON that this schema allows: a file, or the schema"
    )
    group.add_argument("--regex", help="write a text that this regular expression matches")
    group.add_argument("--lark", help="write a text of this Lark grammar: a file, or the grammar")


def read_text_or_file(value: str) -> str:
    """The content of the file of that name, or the value itself where there is none."""
    path = Path(value)
    try:
        return path.read_text("utf-8") if len(value) < 4096 and path.is_file() else value
    except (OSError, ValueError) as error:
        raise InvalidRequestError(f"{value} cannot be read: {error}") from None


def make_constraint(tokenizer: "Tokenizer", args: Namespace) -> "Constraint | None":
    """A new constraint at the start of a text, if the flags ask for one."""
    if args.json_schema is None and args.regex is None and args.lark is None:
        return None
    from mlx_edge.decoding.constraints import make_constraint as make

    if args.json_schema is not None:
        return make(tokenizer, json_schema=read_text_or_file(args.json_schema))
    if args.lark is not None:
        return make(tokenizer, lark=read_text_or_file(args.lark))
    return make(tokenizer, regex=args.regex)


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


def encode_request(tokenizer: "Tokenizer", args: Namespace) -> list[int]:
    """The tokens of the prompt, written as the chat template says where there is one."""
    prompt = read_prompt(args.prompt)
    beginning = args.prefill_response or ""
    variables = read_template_config(args.chat_template_config)
    if not tokenizer.has_chat_template or args.ignore_chat_template:
        if args.system_prompt is not None or variables:
            raise InvalidRequestError(
                "--system-prompt and --chat-template-config need a chat template, and none is used"
            )
        return tokenizer.encode(prompt + beginning)
    messages = [{"role": "user", "content": prompt}]
    if args.system_prompt is not None:
        messages.insert(0, {"role": "system", "content": args.system_prompt})
    text = tokenizer.apply_chat_template(
        messages, add_generation_prompt=True, tokenize=False, **variables
    )
    return tokenizer.encode(f"{text}{beginning}", add_special_tokens=False)


class Run:
    """A loaded model and the request of the flags; every `stream` is the same generation anew."""

    def __init__(self, args: Namespace, watch: "Profiler") -> None:
        """Load and encode; wrong values are said before anything is loaded."""
        self.args = args
        with watch.phase("load"):
            # Imported here, so that a wrong flag or --help is answered at once.
            from mlx_edge.models.load import load

            make_sampler(args)
            self.model, self.tokenizer = load(args.model, revision=args.revision)
            for token in args.extra_eos_token:
                self.tokenizer.add_eos_token(token)
        with watch.phase("tokenise"):
            self.tokens = encode_request(self.tokenizer, args)

    def make_sampler(self) -> "Sampler":
        """A new sampler; XTC never drops end tokens and the newline."""
        newline = self.tokenizer.encode("\n", add_special_tokens=False)
        return make_sampler(self.args, {*self.tokenizer.eos_token_ids, *newline})

    def stream(
        self,
        *,
        max_tokens: int | None = None,
        tokenizer: "Tokenizer | None" = None,
        sampler: "Sampler | None" = None,
    ) -> Iterator["GenerationResponse"]:
        """The responses; tokenizer and sampler may be stand-ins that watch."""
        from mlx_edge.decoding.stream import stream_generate

        return stream_generate(
            self.model,
            tokenizer or self.tokenizer,
            self.tokens,
            max_tokens or self.args.max_tokens,
            stop=self.args.stop,
            sampler=sampler or self.make_sampler(),
            constraint=make_constraint(self.tokenizer, self.args),
            prompt_cache=make_cache(self.model, self.args),
            prefill_step_size=self.args.prefill_step_size,
        )


def print_stream(run: Run, responses: Iterable["GenerationResponse"]) -> None:
    """Print the text as it comes, then the closing lines."""
    from mlx_edge.decoding.stream import describe

    for response in responses:
        if run.args.verbose and response.generation_tokens == 1:
            print("=" * 10)
        print(response.text, end="", flush=True)
    print()
    if run.args.verbose:
        print(f"{'=' * 10}\n{describe(response)}\nLoaded: {run.model.load_report}")


def print_profiled(run: Run, watch: "Profiler") -> None:
    """The same, watched; then where the time went, and what watching cost."""
    from mlx_edge import profiler
    from mlx_edge.ops import observe

    args = run.args
    with watch.phase("warm-up"):  # its own row, so that nothing cold lands in the prefill
        for _ in run.stream(max_tokens=2):
            pass
    phases = profiler.Phases(watch)
    ops = profiler.OpProfile(watch) if args.profile == "ops" else None
    watched = run.stream(
        tokenizer=phases.tokenizer(run.tokenizer), sampler=phases.sampler(run.make_sampler())
    )
    with observe(ops) if ops else nullcontext():
        print_stream(run, phases.steps(watched))
    cost = phases.compare(run.stream())
    roof = profiler.machine_bandwidth() if ops else None  # last, because it raises the peaks
    report = profiler.make_report(watch, ops=ops, bandwidth=roof, cost=cost)
    print(profiler.format_report(report))
    if args.profile_out:
        watch.dump_trace(args.profile_out)


def generate_text(args: Namespace) -> None:
    """Load the model, generate, and print."""
    from mlx_edge.profiler import Profiler

    if args.profile_out and not args.profile:
        raise InvalidRequestError("--profile-out needs --profile")
    watch = Profiler(is_on=args.profile is not None)
    run = Run(args, watch)
    if watch.is_on:
        print_profiled(run, watch)
    else:
        print_stream(run, run.stream())


def main(argv: list[str] | None = None) -> int:
    """Run the command; 0, or 2 after a line that says what was wrong."""
    return run_command(PROG, lambda args: generate_text(make_parser().parse_args(args)), argv)


if __name__ == "__main__":
    sys.exit(main())
