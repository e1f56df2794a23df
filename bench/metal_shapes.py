"""Shapes of the models whose kernels are counted. Knows no kernel, no device and no weights' values.

All are counted with weights of 4 bits in groups of 64 and 16-bit activations, as mlx-community ships them.
"""

from dataclasses import dataclass
from math import prod

LINE = 128  # bytes of a cache line
BITS, GROUP_SIZE, VALUE_BYTES = 4, 64, 2
CONTEXTS = (512, 8192, 32768)
ROWS = (1, 2, 4, 8, 16)


@dataclass(frozen=True)
class Matrix:
    """A quantized weight (rows, columns)."""

    rows: int
    columns: int

    @property
    def nbytes(self) -> int:
        """Packs, scales and offsets."""
        groups = self.columns // GROUP_SIZE
        return self.rows * (self.columns * BITS // 8 + 2 * VALUE_BYTES * groups)

    @property
    def lines(self) -> int:
        """Cache lines of one reading: three arrays, each from the start of a line."""
        packs = self.rows * self.columns * BITS // 8
        scales = self.rows * self.columns // GROUP_SIZE * VALUE_BYTES
        return -(-packs // LINE) + 2 * -(-scales // LINE)


@dataclass(frozen=True)
class Heads:
    """What attention is made of: H query heads, K heads of keys and values, D values each."""

    num_heads: int
    num_kv_heads: int
    head_dim: int
    has_qk_norm: bool = False

    @property
    def group(self) -> int:
        """Query heads that share a head of keys and values."""
        return self.num_heads // self.num_kv_heads

    def kv_lines(self, positions: int) -> int:
        """Cache lines of one reading of the keys and values of so many positions."""
        values = prod((2, self.num_kv_heads, positions, self.head_dim))
        return -(-values * VALUE_BYTES // LINE)


@dataclass(frozen=True)
class Model:
    """The sizes of a decoder: E model dim, F feed-forward dim, V vocabulary."""

    name: str
    num_layers: int
    model_dim: int
    inner_dim: int
    vocabulary: int
    heads: Heads
    window: int | None = None  # positions that most layers see
    num_global_layers: int | None = None  # layers that see all, where the others have a window

    @property
    def projections(self) -> dict[str, Matrix]:
        """The seven matrices of a layer."""
        e, f, heads = self.model_dim, self.inner_dim, self.heads
        queries = heads.num_heads * heads.head_dim
        keys = heads.num_kv_heads * heads.head_dim
        return {
            "q": Matrix(queries, e),
            "k": Matrix(keys, e),
            "v": Matrix(keys, e),
            "o": Matrix(e, queries),
            "gate": Matrix(f, e),
            "up": Matrix(f, e),
            "down": Matrix(e, f),
        }

    @property
    def head(self) -> Matrix:
        """What makes logits of the last hidden states."""
        return Matrix(self.vocabulary, self.model_dim)

    def attended(self, context: int) -> dict[int, int]:
        """How many layers see how many positions, the step's own among them."""
        if self.window is None or self.num_global_layers is None or self.window >= context:
            return {context: self.num_layers}
        local = self.num_layers - self.num_global_layers
        return {context: self.num_global_layers, self.window: local}


LLAMA = Model("Llama-3.2-1B", 16, 2048, 8192, 128256, Heads(32, 8, 64))
QWEN_SMALL = Model("Qwen3-0.6B", 28, 1024, 3072, 151936, Heads(16, 8, 128, True))
QWEN = Model("Qwen3-4B", 36, 2560, 9728, 151936, Heads(32, 8, 128, True))
SMOL = Model("SmolLM3-3B", 36, 2048, 11008, 128256, Heads(16, 4, 128))
GEMMA = Model("Gemma-3-1B", 26, 1152, 6912, 262144, Heads(4, 1, 256, True), 512, 4)
MODELS = (LLAMA, QWEN_SMALL, QWEN, SMOL, GEMMA)

# No model of the list has eight query heads to a head of keys; Qwen3-30B-A3B has these.
GQA8 = Heads(32, 4, 128)
GQA4 = QWEN.heads
