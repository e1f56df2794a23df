"""Writes the table of families into docs/families.md: how far logits are from transformers', over all goldens.

Run it from the repository's root: PYTHONPATH=. python scripts/parity_table.py [--check]

The goldens are tiny random models, stored by scripts/make_goldens.py and scripts/make_vision_goldens.py; the tests hold
each of them to 1e-4. `--check` writes nothing, and says by its status whether the table names all families there are.
"""

import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

import mlx.core as mx
import numpy as np

from mlx_edge.models.decoder import Decoder
from mlx_edge.models.families import FAMILIES
from mlx_edge.models.load import load_model
from mlx_edge.models.vision.prompt import place_images
from tests.goldens.weights import draw_tokens
from tests.models.test_goldens import CHUNKS, GOLDENS, logits_in_chunks, read_golden, write_model
from tests.models.vision import folders as seeing

PAGE = Path(__file__).parents[1] / "docs" / "families.md"
MARKS = ("<!-- parity: begin -->\n", "<!-- parity: end -->\n")


@dataclass(frozen=True)
class Row:
    """One golden: the largest difference of a logit, relative to the largest logit, and the tiny model's size."""

    family: str
    difference: float
    num_parameters: int


def measure_text(path: Path, folder: Path) -> Row:
    """Whole, in parts, and token by token behind a cached prefix."""
    golden = read_golden(path)
    model = load_model(write_model(golden, "saved", folder))
    tokens = draw_tokens(golden["num_tokens"], model.config.vocab_size)
    found = [logits_in_chunks(model, tokens, chunks)[golden["positions"]] for chunks in CHUNKS]
    differences = [seeing.relative_difference(part, golden["logits"]) for part in found]
    family = golden["given"]["model_type"]
    return Row(family, max(differences), count(golden["shapes"]))


def measure_seeing(family: str, folder: Path) -> Row:
    """Prompts with one and several images."""
    model = load_model(seeing.write_model(family, folder))
    golden = seeing.read_golden(family)
    differences = [measure_case(model, family, case) for case in seeing.CASES]
    return Row(family, max(differences), count(golden["shapes"]))


def measure_case(model: Decoder, family: str, case: str) -> float:
    """One prompt with images."""
    assert model.vision is not None
    config = model.vision.config
    tokens = seeing.placed_once(family, case, config.image_token_id)
    prompt = place_images(tokens, seeing.draw_images(family, case, config), config)
    logits = np.array(model(mx.array([prompt.tokens]), images=prompt))[0]
    golden = seeing.read_golden(family)["cases"][case]
    return seeing.relative_difference(logits[golden["positions"]], golden["logits"])


def count(shapes: dict[str, list[int]]) -> int:
    """Numbers in all tensors."""
    return sum(int(np.prod(shape)) for shape in shapes.values())


def make_table() -> str:
    """A row per family, of all its goldens the largest difference and the largest model."""
    rows: list[Row] = []
    with tempfile.TemporaryDirectory() as name:
        for index, path in enumerate(GOLDENS):
            rows.append(measure_text(path, Path(name) / str(index)))
        rows += [measure_seeing(family, Path(name) / family) for family in seeing.FAMILIES]
    lines = [
        "| family | configurations | max relative difference | parameters of the tiny model |",
        "|---|---|---|---|",
    ]
    for family in FAMILIES:
        own = [row for row in rows if row.family == family]
        difference, size = (max(row.difference for row in own), max(r.num_parameters for r in own))
        lines.append(f"| `{family}` | {len(own)} | {difference:.1e} | {size} |")
    return "\n".join(lines) + "\n"


def listed_families(text: str) -> list[str]:
    """The families of the table in a page."""
    table = text.split(MARKS[0])[1].split(MARKS[1], maxsplit=1)[0]
    return [line.split("`")[1] for line in table.splitlines() if line.startswith("| `")]


def main() -> int:
    """Write the table, or compare its families."""
    text = PAGE.read_text()
    if "--check" in sys.argv[1:]:
        return int(listed_families(text) != list(FAMILIES))
    before, rest = text.split(MARKS[0])
    PAGE.write_text(before + MARKS[0] + make_table() + MARKS[1] + rest.split(MARKS[1])[1])
    return 0


if __name__ == "__main__":
    sys.exit(main())
