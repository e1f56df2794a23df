"""Runs Metal kernels on a CPU, with every check on. See README.md."""

from metal_emulator.counts import BufferCounts, Counts, InstructionCounts, Traffic
from metal_emulator.device import Device, Launch
from metal_emulator.errors import MetalError, MetalWarning
from metal_emulator.kernel import Kernel, Run, Undefined, compile_kernel

__all__ = [
    "BufferCounts",
    "Counts",
    "Device",
    "InstructionCounts",
    "Kernel",
    "Launch",
    "MetalError",
    "MetalWarning",
    "Run",
    "Traffic",
    "Undefined",
    "compile_kernel",
]
