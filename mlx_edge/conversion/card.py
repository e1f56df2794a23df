"""The model card of a converted model: README.md with the front matter that the hub reads, and the receipt as a table.

What the source's card says stays below ours. Knows the receipt; measures nothing.
"""

import re
from collections.abc import Mapping
from typing import Any

from mlx_edge.calibration.receipt import FILE_NAME, Receipt

CARD_NAME = "README.md"
BEGIN, END = "<!-- mlx_edge: begin -->", "<!-- mlx_edge: end -->"
TAGS = ("mlx", "mlx-edge")

# What the source's front matter says of its own files, and what we say anew.
_NOT_CARRIED = ("library_name", "base_model_relation", "model-index", "tags")
_FRONT_MATTER = re.compile(r"\s*---[ \t]*\r?\n(.*?)\r?\n---[ \t]*(?:\r?\n|$)", re.DOTALL)
_HUB_ID = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*", re.ASCII)


def make_card(receipt: Receipt, source_card: str = "", *, name: str) -> str:
    """The content of the card. `source_card` is the source's, or an earlier one of ours; `name` is the new model's."""
    source_data, body = read_card(source_card)
    section = f"{BEGIN}\n{_make_section(receipt, name)}\n{END}\n"
    kept = re.sub(rf"{BEGIN}.*?{END}\s*", "", body, flags=re.DOTALL).strip()
    if kept and kept == body.strip():
        kept = f"## The card of {receipt.model}\n\n{kept}"
    card = f"---\n{_dump(merge_front_matter(source_data, receipt))}---\n\n{section}"
    return f"{card}\n{kept}\n" if kept else card


def read_card(text: str) -> tuple[dict[str, Any], str]:
    """Front matter and body of a card; front matter that is no YAML object is left out with its marks."""
    from huggingface_hub import RepoCard

    match = _FRONT_MATTER.match(text)
    if match is None:
        return {}, text
    body = text[match.end() :]
    try:
        card = RepoCard(f"---\n{match[1]}\n---\n", ignore_metadata_errors=True)
    except Exception:  # of yaml, and ValueError: the card is a text of others
        return {}, body
    return {str(key): value for key, value in vars(card.data).items()}, body


def merge_front_matter(source: Mapping[str, Any], receipt: Receipt) -> dict[str, Any]:
    """What the hub shall know: the source's licence, languages and so on, with our library, tags and base model."""
    tags = source.get("tags")
    theirs = [str(tag) for tag in tags] if isinstance(tags, list) else []
    merged: dict[str, Any] = {"library_name": "mlx"}
    base = receipt.model if _HUB_ID.fullmatch(receipt.model) else source.get("base_model")
    if base is not None:
        merged["base_model"] = base
        if receipt.method != "floats":
            merged["base_model_relation"] = "quantized"
    merged |= {key: value for key, value in source.items() if key not in (*_NOT_CARRIED, *merged)}
    merged.setdefault("pipeline_tag", "text-generation")
    merged["tags"] = list(dict.fromkeys([*TAGS, *theirs]))
    return merged


def _dump(data: Mapping[str, Any]) -> str:
    from huggingface_hub import CardData

    text: str = CardData(**data).to_yaml()
    return text.rstrip("\n") + "\n"


def _make_section(receipt: Receipt, name: str) -> str:
    rows = "\n".join(f"| {word} | {_cell(value)} |" for word, value in receipt.table())
    return f"""# {name}

{receipt.model}, converted to MLX by mlx_edge {receipt.mlx_edge_version}.

```bash
pip install mlx-edge
python -m mlx_edge.generate --model {name} --prompt "Hello"
```

mlx-lm reads the same folder: `mlx_lm.generate --model {name} --prompt "Hello"`.

## Quality

What the conversion did to the model, measured against {receipt.model} on text that calibrated nothing; the same
figures are in `{FILE_NAME}`.

| | |
|---|---|
{rows}
"""


def _cell(value: str) -> str:
    return value.replace("|", "\\|").replace("\n", " ")
