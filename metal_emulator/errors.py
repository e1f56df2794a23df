"""What the emulator has found, written as a compiler writes it: place, sentence, the line of the source.

Knows nothing of how it was found. Lines and columns count from 1, in the file that the user wrote.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

Lines = Mapping[str, Sequence[str]]  # a file's name -> its lines as written

_DIAGNOSTIC = re.compile(r"^(.*?):(\d+):(?:(\d+):)? (fatal error|error|warning|note): (.*)$")
_REQUIREMENT = re.compile(r" due to requirement '.*'(?=: )")
_SPEECH = (  # clang speaks of OpenCL; its words in Metal's
    ("__private", "thread"),
    ("__global", "device"),
    ("__local", "threadgroup"),
    ("__constant", "constant"),
    ("__generic", "generic"),
    ("__bf16", "bfloat"),
    ("OpenCL kernel", "kernel"),
    ("C++ for OpenCL version 2021", "Metal"),
    ("C++ for OpenCL", "Metal"),
)


@dataclass(frozen=True)
class Diagnostic:
    """One line of a compiler's output."""

    file: str
    line: int
    column: int  # 0: unknown
    severity: str  # "error", "warning", "note"
    message: str

    def shown(self, lines: Lines) -> str:
        """`file:line:column: error: message`, and below it the line of the source."""
        place = ":".join(str(part) for part in (self.file, self.line, self.column) if part)
        return f"{place}: {self.severity}: {self.message}{excerpt(lines, self.file, self.line, self.column)}"


class MetalWarning(UserWarning):
    """What the compiler only warned of, such as a variable that may be read before it is set."""


class MetalError(Exception):
    """What a compiler or the checker has found in a kernel.

    `kind` is "compile", "subset" (clang takes it, Metal does not), "launch", or a finding of a run such as
    "out_of_bounds" (`metal_emulator.runtime.FINDINGS` lists them); `file`, `line`, `column` are the place in the user's
    source (0: unknown); `thread` who did it, in words.
    """

    def __init__(
        self,
        message: str,
        *,
        kind: str,
        file: str = "",
        line: int = 0,
        column: int = 0,
        thread: str = "",
        lines: Lines | None = None,
        notes: Sequence[str] = (),
    ) -> None:
        self.kind, self.message, self.thread = kind, message, thread
        self.file, self.line, self.column = file, line, column
        head = Diagnostic(file, line, column, "error", f"{message} [{kind}]")
        text = head.shown(lines or {}) if file else f"error: {message} [{kind}]"
        super().__init__("\n".join([text, *([f"  by {thread}"] if thread else []), *notes]))


def excerpt(lines: Lines, file: str, line: int, column: int = 0) -> str:
    """The line of the source with a mark under the column, or nothing when the file is not known."""
    known = lines.get(file, ())
    if not 0 < line <= len(known):
        return ""
    text = known[line - 1].replace("\t", " ")
    mark = f"\n      | {' ' * (column - 1)}^" if 0 < column <= len(text) else ""
    return f"\n{line:5} | {text}{mark}"


def parse_diagnostics(output: str) -> list[Diagnostic]:
    """A compiler's messages in Metal's words; lines that are none (excerpts, include stacks) are left out."""
    for clang, metal in _SPEECH:
        output = output.replace(clang, metal)
    matches = (_DIAGNOSTIC.match(line) for line in output.splitlines())
    return [
        Diagnostic(m[1], int(m[2]), int(m[3] or 0), m[4].replace("fatal ", ""), m[5])
        for m in matches
        if m
    ]


def compile_error(diagnostics: Sequence[Diagnostic], lines: Lines) -> MetalError:
    """The error of a failed compilation: the first error as the head, the others and the notes below."""
    errors = [d for d in diagnostics if d.severity == "error"]
    errors.sort(key=lambda d: d.file not in lines)  # the user's own text first
    first = (
        errors[0]
        if errors
        else Diagnostic("", 0, 0, "error", "the compiler failed, and did not say why")
    )
    rest = [d for d in diagnostics if d.severity in {"error", "note"} and d is not first]
    notes = [d for d in rest if d.severity == "note" and d.file in lines]
    # An error inside the shim is shown where the user's text asks for it.
    place = notes[0] if first.file not in lines and notes else first
    return MetalError(
        _REQUIREMENT.sub("", first.message),
        kind="compile",
        file=place.file,
        line=place.line,
        column=place.column,
        lines=lines,
        notes=[d.shown(lines) for d in rest[:20]],
    )
