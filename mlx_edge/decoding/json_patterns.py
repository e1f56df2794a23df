r"""Regexes of JSON schemas, rewritten so that what they match here is matched by every validator.

JSON Schema asks for the dialect of JavaScript, many validators use that of their own language, and the grammar library
that of Rust. Where JavaScript, Python and Rust differ, the rewritten regex matches what all of them match: `.` no line
end, `\s` the six ASCII blanks, `\S`, `\D` and `\W` nothing that one of them counts as a blank, digit or letter. What
only Rust understands, or reads otherwise, is refused. Knows no schema.
"""

import re

from mlx_edge.errors import InvalidRequestError

_DOT = r"[^\n\r\x{2028}\x{2029}]"
_BLANKS = r"\t\n\x0B\f\r "
_ALL_BLANKS = r"\s\x1c-\x1f\x{85}\x{feff}"
_ALL_DIGITS = r"0-9\p{Nd}"
_ALL_LETTERS = r"0-9A-Za-z_\p{L}\p{N}\p{M}\p{Pc}"
# What a class may hold for a shorthand: what all dialects count, and what one of them counts.
_NARROW = {
    "s": _BLANKS,
    "S": f"[^{_ALL_BLANKS}]",
    "D": f"[^{_ALL_DIGITS}]",
    "W": f"[^{_ALL_LETTERS}]",
}
_WIDE = {
    **{"s": _ALL_BLANKS, "d": _ALL_DIGITS, "w": _ALL_LETTERS},
    **{"S": f"[^{_BLANKS}]", "D": "[^0-9]", "W": "[^0-9A-Za-z_]"},
}
_PART = re.compile(
    r"(?P<escape>\\(?:u\{[^}]*\}|u[0-9a-fA-F]{4}|x[0-9a-fA-F]{2}|[pP]\{[^}]*\}|[^pPux]))"
    r"|(?P<flags>\(\?[a-zA-Z-]+[:)])|(?P<rest>.)",
    re.DOTALL,
)
_KNOWN_LETTERS = "dwsDWSbBtnrfvuxpP"


def portable_pattern(pattern: str) -> str:
    """The regex in Rust's dialect. Raises: InvalidRequestError for what has no meaning that all dialects share."""
    parts: list[str] = []
    at, is_inside, is_negated = 0, False, False
    while at < len(pattern):
        found = _PART.match(pattern, at)
        assert found is not None
        text, start = found[0], at
        at = found.end()
        if found["escape"]:
            parts.append(_read_escape(pattern, text, is_inside=is_inside, is_negated=is_negated))
        elif found["flags"] and not is_inside and not text.startswith("(?P"):
            raise _refusal(pattern, text)
        elif is_inside:
            if text == "]":
                is_inside = False
            elif pattern.startswith(("--", "&&", "~~"), start):
                raise _refusal(pattern, text * 2)
            parts.append(f"\\{text}" if text in "[&~" else text)
        elif text == "[":
            is_inside, is_negated = True, pattern.startswith("^", at)
            at += is_negated
            if pattern.startswith("]", at):
                raise _refusal(pattern, pattern[start : at + 1])
            parts.append("[^" if is_negated else "[")
        elif text == "\\":
            raise _refusal(pattern, pattern[start : start + 2])
        else:
            parts.append(_DOT if text == "." else text)
    return "".join(parts)


def _read_escape(pattern: str, text: str, *, is_inside: bool, is_negated: bool) -> str:
    letter = text[1]
    if letter.isascii() and letter.isalpha() and letter not in _KNOWN_LETTERS:
        raise _refusal(pattern, text)
    if not is_inside:
        inner = _NARROW.get(letter, "")
        return inner if inner.startswith("[") else f"[{inner}]" if inner else text
    return (_WIDE if is_negated else _NARROW).get(letter, text)


def _refusal(pattern: str, part: str) -> InvalidRequestError:
    return InvalidRequestError(
        f"the pattern {pattern[:80]!r} has {part!r}, which validators read in different ways; write it otherwise"
    )
