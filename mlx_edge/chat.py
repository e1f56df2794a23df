"""`python -m mlx_edge.chat`: a conversation at the terminal, or through a pipe: a question per line, answers on stdout.

Reads flags and lines and prints; flags and commands have the names that mlx_lm.chat gives them. What was said is
written with the model's chat template; what the KV cache holds of it is not processed again.
"""

import signal
import sys
from argparse import Namespace
from collections.abc import Callable, Iterable
from contextlib import closing, suppress
from types import FrameType
from typing import TYPE_CHECKING

from mlx_edge.command import Parser, integer, run_command
from mlx_edge.errors import InvalidRequestError
from mlx_edge.options import (
    add_loading,
    add_memory,
    add_sampling,
    add_speculation,
    load_proposers,
    loading_options,
    make_cache,
    make_sampler,
    read_template_config,
)

if TYPE_CHECKING:
    from mlx_edge.cache import AnyKVCache
    from mlx_edge.decoding.constraints import Constraint
    from mlx_edge.models.decoder import Decoder
    from mlx_edge.text import Tokenizer

PROG = "mlx_edge.chat"
PROMPT = ">> "
HELP = "q leaves, r forgets the conversation, h shows this; Ctrl-C stops an answer"
MAX_QUESTION_BYTES = 1 << 26


def make_parser() -> Parser:
    """All flags."""
    parser = Parser(prog=PROG, description=f"Talk with a language model. Commands: {HELP}.")
    add = parser.add_argument
    add("--model", default="pocket", help="a folder, a hub id (owner/name), or the bundled pocket")
    add("--revision", help="branch, tag or commit of a hub model")
    add("--system-prompt", help="what the chat template says before the conversation")
    add(
        "--chat-template-config",
        help='variables of the template, as JSON: {"enable_thinking": false}',
    )
    add("--max-tokens", "-m", type=integer(1), default=256, help="the most tokens of an answer")
    add("--grammar", help="of the answers: a file of Lark, or the name of a ready one: autoglm")
    add_sampling(parser)
    add_memory(parser)
    add_loading(parser)
    add_speculation(parser)
    add("--prefill-step-size", type=integer(1), default=2048, help="prompt tokens per step")
    return parser


class Interrupt:
    """Within it, the first Ctrl-C asks for a stop and breaks nothing off; the next one breaks off."""

    def __init__(self) -> None:
        self.is_wanted = False

    def __enter__(self) -> "Interrupt":
        self._previous = signal.signal(signal.SIGINT, self._note)
        return self

    def __exit__(self, *_: object) -> None:
        signal.signal(signal.SIGINT, self._previous)

    def _note(self, _number: int, _frame: FrameType | None) -> None:
        if self.is_wanted:
            raise KeyboardInterrupt
        self.is_wanted = True

    def check_prefill(self, _done: int, _total: int) -> None:
        """Break off between two chunks of a long prompt: there is no answer yet to be kept."""
        if self.is_wanted:
            raise KeyboardInterrupt


