"""The only switch: which implementation serves an op, and why.

A backend is a name, a test for this machine, and a table from op to implementation; an implementation says
for which arguments it serves. They are asked in order, fastest first; the reference serves everything.
`MLX_EDGE_OPS` or `use()` names one backend: then an op that it cannot run is an error, not a silent fallback. What a
backend leaves to the reference by its purpose (the Metal kernels: prompts) is no refusal and no error.
`observe()` lets a profiler stand around every call; nobody does by default.
"""

import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from functools import cache, partial
from typing import Any, Protocol

from mlx_edge.errors import HardwareNotSupportedError, InvalidRequestError
from mlx_edge.ops.cpu import OPS as CPU_OPS
from mlx_edge.ops.cpu import missing as missing_for_cpu
from mlx_edge.ops.metal import EMULATED_OPS, Ops, leave, missing_for_emulator
from mlx_edge.ops.metal import OPS as METAL_OPS
from mlx_edge.ops.metal import missing as missing_for_metal
from mlx_edge.ops.reference import IMPLEMENTATIONS


@dataclass(frozen=True)
class Implementation:
    """One way to compute an op."""

    run: Callable[..., Any]
    refuse: Callable[..., str | None]  # the op's arguments -> why it does not serve them, or None
    describe: Callable[..., str] | None = None  # the op's arguments -> what it launches


@dataclass(frozen=True)
class Backend:
    """A set of implementations for one kind of hardware."""

    name: str
    missing: Callable[[], str | None]  # what this machine lacks for it, or None
    ops: Mapping[str, Implementation]
    # An op and its arguments -> why the reference is meant to run it, though the backend was named; or None.
    leave: Callable[[str, tuple[Any, ...]], str | None] = lambda _op, _args: None
    is_for_all: bool = True  # False: only for who names it

    def refusal(self, op: str, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> str | None:
        """Why this backend does not run this call, or None when it does."""
        lacking = self.missing()
        if lacking is not None:
            return lacking
        left = self.leave(op, args)
        if left is not None:
            return left
        implementation = self.ops.get(op)
        if implementation is None:
            return f"has no {op}"
        return implementation.refuse(*args, **kwargs)


@dataclass(frozen=True)
class Choice:
    """Which backend runs a call, and why those before it do not."""

    op: str
    backend: Backend
    refusals: tuple[str, ...]
    describe: Callable[[], str] | None = None  # what is launched, where the backend tells

    def __str__(self) -> str:
        launches = f" ({self.describe()})" if self.describe else ""
        return "; ".join((*self.refusals, f"{self.op} runs on {self.backend.name}{launches}"))


def _nothing_missing() -> None:
    return None


def _never_refuses(*_args: Any, **_kwargs: Any) -> None:
    return None


REFERENCE = Backend(
    "reference",
    _nothing_missing,
    {op: Implementation(run, _never_refuses) for op, run in IMPLEMENTATIONS.items()},
)
CPU = Backend(
    "cpu",
    missing_for_cpu,
    {op: Implementation(run, refuse) for op, (run, refuse) in CPU_OPS.items()},
)


def _implementations(ops: Ops) -> dict[str, Implementation]:
    return {op: Implementation(*parts) for op, parts in ops.items()}


METAL = Backend(
    "metal",
    missing_for_metal,
    _implementations(METAL_OPS),
    leave,
)
EMULATED = Backend(  # the same kernels, on a GPU that is a program
    "emulated",
    missing_for_emulator,
    _implementations(EMULATED_OPS),
    leave,
    is_for_all=False,
)
# Fastest first; the reference is last.
BACKENDS: tuple[Backend, ...] = (METAL, CPU, EMULATED, REFERENCE)


class Observer(Protocol):
    """What stands around op calls: it must call `compute` once and return what that returns."""

    def __call__(
        self,
        op: str,
        backend: str,
        compute: Callable[[], Any],
        args: tuple[Any, ...],
        kwargs: Mapping[str, Any],
    ) -> Any:
        """Run one call; `args` and `kwargs` are to be read only, `compute` has them already."""
        ...


_forced: ContextVar[str | None] = ContextVar("mlx_edge_ops", default=None)
_observer: ContextVar[Observer | None] = ContextVar("mlx_edge_ops_observer", default=None)


@cache
def _from_environment() -> str | None:
    name = os.environ.get("MLX_EDGE_OPS", "auto")
    return None if name == "auto" else _checked(name, "MLX_EDGE_OPS")


def _checked(name: str, source: str) -> str:
    known = [backend.name for backend in BACKENDS]
    if name not in known:
        raise InvalidRequestError(
            f"{source} asks for the backend {name!r}; this build has {', '.join(known)} and auto"
        )
    return name


@contextmanager
def use(name: str) -> Iterator[None]:
    """Run every op inside on the named backend; an op that it cannot run raises.

    Raises: InvalidRequestError for an unknown name.
    """
    token = _forced.set(_checked(name, "ops.use()"))
    try:
        yield
    finally:
        _forced.reset(token)


@contextmanager
def observe(observer: Observer) -> Iterator[None]:
    """Let `observer` stand around every op call inside, in this thread; the innermost one alone is called."""
    token = _observer.set(observer)
    try:
        yield
    finally:
        _observer.reset(token)


def uses_cpu_kernels() -> bool:
    """Whether the CPU kernels are here and nobody asked for others: weights and caches are then made for them."""
    forced = _forced.get() or _from_environment()
    return forced in (None, CPU.name) and CPU.missing() is None


def uses_metal_kernels() -> bool:
    """Whether steps will launch the Metal kernels on a GPU, which compiles each at its first use."""
    forced = _forced.get() or _from_environment()
    return forced in (None, METAL.name) and METAL.missing() is None


def choose(op: str, *args: Any, **kwargs: Any) -> Choice:
    """The backend that runs this call.

    Raises: HardwareNotSupportedError when a backend was asked for by name and cannot.
    """
    forced = _forced.get() or _from_environment()
    refusals: list[str] = []
    for backend in BACKENDS:
        if backend.name != forced and (forced is not None or not backend.is_for_all):
            continue
        refusal = backend.refusal(op, args, kwargs)
        if refusal is None:
            describe = backend.ops[op].describe
            details = describe and partial(describe, *args, **kwargs)
            return Choice(op, backend, tuple(refusals), details)
        refusals.append(f"{backend.name}: {refusal}")
        if forced is not None and backend.missing() is None and backend.leave(op, args):
            return Choice(op, REFERENCE, tuple(refusals))
    raise HardwareNotSupportedError(
        f"{op} was asked to run on {forced} and cannot: {'; '.join(refusals)}; "
        "unset MLX_EDGE_OPS to let the runtime choose"
    )


def run(op: str, *args: Any, **kwargs: Any) -> Any:
    """Compute the op with the chosen implementation."""
    backend = choose(op, *args, **kwargs).backend
    compute = backend.ops[op].run
    observer = _observer.get()
    if observer is None:
        return compute(*args, **kwargs)
    return observer(op, backend.name, partial(compute, *args, **kwargs), args, kwargs)
