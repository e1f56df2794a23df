"""`pocket-vision` in torch: GLM-4.1V's mathematics at a small size, written for training.

The names are Hugging Face's, so that `state_dict()` is the checkpoint, and the numbers are those of
`Glm4vForConditionalGeneration`. What differs is the shape of the work: all screens of a batch have one
size, and a row holds one screenshot with several instructions behind it, each of which sees the
screenshot and itself. It knows no text; what training alone needs stands in `pocket_vision_losses.py`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from pocket_model import MLP
from torch import Tensor, nn

PATCH, MERGE, FRAMES = 14, 2, 2
EPS = 1e-5
POINTING_LAYER = 1
"""The layer whose head 0 is told in training where to look."""


@dataclass(frozen=True)
class VisionShape:
    """The sizes of the tower; `grid` is rows and columns of patches in training."""

    hidden_size: int = 128
    depth: int = 4
    num_heads: int = 4
    intermediate_size: int = 64
    """Of the merger, as in GLM-4.1V, whose blocks have MLPs as wide as the decoder."""
    image_size: int = 336
    grid: tuple[int, int] = (24, 12)
    rope_theta: float = 10000.0


@dataclass(frozen=True)
class TextShape:
    """The sizes of the decoder."""

    vocab_size: int = 616
    hidden_size: int = 192
    intermediate_size: int = 192
    num_hidden_layers: int = 4
    num_attention_heads: int = 3
    num_key_value_heads: int = 1
    rope_theta: float = 1000.0
    partial_rotary_factor: float = 0.5
    mrope_section: tuple[int, int, int] = (4, 6, 6)

    @property
    def head_dim(self) -> int:
        """The width of a head."""
        return self.hidden_size // self.num_attention_heads


@dataclass(frozen=True)
class PocketVisionConfig:
    """The whole model."""

    vision: VisionShape = VisionShape()
    text: TextShape = TextShape()


class RMSNorm(nn.RMSNorm):
    """The norm of all layers."""

    def __init__(self, size: int) -> None:
        super().__init__(size, EPS)


class PatchEmbed(nn.Module):
    """A 3D convolution over patches; the two frames of a picture are the same."""

    def __init__(self, hidden_size: int) -> None:
        super().__init__()
        kernel = (FRAMES, PATCH, PATCH)
        self.proj = nn.Conv3d(3, hidden_size, kernel, stride=kernel)

    def forward(self, patches: Tensor) -> Tensor:
        """Return (B, N, E) for one frame of each patch, (B, N, 3 * PATCH * PATCH)."""
        weight = self.proj.weight.sum(dim=2).flatten(1)
        return F.linear(patches, weight, self.proj.bias)


class PatchPositions(nn.Module):
    """Learnt positions on a square, read at other grids by bicubic interpolation."""

    def __init__(self, shape: VisionShape, places: Tensor) -> None:
        super().__init__()
        side = shape.image_size // PATCH
        self.position_embedding = nn.Embedding(side * side, shape.hidden_size)
        rows, columns = shape.grid
        points = (places.flip(-1) + 0.5) / torch.tensor([columns, rows]) * 2 - 1
        unit = torch.eye(side * side).view(1, side * side, side, side)
        mixed = F.grid_sample(
            unit, points[None, :, None], "bicubic", padding_mode="border", align_corners=False
        )
        self.register_buffer("mix", mixed[0, :, :, 0].T.contiguous(), persistent=False)

    def forward(self) -> Tensor:
        """Return (N, E)."""
        mix: Tensor = self.mix  # type: ignore[assignment]
        return mix @ self.position_embedding.weight


class VisionAttention(nn.Module):
    """Attention of all patches of a screen."""

    def __init__(self, shape: VisionShape) -> None:
        super().__init__()
        self.heads = shape.num_heads
        self.qkv = nn.Linear(shape.hidden_size, 3 * shape.hidden_size, bias=False)
        self.proj = nn.Linear(shape.hidden_size, shape.hidden_size, bias=False)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """Return what the block adds, (B, N, E)."""
        batch, count, width = x.shape
        q, k, v = self.qkv(x).view(batch, count, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        out = F.scaled_dot_product_attention(turn_halves(q, cos, sin), turn_halves(k, cos, sin), v)
        result: Tensor = self.proj(out.transpose(1, 2).reshape(batch, count, width))
        return result


class VisionBlock(nn.Module):
    """One layer of the tower."""

    def __init__(self, shape: VisionShape, text_width: int) -> None:
        super().__init__()
        self.norm1 = RMSNorm(shape.hidden_size)
        self.norm2 = RMSNorm(shape.hidden_size)
        self.attn = VisionAttention(shape)
        self.mlp = MLP(shape.hidden_size, text_width)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """Return the next stream, (B, N, E)."""
        x = x + self.attn(self.norm1(x), cos, sin)
        result: Tensor = x + self.mlp(self.norm2(x))
        return result


class Merger(MLP):
    """The last step into the decoder's space."""

    def __init__(self, width: int, inner: int) -> None:
        super().__init__(width, inner)
        self.proj = nn.Linear(width, width, bias=False)
        self.post_projection_norm = nn.LayerNorm(width)

    def forward(self, x: Tensor) -> Tensor:
        """Return (..., E)."""
        return super().forward(F.gelu(self.post_projection_norm(self.proj(x))))


