"""The pocket model in torch, its start values, its optimiser and how the rates go: used by the training scripts alone.

The network is the Llama decoder with the Hugging Face names, so that `state_dict()` is the checkpoint.
Two things are not ordinary. The start values give the first two layers an induction circuit (a head that
looks one token back, a head that looks for what followed the same token before), because a model this
small does not find it by itself within the training budget. And matrices are trained with Muon (Jordan et
al., 2024), embeddings and norms with AdamW. It knows nothing of text.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

NORM_EPS = 1e-5
EMBEDDING_STD = 0.05


@dataclass(frozen=True)
class PocketConfig:
    """The shape of one model; every dimension is a multiple of 64, every head 64 wide."""

    vocab_size: int = 2048
    hidden_size: int = 256
    intermediate_size: int = 768
    num_hidden_layers: int = 6
    num_attention_heads: int = 4
    num_key_value_heads: int = 2
    head_dim: int = 64
    rope_theta: float = 100000.0


def rope_table(length: int, config: PocketConfig) -> tuple[Tensor, Tensor]:
    """Return cosines and sines of the rotary angles, each (length, head_dim / 2)."""
    exponent = torch.arange(0, config.head_dim, 2).float() / config.head_dim
    angles = torch.outer(torch.arange(length).float(), config.rope_theta**-exponent)
    return angles.cos(), angles.sin()


def rotate(x: Tensor, table: tuple[Tensor, Tensor]) -> Tensor:
    """Rotate (B, H, L, D) by position; the two halves of D are the pairs, as in Hugging Face's Llama."""
    cos, sin = table
    first, second = x.chunk(2, dim=-1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)


class Attention(nn.Module):
    """Causal self-attention with grouped keys and values."""

    def __init__(self, config: PocketConfig) -> None:
        super().__init__()
        self.config = config
        width, head = config.hidden_size, config.head_dim
        self.q_proj = nn.Linear(width, config.num_attention_heads * head, bias=False)
        self.k_proj = nn.Linear(width, config.num_key_value_heads * head, bias=False)
        self.v_proj = nn.Linear(width, config.num_key_value_heads * head, bias=False)
        self.o_proj = nn.Linear(config.num_attention_heads * head, width, bias=False)

    def forward(self, x: Tensor, table: tuple[Tensor, Tensor], mask: Tensor | None) -> Tensor:
        """Return what the layer adds, (B, L, E); without a mask attention is causal."""
        batch, length, _ = x.shape
        shape = (batch, length, -1, self.config.head_dim)
        queries = rotate(self.q_proj(x).view(shape).transpose(1, 2), table)
        keys = rotate(self.k_proj(x).view(shape).transpose(1, 2), table)
        values = self.v_proj(x).view(shape).transpose(1, 2)
        share = self.config.num_attention_heads // self.config.num_key_value_heads
        keys, values = keys.repeat_interleave(share, 1), values.repeat_interleave(share, 1)
        out = F.scaled_dot_product_attention(
            queries, keys, values, attn_mask=mask, is_causal=mask is None
        )
        result: Tensor = self.o_proj(out.transpose(1, 2).reshape(batch, length, -1))
        return result


