"""The receipt of a folder that was just written: measured where the model can run, else with the reason why not."""

from pathlib import Path

from mlx_edge.calibration.measurement import Facts, WeightCount, make_receipt, measure_receipt
from mlx_edge.calibration.receipt import Receipt
from mlx_edge.calibration.text import Samples
from mlx_edge.conversion.calibrated import open_model
from mlx_edge.conversion.plan import Plan
from mlx_edge.conversion.request import Bars
from mlx_edge.errors import MLXEdgeError
from mlx_edge.weights import Checkpoint


def judge(
    source: Path | None, written: Path, plan: Plan, facts: Facts, samples: Samples | str, bars: Bars
) -> Receipt:
    """The receipt of `written` against the float folder `source`, on the rows held out.

    In place of `samples` stands the reason why there are none. What cannot be measured has the sizes of the plan.
    """
    reason = str(samples)
    if not isinstance(samples, str) and source is not None:
        try:
            with open_model(source) as reference, open_model(written) as model:
                on_progress = bars("Measuring the quality", "it")
                return measure_receipt(reference, model, samples.held_out, facts, on_progress)
        except MLXEdgeError as error:
            reason = str(error)
    count = WeightCount(plan.num_parameters, plan.num_bytes)
    with Checkpoint.open(written, use_mmap=False) as checkpoint:
        return make_receipt(checkpoint, count, facts, reason=reason)