class VisionTower(nn.Module):
    """Patches to image tokens."""

    def __init__(self, shape: VisionShape, text_width: int) -> None:
        super().__init__()
        places = patch_places(*shape.grid)
        self.patch_embed = PatchEmbed(shape.hidden_size)
        self.embeddings = PatchPositions(shape, places)
        self.post_conv_layernorm = RMSNorm(shape.hidden_size)
        self.blocks = nn.ModuleList(VisionBlock(shape, text_width) for _ in range(shape.depth))
        self.post_layernorm = RMSNorm(shape.hidden_size)
        self.downsample = nn.Conv2d(shape.hidden_size, text_width, MERGE, stride=MERGE)
        self.merger = Merger(text_width, shape.intermediate_size)
        half = shape.hidden_size // shape.num_heads // 2
        frequencies = shape.rope_theta ** -(torch.arange(0, half, 2).float() / half)
        angles = (places[:, :, None] * frequencies).flatten(1).repeat(1, 2)
        self.register_buffer("cos", angles.cos(), persistent=False)
        self.register_buffer("sin", angles.sin(), persistent=False)

    def forward(self, patches: Tensor) -> Tensor:
        """Return image tokens (B, N / 4, E) of patches (B, N, 588) in the processor's order."""
        x = self.post_conv_layernorm(self.patch_embed(patches)) + self.embeddings()
        for block in self.blocks:
            x = block(x, self.cos, self.sin)
        x = self.post_layernorm(x)
        # The four patches of a square follow each other; the convolution sees each square alone.
        squares = x.view(x.shape[0], -1, MERGE * MERGE * x.shape[-1])
        weight = self.downsample.weight.permute(0, 2, 3, 1).flatten(1)
        result: Tensor = self.merger(F.linear(squares, weight, self.downsample.bias))
        return result


class Attention(nn.Module):
    """Attention of the decoder, with RoPE on the first half of a head."""

    def __init__(self, shape: TextShape) -> None:
        super().__init__()
        self.shape, width, head = shape, shape.hidden_size, shape.head_dim
        self.q_proj = nn.Linear(width, shape.num_attention_heads * head)
        self.k_proj = nn.Linear(width, shape.num_key_value_heads * head)
        self.v_proj = nn.Linear(width, shape.num_key_value_heads * head)
        self.o_proj = nn.Linear(shape.num_attention_heads * head, width, bias=False)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        """Return what the layer adds, (B, L, E), and queries and keys of head 0, (2, B, L, D)."""
        batch, length, _ = x.shape
        split = (batch, length, -1, self.shape.head_dim)
        q = turn_pairs(self.q_proj(x).view(split).transpose(1, 2), cos, sin)
        k = turn_pairs(self.k_proj(x).view(split).transpose(1, 2), cos, sin)
        v = self.v_proj(x).view(split).transpose(1, 2)
        share = self.shape.num_attention_heads // self.shape.num_key_value_heads
        k, v = k.repeat_interleave(share, 1), v.repeat_interleave(share, 1)
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        first = torch.stack([q[:, 0], k[:, 0]])
        return self.o_proj(out.transpose(1, 2).reshape(batch, length, -1)), first