class Conversation:
    """What was said so far, and the KV cache of it."""

    def __init__(self, args: Namespace) -> None:
        """Load the model; every flag that cannot be followed is an error here, not in the first answer."""
        variables = read_template_config(args.chat_template_config)
        make_sampler(args)
        # Imported here, so that a wrong flag or --help is answered at once.
        from mlx_edge.models.load import load

        self.args = args
        self.model: Decoder
        self.tokenizer: Tokenizer
        self.model, self.tokenizer = load(
            args.model, revision=args.revision, **loading_options(args)
        )
        if not self.tokenizer.has_chat_template:
            raise InvalidRequestError(
                f"{args.model} has no chat template, which a conversation needs; "
                "take an instruct model, or python -m mlx_edge.generate"
            )
        self.num_processed = 0  # prompt tokens that the newest answer ran through the model
        self.num_reused = 0  # those before them, which the cache held already
        self.messages: list[dict[str, str]] = []
        self._variables = variables
        self._cache: list[AnyKVCache] | None = None
        self._held: list[int] = []  # the tokens whose keys and values are in the cache
        self.reset()
        # One for the whole conversation: it goes on with what it was told, as far as the cache does.
        self._proposer = load_proposers(args, self.model, self.tokenizer)()
        self._check_flags()
        newline = self.tokenizer.encode("\n", add_special_tokens=False)
        # One for the whole conversation: with a new one, a seed would draw the same for every answer.
        self._sampler = make_sampler(args, {*self.tokenizer.eos_token_ids, *newline})

    def reset(self) -> None:
        """Forget all but the system prompt."""
        system = self.args.system_prompt
        self.messages = [] if system is None else [{"role": "system", "content": system}]
        self.drop_cache()

    def drop_cache(self) -> None:
        """Process everything that was said anew for the next answer."""
        self._cache, self._held = None, []

    def ask(self, question: str, show: Callable[[str], object], interrupt: Interrupt) -> bool:
        """Give the text of the answer to `show` as it comes; return whether the context is full after it.

        A stopped answer stays in the conversation as far as it came; a question without any does not.

        Raises: InvalidRequestError for a question that does not fit, which the conversation then lacks.
        """
        asked = {"role": "user", "content": question}
        tokens = self._encode([*self.messages, asked])
        context = self.model.config.context_size
        if len(tokens) > context:
            raise InvalidRequestError(
                f"with this question the conversation has {len(tokens)} tokens, the model's context "
                f"{context}; r forgets the conversation, a shorter question may still fit"
            )
        parts: list[str] = []

        def add_part(text: str) -> None:
            parts.append(text)
            show(text)

        is_full = False
        # Broken off by the second Ctrl-C, or before the first token: the cache is left behind, not the conversation.
        with suppress(KeyboardInterrupt):
            is_full = self._answer(tokens, add_part, interrupt)
        if parts or not interrupt.is_wanted:
            self.messages += [asked, {"role": "assistant", "content": "".join(parts)}]
        return is_full

    def _answer(
        self, tokens: list[int], show: Callable[[str], object], interrupt: Interrupt
    ) -> bool:
        """Run the model; whether the answer ended because the context did."""
        from mlx_edge.decoding.stream import stream_generate

        cache, self.num_reused = self._take_cache(tokens)
        self.num_processed = len(tokens) - self.num_reused
        fed = list(tokens)
        responses = stream_generate(
            self.model,
            self.tokenizer,
            tokens[self.num_reused :],
            self.args.max_tokens,
            sampler=self._sampler,
            prompt_cache=cache,
            prefill_step_size=self.args.prefill_step_size,
            prompt_progress_callback=interrupt.check_prefill,
            proposer=self._proposer,
            constraint=self._make_constraint(),
        )
        with closing(responses):  # closed, the cache holds no drafts
            for response in responses:
                fed.append(response.token)
                show(response.text)
                if interrupt.is_wanted:
                    break
        # The last token may be stored, because its step was in flight already; the cache knows.
        self._cache, self._held = cache, fed[: cache[0].offset]
        is_cut = response.finish_reason == "length"
        return is_cut and response.generation_tokens < self.args.max_tokens

    def _make_constraint(self) -> "Constraint | None":
        """A new one for an answer, if there is a grammar."""
        if self.args.grammar is None:
            return None
        from mlx_edge.decoding.constraints import make_constraint
        from mlx_edge.decoding.grammars import read_grammar

        return make_constraint(self.tokenizer, lark=read_grammar(self.args.grammar, self.tokenizer))

    def _take_cache(self, tokens: list[int]) -> tuple["list[AnyKVCache]", int]:
        """A cache that holds the beginning of these tokens, and how many; a new one where they differ.

        Taken away, so that what breaks off in the middle of a step leaves no torn cache behind.
        """
        cache, held = self._cache, self._held
        self.drop_cache()
        # One token must be left, as the model answers to those it is given.
        if cache is not None and len(held) < len(tokens) and tokens[: len(held)] == held:
            return cache, len(held)
        return make_cache(self.model, self.args), 0

    def _encode(self, messages: list[dict[str, str]]) -> list[int]:
        text = self.tokenizer.apply_chat_template(
            messages, add_generation_prompt=True, tokenize=False, **self._variables
        )
        return self.tokenizer.encode(str(text), add_special_tokens=False)

    def _check_flags(self) -> None:
        """Try what the flags ask for on next to nothing."""
        import mlx.core as mx

        from mlx_edge.cache import QuantizedRows

        num_tokens = len(self._encode([*self.messages, {"role": "user", "content": "Hello"}]))
        context = self.model.config.context_size
        if num_tokens > context:
            raise InvalidRequestError(
                f"with --system-prompt a greeting has {num_tokens} tokens, the model's context "
                f"{context}; shorten the system prompt"
            )
        make_cache(self.model, self.args)
        self._make_constraint()
        if self.args.kv_bits is not None:
            rows = mx.zeros((2, 1, 1, 1, self.model.config.head_dim))
            QuantizedRows(self.args.kv_bits, self.args.kv_group_size).encode(rows)