class MLP(nn.Module):
    """The gated feed-forward half of a layer: silu(gate) * up, then down."""

    def __init__(self, width: int, inner: int) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(width, inner, bias=False)
        self.up_proj = nn.Linear(width, inner, bias=False)
        self.down_proj = nn.Linear(inner, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Return what the layer adds, (B, L, E)."""
        result: Tensor = self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))
        return result


class Layer(nn.Module):
    """One decoder layer: attention and MLP, each behind a norm and beside a residual."""

    def __init__(self, config: PocketConfig) -> None:
        super().__init__()
        self.input_layernorm = nn.RMSNorm(config.hidden_size, NORM_EPS)
        self.self_attn = Attention(config)
        self.post_attention_layernorm = nn.RMSNorm(config.hidden_size, NORM_EPS)
        self.mlp = MLP(config.hidden_size, config.intermediate_size)

    def forward(self, x: Tensor, table: tuple[Tensor, Tensor], mask: Tensor | None) -> Tensor:
        """Return the next residual stream, (B, L, E)."""
        x = x + self.self_attn(self.input_layernorm(x), table, mask)
        result: Tensor = x + self.mlp(self.post_attention_layernorm(x))
        return result


class Decoder(nn.Module):
    """Token ids to hidden states."""

    def __init__(self, config: PocketConfig) -> None:
        super().__init__()
        self.config = config
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(Layer(config) for _ in range(config.num_hidden_layers))
        self.norm = nn.RMSNorm(config.hidden_size, NORM_EPS)

    def forward(self, tokens: Tensor, mask: Tensor | None = None) -> Tensor:
        """Return the last hidden states (B, L, E) of tokens (B, L)."""
        x = self.embed_tokens(tokens)
        table = rope_table(tokens.shape[1], self.config)
        for layer in self.layers:
            x = layer(x, table, mask)
        result: Tensor = self.norm(x)
        return result


class PocketModel(nn.Module):
    """The language model; the output matrix is the embedding."""

    def __init__(self, config: PocketConfig) -> None:
        super().__init__()
        self.config = config
        self.model = Decoder(config)

    def forward(self, tokens: Tensor, mask: Tensor | None = None) -> Tensor:
        """Return logits (B, L, V) for tokens (B, L)."""
        return F.linear(self.model(tokens, mask), self.model.embed_tokens.weight)

    def loss(self, tokens: Tensor, targets: Tensor, weights: Tensor, mask: Tensor) -> Tensor:
        """Return the weighted mean cross-entropy in nats per token."""
        logits = self(tokens, mask).flatten(0, 1)
        each = F.cross_entropy(logits, targets.flatten(), reduction="none")
        return (each * weights.flatten()).sum() / weights.sum()


@torch.no_grad()
def initialize(model: PocketModel, induction: bool = True) -> None:
    """Draw the start values; with `induction`, plant the copying circuit in layers 0 and 1."""
    depth = model.config.num_hidden_layers
    for name, parameter in model.named_parameters():
        if parameter.ndim == 2:
            residual = name.endswith(("o_proj.weight", "down_proj.weight"))
            scale = 0.5 / math.sqrt(2 * depth) if residual else 1.0
            std = EMBEDDING_STD if "embed" in name else 0.5 / math.sqrt(parameter.shape[1])
            nn.init.normal_(parameter, 0, std * scale)
    if induction and depth > 1:
        plant_induction(model)


def plant_induction(model: PocketModel, sharpness: float = 0.7, match: float = 0.7) -> None:
    """Write a previous-token head into layer 0 and induction heads into layer 1.

    All embeddings get a common direction. In layer 0 the queries and keys of group 0 read only that
    direction, with a phase that makes the rotary score peak one token back; the group's values carry the
    previous token's embedding through a random projection P into other directions. In layer 1 the queries
    project the current token with P and the keys read what layer 0 wrote, so the score is high where the
    previous token is the current one; the values then write the token found there to the output.
    """
    config, layers = model.config, model.model.layers
    width, head, half = config.hidden_size, config.head_dim, config.head_dim // 2
    share = config.num_attention_heads // config.num_key_value_heads
    common = torch.ones(width) / math.sqrt(width)
    embedding = model.model.embed_tokens.weight
    embedding += EMBEDDING_STD * math.sqrt(width) * 0.8 * common

    basis = torch.linalg.qr(torch.randn(width, width))[0]
    basis = basis - torch.outer(common, common @ basis)
    read, write = basis[:, :head].T, basis[:, head : 2 * head]  # (D, E), (E, D)

    first: Attention = layers[0].self_attn  # type: ignore[assignment]
    frequencies = config.rope_theta ** -(torch.arange(half).float() / half)
    gain = torch.where(torch.arange(half) < 8, sharpness, 0.0)
    first.k_proj.weight[:head] *= 0.2
    first.k_proj.weight[:half] += torch.outer(gain, common)
    for index in range(share):
        rows = first.q_proj.weight[index * head : (index + 1) * head]
        rows *= 0.2
        rows[:half] += torch.outer(gain * frequencies.cos(), common)
        rows[half:] += torch.outer(-gain * frequencies.sin(), common)
    first.v_proj.weight[:head] = read
    first.o_proj.weight[:, :head] = 0.15 * write

    second: Attention = layers[1].self_attn  # type: ignore[assignment]
    slow = (torch.arange(head) % half >= half // 3).float()[:, None]
    second.k_proj.weight[:head] = second.k_proj.weight[:head] * 0.2 + match * 2 * slow * write.T
    second.v_proj.weight[:head] = basis[:, 2 * head : 3 * head].T
    for index in range(share):
        columns = slice(index * head, (index + 1) * head)
        second.q_proj.weight[columns] = (
            second.q_proj.weight[columns] * 0.2 + match * 2 * slow * read
        )
    second.o_proj.weight[:, :head] = 0.3 * basis[:, 2 * head : 3 * head]


@dataclass(frozen=True)
class Schedule:
    """How the learning rates go: their scale at some steps, straight lines between."""

    points: tuple[tuple[int, float], ...]

    @property
    def steps(self) -> int:
        """How many steps it has."""
        return self.points[-1][0]

    def scale(self, step: int) -> float:
        """Return the scale of the learning rates at a step."""
        steps, scales = zip(*self.points, strict=True)
        return float(np.interp(step, steps, scales))


class Muon:
    """Muon for the matrices inside the layers, AdamW for the embedding and the norms."""

    def __init__(
        self, model: nn.Module, matrix_lr: float, other_lr: float, weight_decay: float = 0.01
    ) -> None:
        self.matrix_lr, self.other_lr, self.weight_decay = matrix_lr, other_lr, weight_decay
        self.momentum = 0.95
        self.groups: dict[tuple[int, ...], list[nn.Parameter]] = {}
        others = []
        for name, parameter in model.named_parameters():
            if parameter.ndim == 2 and "embed" not in name and "lm_head" not in name:
                self.groups.setdefault(tuple(parameter.shape), []).append(parameter)
            else:
                others.append(parameter)
        self.buffers = {s: torch.zeros(len(g), *s) for s, g in self.groups.items()}
        self.adam = torch.optim.AdamW(others, lr=other_lr, betas=(0.9, 0.95), weight_decay=0.0)

    @torch.no_grad()
    def step(self, scale: float) -> None:
        """Update every parameter from its gradient with the learning rates times `scale`."""
        for shape, parameters in self.groups.items():
            gradient = torch.stack([p.grad for p in parameters if p.grad is not None])
            buffer = self.buffers[shape].mul_(self.momentum).add_(gradient)
            update = orthogonalize(gradient + self.momentum * buffer)
            lr = self.matrix_lr * scale
            stretch = math.sqrt(max(1.0, shape[0] / shape[1]))
            for parameter, direction in zip(parameters, update, strict=True):
                parameter.mul_(1 - lr * self.weight_decay).add_(direction, alpha=-lr * stretch)
                parameter.grad = None
        for group in self.adam.param_groups:
            group["lr"] = self.other_lr * scale
        self.adam.step()
        self.adam.zero_grad(set_to_none=True)


def orthogonalize(matrices: Tensor, iterations: int = 5) -> Tensor:
    """Return the nearest half-orthogonal matrices (N, R, C) by Newton-Schulz iterations."""
    tall = matrices.shape[1] > matrices.shape[2]
    x = matrices.mT if tall else matrices
    x = x / (x.norm(dim=(1, 2), keepdim=True) + 1e-7)
    for _ in range(iterations):
        gram = x @ x.mT
        x = 3.4445 * x + (-4.7750 * gram + 2.0315 * (gram @ gram)) @ x
    result: Tensor = x.mT if tall else x
    return result
