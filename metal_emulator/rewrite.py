"""Metal's text made into C++ for OpenCL, line by line: the few things that clang spells otherwise.

A threadgroup variable becomes a reference to memory of the runtime, which is how it is shared, bounded, poisoned and
watched. The rest are constructors, casts and qualifiers that clang does not take. Lines stay lines.
"""

import re
from collections.abc import Mapping
from dataclasses import replace

from metal_emulator.source import (
    Source,
    blank,
    closing,
    find_instances,
    find_kernels,
    split_list,
)

Constants = Mapping[int, bool | int | float]  # by the index of [[function_constant(n)]]

_FUNCTION_CONSTANT = re.compile(
    r"(\bconstant\s+[\w:]+\s+\w+)\s*\[\[\s*function_constant\s*\(\s*(\d+)\s*\)\s*\]\]\s*;"
)
_THREADGROUP = re.compile(r"(?:\balignas\s*\((?P<align>[^()]*|\w+\([^()]*\))\)\s*)?\bthreadgroup\b")
_DECLARATOR = re.compile(
    r"^\s*(?P<type>\S.*?)\s*\b(?P<name>\w+)\s*(?P<extents>(?:\[.*\])?)\s*$", re.DOTALL
)
_CAST = re.compile(r"\bstatic_cast\s*<\s*(\w+)\s*>\s*\(")
_CONST_THREAD = re.compile(
    r"\b(?:const\s+thread|thread\s+const)(\s+[\w:]+(?:<[^<>;(){}]*>)?\s*&(?!&))"
)
_CONST_CONSTANT = re.compile(r"\bconst(?=\s+constant\s+\w)|(?<=\bconstant\s)const(?=\s+\w)")
_METHOD_THREAD = re.compile(r"\)\s*(?:const\s+)?(thread)\b(?=\s*(?:noexcept\s*)?[{:;])")
_VECTOR = re.compile(r"(?<![\w:])(?:metal\s*::\s*)?vec\s*<")
_VECTOR_ALIAS = re.compile(
    r"\busing\s+(\w+)\s*=\s*(?:metal\s*::\s*)?vec\s*<[^;]*;|\btypedef\s+(?:metal\s*::\s*)?vec\s*<[^;]*>\s*(\w+)\s*;"
)


def rewrite(source: Source, constants: Constants | None = None) -> str:
    """The text for clang. Raises MetalError for a threadgroup variable outside of a kernel or with an initialiser."""
    source = replace(source, text=_set_constants(source.text, constants or {}))
    text = _share_threadgroup_variables(source)
    for instance in find_instances(text):
        start, end = instance.span
        text = text[:start] + blank(text[start:end]) + text[end:]
    text = _CONST_THREAD.sub(
        r"const\1", text
    )  # no temporary binds to a reference to `thread` in clang
    text = _drop_thread_on_constructors(text)
    text = _CONST_CONSTANT.sub(
        "     ", text
    )  # `constant` says it; clang takes the two for different types
    text = _CAST.sub(r"emu_cast<\1>(", text)  # clang has no cast from half to bfloat
    return _make_vectors(text)


def _set_constants(text: str, constants: Constants) -> str:
    """Give function constants their values; one without stays undefined, which is an error only where it is used."""

    def value(match: re.Match[str]) -> str:
        given = constants.get(int(match[2]))
        lines = "\n" * match[0].count("\n")
        if given is None:
            return f"extern {match[1]};{lines}"
        return f"{match[1]} = {str(given).lower() if isinstance(given, bool) else given};{lines}"

    return _FUNCTION_CONSTANT.sub(value, text)


