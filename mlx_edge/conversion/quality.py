"""The receipt of a folder that was just written: measured where the model can run, else with the reason why not."""

from pathlib import Path

from mlx_edge.calibration.measurement import (
    Facts,
    fingerprint_weights,
    make_receipt,
    measure_receipt,
)
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

    In place of `samples` stands the reason why there are none.
    """
    try:
        with open_model(written) as model:
            if isinstance(samples, str) or source is None:
                return make_receipt(model, facts, reason=str(samples))
            with open_model(source) as reference:
                on_progress = bars("Measuring the quality", "it")
                return measure_receipt(reference, model, samples.held_out, facts, on_progress)
    except MLXEdgeError as error:
        return _without_model(written, plan, facts, str(error))


def _without_model(written: Path, plan: Plan, facts: Facts, reason: str) -> Receipt:
    """For a family that is not defined here: the sizes are those of the plan."""
    from importlib import import_module

    with Checkpoint.open(written, use_mmap=False) as checkpoint:
        weights = fingerprint_weights(checkpoint)
    return Receipt(
        mlx_edge_version=import_module("mlx_edge").__version__,
        weights=weights,
        model=facts.model,
        method=facts.method,
        packing=facts.packing,
        num_exceptions=facts.num_exceptions,
        bits_per_weight=plan.bits_per_weight,
        weights_bytes_before=facts.weights_bytes_before,
        weights_bytes_after=plan.num_bytes,
        kl_mean=None,
        kl_p99=None,
        top1_agreement=None,
        perplexity_before=None,
        perplexity_after=None,
        num_tokens=0,
        calibrated_on=facts.calibrated_on,
        measured_on=None,
        reason=reason,
        run=facts.run,
    )
