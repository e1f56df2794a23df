"""A kernel from Metal's text to a run on this machine's processor.

`compile_kernel` makes a `Kernel`; `Kernel.run` launches it over numpy arrays. bfloat16 travels as uint16, because numpy
has none. Knows no MLX.
"""

import ctypes
import os
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from metal_emulator.build import Built, build_kernel
from metal_emulator.compiler import MODES
from metal_emulator.counts import Counts
from metal_emulator.errors import Diagnostic, MetalError, MetalWarning
from metal_emulator.line_table import find_line
from metal_emulator.lint import check_types
from metal_emulator.readings import read_counts
from metal_emulator.rewrite import Constants, rewrite
from metal_emulator.runtime import (
    FINDINGS,
    LAUNCHING,
    MODE_NUMBERS,
    POISON,
    UNWRITTEN_OK,
    WRITABLE,
    EmuBuffer,
    EmuFinding,
    EmuLaunch,
    EmuResult,
    load_runtime,
)
from metal_emulator.signature import Buffer, Signature, read_signature
from metal_emulator.source import Source, find_instances, find_kernels, flatten
from metal_emulator.subset import check_subset

Array = npt.NDArray[Any]
Size = tuple[int, int, int]


@dataclass(frozen=True)
class Undefined:
    """An output whose memory Metal leaves undefined: it is filled with NaN before the launch."""

    shape: tuple[int, ...]
    dtype: npt.DTypeLike


@dataclass(frozen=True)
class Run:
    """What a launch gives: outputs by the names of their buffers, and counts in count mode."""

    outputs: dict[str, Array]
    counts: Counts | None = None
    unwritten: dict[str, int] = field(
        default_factory=dict
    )  # check mode: bytes that no thread wrote, where allowed


def compile_kernel(
    text: str,
    name: str,
    template: str = "",
    constants: Constants | None = None,
    mode: str = "check",
    *,
    file: str = "kernel.metal",
    prelude: str = "",
    folders: Sequence[Path] = (),
    skip: Sequence[str] = (),
    lint: bool | None = None,
) -> "Kernel":
    """Compile a kernel of a text, by its own name with template arguments, or by its `host_name`.

    `constants` are values by the index of `[[function_constant(n)]]`. Files of `#include "..."` are looked for in
    `folders`; those named in `skip` are left out. `prelude` goes before the text. `lint` (by default in check mode)
    adds the pass over types. Raises MetalError; the compiler's warnings become MetalWarnings, each time.
    """
    if mode not in MODES:
        raise ValueError(f"mode {mode!r} is none of {', '.join(MODES)}")
    source = flatten(text, file, folders, skip, prelude)
    return _compile(
        source, name, template, constants or {}, mode, lint if lint is not None else mode == "check"
    )


def _compile(
    source: Source, name: str, template: str, constants: Constants, mode: str, lint: bool
) -> "Kernel":
    check_subset(source)
    prepared, entry, signature = prepare(source, name, template, constants)
    if lint:
        check_types(prepared, entry, signature.kernel.name, source.lines)
    built = build_kernel(prepared + entry, mode, source.lines)
    for diagnostic in built.warnings:
        warnings.warn(diagnostic.shown(source.lines), MetalWarning, stacklevel=3)
    return Kernel(source, signature, built, mode)


def prepare(
    source: Source, name: str, template: str, constants: Constants
) -> tuple[str, str, Signature]:
    """The text for clang, the entry to add to it, and the kernel's signature."""
    instance = next((i for i in find_instances(source.text) if i.host_name == name), None)
    function, template = (instance.function, instance.arguments) if instance else (name, template)
    kernels = find_kernels(source)
    kernel = next(
        (k for k in kernels if k.name == function or k.name.endswith(f"::{function}")), None
    )
    if not kernel:
        names = ", ".join(k.name for k in kernels) or "none"
        raise MetalError(
            f"kernel {name!r} is not in {source.name}; there are: {names}", kind="compile"
        )
    if bool(template.strip()) != bool(kernel.template):
        takes = (
            f"takes template arguments <{kernel.template}>" if kernel.template else "is no template"
        )
        raise source.error(
            f"kernel {name!r} {takes}; given: <{template}>", kernel.parameters[0], "compile"
        )
    signature = read_signature(source, kernel)
    text = f'#include <metal_stdlib>\n#line 1 "{source.name}"\n{rewrite(source, constants)}\n'
    return text, f'#line 1 "<entry>"\n{signature.entry(template)}', signature


