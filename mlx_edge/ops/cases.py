"""The shapes that every implementation of an op is tested and timed with: TEST small and odd, BENCH real.

Only sizes, no arrays and no tolerances: the suite in `tests/ops` makes the inputs, `bench/` times them. A
backend adds no cases of its own. Block cases are what every decoder has, and what a Mac is asked; layer cases
are what only some families have.
"""

from dataclasses import dataclass, replace


@dataclass(frozen=True)
class LinearCase:
    """One matrix product; bits 0 is a float weight."""

    m: int
    n: int
    k: int
    bits: int = 0
    group_size: int = 64
    has_bias: bool = False
    mode: str = "affine"

    def __str__(self) -> str:
        weight = f"q{self.bits}g{self.group_size}" if self.bits else "dense"
        weight = weight if self.mode == "affine" else self.mode
        return f"{self.m}x{self.n}x{self.k}-{weight}{'-bias' if self.has_bias else ''}"


@dataclass(frozen=True)
class AttentionCase:
    """New positions `width` after `stored` ones; `cuts` of them lie in separate segments."""

    batch: int
    heads: int
    kv_heads: int
    head_dim: int
    stored: int
    width: int
    window: int | None = None
    segments: int = 2

    def __str__(self) -> str:
        window = f"-w{self.window}" if self.window else ""
        shape = f"b{self.batch}h{self.heads}k{self.kv_heads}d{self.head_dim}"
        return f"{shape}-{self.stored}+{self.width}in{self.segments}{window}"


@dataclass(frozen=True)
class BlockCase:
    """One layer of a model, its cache filled by steps of the given widths; only the last is measured."""

    batch: int
    hidden: int
    inner: int
    heads: int
    kv_heads: int
    head_dim: int
    steps: tuple[int, ...]
    bits: int = 0
    has_qk_norm: bool = False
    has_bias: bool = False
    window: int | None = None
    is_interleaved: bool = False
    rope_dims: int | None = None  # None: the whole head

    def __str__(self) -> str:
        extras = [f"q{self.bits}" if self.bits else "dense"]
        extras += ["qknorm"] * self.has_qk_norm + ["bias"] * self.has_bias
        extras += [f"w{self.window}"] if self.window else []
        extras += ["interleaved"] if self.is_interleaved else []
        extras += [f"rope{self.rope_dims}"] if self.rope_dims else []
        shape = f"b{self.batch}e{self.hidden}h{self.heads}k{self.kv_heads}d{self.head_dim}"
        return f"{shape}-{'+'.join(map(str, self.steps))}-{'-'.join(extras)}"


@dataclass(frozen=True)
class LayerCase:
    """A layer with what only some families have; 1.0, 0 and () are what most have."""

    block: BlockCase
    has_pre_norm: bool = True
    has_post_norm: bool = False
    has_wide_norms: bool = False  # of queries and keys, over all heads together
    has_sinks: bool = False
    softcap: float = 0.0
    residual_scale: float = 1.0
    activation: str = "silu"
    shift: int = 0  # of where RoPE turns a row, from its position
    sections: tuple[int, ...] = ()  # of RoPE, in steps whose rows have positions on three axes

    def __str__(self) -> str:
        names = ("has_post_norm", "has_wide_norms", "has_sinks")
        extras = [name.removeprefix("has_") for name in names if getattr(self, name)]
        extras += [] if self.has_pre_norm else ["no_norm"]
        extras += [f"cap{self.softcap:g}"] if self.softcap else []
        extras += [f"times{self.residual_scale:g}"] if self.residual_scale != 1.0 else []
        extras += [self.activation] if self.activation != "silu" else []
        extras += [f"shift{self.shift}"] if self.shift else []
        extras += [f"axes{'+'.join(map(str, self.sections))}"] if self.sections else []
        return "-".join([str(self.block), *extras])


