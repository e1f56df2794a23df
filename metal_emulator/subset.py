"""What clang takes and Metal does not, as far as the text shows it.

A list of words and attributes with the reason for each. What needs types (pointers without an address space, recursion)
is `lint.py`'s. The list follows Metal's specification; no Metal compiler was at hand to try it.
"""

import re

from metal_emulator.signature import ATTRIBUTES
from metal_emulator.source import Source, split_list

_WORDS = {
    "goto": "Metal has no goto",
    "asm": "Metal has no inline assembly",
    "__asm__": "Metal has no inline assembly",
    "double": "Metal has no double; use float",
    "new": "Metal has no dynamic memory",
    "delete": "Metal has no dynamic memory",
    "virtual": "Metal has no virtual functions",
    "dynamic_cast": "Metal has no run-time type information",
    "typeid": "Metal has no run-time type information",
    "try": "Metal has no exceptions",
    "catch": "Metal has no exceptions",
    "throw": "Metal has no exceptions",
    "thread_local": "Metal has no thread_local",
    "register": "Metal has no register",
    "printf": "Metal has no printf",
    **dict.fromkeys(
        ("__global", "__local", "__private", "__constant", "__generic", "__kernel"),
        "this is OpenCL; write device, threadgroup, thread, constant, kernel",
    ),
}
_WORD = re.compile(rf"(?<![\w.])(?:{'|'.join(_WORDS)})\b|\blong\s+long\b|\bemu_\w+|(?<!\w)EMU_\w+")
_SWIZZLE = re.compile(r"(?<=[\w\])])\s*\.\s*(lo|hi|even|odd|s[0-9a-fA-F]+)\b(?!\s*\()")
_ATTRIBUTE = re.compile(r"\[\[(?!\s*[&=\]])(.*?)\]\]", re.DOTALL)
_KNOWN = {
    *ATTRIBUTES,
    "kernel",
    "buffer",
    "threadgroup",
    "host_name",
    "function_constant",
    "max_total_threads_per_threadgroup",
    "maybe_unused",
    "nodiscard",
    "fallthrough",
    "noinline",
    "clang::optnone",
}


def check_subset(source: Source) -> None:
    """Raise MetalError at the first thing that Metal would refuse."""
    text = source.text
    for match in _WORD.finditer(text):
        if _in_directive(text, match.start()):
            continue
        word = " ".join(match[0].split())
        reason = _WORDS.get(word) or (
            "Metal has no long long; long has 64 bits"
            if word == "long long"
            else "names with emu_ belong to the emulator"
        )
        raise source.error(f"{word!r}: {reason}", match.start())
    for match in _SWIZZLE.finditer(text):
        if not re.search(rf"[\w>*&]\s+{match[1]}\s*[;,=\[{{]", text):
            message = (
                f"'.{match[1]}' is OpenCL's way to name components; Metal has .xyzw, .rgba and [i]"
            )
            raise source.error(message, match.start(1))
    for match in _ATTRIBUTE.finditer(text):
        _check_attributes(source, match)


def _check_attributes(source: Source, match: re.Match[str]) -> None:
    for attribute in split_list(match[1]):
        name = re.match(r"\s*([\w:]*)", attribute)
        if name and name[1] not in _KNOWN:
            message = f"attribute {name[1]!r} is unknown, or not one that the emulator runs"
            raise source.error(message, match.start())


def _in_directive(text: str, position: int) -> bool:
    return (
        text[text.rfind("\n", 0, position) + 1 : position]
        .lstrip()
        .startswith(("#error", "#pragma", "#line"))
    )
