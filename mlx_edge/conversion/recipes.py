"""Mixed bits by rule of thumb: which layers of a model get more bits, with nothing measured.

The choice is that of llama.cpp's Q4_K_M as mlx-lm has taken it over (`--quant-predicate`), so that the same recipe
makes a folder of the same packings. What is measured instead is in `calibration/`.
"""

from collections.abc import Iterable, Mapping

from mlx_edge.errors import UnsupportedModelError
from mlx_edge.quant import Packing

RECIPES: Mapping[str, tuple[int, int]] = {  # low and high bits
    "mixed_2_6": (2, 6),
    "mixed_3_4": (3, 4),
    "mixed_3_6": (3, 6),
    "mixed_4_6": (4, 6),
}


def mix(
    recipe: str, layers: Iterable[str], num_layers: int, group_size: int = 64
) -> dict[str, Packing]:
    """Layer name -> its packing: high bits for the head, and for values and down projections of some layers.

    Those are the first and the last eighth, and between them every third layer.

    Raises: UnsupportedModelError for a model without down projections, which the rule is made for.
    """
    names = list(layers)
    if not any("down_proj" in name for name in names):
        raise UnsupportedModelError(
            f"--quant-predicate {recipe} is made for models with down_proj layers, and this one has none; "
            "give --q-bits, or --target-bpw, which measures"
        )
    low, high = (Packing(group_size, bits) for bits in RECIPES[recipe])
    return {name: high if _is_sensitive(name, num_layers) else low for name in names}


def _is_sensitive(name: str, num_layers: int) -> bool:
    if "lm_head" in name:
        return True
    if not any(part in name for part in ("v_proj", "v_a_proj", "v_b_proj", "down_proj")):
        return False
    index = next((int(part) for part in name.split(".") if part.isdecimal()), 0)
    eighth = num_layers // 8
    return index < eighth or index >= 7 * num_layers // 8 or (index - eighth) % 3 == 2
