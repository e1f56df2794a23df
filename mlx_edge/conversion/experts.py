"""A source whose experts are stacked, three matrices a layer, as mlx-lm has them when it quantizes.

Files hold each expert by itself, or gate and up of all of them fused in one tensor. Knows names and shapes, no
quantization.
"""

import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import mlx.core as mx

from mlx_edge.conversion.finite import require_finite
from mlx_edge.conversion.source import Source, find_family
from mlx_edge.errors import ModelFormatError
from mlx_edge.models.families import Experts
from mlx_edge.models.moe import gate_or_up
from mlx_edge.ops.types import Quantized
from mlx_edge.quant import Packing


def stack_experts(source: Source) -> Source:
    """The source, or one that stands for it where its experts are saved in another form.

    Raises: ModelFormatError when experts are missing, or differ in shape or type.
    """
    family = find_family(source)
    if family is None or family.experts is None:
        return source
    stacks = dict(_find_single(source, family.experts)) | dict(_find_fused(source, family.experts))
    return StackedSource(source, stacks) if stacks else source


@dataclass(frozen=True)
class Stack:
    """A tensor that is made of others: of one for each expert, or of one that holds more than itself."""

    parts: tuple[str, ...]
    shape: tuple[int, ...]
    make: Callable[[list[mx.array]], mx.array]


class StackedSource:
    """A source with stacks in place of the tensors that they are made of."""

    def __init__(self, source: Source, stacks: Mapping[str, Stack]) -> None:
        """`stacks` by the names that their tensors get."""
        self._source, self._stacks = source, stacks
        self.name, self.config = source.name, source.config

    def fingerprint(self) -> str:
        """That of the files."""
        return self._source.fingerprint()

    def names(self) -> list[str]:
        """In the order of their use, stacks where their first tensor was."""
        made: dict[str, list[str]] = {}
        for name, stack in self._stacks.items():
            made.setdefault(stack.parts[0], []).append(name)
        taken = {part for stack in self._stacks.values() for part in stack.parts}
        names: list[str] = []
        for name in self._source.names():
            names += made.get(name, []) if name in taken else [name]
        return names

    def dtype(self, name: str) -> mx.Dtype:
        """The type of a tensor."""
        stack = self._stacks.get(name)
        return self._source.dtype(name if stack is None else stack.parts[0])

    def shape(self, name: str) -> tuple[int, ...]:
        """The shape of a tensor."""
        stack = self._stacks.get(name)
        return self._source.shape(name) if stack is None else stack.shape

    def read(self, name: str) -> mx.array:
        """A tensor as a new array. Raises ModelFormatError for an expert that is not finite: here it has a name."""
        stack = self._stacks.get(name)
        if stack is None:
            return self._source.read(name)
        parts = [self._source.read(part) for part in stack.parts]
        for part, array in zip(stack.parts, parts, strict=True):
            require_finite(self._source, part, array)
        made = mx.contiguous(stack.make(parts))
        mx.eval(made)
        return made

    def quantized(self, layer: str) -> Packing | None:
        """How the source stores a weight; experts that are to be stacked are floats."""
        return self._source.quantized(layer)

    def stored(self, layer: str, packing: Packing, dtype: mx.Dtype) -> Quantized | None:
        """What the source has in just this packing; no stack."""
        is_stack = f"{layer}.weight" in self._stacks
        return None if is_stack else self._source.stored(layer, packing, dtype)

    def copy_text_files(self, folder: Path) -> None:
        """Puts what a model folder holds beside its weights into `folder`."""
        self._source.copy_text_files(folder)


def _find_single(source: Source, names: Experts) -> Iterator[tuple[str, Stack]]:
    """The stacks of experts that are saved one by one."""
    words = {names.gate: "gate_proj", names.up: "up_proj", names.down: "down_proj"}
    one = re.escape(names.one).replace(re.escape("{index}"), r"(\d+)")
    pattern = re.compile(rf"(.*\.){one}({'|'.join(words)})\.weight")
    found: dict[str, dict[int, str]] = {}
    for name in source.names():
        if match := pattern.fullmatch(name):
            stack = f"{match[1]}{names.stacked}{words[match[3]]}.weight"
            found.setdefault(stack, {})[int(match[2])] = name
    for stack, parts in found.items():
        ordered = tuple(parts[index] for index in sorted(parts))
        _check_alike(source, stack, parts)
        yield stack, Stack(ordered, (len(ordered), *source.shape(ordered[0])), mx.stack)


def _check_alike(source: Source, stack: str, parts: Mapping[int, str]) -> None:
    missing = set(range(max(parts) + 1)) - set(parts)
    if missing:
        raise ModelFormatError(
            f"{source.name}: {stack} wants experts 0 to {max(parts)}, and {min(missing)} is missing; "
            "the download is not complete"
        )
    first = parts[0]
    for name in parts.values():
        found, expected = (
            f"{source.dtype(each)} {list(source.shape(each))}".removeprefix("mlx.core.")
            for each in (name, first)
        )
        if found != expected:
            raise ModelFormatError(
                f"{source.name}: {name} is {found}, expected {expected} as {first} is"
            )


def _find_fused(source: Source, names: Experts) -> Iterator[tuple[str, Stack]]:
    """The stacks that are cut out of tensors of all experts: gate_up_proj and down_proj, and their biases."""
    ending = f"{names.fused}gate_up_proj"
    for name in source.names():
        if not name.endswith(ending):
            continue
        before = name.removesuffix(ending)
        yield from _cut(source, f"{before}{names.fused}", f"{before}{names.stacked}", names)


def _cut(source: Source, fused: str, stacked: str, names: Experts) -> Iterator[tuple[str, Stack]]:
    def upright(parts: list[mx.array]) -> mx.array:
        return parts[0].swapaxes(1, 2) if names.is_transposed else parts[0]

    def half(index: int) -> Callable[[list[mx.array]], mx.array]:
        return lambda parts: gate_or_up(upright(parts), index, names)

    def half_bias(index: int) -> Callable[[list[mx.array]], mx.array]:
        return lambda parts: gate_or_up(parts[0], index, names)

    gate_up, down = f"{fused}gate_up_proj", f"{fused}down_proj"
    count, rows, columns = _upright_shape(source, gate_up, names)
    for index, word in enumerate(("gate_proj", "up_proj")):
        shape = (count, rows // 2, columns)
        yield f"{stacked}{word}.weight", Stack((gate_up,), shape, half(index))
        if names.has_bias:
            bias = f"{gate_up}_bias"
            yield f"{stacked}{word}.bias", Stack((bias,), shape[:2], half_bias(index))
    shape = _upright_shape(source, down, names)
    yield f"{stacked}down_proj.weight", Stack((down,), shape, upright)
    if names.has_bias:
        yield (
            f"{stacked}down_proj.bias",
            Stack((f"{down}_bias",), shape[:2], lambda parts: parts[0]),
        )


def _upright_shape(source: Source, name: str, names: Experts) -> tuple[int, int, int]:
    """Experts, rows and columns of a tensor of all experts."""
    shape = source.shape(name) if name in source.names() else ()
    if len(shape) != 3:
        raise ModelFormatError(
            f"{source.name}: {name} is {list(shape) if shape else 'missing'}, expected a tensor of three dimensions; "
            "the download is not complete, or config.json belongs to another model"
        )
    count, rows, columns = shape
    return (count, columns, rows) if names.is_transposed else (count, rows, columns)
