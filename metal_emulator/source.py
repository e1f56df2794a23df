"""A kernel's text: its includes put in, its comments blanked, its kernels found.

Lines and columns stay where the user wrote them: what is taken out leaves spaces, a file that is put in stands between
`#line` marks. Knows no launch, no compiler and no meaning of what it moves.
"""

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from metal_emulator.errors import MetalError

_INCLUDE = re.compile(r'\s*#\s*include\s+"([^"]+)"')
_ONCE = re.compile(r"\s*#\s*pragma\s+once")
_LINE_MARK = re.compile(r'^#line (\d+) "([^"]*)"$', re.MULTILINE)
_COMMENT = re.compile(r'//[^\n]*|/\*.*?\*/|"(?:\\.|[^"\\\n])*"', re.DOTALL)
_KERNEL = re.compile(r"(?:\[\[\s*kernel\b[^\]]*\]\]|\bkernel)\s+void\s+(\w+)\s*\(")
_INSTANCE = re.compile(r'template\s*\[\[\s*host_name\s*\(\s*"([^"]+)"\s*\)\s*\]\][^;]*;')
_NAMESPACE = re.compile(r"\bnamespace\s+(\w+)\s*\{")
_PAIRS = {"(": ")", "[": "]", "{": "}", "<": ">"}


@dataclass(frozen=True)
class Source:
    """Flattened text, and the lines of each of its files as written (for messages)."""

    text: str
    lines: dict[str, list[str]]
    name: str

    def error(self, message: str, position: int, kind: str = "subset") -> MetalError:
        """An error at a position of the text."""
        file, line, column = self.place(position)
        return MetalError(message, kind=kind, file=file, line=line, column=column, lines=self.lines)

    def place(self, position: int) -> tuple[str, int, int]:
        """File, line and column of a position of the text."""
        file, line, start = self.name, 1, 0
        for mark in _LINE_MARK.finditer(self.text, 0, position):
            file, line, start = mark[2], int(mark[1]), mark.end() + 1
        column = position - self.text.rfind("\n", 0, position)
        return file, line + self.text.count("\n", start, position), column


@dataclass(frozen=True)
class KernelText:
    """Where a kernel stands in a text: positions of its parameter list and of its body's braces."""

    name: str  # with its namespaces
    template: str  # "typename T, int N", or "" when it is no template
    parameters: tuple[int, int]  # inside the parentheses
    body: tuple[int, int]


@dataclass(frozen=True)
class Instance:
    """`template [[host_name("n")]] [[kernel]] decltype(f<A>) f<A>;`"""

    host_name: str
    function: str
    arguments: str
    span: tuple[int, int]


def flatten(
    text: str,
    name: str,
    folders: Sequence[Path] = (),
    skip: Sequence[str] = (),
    prelude: str = "",
) -> Source:
    """Put in every `#include "..."` once, from the first folder that has it; `prelude` goes before the text.

    Files whose last name is in `skip` are left out. Raises MetalError for a file that no folder has.
    """
    lines: dict[str, list[str]] = {}

    def expanded(text: str, name: str) -> Iterator[str]:
        lines[name] = text.split("\n")
        for number, line in enumerate(lines[name], 1):
            match = _INCLUDE.match(line)
            if not match:
                yield "" if _ONCE.match(line) else line
                continue
            file = match[1]
            if file in lines or Path(file).name in skip:
                yield ""
                continue
            yield f'#line 1 "{file}"'
            yield from expanded(_read(file, folders, name, number), file)
            yield f'#line {number + 1} "{name}"'

    before = [*expanded(prelude, "<prelude>"), f'#line 1 "{name}"'] if prelude else []
    return Source(blank_comments("\n".join([*before, *expanded(text, name)])), lines, name)


def _read(file: str, folders: Sequence[Path], includer: str, line: int) -> str:
    for folder in folders:
        if (folder / file).is_file():
            return (folder / file).read_text(encoding="utf-8")
    where = ", ".join(str(folder) for folder in folders) or "no folder was given"
    message = f"file {file!r} not found in {where}"
    raise MetalError(message, kind="compile", file=includer, line=line)


def blank(text: str) -> str:
    """As many spaces; line ends stay."""
    return re.sub(r"[^\n]", " ", text)


def blank_comments(text: str) -> str:
    """The text with spaces for comments; strings stay."""
    return _COMMENT.sub(lambda m: m[0] if m[0].startswith('"') else blank(m[0]), text)


def closing(text: str, opening: int) -> int:
    """Position of the bracket that closes the one at `opening`; -1 when there is none."""
    left, right = text[opening], _PAIRS[text[opening]]
    depth = 0
    for match in re.compile(rf"[{re.escape(left + right)}]").finditer(text, opening):
        if match[0] == ">" and text[match.start() - 1] == "-":
            continue
        depth += 1 if match[0] == left else -1
        if depth == 0:
            return match.start()
    return -1


def split_list(text: str, separator: str = ",") -> list[str]:
    """Parts between separators that stand outside of all brackets."""
    parts, depth, start = [], 0, 0
    for position, character in enumerate(text):
        if character in "([{<":
            depth += 1
        elif character in ")]}" or (character == ">" and text[position - 1] != "-"):
            depth -= 1
        elif character == separator and depth == 0:
            parts.append(text[start:position])
            start = position + 1
    return [*parts, text[start:]] if text[start:].strip() else parts


def find_kernels(source: Source) -> list[KernelText]:
    """All kernels of a text, in order."""
    text = source.text
    namespaces = [(m[1], m.end(), closing(text, m.end() - 1)) for m in _NAMESPACE.finditer(text)]
    found = []
    for match in _KERNEL.finditer(text):
        end = closing(text, match.end() - 1)
        opening = text.find("{", end)
        if end < 0 or opening < 0 or ";" in text[end:opening]:
            continue  # a declaration, or part of a macro
        body_end = closing(text, opening)
        if body_end < 0:
            raise source.error(f"the body of kernel {match[1]} does not end", opening, "compile")
        around = (n for n, start, stop in namespaces if start <= match.start() < stop)
        name = "::".join([*around, match[1]])
        found.append(
            KernelText(
                name, _template_before(text, match.start()), (match.end(), end), (opening, body_end)
            )
        )
    return found


def _template_before(text: str, position: int) -> str:
    """The parameters of the template head that ends where the declaration begins."""
    before = re.sub(
        r"(?:\[\[[^\]]*\]\]\s*)+$", "", text[max(0, position - 2000) : position].rstrip()
    ).rstrip()
    if not before.endswith(">"):
        return ""
    head = before.rfind("template")
    while head >= 0:
        opening = before.find("<", head)
        if closing(before, opening) == len(before) - 1:
            return before[opening + 1 : -1]
        head = before.rfind("template", 0, head)
    return ""


def find_instances(text: str) -> list[Instance]:
    """Explicit instantiations that give a kernel a name for the host."""
    found = []
    for match in _INSTANCE.finditer(text):
        function = re.search(r"(?:decltype\s*\(|\bvoid\s+)\s*([\w:]+)\s*(<)", match[0])
        if function:
            end = closing(match[0], function.start(2))
            arguments = match[0][function.end(2) : end]
            found.append(Instance(match[1], function[1], arguments.strip(), match.span()))
    return found
