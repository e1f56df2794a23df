"""The plain numbers that some families multiply with: of scores, embeddings, residuals and logits; and their caps."""

from dataclasses import dataclass

from mlx_edge.models.families import Family
from mlx_edge.models.fields import Fields


@dataclass(frozen=True)
class Scales:
    """Factors, 1 where a family has none; a cap c turns x into c * tanh(x / c)."""

    attention: float  # of the scores
    embedding: float = 1.0
    residual: float = 1.0  # of what a block adds
    logits: float = 1.0
    attention_cap: float | None = None
    logits_cap: float | None = None


def read_scales(fields: Fields, family: Family, head_dim: int, hidden_size: int) -> Scales:
    """Those of the family's own numbers; scores are else divided by sqrt(head_dim)."""

    def read(key: str, default: float) -> float:
        return fields.number(key, default, low=0.0) if key in family.numbers else default

    def read_cap(key: str) -> float | None:
        is_given = key in family.numbers and fields.raw.get(key) is not None
        return fields.number(key, low=0.0) if is_given else None

    width = read("query_pre_attn_scalar", head_dim)
    return Scales(
        attention=read("attention_multiplier", width**-0.5),
        embedding=hidden_size**0.5
        if family.has_scaled_embedding
        else read("embedding_multiplier", 1.0),
        residual=read("residual_multiplier", 1.0),
        logits=1.0 / read("logits_scaling", 1.0),
        attention_cap=read_cap("attn_logit_softcapping"),
        logits_cap=read_cap("final_logit_softcapping"),
    )
