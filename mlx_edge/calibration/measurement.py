"""From two models to a receipt: counts the weights, measures the damage, tells weights from others by a fingerprint.

Knows how tensors of a quantized layer are named; not how they came to be.
"""

import hashlib
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np

from mlx_edge.calibration.comparison import Comparison, compare
from mlx_edge.calibration.layerwise import LayerwiseModel
from mlx_edge.calibration.receipt import Receipt, Run, TextSource
from mlx_edge.calibration.text import Sample
from mlx_edge.errors import MLXEdgeError
from mlx_edge.models.config import ModelConfig
from mlx_edge.runtime import own_version
from mlx_edge.weights import Checkpoint

NUM_SPANS, SPAN_BYTES = 8, 256  # of each tensor, in a fingerprint


@dataclass(frozen=True)
class Facts:
    """What a conversion knows of itself."""

    model: str  # the name of what was converted
    method: str
    packing: str  # of most layers, in words
    num_exceptions: int
    weights_bytes_before: int
    calibrated_on: TextSource | None
    run: Run


@dataclass(frozen=True)
class WeightCount:
    """How many values a checkpoint holds, and in how many bytes."""

    num_values: int
    num_bytes: int

    @property
    def bits_per_weight(self) -> float:
        """Of all tensors, scales and offsets counted as bits and not as values."""
        return 8 * self.num_bytes / max(1, self.num_values)


def measure_receipt(
    source: LayerwiseModel,
    written: LayerwiseModel,
    sample: Sample,
    facts: Facts,
    on_progress: Callable[[int, int], None] | None = None,
) -> Receipt:
    """The receipt of `written`, measured against `source` on held-out rows.

    What cannot be measured is no error of the conversion: the receipt then says why.
    """
    checkpoint, count = written.checkpoint, count_weights(written.checkpoint, written.config)
    try:
        comparison = compare(source, written, sample.rows, on_progress=on_progress)
    except MLXEdgeError as error:
        return make_receipt(checkpoint, count, facts, reason=str(error))
    if not math.isfinite(comparison.reference_perplexity + comparison.other_perplexity):
        reason = "a perplexity is beyond all numbers"
        return make_receipt(checkpoint, count, facts, reason=reason)
    return make_receipt(checkpoint, count, facts, comparison, sample)


def make_receipt(
    written: Checkpoint,
    count: WeightCount,
    facts: Facts,
    comparison: Comparison | None = None,
    sample: Sample | None = None,
    *,
    reason: str | None = None,
) -> Receipt:
    """The receipt of `written`: with a comparison and the rows compared on, or the reason why there is none."""
    assert (comparison is None) == (sample is None) == (reason is not None)
    measured = comparison is not None
    return Receipt(
        mlx_edge_version=own_version(),
        weights=fingerprint_weights(written),
        model=facts.model,
        method=facts.method,
        packing=facts.packing,
        num_exceptions=facts.num_exceptions,
        bits_per_weight=count.bits_per_weight,
        weights_bytes_before=facts.weights_bytes_before,
        weights_bytes_after=count.num_bytes,
        kl_mean=comparison.kl_mean if comparison else None,
        kl_p99=comparison.kl_p99 if comparison else None,
        top1_agreement=comparison.top1 if comparison else None,
        perplexity_before=comparison.reference_perplexity if comparison else None,
        perplexity_after=comparison.other_perplexity if comparison else None,
        num_tokens=comparison.num_tokens if comparison else 0,
        calibrated_on=facts.calibrated_on,
        measured_on=TextSource(sample.source, sample.sha256) if measured and sample else None,
        reason=reason,
        run=facts.run,
    )


def count_weights(checkpoint: Checkpoint, config: ModelConfig) -> WeightCount:
    """All values and bytes of a checkpoint."""
    names = checkpoint.names()
    num_values = 0
    for name in names:
        layer, _, part = name.rpartition(".")
        if part == "weight" and f"{layer}.scales" in names:
            num_values += math.prod(packed_shape(checkpoint, config, layer))
        elif not (part in ("scales", "biases") and f"{layer}.weight" in names):
            num_values += math.prod(checkpoint.entry(name).shape)
    return WeightCount(num_values, sum(checkpoint.entry(name).num_bytes for name in names))


def packed_shape(checkpoint: Checkpoint, config: ModelConfig, layer: str) -> tuple[int, int]:
    """Rows and columns of the weight that a packed layer stands for; of stacked experts all rows."""
    packing = config.quantization.packing(layer)
    assert packing is not None, f"{layer} has scales, and config.json knows no packing"
    *num_rows, num_groups = checkpoint.entry(f"{layer}.scales").shape
    return math.prod(num_rows), num_groups * packing.group_size


def fingerprint_weights(checkpoint: Checkpoint) -> str:
    """64 hex digits that tell these weights from others, wherever their files lie and however they are cut.

    They cover every tensor's name, dtype, shape and 8 spans of 256 bytes: another quantization changes nearly all codes
    and is noticed, an edit between the spans is not.
    """
    digest = hashlib.sha256()
    for name in sorted(checkpoint.names()):
        entry = checkpoint.entry(name)
        digest.update(repr((name, entry.dtype, tuple(entry.shape))).encode())
        for span in _spans(np.frombuffer(checkpoint.read_bytes(name), np.uint8)):
            digest.update(span)
    return digest.hexdigest()


def _spans(data: np.ndarray[tuple[int], np.dtype[np.uint8]]) -> Iterator[bytes]:
    room = max(0, data.size - SPAN_BYTES)
    for start in sorted({room * index // (NUM_SPANS - 1) for index in range(NUM_SPANS)}):
        yield data[start : start + SPAN_BYTES].tobytes()