def note(text: str) -> None:
    """Say something that is no answer."""
    print(text, file=sys.stderr, flush=True)


def show_text(text: str) -> None:
    """Print a piece of an answer at once."""
    print(text, end="", flush=True)


def read_terminal() -> Iterable[str]:
    """The lines typed at the terminal, until its end of input."""
    with suppress(ImportError):
        import readline  # noqa: F401  (its import gives input() a history and an editable line)
    while True:
        try:
            if sys.stdout.isatty():  # input() must know its prompt, to draw the line anew
                line = input(PROMPT)
            else:
                print(PROMPT, end="", file=sys.stderr, flush=True)
                line = input()
        except EOFError:
            note("")  # the shell's prompt gets a line of its own
            return
        except UnicodeDecodeError as error:
            raise InvalidRequestError(f"the line is not UTF-8: {error.reason}") from None
        yield line


def read_pipe() -> Iterable[str]:
    """The lines of a stdin that is no terminal, as UTF-8 whatever the locale says."""
    number = 0
    while data := sys.stdin.buffer.readline(MAX_QUESTION_BYTES + 1):
        number += 1
        if len(data) > MAX_QUESTION_BYTES:
            limit = MAX_QUESTION_BYTES >> 20
            raise InvalidRequestError(f"line {number} of stdin has more than {limit} MiB")
        try:
            yield data.decode("utf-8")
        except UnicodeDecodeError as error:
            raise InvalidRequestError(
                f"line {number} of stdin is not UTF-8: {error.reason}"
            ) from None


def answer(conversation: Conversation, question: str) -> None:
    """Print the answer; a question that cannot be answered is one line, and the conversation goes on."""
    try:
        with Interrupt() as interrupt:
            is_full = conversation.ask(question, show_text, interrupt)
    except InvalidRequestError as error:
        note(f"{PROG}: {' '.join(str(error).split())}")
        return
    print(flush=True)
    if is_full:
        context = conversation.model.config.context_size
        note(f"{PROG}: the model's context of {context} tokens is full; r forgets the conversation")


def chat(args: Namespace) -> None:
    """Answer lines until they end or one says q."""
    conversation = Conversation(args)
    if not sys.stdin:  # None when the caller closed it
        return
    is_terminal = sys.stdin.isatty()
    if is_terminal:
        note(f"Talking with {args.model}: {HELP}.")
    for line in read_terminal() if is_terminal else read_pipe():
        command = line.strip()
        if command == "q":
            return
        if command == "h":
            note(HELP)
        elif command == "r":
            conversation.reset()
            if is_terminal:
                note("The conversation is forgotten.")
        elif command:
            answer(conversation, line.rstrip("\r\n"))


def main(argv: list[str] | None = None) -> int:
    """Run the command; 0, or 2 after a line that says what was wrong."""
    return run_command(PROG, lambda args: chat(make_parser().parse_args(args)), argv)


if __name__ == "__main__":
    sys.exit(main())