@dataclass(frozen=True)
class ExpertsCase:
    """A mixture of experts; bits 0 are float weights, the router has floats always."""

    rows: int
    hidden: int
    inner: int
    experts: int
    top_k: int
    bits: int = 0
    mode: str = "affine"
    is_normalized: bool = True
    has_bias: bool = False
    has_pre_norm: bool = True
    has_post_norm: bool = False
    activation: str = "silu"

    def __str__(self) -> str:
        extras = [f"q{self.bits}" if self.bits else "dense"]
        extras += [self.mode] if self.mode != "affine" else []
        names = ("is_normalized", "has_pre_norm")
        extras += [f"not_{name}" for name in names if not getattr(self, name)]
        extras += [name for name in ("has_bias", "has_post_norm") if getattr(self, name)]
        extras += [self.activation] if self.activation != "silu" else []
        shape = f"{self.rows}x{self.hidden}x{self.inner}-{self.top_k}of{self.experts}"
        return "-".join([shape, *extras])


@dataclass(frozen=True)
class WithinCase:
    """Attention of rows over each other, run by run."""

    heads: int
    head_dim: int
    lengths: tuple[int, ...]

    def __str__(self) -> str:
        runs = "+".join(map(str, self.lengths[:6])) + ("+..." if len(self.lengths) > 6 else "")
        return f"h{self.heads}d{self.head_dim}-{runs}"


@dataclass(frozen=True)
class RotateCase:
    """A rotation of some dims of heads of 16."""

    dims: int
    is_interleaved: bool = False
    magnitude: float = 1.0
    shifts: tuple[int, ...] = ()
    sections: tuple[int, ...] | None = (
        None  # a step with positions on three axes; () for a Rope without
    )

    def __str__(self) -> str:
        extras = ["interleaved"] * self.is_interleaved
        extras += [f"times{self.magnitude:g}"] if self.magnitude != 1.0 else []
        extras += ["shifted"] if self.shifts else []
        extras += [f"axes{self.sections}"] if self.sections is not None else []
        return "-".join([f"{self.dims}", *extras])


@dataclass(frozen=True)
class HeadCase:
    """A token table and a head."""

    bits: int = 0
    embed_scale: float = 1.0
    scale: float = 1.0
    softcap: float | None = None

    def __str__(self) -> str:
        return f"q{self.bits}-embed{self.embed_scale:g}-times{self.scale:g}-cap{self.softcap}"


@dataclass(frozen=True)
class RaggedCase:
    """A layer in ragged steps: the lengths that each of several sequences brings to each."""

    layer: LayerCase  # of which the sizes count, not the steps; each sequence has its own multiple of the shift
    steps: tuple[tuple[int, ...], ...]

    def __str__(self) -> str:
        return f"{self.layer}-ragged-{'-'.join('+'.join(map(str, step)) for step in self.steps)}"


@dataclass(frozen=True)
class RowCase:
    """Rows of a given width, for the ops that treat each row alone."""

    rows: int
    width: int

    def __str__(self) -> str:
        return f"{self.rows}x{self.width}"


@dataclass(frozen=True)
class Cases:
    """All cases of one purpose."""

    linear: tuple[LinearCase, ...]
    attention: tuple[AttentionCase, ...]
    block: tuple[BlockCase, ...]
    rows: tuple[RowCase, ...]
    ragged: tuple[RaggedCase, ...] = ()
    layers: tuple[LayerCase, ...] = ()
    experts: tuple[ExpertsCase, ...] = ()
    within: tuple[WithinCase, ...] = ()
    rotate: tuple[RotateCase, ...] = ()
    heads: tuple[HeadCase, ...] = ()


_SMALL = BlockCase(1, 64, 128, 4, 2, 64, (12, 4))
_GLM = replace(_SMALL, has_bias=True, is_interleaved=True, rope_dims=32)


