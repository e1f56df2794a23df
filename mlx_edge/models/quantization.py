"""How a model's weights are packed, as `config.json` says it: a default and exceptions by layer name.

Beside MLX's own object `quantization` there may be ours, which mlx-lm leaves alone: the fixed steps in which inputs are
rounded to int8, `"activation_quantization": {"bits": 8, "scales": {layer: step}}`.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field

from mlx_edge.errors import ModelFormatError, UnsupportedModelError
from mlx_edge.models.fields import Fields
from mlx_edge.quant import MODES, Packing

MIN_STEP, MAX_STEP = 1e-30, 1e30  # of what float32 can divide by and multiply with 127


@dataclass(frozen=True)
class Quantization:
    """The packing of each layer; empty for a float model."""

    default: Packing | None = None
    exceptions: Mapping[str, Packing | None] = field(default_factory=dict)  # None: kept as floats
    input_scales: Mapping[str, float] = field(default_factory=dict)  # by layer; others take floats

    def packing(self, layer: str) -> Packing | None:
        """The packing of the weight of `layer`, or None when it is float."""
        return self.exceptions.get(layer, self.default)

    @staticmethod
    def read(fields: Fields) -> "Quantization":
        """From MLX's `quantization` object and ours; other schemes (gptq, awq, fp8) are refused by name."""
        input_scales = _read_input_scales(fields)
        foreign = fields.nested("quantization_config")
        if foreign is not None and "quant_method" in foreign.raw:
            method = foreign.string("quant_method")
            raise UnsupportedModelError(
                f"{fields.name}: quantization_config asks for {method!r}; only MLX's own layout is read. "
                "Take an mlx-community conversion of the model, or convert it from the float weights"
            )
        own = fields.nested("quantization") or foreign
        if own is None:
            return Quantization(input_scales=input_scales)
        exceptions = {
            key: _read_exception(own, key)
            for key, value in own.raw.items()
            if isinstance(value, dict) or (isinstance(value, bool) and _names_layer(key))
        }
        quantization = Quantization(_read_packing(own), exceptions, input_scales)
        own.refuse_unread()
        return quantization


def _names_layer(key: str) -> bool:
    """Whether a key with a truth value is a layer, and not a switch of some other scheme."""
    return "." in key or key == "lm_head"


def _read_exception(own: Fields, layer: str) -> Packing | None:
    value = own.raw[layer]
    own.unread.discard(layer)
    if value is False:
        return None
    if value is True:
        return _read_packing(own)
    nested = Fields(value, f"{own.name}: {layer}")
    packing = _read_packing(nested)
    nested.refuse_unread()
    return packing


def _read_packing(fields: Fields) -> Packing:
    mode = fields.string("mode", "affine")
    if mode not in MODES:
        raise UnsupportedModelError(
            f"{fields.name}: mode {mode!r} is not supported; known are {', '.join(MODES)}"
        )
    bits, group_sizes = MODES[mode]
    packing = Packing(
        group_size=fields.integer("group_size", group_sizes[0], high=1 << 16),
        bits=fields.integer("bits", bits[0], high=64),
        mode=mode,
    )
    if packing.bits not in bits or packing.group_size not in group_sizes:
        raise ModelFormatError(
            f"{fields.name}: {packing.bits} bits in groups of {packing.group_size}; {mode} has bits of "
            f"{', '.join(map(str, sorted(bits)))} and groups of {', '.join(map(str, sorted(group_sizes)))}"
        )
    return packing


def _read_input_scales(fields: Fields) -> dict[str, float]:
    nested = fields.nested("activation_quantization")
    if nested is None:
        return {}
    nested.integer("bits", low=8, high=8)
    layers = nested.nested("scales")
    if layers is None:
        raise ModelFormatError(
            f"{nested.name}: scales is missing or empty, expected a step per layer"
        )
    scales = {layer: layers.number(layer, low=0.0) for layer in layers.raw}
    for layer, scale in scales.items():
        if not MIN_STEP <= scale <= MAX_STEP:
            raise ModelFormatError(
                f"{layers.name}: {layer} is {scale:g}, expected {MIN_STEP:g} to {MAX_STEP:g}"
            )
    nested.refuse_unread()
    return scales
