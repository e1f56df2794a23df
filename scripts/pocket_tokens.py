"""Tokens for the pocket model: trains the tokenizer, encodes documents, packs them into rows.

No piece of the tokenizer joins a space to a capital letter, so a name has the same pieces after a space,
a quote or a bracket: the model can copy it. Documents are never cut; a row holds several, told apart by
number so that attention stays inside a document.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pocket_corpus
import sentencepiece
from pocket_corpus import Document

ROW_TOKENS = 256
PROMPT_WEIGHT = 0.05
UNKNOWN, BOS, EOS, PAD = 0, 1, 2, 3
USER, ASSISTANT = "<user>", "<assistant>"
DELIMITER = "\x01"
OPEN_ROWS = 48
TOKENIZER_SEED = 11
TOKENIZER_DOCUMENTS = 60_000


def separate_capitals(text: str) -> str:
    """Return the text with a border, which no piece may cross, before each capital behind a space."""
    return re.sub(r"( )(?=[A-Z])", r"\1" + DELIMITER, text)


def tokenizer_text() -> Iterator[str]:
    """Yield the lines the tokenizer is trained on."""
    stream = pocket_corpus.documents(TOKENIZER_SEED)
    for _ in range(TOKENIZER_DOCUMENTS):
        document = next(stream)
        if document.prompt:
            yield separate_capitals(document.prompt)
        yield separate_capitals(document.answer)


def train_tokenizer(path: Path, vocab_size: int) -> None:
    """Train the tokenizer and write it to `path` (which ends in `.model`)."""
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=tokenizer_text(),
        model_prefix=str(path.with_suffix("")),
        vocab_size=vocab_size,
        model_type="bpe",
        byte_fallback=True,
        split_digits=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        add_dummy_prefix=False,
        character_coverage=1.0,
        pretokenization_delimiter=DELIMITER,
        user_defined_symbols=[USER, ASSISTANT],
        unk_id=UNKNOWN,
        bos_id=BOS,
        eos_id=EOS,
        pad_id=PAD,
        num_threads=1,
        minloglevel=2,
    )


def encode_document(
    tokenizer: sentencepiece.SentencePieceProcessor, document: Document
) -> tuple[list[int], int]:
    """Return BOS, the document and EOS as ids, and how many of them are prompt (with BOS)."""
    answer = [*tokenizer.encode(document.answer), EOS]
    if document.prompt is None:
        return [BOS, *answer], 1
    prompt = [BOS, *tokenizer.encode(f"{USER}{document.prompt}{ASSISTANT}")]
    return prompt + answer, len(prompt)


class Packer:
    """Puts documents into rows of ROW_TOKENS + 1 ids: best fit among a few open rows."""

    def __init__(self) -> None:
        self.tokens: list[list[int]] = []
        self.weights: list[list[float]] = []
        self.owners: list[list[int]] = []
        self.open: list[int] = []

    def add(self, ids: list[int], prompt_length: int) -> None:
        """Add one document; too long a document is left out."""
        room = ROW_TOKENS + 1
        if len(ids) > room:
            return
        fitting = [row for row in self.open if len(self.tokens[row]) + len(ids) <= room]
        if fitting:
            row = max(fitting, key=lambda index: len(self.tokens[index]))
        else:
            if len(self.open) == OPEN_ROWS:
                self.open.remove(max(self.open, key=lambda index: len(self.tokens[index])))
            row = len(self.tokens)
            self.open.append(row)
            self.tokens.append([])
            self.weights.append([])
            self.owners.append([])
        owner = self.owners[row][-1] + 1 if self.owners[row] else 0
        self.tokens[row] += ids
        # weights[i] is the weight of predicting ids[i + 1]; the last id of a document predicts nothing
        self.weights[row] += [PROMPT_WEIGHT] * (prompt_length - 1)
        self.weights[row] += [1.0] * (len(ids) - prompt_length) + [0.0]
        self.owners[row] += [owner] * len(ids)

    def arrays(self) -> dict[str, np.ndarray]:
        """Return tokens, weights and owners as arrays (N, ROW_TOKENS + 1), rows shuffled."""
        room, order = ROW_TOKENS + 1, np.random.default_rng(0).permutation(len(self.tokens))
        columns: dict[str, tuple[list[Any], float, type[np.generic]]] = {
            "tokens": (self.tokens, PAD, np.int16),
            "weights": (self.weights, 0.0, np.float16),
            "owners": (self.owners, 255, np.uint8),
        }
        return {
            name: np.array([rows[i] + [fill] * (room - len(rows[i])) for i in order], dtype)
            for name, (rows, fill, dtype) in columns.items()
        }


def pack_corpus(
    tokenizer_path: Path, num_rows: int
) -> tuple[dict[str, np.ndarray], dict[str, float]]:
    """Return at least `num_rows` packed rows of the training stream, and counts of what is in them."""
    tokenizer = sentencepiece.SentencePieceProcessor(model_file=str(tokenizer_path))
    packer, stream = Packer(), pocket_corpus.documents()
    counts: dict[str, float] = {"documents": 0, "characters": 0, "tokens": 0}
    while len(packer.tokens) < num_rows:
        document = next(stream)
        ids, prompt_length = encode_document(tokenizer, document)
        packer.add(ids, prompt_length)
        kind = document.kind if document.kind in ("story", "screen") else "command"
        kind = "question" if document.kind.startswith("qa") else kind
        counts["documents"] += 1
        counts["characters"] += len(document.prompt or "") + len(document.answer)
        counts["tokens"] += len(ids)
        counts[f"{kind}_tokens"] = counts.get(f"{kind}_tokens", 0) + len(ids)
    return packer.arrays(), counts
