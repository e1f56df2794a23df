"""A kernel's parameters, and the function through which the runtime calls it.

Knows Metal's attributes and the runtime's names for them, no values.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass

from metal_emulator.source import KernelText, Source, split_list

_OF_THREAD_3 = ("thread_position_in_grid", "thread_position_in_threadgroup")
_OF_THREAD = (
    "thread_index_in_threadgroup",
    "thread_index_in_simdgroup",
    "simdgroup_index_in_threadgroup",
    "thread_index_in_quadgroup",
    "quadgroup_index_in_threadgroup",
)
_OF_GROUP_3 = (
    "threadgroup_position_in_grid",
    "threads_per_grid",
    "threadgroups_per_grid",
    "threads_per_threadgroup",
    "dispatch_threads_per_threadgroup",
    "grid_origin",
    "grid_size",
)
_OF_GROUP = (
    "simdgroups_per_threadgroup",
    "dispatch_simdgroups_per_threadgroup",
    "threads_per_simdgroup",
    "thread_execution_width",
    "quadgroups_per_threadgroup",
    "dispatch_quadgroups_per_threadgroup",
)
ATTRIBUTES = {
    **{name: f"t->{name}" for name in _OF_THREAD_3},
    **{name: f"&t->{name}" for name in _OF_THREAD},
    **{name: f"t->group->{name}" for name in _OF_GROUP_3},
    **{name: f"&t->group->{name}" for name in _OF_GROUP},
}
_MAX_BUFFERS = 31  # Metal's slots 0 to 30
_ATTRIBUTE = re.compile(r"\[\[(.*?)\]\]", re.DOTALL)
_POINTER = re.compile(r"^(?P<type>.+?)\s*(?P<kind>[*&])\s*(?:const\s+)?(?P<name>\w+)$")
_VALUE = re.compile(r"^(?:const\s+)?(?P<type>[\w:]+(?:<.*>)?)\s+(?P<name>\w+)$")


@dataclass(frozen=True)
class Buffer:
    """A parameter that is bound to memory."""

    index: int  # of [[buffer(n)]]
    name: str
    type: str  # "const device half"
    is_reference: bool

    @property
    def is_writable(self) -> bool:
        """Whether the kernel may write to it."""
        return not re.search(r"\b(?:const|constant)\b", self.type)


@dataclass(frozen=True)
class Signature:
    """What a kernel takes: its buffers by index, and the C++ expressions of all arguments in order."""

    kernel: KernelText
    buffers: tuple[Buffer, ...]
    arguments: tuple[str, ...]

    def entry(self, template: str) -> str:
        """The text of `emu_entry`, which calls the kernel with these template arguments."""
        call = ", ".join(self.arguments)
        name = self.kernel.name
        if not self.kernel.template:
            return f'extern "C" void emu_entry(thread emu_thread* t) {{ {name}({call}); }}\n'
        names = ", ".join(_parameter_names(self.kernel.template))
        return (
            f"template <{' '.join(self.kernel.template.split())}> static void emu_call(thread emu_thread* t) "
            f"{{ {name}<{names}>({call}); }}\n"
            f'extern "C" void emu_entry(thread emu_thread* t) {{ emu_call<{template}>(t); }}\n'
        )


def _parameter_names(template: str) -> list[str]:
    names = []
    for parameter in split_list(template):
        before_default = split_list(parameter, "=")[0].strip()
        name = re.search(r"(\w+)$", before_default)
        assert name, f"a template parameter without a name: {parameter!r}"
        names.append(name[1] + ("..." if "..." in before_default else ""))
    return names


def read_signature(source: Source, kernel: KernelText) -> Signature:
    """Parse a kernel's parameter list. Raises MetalError for what the emulator cannot pass."""
    start, end = kernel.parameters
    buffers: list[Buffer] = []
    arguments: list[str] = []
    position = start
    for text in _parameters(source.text[start:end]):
        try:
            argument = _argument(text, buffers)
        except ValueError as error:
            raise source.error(
                str(error), position + len(text) - len(text.lstrip()), "compile"
            ) from None
        arguments.append(argument)
        position += len(text) + 1
    return Signature(kernel, tuple(sorted(buffers, key=lambda b: b.index)), tuple(arguments))


def _parameters(text: str) -> list[str]:
    return split_list(text)


def _argument(text: str, buffers: list[Buffer]) -> str:
    """The C++ expression for one parameter; a buffer is added to the list."""
    attributes = [part.strip() for group in _ATTRIBUTE.findall(text) for part in split_list(group)]
    declared = " ".join(_ATTRIBUTE.sub(" ", text).split())
    known = next((a for a in attributes if a in ATTRIBUTES), None)
    if known:
        match = _VALUE.match(declared)
        if not match:
            raise ValueError(
                f"expected a value such as `uint3 name` for [[{known}]], found {declared!r}"
            )
        return f"emu_attribute<{match['type']}>({ATTRIBUTES[known]})"
    match = _POINTER.match(declared)
    if not match or not re.search(r"\b(?:device|constant)\b", match["type"]):
        raise ValueError(
            f"parameter {declared!r} is neither a device or constant pointer or reference nor has it an attribute "
            "that the emulator passes (threadgroup memory, textures and argument buffers are not run)"
        )
    index = _index(attributes, buffers)
    kind = (
        re.sub(r"\bconst\s+", "", match["type"]) if "constant" in match["type"] else match["type"]
    )
    buffers.append(Buffer(index, match["name"], kind, match["kind"] == "&"))
    cast = f"({kind}*)t->group->buffer[{index}]"
    return f"*{cast}" if match["kind"] == "&" else cast


def _index(attributes: Sequence[str], buffers: Sequence[Buffer]) -> int:
    given = next(
        (m for m in (re.match(r"buffer\s*\(\s*(\d+)\s*\)$", a) for a in attributes) if m), None
    )
    index = int(given[1]) if given else max((b.index for b in buffers), default=-1) + 1
    taken = next((b.name for b in buffers if b.index == index), None)
    if taken:
        raise ValueError(f"[[buffer({index})]] is bound twice; {taken!r} has it")
    if index >= _MAX_BUFFERS:
        raise ValueError(
            f"[[buffer({index})]]: Metal has {_MAX_BUFFERS} buffers, 0 to {_MAX_BUFFERS - 1}"
        )
    return index
