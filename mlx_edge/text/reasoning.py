"""Where a model's thoughts end and its answer begins.

A reply may begin with thoughts between two marks; some chat templates have opened them already, so that the reply
holds the end alone. Knows no tool calls.
"""

from __future__ import annotations

from dataclasses import dataclass

from mlx_edge.text.tokenizer import Tokenizer


@dataclass(frozen=True)
class Reasoning:
    """The marks around thoughts; `dropped` are marks of the same language that are no text either.

    `resume` follows the thoughts, and `answer` stands before text for the user. `is_anywhere`: thoughts may stand
    between other parts of the reply, not only at its beginning.
    """

    open: str
    close: str
    dropped: tuple[str, ...] = ()
    resume: str = ""
    answer: str = ""
    is_anywhere: bool = False

    def is_open(self, prompt: str) -> bool:
        """Whether a rendered prompt ends within thoughts, so that the reply begins there."""
        return prompt.rstrip().endswith(self.open)


_HARMONY = Reasoning(
    "<|channel|>analysis<|message|>",
    "<|end|>",
    dropped=(
        "<|start|>assistant",
        "<|channel|>final<|message|>",
        "<|channel|>commentary<|message|>",
    ),
    resume="<|start|>assistant",
    answer="<|channel|>final<|message|>",
    is_anywhere=True,
)
_KNOWN = (
    Reasoning("<think>", "</think>"),
    Reasoning("[THINK]", "[/THINK]"),
    Reasoning("<seed:think>", "</seed:think>"),
    Reasoning("<longcat_think>", "</longcat_think>"),
)


def find_reasoning(tokenizer: Tokenizer) -> Reasoning | None:
    """The marks that the chat template writes, or for which the vocabulary has tokens; None: it knows none."""
    template = read_template(tokenizer) or ""
    if "<|channel|>" in template and "<|message|>" in template:
        return _HARMONY
    for marks in _KNOWN:
        if marks.close in template:
            return marks
    for marks in _KNOWN:
        if all(tokenizer.token_to_id(mark) is not None for mark in (marks.open, marks.close)):
            return marks
    return None


def read_template(tokenizer: Tokenizer) -> str | None:
    """The source of the chat template that is used when tools are given, None if there is none."""
    return tokenizer.read_chat_template(with_tools=True)
