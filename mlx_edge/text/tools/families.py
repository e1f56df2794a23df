"""Which family of models writes calls in which form, and how its chat template tells.

The facts are those of the published chat templates. Where a template tells nothing, the form is that of Hermes, which
most models follow when a prompt asks for it.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from mlx_edge.text.tools.formats import JsonCalls, NamedCalls, Shape, TaggedCalls


@dataclass(frozen=True)
class ToolFormat:
    """A form of calls.

    A reply calls by `trigger`, `lead`, one call after the other with `between` them, and `close`; with `between`
    None there is one call at most. When it is read, a call begins at one of `openers` (at the beginning of a reply
    with `{` too where `is_bare`), and `wrappers` beside a call are part of it.
    """

    name: str
    shape: Shape
    openers: tuple[str, ...]
    trigger: str
    lead: str = ""
    between: str | None = ""
    close: str = ""
    wrappers: tuple[str, ...] = ()
    is_bare: bool = False
    id_length: int | None = None  # of the ids that the template takes; None: any


_HERMES = ToolFormat(
    "hermes",
    JsonCalls(end="</tool_call>"),
    openers=("<tool_call>",),
    trigger="<tool_call>",
    lead="\n",
    between="\n</tool_call>\n<tool_call>\n",
    close="\n</tool_call>",
)


def _coder(mark: str) -> ToolFormat:
    """Functions and parameters as tags, within `mark`: Qwen3-Coder, Seed."""
    return ToolFormat(
        f"tags in {mark}",
        TaggedCalls(
            name_end=">",
            key_begin="<parameter=",
            key_end=">",
            value_begin="",
            value_end="</parameter>",
            end="</function>",
            line="\n",
            padding="\n",
        ),
        openers=("<function=",),
        trigger=f"<{mark}>",
        lead="\n<function=",
        between=f"\n</{mark}>\n<{mark}>\n<function=",
        close=f"\n</{mark}>",
        wrappers=(f"<{mark}>", f"</{mark}>"),
    )


_LLAMA_TAGS = ToolFormat(
    "llama tags",
    NamedCalls(separator=">", end="</function>"),
    openers=("<function=",),
    trigger="<function=",
    between="<function=",
)
_LLAMA = ToolFormat(
    "llama json",
    JsonCalls(key="parameters", only_known=True),
    openers=("<|python_tag|>",),
    trigger="",
    between="; ",
    wrappers=(";",),
    is_bare=True,
)
_MISTRAL = ToolFormat(
    "mistral",
    NamedCalls(separator="[ARGS]"),
    openers=("[TOOL_CALLS]",),
    trigger="[TOOL_CALLS]",
    between="[TOOL_CALLS]",
    id_length=9,
)
_GLM = ToolFormat(
    "glm",
    TaggedCalls(
        name_end="",
        key_begin="<arg_key>",
        key_end="</arg_key>",
        value_begin="<arg_value>",
        value_end="</arg_value>",
        end="</tool_call>",
        line="\n",
    ),
    openers=("<tool_call>",),
    trigger="<tool_call>",
    between="\n<tool_call>",
)
_MINIMAX = ToolFormat(
    "minimax",
    TaggedCalls(
        name_end='">',
        key_begin='<parameter name="',
        key_end='">',
        value_begin="",
        value_end="</parameter>",
        end="</invoke>",
        line="\n",
    ),
    openers=('<invoke name="',),
    trigger="<minimax:tool_call>",
    lead='\n<invoke name="',
    between='\n<invoke name="',
    close="\n</minimax:tool_call>",
    wrappers=("<minimax:tool_call>", "</minimax:tool_call>"),
)
_KIMI = ToolFormat(
    "kimi",
    NamedCalls(
        separator="<|tool_call_argument_begin|>",
        end="<|tool_call_end|>",
        prefix="functions.",
        label=":[0-9]{1,3}",
    ),
    openers=("<|tool_call_begin|>",),
    trigger="<|tool_calls_section_begin|>",
    lead="<|tool_call_begin|>",
    between="<|tool_call_begin|>",
    close="<|tool_calls_section_end|>",
    wrappers=("<|tool_calls_section_begin|>", "<|tool_calls_section_end|>"),
)
_HARMONY = ToolFormat(
    "harmony",
    NamedCalls(separator="<|message|>", end="<|call|>", label=r" <\|constrain\|>json"),
    openers=("<|channel|>commentary to=functions.",),
    trigger="<|channel|>commentary to=functions.",
    between=None,
)


def _json_list(begin: str, end: str, id_length: int | None = None) -> ToolFormat:
    """A list of JSON calls after a mark: Granite 3, Phi-4-mini, Nemotron, the older Mistral."""
    return ToolFormat(
        f"list within {begin} {end}".strip(),
        JsonCalls(end=end),
        openers=(begin,),
        trigger=begin,
        lead="[",
        between=", ",
        close="]" + end,
        id_length=id_length,
    )


def _deepseek(prefix: str, separator: str, end: str) -> ToolFormat:
    return ToolFormat(
        f"deepseek with {separator.strip()}",
        NamedCalls(separator=separator, end=end + "<｜tool▁call▁end｜>", prefix=prefix),
        openers=("<｜tool▁call▁begin｜>",),
        trigger="<｜tool▁calls▁begin｜>",
        lead="<｜tool▁call▁begin｜>",
        between="<｜tool▁call▁begin｜>",
        close="<｜tool▁calls▁end｜>",
        wrappers=("<｜tool▁calls▁begin｜>", "<｜tool▁calls▁end｜>"),
    )


_SEP = "<｜tool▁sep｜>"
# The first whose signs all occur in the template.
_SIGNS: tuple[tuple[tuple[str, ...], ToolFormat], ...] = (
    (("<seed:tool_call>",), _coder("seed:tool_call")),
    (("<minimax:tool_call>",), _MINIMAX),
    (("<function=", "<parameter="), _coder("tool_call")),
    (("<arg_key>", "<arg_value>"), _GLM),
    (("<|tool_call_argument_begin|>",), _KIMI),
    (("to=functions.", "<|channel|>"), _HARMONY),
    ((_SEP, "```json"), _deepseek("function" + _SEP, "\n```json\n", "\n```")),
    ((_SEP,), _deepseek("", _SEP, "")),
    (("[TOOL_CALLS]", "[ARGS]"), _MISTRAL),
    (("[TOOL_CALLS]",), _json_list("[TOOL_CALLS]", "", id_length=9)),
    (("<TOOLCALL>",), _json_list("<TOOLCALL>", "</TOOLCALL>")),
    (("<|tool_call|>", "<|/tool_call|>"), _json_list("<|tool_call|>", "<|/tool_call|>")),
    (("<tool_call>",), _HERMES),
    (("<|tool_call|>",), _json_list("<|tool_call|>", "")),
    (("<function=", "</function>"), _LLAMA_TAGS),
    (("<|python_tag|>",), _LLAMA),
    (('"parameters": dictionary',), _LLAMA),
)
FORMATS = tuple({form.name: form for _, form in _SIGNS}.values())


def find_format(template: str | None) -> ToolFormat:
    """The form that a chat template shows or asks for, else that of Hermes."""
    text = re.sub(
        r"\\(['\"n])", lambda found: "\n" if found[1] == "n" else found[1], template or ""
    )
    for signs, form in _SIGNS:
        if all(sign in text for sign in signs):
            return form
    return _HERMES
