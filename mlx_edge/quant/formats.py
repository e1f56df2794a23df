"""The formats of a quantized matrix: MLX's modes, their bits and group sizes, and what a weight costs in each."""

from collections.abc import Mapping
from dataclasses import dataclass

# Bits and group sizes of each mode, the first of them its default. All but affine have uint8 scales and no offsets.
MODES: Mapping[str, tuple[tuple[int, ...], tuple[int, ...]]] = {
    "affine": ((4, 1, 2, 3, 5, 6, 8), (64, 32, 128)),
    "mxfp4": ((4,), (32,)),
    "mxfp8": ((8,), (32,)),
    "nvfp4": ((4,), (16,)),
}


@dataclass(frozen=True)
class Packing:
    """How one weight is packed: `bits` per value, a scale (affine: and an offset) per `group_size` values."""

    group_size: int
    bits: int
    mode: str = "affine"

    def __str__(self) -> str:
        name = f"{self.bits} bit" if self.mode == "affine" else self.mode
        return f"{name}, groups of {self.group_size}"

    @property
    def num_codes(self) -> int:
        """Different codes that a value may have."""
        return 1 << self.bits

    def bits_per_weight(self, scale_bits: int = 16) -> float:
        """What one value costs with its share of the group's scale; `scale_bits` is that of an affine scale's dtype."""
        per_group = 2 * scale_bits if self.mode == "affine" else 8
        return self.bits + per_group / self.group_size

    def refusal(self, shape: tuple[int, ...]) -> str | None:
        """Why a weight of this shape cannot be packed so, or None when it can."""
        if len(shape) != 2:
            return f"it has {len(shape)} dimensions, a packed weight has 2"
        if shape[1] % self.group_size:
            return f"its {shape[1]} columns do not divide into groups of {self.group_size}"
        if shape[1] % 32:  # MLX unpacks 32 values at a time, and fails on the rest
            return f"its {shape[1]} columns are not a multiple of 32, which MLX's {self.mode} reads"
        return None
