"""What a model folder says about its own quality, in one line: from the receipt beside the weights.

Reads the receipt and the headers of the weights, and loads nothing.
"""

from pathlib import Path

from mlx_edge.calibration.receipt import FILE_NAME, read_receipt
from mlx_edge.errors import MLXEdgeError


def describe_quality(folder: Path) -> str | None:
    """One line of the receipt in a folder, or why it is not shown; None where there is no receipt."""
    try:
        receipt = read_receipt(folder)
        if receipt is None:
            return None
        from mlx_edge.calibration.measurement import fingerprint_weights
        from mlx_edge.weights import Checkpoint

        with Checkpoint.open(folder) as checkpoint:
            if fingerprint_weights(checkpoint) != receipt.weights:
                return f"Quality: unknown; {FILE_NAME} is the receipt of other weights"
    except MLXEdgeError as error:  # what was asked for is there all the same
        return f"Quality: unknown; {error}"
    return f"Quality: {receipt.summary()}"
