"""`python -m mlx_edge.generate`: a prompt in, text out as it comes, then how fast it was.

Reads flags and prints; the flags have the names that mlx_lm.generate gives them.
"""

import json
import sys
from argparse import Namespace
from collections.abc import Iterable, Iterator, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mlx_edge.command import Parser, integer, run_command, truth
from mlx_edge.errors import InvalidRequestError
from mlx_edge.options import (
    add_images,
    add_loading,
    add_memory,
    add_sampling,
    add_speculation,
    load_proposers,
    loading_options,
    make_cache,
    make_sampler,
    read_prompt,
    read_template_config,
)

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from mlx_edge.decoding.constraints import Constraint
    from mlx_edge.decoding.sampling import Sampler
    from mlx_edge.decoding.stream import GenerationResponse
    from mlx_edge.models.interface import LanguageModel
    from mlx_edge.profiler import Profiler
    from mlx_edge.text import Tokenizer

PROG = "mlx_edge.generate"
DEFAULT_PROMPT = "Once upon a time"
CUT = "<query>"  # stands in the template for a prompt that is stored already


def make_parser() -> Parser:
    """All flags."""
    parser = Parser(prog=PROG, description="Generate text with a language model.")
    add = parser.add_argument
    add("--model", help="a folder or a hub id (owner/name); else the prompt cache's, or pocket")
    add("--revision", help="branch, tag or commit of a hub model")
    add("--bridge", choices=("mlx-lm",), help="run the model by mlx-lm's definition of it")
    add("--prompt", "-p", default=DEFAULT_PROMPT, help='the prompt; "-" reads it from stdin')
    add("--system-prompt", help="what the chat template says before the prompt")
    add("--prefill-response", help="how the answer begins")
    add("--prompt-cache-file", help="continue the prompt that mlx_edge.cache_prompt has stored")
    add("--ignore-chat-template", action="store_true", help="give the model the prompt as it is")
    add(
        "--chat-template-config",
        help='variables of the template, as JSON: {"enable_thinking": false}',
    )
    add("--max-tokens", "-m", type=integer(1), default=256, help="the most tokens to generate")
    add("--stop", action="append", default=[], help="end before this text; may be given again")
    add("--extra-eos-token", nargs="+", default=[], help="tokens that end the text as well")
    add_images(parser)
    add_sampling(parser)
    add_grammar(parser)
    add_memory(parser)
    add_loading(parser)
    add_speculation(parser)
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
    group.add_argument("--grammar", help="the same; or a ready grammar by its name: autoglm")


def read_text_or_file(value: str) -> str:
    """The content of the file of that name, or the value itself where there is none."""
    path = Path(value)
    try:
        return path.read_text("utf-8") if len(value) < 4096 and path.is_file() else value
    except (OSError, ValueError) as error:
        raise InvalidRequestError(f"{value} cannot be read: {error}") from None


def make_constraint(tokenizer: "Tokenizer", args: Namespace) -> "Constraint | None":
    """A new constraint at the start of a text, if the flags ask for one."""
    if all(x is None for x in (args.json_schema, args.regex, args.lark, args.grammar)):
        return None
    from mlx_edge.decoding.constraints import make_constraint as make
    from mlx_edge.decoding.grammars import read_grammar

    if args.grammar is not None:
        return make(tokenizer, lark=read_grammar(args.grammar, tokenizer))
    if args.json_schema is not None:
        return make(tokenizer, json_schema=read_text_or_file(args.json_schema))
    if args.lark is not None:
        return make(tokenizer, lark=read_text_or_file(args.lark))
    return make(tokenizer, regex=args.regex)


def choose_model(args: Namespace) -> tuple[str, str | None]:
    """Name and revision to load: the flags', else those of the prompt cache, else the bundled model."""
    if args.prompt_cache_file is None:
        return "pocket" if args.model is None else args.model, args.revision
    default = make_parser().get_default
    decided = ("max_kv_size", "kv_bits", "kv_group_size", "quantized_kv_start")
    for name in (*decided, "system_prompt", "bridge"):
        if getattr(args, name) != default(name):
            raise InvalidRequestError(
                f"--{name.replace('_', '-')} does not go with --prompt-cache-file: "
                "the file has decided it; leave the flag out, or make another file"
            )
    from mlx_edge.models.prompt_cache import read_prompt_metadata

    metadata = read_prompt_metadata(args.prompt_cache_file)
    if args.model is not None:
        return args.model, args.revision
    return metadata.get("model", "pocket"), args.revision or metadata.get("revision")


def encode_request(tokenizer: "Tokenizer", args: Namespace) -> list[int]:
    """The tokens of the prompt, written as the chat template says where there is one.

    With a prompt cache, those that follow the prompt in it: the beginning of the turn is stored already.
    """
    continues = args.prompt_cache_file is not None
    prompt = read_prompt(args.prompt)
    beginning = args.prefill_response or ""
    variables = read_template_config(args.chat_template_config)
    if not tokenizer.has_chat_template or args.ignore_chat_template:
        if args.system_prompt is not None or variables:
            raise InvalidRequestError(
                "--system-prompt and --chat-template-config need a chat template, and none is used"
            )
        return tokenizer.encode(prompt + beginning, add_special_tokens=not continues)
    from mlx_edge.decoding.multimodal import write_user_turn

    messages = [write_user_turn(CUT + prompt if continues else prompt, len(args.image))]
    if args.system_prompt is not None:
        messages.insert(0, {"role": "system", "content": args.system_prompt})
    text = tokenizer.apply_chat_template(
        messages, add_generation_prompt=True, tokenize=False, **variables
    )
    if continues:
        _, found, text = str(text).partition(CUT)
        if not found:
            raise InvalidRequestError("the chat template does not write the prompt as it is")
    return tokenizer.encode(f"{text}{beginning}", add_special_tokens=False)