TEST = Cases(
    linear=(
        *(LinearCase(m, 33, 64) for m in (1, 2, 17)),
        LinearCase(1, 1, 128),
        LinearCase(3, 40, 96, has_bias=True),
        *(LinearCase(2, 40, 256, bits) for bits in (1, 2, 3, 4, 5, 6, 8)),
        *(LinearCase(1, 7, 384, 4, group_size) for group_size in (32, 64, 128)),
        LinearCase(17, 24, 128, 4, 32, has_bias=True),
        LinearCase(1, 1, 64, 8, 64),
        LinearCase(3, 40, 96, 4, 32, mode="mxfp4"),
        LinearCase(3, 40, 96, 8, 32, mode="mxfp8"),
        LinearCase(3, 40, 96, 4, 16, mode="nvfp4"),
    ),
    attention=(
        AttentionCase(1, 4, 4, 16, stored=0, width=1, segments=1),
        AttentionCase(1, 4, 2, 64, stored=37, width=1),
        AttentionCase(2, 6, 2, 80, stored=63, width=5, segments=3),
        AttentionCase(1, 8, 1, 64, stored=0, width=33, segments=1),
        AttentionCase(1, 4, 2, 32, stored=50, width=1, window=16),
        AttentionCase(2, 2, 2, 32, stored=29, width=11, window=7, segments=3),
        AttentionCase(1, 2, 1, 128, stored=127, width=2, window=1),
    ),
    block=(
        BlockCase(1, 64, 96, 4, 2, 16, (1,)),
        BlockCase(1, 64, 96, 4, 4, 64, (31, 1, 1)),
        BlockCase(2, 64, 96, 4, 2, 128, (5, 40, 3), has_qk_norm=True),
        BlockCase(1, 128, 192, 4, 1, 64, (33, 1), bits=4),
        BlockCase(1, 128, 192, 2, 2, 64, (7, 2), bits=8, has_qk_norm=True),
        BlockCase(1, 64, 96, 4, 2, 64, (40, 1), window=9),
        BlockCase(1, 64, 96, 4, 2, 64, (12, 4), has_bias=True, is_interleaved=True, rope_dims=32),
    ),
    rows=(RowCase(1, 64), RowCase(3, 33), RowCase(17, 1000)),
    ragged=(
        RaggedCase(
            LayerCase(BlockCase(1, 64, 96, 4, 2, 64, (), has_qk_norm=True)),
            ((33, 1, 7), (1, 5, 1), (1, 1, 1)),
        ),
        RaggedCase(
            LayerCase(BlockCase(1, 128, 192, 4, 1, 64, (), bits=4, window=9)), ((3, 12), (1, 2))
        ),
        RaggedCase(LayerCase(_GLM, has_post_norm=True, shift=-3), ((9, 20), (1, 1), (4, 1))),
        RaggedCase(LayerCase(_GLM, sections=(4, 6, 6)), ((9, 20), (3, 1))),
        RaggedCase(LayerCase(_SMALL, has_sinks=True), ((2, 8, 5), (1, 1, 3))),
    ),
    layers=(
        LayerCase(_GLM, has_post_norm=True),
        LayerCase(replace(_GLM, batch=2), has_post_norm=True, shift=-9),
        LayerCase(replace(_GLM, bits=4, steps=(300, 1)), sections=(4, 6, 6), has_post_norm=True),
        LayerCase(replace(_SMALL, batch=2, steps=(5, 3)), sections=(8, 12, 12)),
        LayerCase(replace(_SMALL, steps=(70, 1, 1)), shift=-61),
        LayerCase(_SMALL, residual_scale=0.22),
        LayerCase(replace(_SMALL, bits=8), residual_scale=0.22, has_post_norm=True),
        LayerCase(replace(_SMALL, window=9), softcap=1.5, activation="gelu_tanh"),
        LayerCase(replace(_SMALL, steps=(300, 1)), softcap=1.5),
        LayerCase(_SMALL, has_sinks=True),
        LayerCase(replace(_SMALL, window=5, bits=4, steps=(290, 1, 3)), has_sinks=True),
        LayerCase(_SMALL, has_wide_norms=True),
        LayerCase(replace(_SMALL, bits=4), has_pre_norm=False, has_post_norm=True),
        LayerCase(
            replace(_SMALL, steps=(1,)), has_pre_norm=False, has_post_norm=True, has_wide_norms=True
        ),
        LayerCase(_SMALL, activation="swiglu_oai"),
    ),
    experts=(
        *(ExpertsCase(rows, 64, 96, 4, 2) for rows in (1, 7)),
        *(ExpertsCase(rows, 64, 96, 8, 2, 4, is_normalized=False) for rows in (1, 33)),
        ExpertsCase(300, 64, 32, 128, 8, 4),
        ExpertsCase(5, 64, 33, 5, 5, has_pre_norm=False, has_post_norm=True),
        ExpertsCase(2, 32, 48, 3, 1, has_bias=True, is_normalized=False),
        ExpertsCase(3, 64, 160, 32, 4, 4, mode="mxfp4", has_bias=True, activation="swiglu_oai"),
        ExpertsCase(3, 64, 64, 4, 2, 8),
    ),
    within=(
        WithinCase(2, 80, (1,)),
        WithinCase(3, 64, (64,)),
        WithinCase(1, 128, (67, 1, 131)),
        WithinCase(2, 80, (16,) * 9 + (5,)),
        WithinCase(2, 33, (70, 2)),
        WithinCase(1, 256, (49, 3)),
        WithinCase(5, 32, (400,)),
    ),
    rotate=(
        *(RotateCase(16, is_interleaved) for is_interleaved in (False, True)),
        *(RotateCase(8, is_interleaved, 1.25) for is_interleaved in (False, True)),
        *(RotateCase(8, is_interleaved, shifts=(-3, 5)) for is_interleaved in (False, True)),
        *(RotateCase(16, paired, sections=(2, 3, 3)) for paired in (False, True)),
        RotateCase(8, True, 1.25, sections=(1, 1, 2)),
        RotateCase(8, sections=()),
    ),
    heads=(
        *(HeadCase(bits) for bits in (0, 4, 8)),
        *(HeadCase(bits, 8.0, softcap=2.0) for bits in (0, 4)),
        HeadCase(embed_scale=12.0, scale=0.125),
        HeadCase(8, embed_scale=0.3, scale=3.0, softcap=30.0),
    ),
)

