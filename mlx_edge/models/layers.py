"""What sets the layers of one model apart: which see a window only, which go without RoPE."""

from dataclasses import dataclass

from mlx_edge.errors import ModelFormatError, UnsupportedModelError
from mlx_edge.models.families import Family
from mlx_edge.models.fields import Fields, spell

MAX_WINDOW = 1 << 30


@dataclass(frozen=True)
class LayerKind:
    """The switches of one layer."""

    has_rope: bool = True
    window: int | None = None  # positions that a query sees, itself included


def read_layers(fields: Fields, family: Family, num_layers: int) -> tuple[LayerKind, ...]:
    """One kind per layer, from `layer_types`, `sliding_window` and `no_rope_layers`.

    Raises: ModelFormatError where lists and layers do not fit, UnsupportedModelError for an unknown type.
    """
    has_rope = _read_rope_layers(fields, family, num_layers)
    window = _read_window(fields, family)
    first = fields.integer("max_window_layers", 28, low=0, high=1 << 20)
    every = 1
    if family.window_layers == "pattern":
        every = fields.integer("sliding_window_pattern", high=1 << 20)
    default = {
        "none": [False] * num_layers,
        "all": [window is not None] * num_layers,
        "last": [window is not None and index >= first for index in range(num_layers)],
        "without rope": [window is not None and not rope for rope in has_rope],
        "pattern": [(index + 1) % every != 0 for index in range(num_layers)],
    }[family.window_layers]
    sees_window = _read_layer_types(fields, num_layers)
    if sees_window is None:
        sees_window = default
    if any(sees_window) and window is None:
        said = "layer_types" if fields.raw.get("layer_types") else family.model_type
        raise ModelFormatError(
            f"{fields.name}: {said} names windows, but sliding_window is not set"
        )
    if window is not None and family.window_layers == "none" and not any(sees_window):
        raise UnsupportedModelError(
            f"{fields.name}: sliding_window = {window} is not supported for {family.model_type}, "
            "unless layer_types says which layers have it"
        )
    return tuple(
        LayerKind(rope, window if is_sliding else None)
        for rope, is_sliding in zip(has_rope, sees_window, strict=True)
    )


def _read_window(fields: Fields, family: Family) -> int | None:
    is_given = fields.raw.get("sliding_window") is not None
    uses_it = fields.boolean("use_sliding_window", is_given or family.window_layers == "all")
    window = fields.integer("sliding_window", high=MAX_WINDOW) if is_given else None
    return window if uses_it else None


def _read_layer_types(fields: Fields, num_layers: int) -> list[bool] | None:
    """Whether each layer sees a window, or None when `layer_types` is not given."""
    types = fields.strings("layer_types")
    unknown = sorted(set(types) - {"full_attention", "sliding_attention"})
    if unknown:
        raise UnsupportedModelError(
            f"{fields.name}: layer_types {', '.join(map(spell, unknown))} are not supported"
        )
    _check_length(fields, "layer_types", len(types), num_layers)
    return [kind == "sliding_attention" for kind in types] or None


def _read_rope_layers(fields: Fields, family: Family, num_layers: int) -> list[bool]:
    if not family.has_rope_gaps:
        return [True] * num_layers
    interval = fields.integer("no_rope_layer_interval", 4, high=1 << 20)
    flags = fields.integers("no_rope_layers", high=1)  # despite its name, 1 means with RoPE
    _check_length(fields, "no_rope_layers", len(flags), num_layers)
    return [bool(flag) for flag in flags] or [(i + 1) % interval != 0 for i in range(num_layers)]


def _check_length(fields: Fields, key: str, found: int, num_layers: int) -> None:
    if found not in (0, num_layers):
        raise ModelFormatError(f"{fields.name}: {key} has {found} entries for {num_layers} layers")