class FusedMLP(nn.Module):
    """The gated MLP with gate and up in one matrix, as GLM-4 stores it."""

    def __init__(self, shape: TextShape) -> None:
        super().__init__()
        self.gate_up_proj = nn.Linear(shape.hidden_size, 2 * shape.intermediate_size, bias=False)
        self.down_proj = nn.Linear(shape.intermediate_size, shape.hidden_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Return (B, L, E)."""
        gate, up = self.gate_up_proj(x).chunk(2, dim=-1)
        result: Tensor = self.down_proj(F.silu(gate) * up)
        return result


class Layer(nn.Module):
    """One decoder layer: each half stands between two norms."""

    def __init__(self, shape: TextShape) -> None:
        super().__init__()
        self.input_layernorm = RMSNorm(shape.hidden_size)
        self.self_attn = Attention(shape)
        self.post_self_attn_layernorm = RMSNorm(shape.hidden_size)
        self.post_attention_layernorm = RMSNorm(shape.hidden_size)
        self.mlp = FusedMLP(shape)
        self.post_mlp_layernorm = RMSNorm(shape.hidden_size)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        """Return the next stream (B, L, E), and queries and keys of head 0."""
        added, first = self.self_attn(self.input_layernorm(x), cos, sin, mask)
        x = x + self.post_self_attn_layernorm(added)
        x = x + self.post_mlp_layernorm(self.mlp(self.post_attention_layernorm(x)))
        return x, first


class LanguageModel(nn.Module):
    """The decoder without its head."""

    def __init__(self, shape: TextShape) -> None:
        super().__init__()
        self.shape = shape
        self.embed_tokens = nn.Embedding(shape.vocab_size, shape.hidden_size)
        self.layers = nn.ModuleList(Layer(shape) for _ in range(shape.num_hidden_layers))
        self.norm = RMSNorm(shape.hidden_size)

    def forward(self, x: Tensor, turns: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        """Return hidden states (B, L, E), and queries and keys (2, B, L, D) of the pointing head."""
        cos, sin = rope_tables(turns, self.shape)
        pointing = x
        for index, layer in enumerate(self.layers):
            x, first = layer(x, cos, sin, mask)
            pointing = first if index == POINTING_LAYER else pointing
        return self.norm(x), pointing


class Glm4v(nn.Module):
    """Tower and decoder under the names of the checkpoint."""

    def __init__(self, config: PocketVisionConfig) -> None:
        super().__init__()
        self.visual = VisionTower(config.vision, config.text.hidden_size)
        self.language_model = LanguageModel(config.text)


@dataclass
class Seen:
    """What a forward pass shows to the losses."""

    hidden: Tensor
    """(B, L, E), what `lm_head` makes logits of."""
    cells: Tensor
    """The image tokens, (B, cells, E)."""
    pointing: Tensor
    """Queries and keys of the head that is told where to look, (2, B, L, D)."""


class PocketVisionModel(nn.Module):
    """The whole model."""

    def __init__(self, config: PocketVisionConfig) -> None:
        super().__init__()
        self.config = config
        self.model = Glm4v(config)
        self.lm_head = nn.Linear(config.text.hidden_size, config.text.vocab_size, bias=False)

    def forward(
        self, patches: Tensor, tokens: Tensor, image_start: int, turns: Tensor, mask: Tensor
    ) -> Seen:
        """Return what is seen at tokens (B, L), of which an image's run begins at `image_start`.

        `turns` are RoPE positions (3, L); `mask` (L, L) is added to the scores.
        """
        cells = self.model.visual(patches)
        x = self.model.language_model.embed_tokens(tokens)
        behind = image_start + cells.shape[1]
        x = torch.cat([x[:, :image_start], cells, x[:, behind:]], dim=1)
        hidden, pointing = self.model.language_model(x, turns, mask)
        return Seen(hidden, cells, pointing)


def patch_places(rows: int, columns: int) -> Tensor:
    """Return row and column of each patch (N, 2) in the processor's order: square by square."""
    y, x = torch.meshgrid(torch.arange(rows), torch.arange(columns), indexing="ij")
    squares = torch.stack([y, x], dim=-1).view(rows // MERGE, MERGE, columns // MERGE, MERGE, 2)
    return squares.transpose(1, 2).reshape(-1, 2)


def turn_halves(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate (B, H, N, D); the halves of D are the pairs."""
    first, second = x.chunk(2, dim=-1)
    return x * cos + torch.cat([-second, first], dim=-1) * sin


def turn_pairs(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate the first dimensions of (B, H, L, D); neighbours are the pairs."""
    turned, rest = x[..., : cos.shape[-1]], x[..., cos.shape[-1] :]
    crossed = torch.stack([-turned[..., 1::2], turned[..., ::2]], dim=-1).flatten(-2)
    return torch.cat([turned * cos + crossed * sin, rest], dim=-1)


def rope_tables(turns: Tensor, shape: TextShape) -> tuple[Tensor, Tensor]:
    """Return cosines and sines (L, rotated dimensions) of positions (3, L) in time, row, column."""
    size = int(shape.head_dim * shape.partial_rotary_factor)
    frequencies = shape.rope_theta ** -(torch.arange(0, size, 2).float() / size)
    parts = (turns[:, :, None] * frequencies).split(list(shape.mrope_section), dim=-1)
    angles = torch.cat([part[axis] for axis, part in enumerate(parts)], dim=-1)
    angles = angles.repeat_interleave(2, dim=-1)
    return angles.cos(), angles.sin()


@torch.no_grad()
def initialize(model: PocketVisionModel) -> None:
    """Draw the start values; branches begin small beside the stream they are added to."""
    for name, parameter in model.named_parameters():
        if parameter.ndim >= 2:
            std = 0.6 / math.sqrt(parameter[0].numel())
            if name.endswith(("attn.proj.weight", "blocks.mlp.down_proj.weight")):
                std *= 0.4
            if "embed_tokens" in name or "position_embedding" in name:
                std = 0.3
            nn.init.normal_(parameter, 0, std)
        elif name.endswith("bias"):
            parameter.zero_()
        elif "post_self_attn" in name or "post_mlp" in name:
            parameter.fill_(0.3)