_LLAMA_1B = BlockCase(1, 2048, 8192, 32, 8, 64, steps=(512, 1), bits=4)
_QWEN3_06B = BlockCase(1, 1024, 3072, 16, 8, 128, steps=(512, 1), bits=4, has_qk_norm=True)
_GLM4_9B = BlockCase(
    *(1, 4096, 13696, 32, 2, 128, (512, 1)),
    bits=4,
    has_bias=True,
    is_interleaved=True,
    rope_dims=64,
)

BENCH = Cases(
    linear=tuple(
        LinearCase(m, n, k, 4)
        for n, k in ((2048, 2048), (8192, 2048), (2048, 8192), (128256, 2048))
        for m in (1, 4, 8, 128)
    ),
    attention=tuple(
        AttentionCase(1, 32, 8, 64, stored=stored, width=width)
        for stored, width in ((512, 1), (4096, 1), (0, 512), (4096, 512))
    ),
    block=tuple(
        replace(shape, steps=steps)
        for shape in (_LLAMA_1B, _QWEN3_06B)
        for steps in ((512, 1), (512,))
    ),
    rows=(RowCase(1, 2048), RowCase(512, 2048)),
    layers=tuple(
        LayerCase(replace(_GLM4_9B, steps=s), has_post_norm=True) for s in ((512, 1), (512,))
    ),
    experts=(
        *(ExpertsCase(rows, 2048, 768, 128, 8, 4) for rows in (1, 512)),
        *(
            ExpertsCase(
                rows, 2880, 2880, 32, 4, 4, mode="mxfp4", has_bias=True, activation="swiglu_oai"
            )
            for rows in (1, 512)
        ),
    ),
    within=(
        *(WithinCase(12, 128, (length,)) for length in (1000, 4000)),
        *(WithinCase(16, 80, (length,)) for length in (1000, 4000)),
        WithinCase(16, 80, (64,) * 64),
    ),
)
