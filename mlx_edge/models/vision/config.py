"""Sizes and switches of a vision tower, read from `config.json` into one frozen record.

The only place that knows how the vision side is spelled there. Knows nothing of tensors, pixels and tokens' texts.
"""

from collections.abc import Callable, Mapping, Set
from dataclasses import dataclass

from mlx_edge.errors import ModelFormatError, UnsupportedModelError
from mlx_edge.models.fields import Fields

MAX_EXTENT = 1 << 20
MAX_DEPTH = 512
IN_PIXELS = 4096  # no patch, window or trained image is larger

# What `vision_config` says for training, for other exporters, or of video, and what changes no picture.
NEUTRAL = frozenset(("hidden_dropout_prob", "tokens_per_second", "spatial_patch_size"))


@dataclass(frozen=True)
class VisionConfig:
    """What a tower needs to know beyond its weights, and which tokens stand for images."""

    model_type: str  # of the whole model
    depth: int
    hidden_size: int
    num_heads: int
    intermediate_size: int  # of the blocks
    out_size: int  # of the features: the decoder's hidden size
    patch_size: int  # pixels
    temporal_patch_size: int  # frames of a patch: a still image is repeated
    merge_size: int  # patches along each side of what becomes one token
    in_channels: int
    norm_eps: float
    has_qkv_bias: bool
    has_bias: bool  # of all other products in the blocks
    image_token_id: int
    merger_size: int = 0  # the inner size of a gated merger
    position_grid: int | None = None  # learned positions along each side of the trained image
    window_cells: int | None = None  # tokens along each side of a window of attention
    full_blocks: frozenset[int] = frozenset()  # blocks whose attention sees beyond the windows
    rope_theta: float = 10000.0

    @property
    def head_dim(self) -> int:
        """Elements of a head."""
        return self.hidden_size // self.num_heads

    @property
    def patch_values(self) -> int:
        """Numbers of one patch: channels, frames, rows and columns."""
        return self.in_channels * self.temporal_patch_size * self.patch_size**2

    @property
    def merge_unit(self) -> int:
        """Patches of one token."""
        return self.merge_size**2


def read_vision(fields: Fields, neutral: Set[str]) -> VisionConfig | None:
    """The vision side of a whole model's `config.json`; None for one that has none, or one that is not run here.

    Reads `vision_config` and the token that stands for images. `neutral` are keys that change nothing.

    Raises: ModelFormatError for what is missing or does not fit, UnsupportedModelError for an unknown key.
    """
    read = _READERS.get(fields.string("model_type"))
    vision = None if read is None else fields.nested("vision_config")
    if read is None or vision is None:
        return None
    config = read(vision, fields.integer("image_token_id", low=0, high=1 << 24))
    if vision.string("hidden_act", "silu") not in ("silu", "swish"):
        raise UnsupportedModelError(
            f"{vision.name}: hidden_act is not silu, which is all that is known"
        )
    vision.unread -= neutral | NEUTRAL
    vision.refuse_unread()
    return _checked(config, vision)


def _read_glm4v(vision: Fields, image_token_id: int) -> VisionConfig:
    patch_size = vision.integer("patch_size", 14, high=IN_PIXELS)
    out_size = vision.integer("out_hidden_size", 4096, high=MAX_EXTENT)
    return VisionConfig(
        model_type="glm4v",
        depth=vision.integer("depth", 24, high=MAX_DEPTH),
        hidden_size=vision.integer("hidden_size", 1536, high=MAX_EXTENT),
        num_heads=vision.integer("num_heads", 12, high=MAX_EXTENT),
        intermediate_size=out_size,  # not `intermediate_size`, which is the merger's
        out_size=out_size,
        patch_size=patch_size,
        temporal_patch_size=vision.integer("temporal_patch_size", 2, high=64),
        merge_size=vision.integer("spatial_merge_size", 2, high=64),
        in_channels=vision.integer("in_channels", 3, low=3, high=3),
        norm_eps=vision.number("rms_norm_eps", 1e-5, low=0.0),
        has_qkv_bias=vision.boolean("attention_bias", False),
        has_bias=False,
        image_token_id=image_token_id,
        merger_size=vision.integer("intermediate_size", 13696, high=MAX_EXTENT),
        position_grid=vision.integer("image_size", 336, high=IN_PIXELS) // patch_size,
        rope_theta=_read_theta(vision),
    )


def _read_qwen(vision: Fields, image_token_id: int) -> VisionConfig:
    patch_size = vision.integer("patch_size", 14, high=IN_PIXELS)
    merge_size = vision.integer("spatial_merge_size", 2, high=64)
    window = vision.integer("window_size", 112, high=IN_PIXELS)
    is_given = vision.raw.get("fullatt_block_indexes") is not None
    blocks = vision.integers("fullatt_block_indexes", high=MAX_DEPTH)
    channels = vision.integer("in_chans", 3, low=3, high=3)
    return VisionConfig(
        model_type="qwen2_5_vl",
        depth=vision.integer("depth", 32, high=MAX_DEPTH),
        hidden_size=vision.integer("hidden_size", 3584, high=MAX_EXTENT),
        num_heads=vision.integer("num_heads", 16, high=MAX_EXTENT),
        intermediate_size=vision.integer("intermediate_size", 3420, high=MAX_EXTENT),
        out_size=vision.integer("out_hidden_size", 3584, high=MAX_EXTENT),
        patch_size=patch_size,
        temporal_patch_size=vision.integer("temporal_patch_size", 2, high=64),
        merge_size=merge_size,
        in_channels=vision.integer("in_channels", channels, low=3, high=3),
        norm_eps=1e-6,  # fixed in the reference implementation
        has_qkv_bias=True,
        has_bias=True,
        image_token_id=image_token_id,
        window_cells=window // merge_size // patch_size,
        full_blocks=frozenset(blocks if is_given else (7, 15, 23, 31)),
        rope_theta=_read_theta(vision),
    )


_READERS: Mapping[str, Callable[[Fields, int], VisionConfig]] = {
    "glm4v": _read_glm4v,
    "qwen2_5_vl": _read_qwen,
}


def _read_theta(vision: Fields) -> float:
    """The base of the tower's rope, which newer files state."""
    rope = vision.nested("rope_parameters")
    if rope is None:
        return 10000.0
    if rope.string("rope_type", "axial") not in ("axial", "default"):
        raise UnsupportedModelError(
            f"{rope.name}: rope_type is not axial, which is all that is known"
        )
    theta = rope.number("rope_theta", 10000.0, low=0.0)
    rope.refuse_unread()
    return theta


def _checked(config: VisionConfig, vision: Fields) -> VisionConfig:
    if config.hidden_size % config.num_heads or config.head_dim % 4:
        raise ModelFormatError(
            f"{vision.name}: hidden_size {config.hidden_size} in {config.num_heads} heads; "
            "expected heads of a multiple of 4, half turned by height and half by width"
        )
    if config.position_grid == 0 or config.window_cells == 0:
        raise ModelFormatError(
            f"{vision.name}: patch_size {config.patch_size} with spatial_merge_size {config.merge_size} "
            "does not fit into image_size or window_size"
        )
    return config
