"""The shapes that every implementation of an op is tested and timed with: TEST small and odd, BENCH real.

Only sizes, no arrays and no tolerances: the suite in `tests/ops` makes the inputs, `bench/` times them. A
backend adds no cases of its own.
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
class RaggedCase:
    """A layer in ragged steps: the lengths that each of several sequences brings to each."""

    layer: BlockCase  # of which the sizes count, not the steps
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
            BlockCase(1, 64, 96, 4, 2, 64, (), has_qk_norm=True), ((33, 1, 7), (1, 5, 1), (1, 1, 1))
        ),
        RaggedCase(BlockCase(1, 128, 192, 4, 1, 64, (), bits=4, window=9), ((3, 12), (1, 2))),
    ),
)

_LLAMA_1B = BlockCase(1, 2048, 8192, 32, 8, 64, steps=(512, 1), bits=4)
_QWEN3_06B = BlockCase(1, 1024, 3072, 16, 8, 128, steps=(512, 1), bits=4, has_qk_norm=True)

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
)
