"""The fixed steps in which a model's inputs are rounded to int8, one per linear, from a text that goes through it.

What a step is chosen by is in `quant/inputs.py`; how a folder keeps them, in `models/quantization.py`.
"""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import mlx.core as mx

from mlx_edge import ops
from mlx_edge.calibration.layerwise import LayerwiseModel
from mlx_edge.quant import InputStatistics


def static_scales(
    model: LayerwiseModel,
    rows: mx.array,
    *,
    on_progress: Callable[[int, int], None] | None = None,
) -> dict[str, float]:
    """The step of each linear's input by layer name; a head has its own name (`lm_head`), also where it is tied.

    `rows` (R, L) int32 are tokens to calibrate with; `on_progress(done, total)` is called in layers. Leave out those
    that are to take floats, and give the rest to `describe_scales`.

    Raises: InvalidRequestError for NaN or infinity on the way.
    """
    scales: dict[str, float] = {}
    hidden = model.embed(rows)
    for index in range(model.num_layers):
        layer = model.read_layer(index)
        seen = {name: InputStatistics(name) for name in model.find_linears(layer, index)}
        hidden = model.run_layer(layer, index, hidden, watch=partial(_add, seen))
        scales |= {name: statistics.best_scale() for name, statistics in seen.items()}
        if on_progress is not None:
            on_progress(index + 1, model.num_layers + 1)
    head = InputStatistics(model.config.family.head)
    with ops.watch_inputs(lambda _linear, x: head.add(x)):
        for logits in model.logits(hidden):
            mx.eval(logits)
    scales[head.name] = head.best_scale()
    if on_progress is not None:
        on_progress(model.num_layers + 1, model.num_layers + 1)
    return scales


def _add(seen: Mapping[str, InputStatistics], name: str, x: mx.array) -> None:
    seen[name].add(x)


def describe_scales(scales: Mapping[str, float]) -> dict[str, Any]:
    """What goes into config.json under "activation_quantization", which mlx-lm leaves alone."""
    return {"bits": 8, "scales": dict(scales)}
