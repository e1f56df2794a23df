"""Model cards: front matter for the hub, the receipt as a table, and the source's card kept."""

from dataclasses import replace

import pytest
import yaml

from mlx_edge.conversion.card import make_card, read_card
from tests.calibration.test_receipt import RECEIPT, UNMEASURED

SOURCE = """---
license: other
license_name: special
license_link: LICENSE
language:
- en
- de
base_model: someone/Base
library_name: transformers
tags:
- chat
- mlx
model-index:
- name: x
---
# The model

It is good, says `---`.
"""


def front_matter(card: str) -> dict:
    _, text, _ = card.split("---\n", 2)
    return yaml.safe_load(text)


def test_front_matter_is_the_hubs_and_carries_the_licence() -> None:
    data = front_matter(make_card(RECEIPT, SOURCE, name="out"))
    assert data == {
        "library_name": "mlx",
        "base_model": "owner/Model-1B",
        "base_model_relation": "quantized",
        "license": "other",
        "license_name": "special",
        "license_link": "LICENSE",
        "language": ["en", "de"],
        "pipeline_tag": "text-generation",
        "tags": ["mlx", "mlx-edge", "chat"],
    }


def test_a_source_without_card_or_hub_id_has_no_base_model() -> None:
    data = front_matter(make_card(replace(RECEIPT, model="pocket"), name="out"))
    assert data == {
        "library_name": "mlx",
        "pipeline_tag": "text-generation",
        "tags": ["mlx", "mlx-edge"],
    }
    data = front_matter(
        make_card(replace(RECEIPT, model="local", method="floats"), SOURCE, name="out")
    )
    assert data["base_model"] == "someone/Base" and "base_model_relation" not in data


def test_every_figure_of_the_receipt_is_in_the_table() -> None:
    card = make_card(RECEIPT, name="out")
    for word, value in RECEIPT.table():
        assert f"| {word} | {value} |" in card
    assert "python -m mlx_edge.generate --model out" in card
    assert "not measured: the model has no tokenizer" in make_card(UNMEASURED, name="out")
    odd = make_card(replace(UNMEASURED, reason="a | b\nc"), name="out")
    assert "not measured: a \\| b c |" in odd


def test_the_sources_card_stays_below_and_ours_is_replaced() -> None:
    card = make_card(RECEIPT, SOURCE, name="out")
    assert card.endswith(
        "## The card of owner/Model-1B\n\n# The model\n\nIt is good, says `---`.\n"
    )
    assert make_card(RECEIPT, card, name="out") == card
    again = make_card(replace(RECEIPT, method="awq"), card, name="out")
    assert again.count("## Quality") == 1 and "| Method | awq" in again and "gptq" not in again
    assert again.count("It is good") == 1


@pytest.mark.parametrize(
    "text", ["---\nfoo: [1\n---\nbody\n", "---\n- 1\n---\nbody\n", "---\r\n3\r\n---\r\nbody\n"]
)
def test_front_matter_that_is_broken_is_left_out(text) -> None:
    assert read_card(text) == ({}, "body\n")


@pytest.mark.parametrize("text", ["", "# Hi\n", "---\nlicense: mit\n", "text\n---\na: 1\n---\n"])
def test_a_card_without_front_matter_is_all_body(text) -> None:
    assert read_card(text) == ({}, text)