class Kernel:
    """A compiled kernel: its buffers, and what the compiler warned of."""

    def __init__(self, source: Source, signature: Signature, built: Built, mode: str) -> None:
        self.name = signature.kernel.name
        self.buffers: tuple[Buffer, ...] = signature.buffers
        self.warnings: tuple[Diagnostic, ...] = built.warnings
        self.was_cached = built.was_cached
        self.mode = mode
        self.library = built.library
        self._blocks = built.blocks
        self._lines = source.lines
        self._file = source.name
        self._runtime = load_runtime()
        try:
            library = ctypes.CDLL(str(built.library), mode=os.RTLD_LOCAL | os.RTLD_NOW)
        except OSError as error:
            symbol = str(error).rsplit("undefined symbol: ", 1)[-1]
            message = (
                f"{symbol!r} is used and has no value: give its function constant one, or define it"
            )
            raise MetalError(message, kind="compile", file=source.name) from None
        self._entry = ctypes.cast(library.emu_entry, ctypes.c_void_p)

    def run(
        self,
        buffers: Mapping[str, Array],
        outputs: Mapping[str, Array | Undefined],
        grid: Size,
        threadgroup: Size,
        *,
        order: int = 0,
        unwritten_ok: Sequence[str] = (),
        same_value_ok: bool = False,
        strict_exit: int = 2,
        max_groups: int = 0,
    ) -> Run:
        """Launch it over `grid` threads in groups of `threadgroup`, as Metal's dispatchThreads does.

        `buffers` are the inputs and `outputs` what the kernel may write, by parameter name; an output's array is what
        its memory holds before (it is not changed), `Undefined` is memory that holds anything. `order` 1 runs lanes and
        groups in reverse. `unwritten_ok` names outputs that need not be written whole; `same_value_ok` lets two threads
        write the same value to one place; `strict_exit` is 2 when simd operations need all threads of a simdgroup, 1
        when only barriers do. Raises MetalError for what the mode finds.
        """
        self._check_names(buffers, outputs)
        with LAUNCHING:
            table, written = self._bind(buffers, outputs, unwritten_ok)
            launch = EmuLaunch(
                self._entry, table, len(table), (ctypes.c_uint32 * 3)(*grid), (ctypes.c_uint32 * 3)(*threadgroup),
                MODE_NUMBERS[self.mode], order, strict_exit, int(same_value_ok), max_groups,
            )  # fmt: skip
            result = EmuResult()
            if self._runtime.emu_run(ctypes.byref(launch), ctypes.byref(result)):
                raise self._error(result.finding)
            counts = self._counts(table, result) if self.mode == "count" else None
            unwritten = {b.name: int(result.buffers[b.index].unwritten_bytes) for b in self.buffers}
            given = {name: _read(address, array) for name, (address, array) in written.items()}
        return Run(given, counts, {name: count for name, count in unwritten.items() if count})

    def _check_names(
        self, buffers: Mapping[str, Array], outputs: Mapping[str, Array | Undefined]
    ) -> None:
        known = {b.name: b for b in self.buffers}
        for name in [*buffers, *outputs]:
            if name not in known:
                raise ValueError(
                    f"kernel {self.name} has no buffer {name!r}; it has {', '.join(known)}"
                )
        for name in outputs:
            if not known[name].is_writable:
                raise ValueError(f"{name!r} of kernel {self.name} is const: pass it in `buffers`")

    def _bind(
        self,
        buffers: Mapping[str, Array],
        outputs: Mapping[str, Array | Undefined],
        unwritten_ok: Sequence[str],
    ) -> tuple[ctypes.Array[EmuBuffer], dict[str, tuple[int, Array]]]:
        """The table of buffers, each copied between guard pages, and where the outputs lie."""
        table = (EmuBuffer * (max((b.index for b in self.buffers), default=0) + 1))()
        written: dict[str, tuple[int, Array]] = {}
        for buffer in self.buffers:
            given = buffers.get(buffer.name, outputs.get(buffer.name))
            if given is None:
                continue  # an unbound slot: any access of it is out of bounds
            flags = WRITABLE if buffer.name in outputs else 0
            flags |= UNWRITTEN_OK if buffer.name in unwritten_ok else 0
            if isinstance(given, Undefined):
                array = np.empty(given.shape, given.dtype)
                flags |= POISON
            else:
                array = np.ascontiguousarray(given)
                flags |= UNWRITTEN_OK
            address = self._runtime.emu_place(buffer.index, max(array.nbytes, 1))
            if not address:
                raise MemoryError(f"no room for {array.nbytes} bytes of buffer {buffer.name!r}")
            if not flags & POISON:
                ctypes.memmove(address, array.ctypes.data, array.nbytes)
            if flags & WRITABLE:
                written[buffer.name] = (address, array)
            label = f"{buffer.name} [[buffer({buffer.index})]]".encode()
            table[buffer.index] = EmuBuffer(address, array.nbytes, label, flags, 0)
        return table, written

    def _counts(self, table: ctypes.Array[EmuBuffer], result: EmuResult) -> Counts:
        names = {b.index: b.name for b in self.buffers}
        sizes = {index: table[index].bytes for index in names}
        return read_counts(result, names, sizes, self._blocks, self._entry, self._short_place)

    def _short_place(self, pc: int) -> str:
        file, line, _ = self._place_of(pc, 0)
        return f"{file}:{line}" if line else hex(pc)

    def _place_of(self, pc: int, site: int) -> tuple[str, int, int]:
        """File, line and column: by the instruction, or by the operation when it stands in the emulator's own text."""
        row = find_line(self.library, pc) if pc else None
        if row:
            for file in self._lines:
                if row.file == file or row.file.endswith(f"/{file}"):
                    return file, row.line, row.column
        if site:
            return self._file, site >> 11, site & 2047
        return self._file, 0, 0

    def _error(self, finding: EmuFinding) -> MetalError:
        file, line, column = self._place_of(finding.pc, finding.site)
        message = finding.text.decode(errors="replace")
        thread = ""
        if finding.has_thread:
            thread = (
                f"thread {tuple(finding.thread)} of threadgroup {tuple(finding.threadgroup)}, "
                f"simdgroup {finding.simdgroup}, lane {finding.lane}"
            )
        kind = FINDINGS[finding.kind]
        return MetalError(
            message,
            kind=kind,
            file=file,
            line=line,
            column=column,
            thread=thread,
            lines=self._lines,
        )


def _read(address: int, like: Array) -> Array:
    out = np.empty_like(like)
    ctypes.memmove(out.ctypes.data, address, out.nbytes)
    return out
