r"""Ready grammars by name, for `--grammar` and the server: what a reply must be so that a certain program can read it.

`autoglm`: what Open-AutoGLM's phone agent reads (https://github.com/zai-org/Open-AutoGLM, phone_agent/model/client.py
and phone_agent/actions/handler.py). Thoughts, as the model likes, then one action, and with its last parenthesis the
reply ends. The agent cuts a reply at the first `finish(message=` or else `do(action=`, so the first of them begins the
action here, and no text inside an action holds `finish(message=`. It slices the text of Type and finish out as it
stands, quotes included, and ends it before the last `")`; it parses all else as Python, so strings there have
Python's escapes and numbers no leading zeros. Coordinates are thousandths of the screen, 0 to 999. Nor does a text
hold `<answer>` or `<think>`, or their ends: the server takes these marks out of a reply wherever they stand.

Narrower than the agent's parser, which takes whatever Python does: the spellings are those of its own prompts, with
double quotes and that order of arguments. Knows no model and no sampling.
"""

from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType

from mlx_edge.errors import InvalidRequestError
from mlx_edge.text import Tokenizer

_NO_LEAD = 'lead: ""'
# The strings that Python reads are on one line. The others may hold lines, tabs, and quotes that end no argument.
_AUTOGLM = rf"""
start: lead (do action | finish SLICED)
{_NO_LEAD}
do[lazy]: DO
finish[lazy]: FINISH
DO: /(?s:.*)do\(action=/ & ~ANY_FINISH
FINISH: /(?s:.*)finish\(message=/ & ~/(?s:.*)do\(action=(?s:.*)/
THOUGHTS: /(?s:.*)/ & ~ANY_FINISH & ~/(?s:.*)do\(action=(?s:.*)/
ANY_FINISH: /(?s:.*)finish\(message=(?s:.*)/
ANY_MARK: /(?s:.*)<\/?(answer|think)>(?s:.*)/
action: launch | tap | press | type | swipe | key | wait | ask | note | call
launch: "\"Launch\"" COMMA "app=" NAME ")"
tap: "\"Tap\"" COMMA "element=" POINT (COMMA "message=" STRING)? ")"
press: ("\"Long Press\"" | "\"Double Tap\"") COMMA "element=" POINT ")"
type: ("\"Type\"" | "\"Type_Name\"") COMMA "text=" SLICED
swipe: "\"Swipe\"" COMMA "start=" POINT COMMA "end=" POINT ")"
key: ("\"Back\"" | "\"Home\"" | "\"Interact\"") ")"
wait: "\"Wait\"" (COMMA "duration=" DURATION)? ")"
ask: "\"Take_over\"" (COMMA "message=" STRING)? ")"
note: "\"Note\"" (COMMA "message=" STRING)? ")"
call: "\"Call_API\"" (COMMA "instruction=" STRING)? ")"
COMMA: /, ?/
POINT: /\[(0|[1-9][0-9]{{0,2}}), ?(0|[1-9][0-9]{{0,2}})\]/
DURATION: /"(0|[1-9][0-9]{{0,2}})(\.[0-9])? ?(seconds)?"/
NAME: /"[^"\\\x00-\x1f\x7f]{{1,100}}"/ & ~ANY_FINISH & ~ANY_MARK
STRING: /"([^"\\\x00-\x1f\x7f]|\\["'\\nt])*"/ & ~ANY_FINISH & ~ANY_MARK
SLICED: /"([^"\x00-\x08\x0b-\x1f\x7f]|"+[^"),\x00-\x08\x0b-\x1f\x7f])*"+\)/ & ~ANY_FINISH & ~ANY_MARK
"""
GRAMMARS: Mapping[str, str] = MappingProxyType({"autoglm": _AUTOGLM})  # name -> Lark source
# What the model may write before an action, in this order; where these are special tokens, they are no text.
_MARKS = ("<think>", "</think>", "<answer>")


def read_grammar(value: str, tokenizer: Tokenizer) -> str:
    """The Lark source of a name of `GRAMMARS`, of a file, or the value itself, for texts of `tokenizer`.

    Raises: InvalidRequestError for a name that is neither, and a file that cannot be read.
    """
    if value in GRAMMARS:
        return GRAMMARS[value].replace(_NO_LEAD, _write_lead(tokenizer))
    if ":" in value or "\n" in value:
        return value
    try:
        return Path(value).read_text("utf-8")
    except (OSError, ValueError) as error:
        raise InvalidRequestError(
            f"the grammar {value[:100]!r} is no file that can be read ({error}), expected one, or a name: "
            f"{', '.join(GRAMMARS)}"
        ) from None


def _write_lead(tokenizer: Tokenizer) -> str:
    """The rule of what comes before an action: thoughts between marks that this vocabulary keeps out of its texts."""
    special = tokenizer.special_ids | tokenizer.eos_token_ids
    ids = [index for mark in _MARKS if (index := tokenizer.token_to_id(mark)) in special]
    return "lead: " + (" ".join(f"(THOUGHTS <[{index}]>)?" for index in ids) or '""')
