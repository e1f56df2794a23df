"""A decoder put together from a checkpoint: which tensors its configuration and family want, and where they go.

How tensors are found and checked is in `tensors.py`, how experts are in `moe.py`.
"""

from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import cached_property
from typing import TYPE_CHECKING

import mlx.core as mx

from mlx_edge import ops
from mlx_edge.models.config import ModelConfig
from mlx_edge.models.decoder import Decoder, Layer
from mlx_edge.models.moe import read_matrices
from mlx_edge.models.packing import Packer
from mlx_edge.models.rope import make_rope
from mlx_edge.models.tensors import Tensors, find_prefix, stored_name
from mlx_edge.weights import Checkpoint

if TYPE_CHECKING:  # it stands on numpy, which a model of text can do without
    from mlx_edge.models.vision.tower import VisionTower


def find_splits(checkpoint: Checkpoint, config: ModelConfig) -> Mapping[str, tuple[int, ...]]:
    """The layers whose one matrix is several, by their names in the files, and the rows of each of these."""
    family = config.family
    prefix = find_prefix(checkpoint.names(), family.embedding)
    query, key = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
    splits = {
        family.fused_qkv: (query, key, key),
        family.fused_gate_up: (config.intermediate_size,) * 2,
    }
    return {
        stored_name(family.layer.format(index=index) + name, prefix): rows
        for index in range(config.num_layers)
        for name, rows in splits.items()
        if name is not None
    }


