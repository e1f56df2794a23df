"""What clang takes and Metal does not, as far as types show it: pointers without an address space, program-scope
variables outside of `constant`, recursion.

Two passes of clang over the text of a kernel, without code; a text that was found clean is remembered in the cache.
"""

import hashlib
import re
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from metal_emulator.build import cache_folder
from metal_emulator.compiler import LANGUAGE, find_compiler
from metal_emulator.errors import Lines, MetalError, compile_error, parse_diagnostics

# Without its generic address space clang reads an unqualified pointer or reference as one to `thread`, as Metal does.
_NO_GENERIC = ",-__opencl_c_generic_address_space,-__opencl_c_pipes,-__opencl_c_device_enqueue"
_STRICT = tuple(
    f"{flag}{_NO_GENERIC}" if flag.startswith("-cl-ext=") else flag for flag in LANGUAGE
)
_ABOUT_SPACES = re.compile(r"address space|no matching (?:member )?function|changes address")
_NODE = re.compile(r"^(?P<tree>[|` -]*)(?P<kind>\w+) (?P<id>0x[0-9a-f]+)(?P<rest>.*)$")
_PLACE = re.compile(
    r"(?:(?P<file>[^\s<>,:]+)|(?<=[<, ])line):(?P<line>\d+):(?P<column>\d+)|(?<=[<, ])col:(?P<only>\d+)"
)
_FUNCTION = {"FunctionDecl", "CXXMethodDecl", "CXXConstructorDecl", "CXXConversionDecl"}
_TOLD = ("Decl 0x", "Function 0x", "CXXMethod 0x", "MemberExpr 0x")  # of nodes that matter here
_CALLED = re.compile(r"(?:\bFunction|\bCXXMethod|(?:->|\.)[\w~]+) (0x[0-9a-f]+)")
_EARLIER = re.compile(r"^ (?:parent 0x[0-9a-f]+ )?prev (0x[0-9a-f]+)")
_VARIABLE = re.compile(r"(?P<name>\w+) '(?P<type>[^']*)'")


@dataclass
class _Function:
    name: str
    file: str
    line: int
    calls: set[str] = field(default_factory=set)


def check_types(text: str, entry: str, name: str, lines: Lines) -> None:
    """Raise MetalError at the first finding in a text that is ready for clang; places are of the files in `lines`.

    `entry` calls the kernel `name` with its template arguments. The slow pass, over the syntax tree, is done for one
    instance of a text and stands for the others.
    """
    clang = find_compiler()
    once = text.replace(name, "kernel")
    with _remembered("address spaces", clang.version, text, entry) as is_new:
        if is_new:
            _check_address_spaces(clang.clang, text + entry, lines)
    with _remembered("syntax tree", clang.version, once) as is_new:
        if is_new:
            _check_syntax_tree(clang.clang, text + entry, lines)


@contextmanager
def _remembered(*parts: str) -> Iterator[bool]:
    """Whether these have yet to be checked; they are remembered as clean unless the block raises."""
    rules = Path(__file__).read_text(encoding="utf-8")
    key = hashlib.sha256("\0".join([rules, *LANGUAGE, *parts]).encode()).hexdigest()[:40]
    clean = cache_folder() / "clean" / key[:2] / key
    if clean.exists():
        yield False
        return
    yield True
    clean.parent.mkdir(parents=True, exist_ok=True)
    clean.touch()


def _check_address_spaces(clang: tuple[str, ...], text: str, lines: Lines) -> None:
    command = [*clang, *_STRICT, "-Wno-everything", "-fsyntax-only", "-ferror-limit=0", "-"]
    done = subprocess.run(command, input=text, capture_output=True, text=True, check=False)
    found = [
        d
        for d in parse_diagnostics(done.stderr)
        if d.severity == "error"
        and d.file in lines
        and _ABOUT_SPACES.search(d.message)
        and "object parameter" not in d.message  # methods of temporaries: clang's own trouble
    ]
    if found:
        raise compile_error(found, lines)


def _check_syntax_tree(clang: tuple[str, ...], text: str, lines: Lines) -> None:
    command = [*clang, *LANGUAGE, "-Wno-everything", "-fsyntax-only", "-Xclang", "-ast-dump", "-"]
    done = subprocess.run(command, input=text, capture_output=True, text=True, check=False)
    if done.returncode:
        raise compile_error(parse_diagnostics(done.stderr), lines)
    functions: dict[str, _Function] = {}
    inside: list[tuple[int, _Function]] = []
    for depth, kind, node, rest, place in _nodes(done.stdout):
        while inside and inside[-1][0] >= depth:
            inside.pop()
        if kind in _FUNCTION:
            name = re.search(r"([\w~]+|operator\S+) '", rest)
            before = _EARLIER.search(rest)  # a declaration of the same function
            known = functions.get(before[1]) if before else None
            functions[node] = known or _Function(name[1] if name else "?", *place[:2])
            inside.append((depth, functions[node]))
        elif kind == "VarDecl" and not inside and place[0] in lines:
            _check_variable(rest, place, lines)
        if inside:
            inside[-1][1].calls.update(_CALLED.findall(rest))
    _check_recursion(functions, lines)


def _nodes(dump: str) -> Iterator[tuple[int, str, str, str, tuple[str, int, int]]]:
    """Depth, kind, identity, rest and place of each node; clang writes only what of a place is new."""
    file, line = "", 0
    for text in dump.splitlines():
        column = 0
        if ":" in text.replace("col:", ""):  # most nodes stand in the line of the one before
            for place in _PLACE.finditer(text.split("'", 1)[0]):
                if place["line"]:
                    file = place["file"] if place["file"] and place["file"] != "line" else file
                    line = int(place["line"])
                column = int(place["column"] or place["only"])
        if not any(word in text for word in _TOLD):
            continue
        match = _NODE.match(text)
        if match:
            yield (
                len(match["tree"]),
                match["kind"],
                match["id"],
                match["rest"],
                (file, line, column),
            )


def _check_variable(rest: str, place: tuple[str, int, int], lines: Lines) -> None:
    variable = _VARIABLE.search(rest)
    if variable and "__constant" not in variable["type"]:
        message = f"variable {variable['name']!r} stands outside of all functions: Metal wants it in `constant`"
        raise MetalError(
            message, kind="subset", file=place[0], line=place[1], column=place[2], lines=lines
        )


def _check_recursion(functions: dict[str, _Function], lines: Lines) -> None:
    done: set[str] = set()
    for start, function in functions.items():
        path: list[tuple[str, Iterator[str]]] = [(start, iter(function.calls))]
        while path and start not in done:
            node, calls = path[-1]
            following = next((c for c in calls if c in functions and c not in done), None)
            if following is None:
                done.add(node)
                path.pop()
                continue
            if any(following == on_path for on_path, _ in path):
                caller = functions[following]
                if caller.file in lines:
                    message = f"function {caller.name!r} calls itself; Metal has no recursion"
                    raise MetalError(
                        message, kind="subset", file=caller.file, line=caller.line, lines=lines
                    )
                done.add(following)
                continue
            path.append((following, iter(functions[following].calls)))
