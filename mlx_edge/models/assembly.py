"""A decoder put together from a checkpoint: every tensor found by name, checked against the configuration.

A missing tensor, a wrong shape or dtype, and a tensor that nobody asked for are errors that name it.
"""

from collections.abc import Callable
from dataclasses import replace

import mlx.core as mx

from mlx_edge import ops
from mlx_edge.errors import ModelFormatError
from mlx_edge.models.config import ModelConfig
from mlx_edge.models.decoder import Decoder, Layer
from mlx_edge.models.packing import Packer
from mlx_edge.models.rope import make_rope
from mlx_edge.quant import Packing
from mlx_edge.weights import Checkpoint

FLOATS = ("F32", "F16", "BF16")


class Assembler:
    """Reads a model's tensors from a checkpoint, each once."""

    def __init__(
        self,
        checkpoint: Checkpoint,
        config: ModelConfig,
        convert: Callable[[mx.array], mx.array],
        packer: Packer | None = None,
    ) -> None:
        """`convert` is applied to every float tensor: the dtype that this machine computes in. With a `packer`
        weights are taken in the layout of the CPU kernels, as far as these serve them."""
        self._checkpoint = checkpoint
        self._config = config
        self._convert = convert
        self._packer = packer
        self._unused = set(checkpoint.names())
        self._unused_scales = set(config.quantization.input_scales)

    def assemble(self) -> Decoder:
        """The whole model.

        Raises: ModelFormatError for a tensor that is missing, left over, or of another shape or dtype.
        """
        config = self._config
        embedding = self.embedding()
        rope = make_rope(config.rope, config.head_dim)
        layers = tuple(self.layer(index, rope) for index in range(config.num_layers))
        decoder = Decoder(
            config,
            embedding,
            layers,
            self.head(embedding),
            self._checkpoint,
            self._checkpoint.report,
        )
        self._refuse_unused()
        return decoder

    def embedding(self) -> ops.Embedding:
        """The token table."""
        config, name = self._config, self._config.family.embedding
        # It is looked up in, nothing is multiplied: a scale of its input would be without meaning.
        return ops.Embedding(self._weight(name, config.vocab_size, config.hidden_size))

    def head(self, embedding: ops.Embedding) -> ops.HeadWeights:
        """The final norm, and the head: the token table itself where the two are tied."""
        norm = self._norm(self._config.family.final_norm, self._config.hidden_size)
        return ops.HeadWeights(norm, self._projection(embedding.table))

    def _projection(self, table: ops.Linear) -> ops.Linear:
        config, name = self._config, self._config.family.head
        is_tied = config.is_tied
        if is_tied is None:
            is_tied = f"{name}.weight" not in self._unused
        if not is_tied:
            return self._linear(name, config.vocab_size, config.hidden_size)
        # Some exporters save the tied head as well.
        self._unused -= {f"{name}.{part}" for part in ("weight", "scales", "biases")}
        scale = self._input_scale(name)
        if scale is None:
            return table
        table = table.restore() if isinstance(table, ops.Packed) else table
        return replace(table, input_scale=scale)

    def layer(self, index: int, rope: ops.Rope) -> Layer:
        """One layer; `rope` is shared by those that turn their heads."""
        config, family = self._config, self._config.family
        prefix = family.layer.format(index=index)
        hidden, inner = config.hidden_size, config.intermediate_size
        query, key = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
        qkv_bias, mlp_bias = config.has_qkv_bias, config.has_mlp_bias
        kind = config.layers[index]

        def head_norm(name: str) -> ops.Norm | None:
            return self._norm(prefix + name, config.head_dim) if config.has_qk_norm else None

        attention = ops.AttentionWeights(
            norm=self._norm(prefix + family.attention_norm, hidden),
            q=self._linear(prefix + family.query, query, hidden, has_bias=qkv_bias),
            k=self._linear(prefix + family.key, key, hidden, has_bias=qkv_bias),
            v=self._linear(prefix + family.value, key, hidden, has_bias=qkv_bias),
            o=self._linear(prefix + family.output, hidden, query, has_bias=config.has_output_bias),
            num_heads=config.num_heads,
            num_kv_heads=config.num_kv_heads,
            head_dim=config.head_dim,
            scale=config.head_dim**-0.5,
            q_norm=head_norm(family.query_norm),
            k_norm=head_norm(family.key_norm),
            window=kind.window,
        )
        mlp = ops.MLPWeights(
            norm=self._norm(prefix + family.mlp_norm, hidden),
            gate=self._linear(prefix + family.gate, inner, hidden, has_bias=mlp_bias),
            up=self._linear(prefix + family.up, inner, hidden, has_bias=mlp_bias),
            down=self._linear(prefix + family.down, hidden, inner, has_bias=mlp_bias),
        )
        return Layer(attention, mlp, rope if kind.has_rope else None)

    def _linear(self, name: str, rows: int, columns: int, *, has_bias: bool = False) -> ops.Linear:
        if has_bias:
            self._check(f"{name}.bias", FLOATS, (rows,))
        bias = self._float(f"{name}.bias") if has_bias else None
        return self._weight(name, rows, columns, bias, self._input_scale(name))

    def _input_scale(self, name: str) -> float | None:
        self._unused_scales.discard(name)
        return self._config.quantization.input_scales.get(name)

    def _weight(
        self,
        name: str,
        rows: int,
        columns: int,
        bias: mx.array | None = None,
        input_scale: float | None = None,
    ) -> ops.Linear:
        packing = self._config.quantization.packing(name)
        # A default packing covers what could be packed; MLX leaves other layers as floats.
        if packing is None or f"{name}.scales" not in self._unused:
            self._check(f"{name}.weight", FLOATS, (rows, columns))
            packing = None
        else:
            self._check_packs(name, rows, columns, packing)
        if self._packer is not None and input_scale is None:
            packed = self._packer.pack(name, bias)
            if packed is not None:
                return packed
        if packing is None:
            return ops.Dense(self._float(f"{name}.weight"), bias, input_scale)
        is_affine = packing.mode == "affine"
        scales = self._checkpoint.read(f"{name}.scales")
        return ops.Quantized(
            self._checkpoint.read(f"{name}.weight"),
            self._convert(scales) if is_affine else scales,
            self._float(f"{name}.biases") if is_affine else None,
            packing.group_size,
            packing.bits,
            packing.mode,
            bias,
            input_scale,
        )

    def _check_packs(self, name: str, rows: int, columns: int, packing: Packing) -> None:
        if columns % packing.group_size:
            raise ModelFormatError(
                f"{name}: {columns} columns do not divide into groups of {packing.group_size}; "
                "config.json's quantization does not belong to these weights"
            )
        groups = columns // packing.group_size
        is_affine = packing.mode == "affine"
        self._check(f"{name}.weight", ("U32",), (rows, columns * packing.bits // 32))
        self._check(f"{name}.scales", FLOATS if is_affine else ("U8",), (rows, groups))
        if is_affine:
            self._check(f"{name}.biases", FLOATS, (rows, groups))

    def _norm(self, name: str, size: int) -> ops.Norm:
        self._check(f"{name}.weight", FLOATS, (size,))
        return ops.Norm(self._float(f"{name}.weight"), self._config.norm_eps)

    def _float(self, name: str) -> mx.array:
        return self._convert(self._checkpoint.read(name))

    def _check(self, name: str, dtypes: tuple[str, ...], shape: tuple[int, ...]) -> None:
        """A tensor that is used: there, of this type and shape, and asked for once."""
        if name not in self._unused:
            raise ModelFormatError(
                f"{self._checkpoint.folder}: tensor {name} is missing; "
                "the download is not complete, or config.json belongs to another model"
            )
        self._unused.discard(name)
        entry = self._checkpoint.entry(name)
        if entry.dtype not in dtypes or tuple(entry.shape) != shape:
            raise ModelFormatError(
                f"{self._checkpoint.folder}: tensor {name} is {entry.dtype} {list(entry.shape)}, "
                f"expected {' or '.join(dtypes)} {list(shape)}"
            )

    def _refuse_unused(self) -> None:
        ignored = self._config.family.ignored_suffixes
        if self._unused_scales:
            raise ModelFormatError(
                f"{self._checkpoint.folder}/config.json: activation_quantization names "
                f"{', '.join(sorted(self._unused_scales)[:3])}, which no input of this model goes into; "
                "it belongs to another model"
            )
        left = sorted(name for name in self._unused if not name.endswith(ignored))
        if left:
            more = f" and {len(left) - 3} more" if len(left) > 3 else ""
            raise ModelFormatError(
                f"{self._checkpoint.folder}: tensors that this model does not use: "
                f"{', '.join(left[:3])}{more}; config.json belongs to another model"
            )