class Assembler:
    """Makes the parts of a model from its tensors, each once."""

    def __init__(
        self,
        checkpoint: Checkpoint,
        config: ModelConfig,
        convert: Callable[[mx.array], mx.array],
        packer: Packer | None = None,
    ) -> None:
        """`convert` and `packer` as for `Tensors`."""
        self._config = config
        prefix = find_prefix(checkpoint.names(), config.family.embedding)
        self.tensors = Tensors(checkpoint, config.quantization, convert, packer, prefix)

    def assemble(self) -> Decoder:
        """The whole model.

        Raises: ModelFormatError for a tensor that is missing, left over, or of another shape or dtype.
        """
        config, family = self._config, self._config.family
        embedding = self.embedding()
        layers = tuple(self.layer(index) for index in range(config.num_layers))
        checkpoint = self.tensors.checkpoint
        head = self.head(embedding)
        decoder = Decoder(
            config, embedding, layers, head, checkpoint, checkpoint.report, self.tower()
        )
        self.tensors.refuse_unused(family.ignored_suffixes, family.ignored_prefixes)
        return decoder

    def tower(self) -> "VisionTower | None":
        """What reads images, of a model that does; UnsupportedModelError for images of a kind that is not known."""
        config = self._config
        if config.vision is None:
            return None
        from mlx_edge.models.vision.assembly import assemble_tower, read_processor

        processor = read_processor(self.tensors.checkpoint.folder, config.vision)
        return assemble_tower(self.tensors, config.vision, processor, config.hidden_size)

    def embedding(self) -> ops.Embedding:
        """The token table."""
        config = self._config
        table = self.tensors.table(config.family.embedding, config.vocab_size, config.hidden_size)
        return ops.Embedding(table, config.scales.embedding)

    def head(self, embedding: ops.Embedding) -> ops.HeadWeights:
        """The final norm, and the head: the token table itself where the two are tied."""
        scales = self._config.scales
        return ops.HeadWeights(
            self._sized_norm(self._config.family.final_norm, self._config.hidden_size),
            self._projection(embedding.table),
            scales.logits,
            scales.logits_cap,
        )

    def _projection(self, table: ops.Linear) -> ops.Linear:
        config, name = self._config, self._config.family.head
        is_tied = config.is_tied
        if is_tied is None:
            is_tied = not self.tensors.has(f"{name}.weight")
        if not is_tied:
            return self.tensors.linear(name, config.vocab_size, config.hidden_size)
        self.tensors.skip(name)  # some exporters save the tied head as well
        scale = self.tensors.input_scale(name)
        if scale is None:
            return table
        table = table.restore() if isinstance(table, ops.Packed) else table
        return replace(table, input_scale=scale)

    def layer(self, index: int) -> Layer:
        """One layer."""
        kind = self._config.layers[index]
        prefix = self._config.family.layer.format(index=index)
        experts = self._config.experts
        has_experts = experts is not None and experts.layers[index]
        mlp = self._experts(prefix) if has_experts else self._mlp(prefix)
        rope = self._rope if kind.window is None else self._window_rope
        return Layer(self._attention(prefix, kind.window), mlp, rope if kind.has_rope else None)

    @cached_property
    def _rope(self) -> ops.Rope:
        """Shared by the layers that turn their heads."""
        return make_rope(self._config.rope, self._config.head_dim)

    @cached_property
    def _window_rope(self) -> ops.Rope:
        own = self._config.window_rope
        return self._rope if own is None else make_rope(own, self._config.head_dim)

    def _attention(self, prefix: str, window: int | None) -> ops.AttentionWeights:
        config, family, tensors = self._config, self._config.family, self.tensors
        hidden, heads, kv_heads = config.hidden_size, config.num_heads, config.num_kv_heads
        query, key = heads * config.head_dim, kv_heads * config.head_dim
        if family.fused_qkv is not None:
            name = prefix + family.fused_qkv
            q, k, v = tensors.parts(name, [query, key, key], hidden, has_bias=config.has_qkv_bias)
        else:
            rows = ((family.query, query), (family.key, key), (family.value, key))
            q, k, v = (
                tensors.linear(prefix + name, count, hidden, has_bias=config.has_qkv_bias)
                for name, count in rows
            )
        return ops.AttentionWeights(
            norm=self._norm(family.attention_norm, prefix),
            q=q,
            k=k,
            v=v,
            o=tensors.linear(
                prefix + family.output, hidden, query, has_bias=config.has_output_bias
            ),
            num_heads=heads,
            num_kv_heads=kv_heads,
            head_dim=config.head_dim,
            scale=config.scales.attention,
            q_norm=self._head_norm(prefix + family.query_norm, heads),
            k_norm=self._head_norm(prefix + family.key_norm, kv_heads),
            window=window,
            post_norm=self._norm(family.attention_post_norm, prefix),
            residual_scale=config.scales.residual,
            softcap=config.scales.attention_cap,
            sinks=tensors.array(prefix + family.sinks, (heads,)) if family.has_sinks else None,
        )

    def _mlp(self, prefix: str) -> ops.MLPWeights:
        config, family, tensors = self._config, self._config.family, self.tensors
        hidden, inner, has_bias = config.hidden_size, config.intermediate_size, config.has_mlp_bias
        if family.fused_gate_up is not None:
            name = prefix + family.fused_gate_up
            gate, up = tensors.parts(name, [inner, inner], hidden, has_bias=has_bias)
        else:
            gate, up = (
                tensors.linear(prefix + name, inner, hidden, has_bias=has_bias)
                for name in (family.gate, family.up)
            )
        return ops.MLPWeights(
            norm=self._norm(family.mlp_norm, prefix),
            gate=gate,
            up=up,
            down=tensors.linear(prefix + family.down, hidden, inner, has_bias=has_bias),
            activation=config.activation,
            post_norm=self._norm(family.mlp_post_norm, prefix),
            residual_scale=config.scales.residual,
        )

    def _experts(self, prefix: str) -> ops.MoEWeights:
        config, family, experts = self._config, self._config.family, self._config.experts
        names = family.experts
        assert experts is not None and names is not None
        router = self.tensors.linear(
            prefix + names.router, experts.num_experts, config.hidden_size, has_bias=names.has_bias
        )
        return ops.MoEWeights(
            norm=self._norm(family.mlp_norm, prefix),
            router=router,
            **read_matrices(self.tensors, prefix, names, experts, config.hidden_size),
            num_experts=experts.num_experts,
            top_k=experts.top_k,
            is_normalized=experts.is_normalized,
            activation=config.activation,
            post_norm=self._norm(family.mlp_post_norm, prefix),
            residual_scale=config.scales.residual,
        )

    def _norm(self, name: str | None, prefix: str = "") -> ops.Norm | None:
        return None if name is None else self._sized_norm(prefix + name, self._config.hidden_size)

    def _head_norm(self, name: str, num_heads: int) -> ops.Norm | None:
        config, family = self._config, self._config.family
        if family.has_wide_qk_norm:
            return self._sized_norm(name, num_heads * config.head_dim)
        return self._sized_norm(name, config.head_dim) if config.has_qk_norm else None

    def _sized_norm(self, name: str, size: int) -> ops.Norm:
        offset = 1.0 if self._config.family.has_norm_offset else 0.0
        return self.tensors.norm(name, size, self._config.norm_eps, offset)