def read_images(args: Namespace) -> "list[NDArray[np.uint8]]":
    """The images of the flags, decoded."""
    if not args.image:
        if args.max_pixels is not None:
            raise InvalidRequestError("--max-pixels is the size of images, and there is no --image")
        return []
    if args.prompt_cache_file is not None:
        raise InvalidRequestError(
            "--image does not go with --prompt-cache-file: an image stands before the prompt, which is stored already"
        )
    from mlx_edge.models.vision.image import read_image

    return [read_image(path) for path in args.image]


class Run:
    """A loaded model and the request of the flags; every `stream` is the same generation anew."""

    def __init__(self, args: Namespace, watch: "Profiler") -> None:
        """Load and encode; wrong values are said before anything is loaded."""
        self.args = args
        with watch.phase("load"):
            # Imported here, so that a wrong flag or --help is answered at once.
            from mlx_edge.models.interface import check_reads_images
            from mlx_edge.models.load import load

            make_sampler(args)
            self.images = read_images(args)
            name, revision = choose_model(args)
            self.model, self.tokenizer = load(
                name, revision=revision, bridge=args.bridge, **loading_options(args)
            )
            check_reads_images(self.model, len(self.images) > 0)
            for token in args.extra_eos_token:
                self.tokenizer.add_eos_token(token)
            self.make_proposer = load_proposers(args, self.model, self.tokenizer)
        with watch.phase("tokenise"):
            self.tokens = encode_request(self.tokenizer, args)

    def make_sampler(self) -> "Sampler":
        """A new sampler; XTC never drops end tokens and the newline."""
        newline = self.tokenizer.encode("\n", add_special_tokens=False)
        return make_sampler(self.args, {*self.tokenizer.eos_token_ids, *newline})

    def make_cache(self) -> tuple[Sequence[Any], list[int]]:
        """A new cache, empty or as it was stored, and the tokens in it."""
        args = self.args
        if args.prompt_cache_file is None:
            return make_cache(self.model, args), []
        from mlx_edge.models.decoder import Decoder
        from mlx_edge.models.prompt_cache import NO_TEMPLATE, load_prompt_cache

        assert isinstance(self.model, Decoder)  # --bridge was refused
        caches, metadata = load_prompt_cache(
            args.prompt_cache_file, self.model, return_metadata=True
        )
        is_raw = not self.tokenizer.has_chat_template or args.ignore_chat_template
        if is_raw != (metadata["chat_template"] == NO_TEMPLATE):
            raise InvalidRequestError(
                f"{args.prompt_cache_file}: the prompt was stored with{'' if is_raw else 'out'} the chat template; "
                f"{'leave out' if is_raw else 'give'} --ignore-chat-template"
            )
        return caches, json.loads(metadata["tokens"])[0]

    def stream(
        self,
        *,
        max_tokens: int | None = None,
        tokenizer: "Tokenizer | None" = None,
        sampler: "Sampler | None" = None,
    ) -> Iterator["GenerationResponse"]:
        """The responses; tokenizer and sampler may be stand-ins that watch."""
        from mlx_edge.decoding.stream import stream_generate

        cache, stored = self.make_cache()
        proposer = self.make_proposer()
        if proposer is not None and stored:
            proposer.start(stored, 0)
        return stream_generate(
            self.model,
            tokenizer or self.tokenizer,
            self.tokens,
            max_tokens or self.args.max_tokens,
            stop=self.args.stop,
            sampler=sampler or self.make_sampler(),
            constraint=make_constraint(self.tokenizer, self.args),
            prompt_cache=cache,
            prefill_step_size=self.args.prefill_step_size,
            proposer=proposer,
            images=self.images,
            max_pixels=self.args.max_pixels,
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
        if line := describe_quality(run.model):
            print(line)


def describe_quality(model: "LanguageModel[Any]") -> str | None:
    """One line of the receipt in the model's folder; None where there is none."""
    from mlx_edge.calibration.quality import describe_quality as describe
    from mlx_edge.models.decoder import Decoder

    # The bridge keeps no folder.
    return describe(model.checkpoint.folder) if isinstance(model, Decoder) else None


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
    if not args.bridge:
        from mlx_edge.models.decoder import Decoder, describe_kernels

        assert isinstance(run.model, Decoder)
        print(f"Computed by {describe_kernels(run.model)}")
    print(profiler.format_report(report))
    if args.profile_out:
        watch.dump_trace(args.profile_out)


def generate_text(args: Namespace) -> None:
    """Load the model, generate, and print."""
    from mlx_edge.profiler import Profiler

    if args.profile_out and not args.profile:
        raise InvalidRequestError("--profile-out needs --profile")
    if args.bridge and args.profile == "ops":
        raise InvalidRequestError("--profile ops sees our own ops, of which --bridge runs none")
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
