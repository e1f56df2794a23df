"""Where time and memory go, observed from outside: no other floor knows that it is watched.

    from mlx_edge import profiler

    with profiler.start("layer_1"):                 # spans nest, in any thread
        ...
    profiler.dump_report("profile.json")            # of the default profiler; profiler.reset() empties it

    watch = profiler.Profiler()                     # one's own; Profiler(is_on=False) costs next to nothing
    phases = profiler.Phases(watch)                 # prefill, decode, sample, detokenise of a generation
    op_profile = profiler.OpProfile(watch)          # every op call; for mlx_edge.ops.select.observe
    for response in phases.steps(stream_generate(model, phases.tokenizer(tokenizer), prompt)):
        ...
    report = profiler.make_report(watch, ops=op_profile, bandwidth=profiler.machine_bandwidth())
    print(profiler.format_report(report))
    watch.dump_trace("trace.json")                  # opens at ui.perfetto.dev

Importing it loads neither MLX nor numpy; what needs them is loaded when it is first used.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from mlx_edge.profiler.memory import Memory, sample_memory
from mlx_edge.profiler.timer import DEFAULT, Profiler, dump_report, reset, start

if TYPE_CHECKING:
    from mlx_edge.profiler.operations import OpProfile as OpProfile
    from mlx_edge.profiler.phases import ObservationCost as ObservationCost
    from mlx_edge.profiler.phases import Phases as Phases
    from mlx_edge.profiler.report import Report as Report
    from mlx_edge.profiler.report import make_report as make_report
    from mlx_edge.profiler.report import write_report as write_report
    from mlx_edge.profiler.roofline import Bandwidth as Bandwidth
    from mlx_edge.profiler.roofline import machine_bandwidth as machine_bandwidth
    from mlx_edge.profiler.roofline import measure_bandwidth as measure_bandwidth
    from mlx_edge.profiler.table import format_report as format_report
    from mlx_edge.profiler.trace import make_trace as make_trace
    from mlx_edge.profiler.trace import write_trace as write_trace

_HOMES = {
    "Bandwidth": "mlx_edge.profiler.roofline",
    "ObservationCost": "mlx_edge.profiler.phases",
    "OpProfile": "mlx_edge.profiler.operations",
    "Phases": "mlx_edge.profiler.phases",
    "Report": "mlx_edge.profiler.report",
    "format_report": "mlx_edge.profiler.table",
    "machine_bandwidth": "mlx_edge.profiler.roofline",
    "make_report": "mlx_edge.profiler.report",
    "make_trace": "mlx_edge.profiler.trace",
    "measure_bandwidth": "mlx_edge.profiler.roofline",
    "write_report": "mlx_edge.profiler.report",
    "write_trace": "mlx_edge.profiler.trace",
}

__all__ = [
    "DEFAULT",
    "Bandwidth",
    "Memory",
    "ObservationCost",
    "OpProfile",
    "Phases",
    "Profiler",
    "Report",
    "dump_report",
    "format_report",
    "machine_bandwidth",
    "make_report",
    "make_trace",
    "measure_bandwidth",
    "reset",
    "sample_memory",
    "start",
    "write_report",
    "write_trace",
]


def __getattr__(name: str) -> Any:
    home = _HOMES.get(name)
    if home is None:
        raise AttributeError(f"module 'mlx_edge.profiler' has no attribute {name!r}")
    return getattr(import_module(home), name)
