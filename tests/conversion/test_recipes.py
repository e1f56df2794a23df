"""Mixed bits: the layers that mlx-lm chooses."""

from types import SimpleNamespace

import pytest
from mlx_lm.convert import mixed_quant_predicate_builder

from mlx_edge.conversion.recipes import RECIPES, mix
from mlx_edge.errors import UnsupportedModelError

PARTS = [f"self_attn.{p}_proj" for p in "qkvo"] + [f"mlp.{p}_proj" for p in ("gate", "up", "down")]


def layer_names(num_layers):
    inner = [f"model.layers.{i}.{part}" for i in range(num_layers) for part in PARTS]
    return ["model.embed_tokens", *inner, "lm_head"]


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("num_layers", [1, 4, 7, 16, 29, 32])
def test_same_choice_as_mlx_lm(recipe, num_layers):
    names = layer_names(num_layers)
    model = SimpleNamespace(
        named_modules=lambda: [(name, None) for name in names], layers=range(num_layers)
    )
    theirs = mixed_quant_predicate_builder(recipe, model)
    ours = mix(recipe, names, num_layers)
    assert {n: (p.bits, p.group_size, p.mode) for n, p in ours.items()} == {
        n: (w["bits"], w["group_size"], w["mode"]) for n in names if (w := theirs(n, None))
    }


def test_a_model_without_down_projections_is_refused():
    with pytest.raises(UnsupportedModelError, match="down_proj"):
        mix("mixed_2_6", ["model.embed_tokens", "transformer.h.0.fc"], 1)