def _share_threadgroup_variables(source: Source) -> str:
    text, parts, done = source.text, [], 0
    bodies = [kernel.body for kernel in find_kernels(source)]
    for number, match in enumerate(_THREADGROUP.finditer(text)):
        end = text.find(";", match.end())
        declared = text[match.end() : end]
        if end < 0 or not _declares_variables(text, match.start(), declared):
            continue
        if not any(start < match.start() < stop for start, stop in bodies):
            message = "a threadgroup variable must be declared in the body of a kernel; pass a pointer to it instead"
            raise source.error(message, match.start())
        if "=" in _outside_brackets(declared):
            raise source.error("a threadgroup variable has no initialiser in Metal", match.start())
        column = source.place(match.start())[2]
        shared = _shared(declared, match["align"], number, column)
        parts += [text[done : match.start()], shared, "\n" * text.count("\n", match.start(), end)]
        done = end + 1
    return "".join([*parts, text[done:]])


def _declares_variables(text: str, start: int, declared: str) -> bool:
    """Whether `threadgroup` begins a declaration of variables, not of a pointer, a reference or a parameter."""
    before = text[max(0, start - 400) : start].rstrip()
    line = before[before.rfind("\n") + 1 :].lstrip()
    begins = not before or before[-1] in ";{}" or line.startswith("#")
    return begins and not set("(){}*&#") & set(_outside_brackets(declared).split("=")[0])


def _outside_brackets(text: str) -> str:
    kept, depth = [], 0
    for character in text:
        depth += (character in "[<") - (character in "]>")
        if depth == 0 and character not in "]>":
            kept.append(character)
    return "".join(kept)


def _shared(declared: str, align: str | None, number: int, column: int) -> str:
    """`T a[N], b` -> references to the runtime's memory, by a number that is the same for all threads."""
    statements, base = [], ""
    for index, declarator in enumerate(split_list(declared)):
        match = _DECLARATOR.match(declarator if index == 0 else f"{base} {declarator}")
        assert match, f"not a declaration of a variable: threadgroup{declared}"
        base = base or match["type"]
        alias = f"emu_type_{number}_{index}"
        statements.append(
            f"using {alias} = {base} {match['extents']}; threadgroup {alias}& {match['name']} = "
            f"*(threadgroup {alias}*)emu_threadgroup({number * 16 + index}, sizeof({alias}), "
            f"{align or f'alignof({alias})'}, EMU_SITE(__LINE__, {column}));"
        )
    return " ".join(statements).replace("\n", " ")


def _drop_thread_on_constructors(text: str) -> str:
    """clang holds temporaries in its generic space, where methods of `thread` objects cannot be called."""
    classes = set(re.findall(r"\b(?:struct|class)\s+(\w+)", text))
    parts, done = [], 0
    for match in _METHOD_THREAD.finditer(text):
        head = text[max(0, match.start() - 4000) : match.start() + 1]
        name = head[: _opening(head)].rstrip()[-120:]
        word = re.search(r"(\w+)$", name)
        is_constructor = word is not None and word[1] in classes
        if is_constructor or re.search(r"operator\b[^;{}()]*(?:\(\s*\))?$", name):
            parts += [text[done : match.start(1)], "      "]
            done = match.end(1)
    return "".join([*parts, text[done:]])


def _opening(text: str) -> int:
    """Position of the parenthesis that the last character closes."""
    depth = 0
    for position in range(len(text) - 1, -1, -1):
        depth += (text[position] == ")") - (text[position] == "(")
        if depth == 0:
            return position
    return 0


def _make_vectors(text: str) -> str:
    """`vec<T, 2>(a, b)` -> `emu_vector<vec<T, 2>>(a, b)`: clang would take the arguments for a comma expression."""
    parts, done = [], 0
    for match in _VECTOR.finditer(text):
        end = closing(text, match.end() - 1) + 1
        is_call = text[end : end + 40].lstrip().startswith("(")
        is_operator = text[max(0, match.start() - 40) : match.start()].rstrip().endswith("operator")
        if end and match.start() >= done and is_call and not is_operator:
            parts += [text[done : match.start()], f"emu_vector<{text[match.start() : end]}>"]
            done = end
    text = "".join([*parts, text[done:]])
    for alias in {match[1] or match[2] for match in _VECTOR_ALIAS.finditer(text)}:
        text = re.sub(rf"(?<![\w.])(?<!operator ){alias}\s*\(", f"emu_vector<{alias}>(", text)
    return text
