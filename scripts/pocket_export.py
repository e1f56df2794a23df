"""Writes a trained pocket model as a folder that every Llama loader reads.

float16 safetensors with the Hugging Face names, the configuration, both forms of the tokenizer, the chat
template. `tokenizer.json` is made from the pieces of `tokenizer.model`; `check_tokenizers` proves on a
sample of the corpus that both cut a text alike.
"""

from __future__ import annotations

import json
import shutil
from itertools import islice
from pathlib import Path
from typing import Any

import pocket_corpus
import sentencepiece
import torch
from pocket_model import NORM_EPS, PocketConfig
from pocket_tokens import ASSISTANT, BOS, EOS, PAD, UNKNOWN, USER

CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}"
    "{% if message['role'] == 'assistant' %}"
    "{{ '<assistant>' + message['content'] + eos_token }}"
    "{% else %}{{ '<user>' + message['content'] }}{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<assistant>' }}{% endif %}"
)
CONTEXT = 512
SPACE_MARK = "\u2581"


def model_config(config: PocketConfig) -> dict[str, Any]:
    """Return what config.json says."""
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "intermediate_size": config.intermediate_size,
        "num_hidden_layers": config.num_hidden_layers,
        "num_attention_heads": config.num_attention_heads,
        "num_key_value_heads": config.num_key_value_heads,
        "head_dim": config.head_dim,
        "hidden_act": "silu",
        "max_position_embeddings": CONTEXT,
        "rms_norm_eps": NORM_EPS,
        "rope_theta": config.rope_theta,
        "attention_bias": False,
        "mlp_bias": False,
        "tie_word_embeddings": True,
        "torch_dtype": "float16",
        "bos_token_id": BOS,
        "eos_token_id": EOS,
        "pad_token_id": PAD,
    }


def tokenizer_config() -> dict[str, Any]:
    """Return what tokenizer_config.json says."""
    special = {UNKNOWN: "<unk>", BOS: "<s>", EOS: "</s>", PAD: "<pad>"}
    added = {
        str(index): {
            "content": content,
            "lstrip": False,
            "normalized": False,
            "rstrip": False,
            "single_word": False,
            "special": True,
        }
        for index, content in special.items()
    }
    return {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "add_bos_token": True,
        "add_eos_token": False,
        "add_prefix_space": False,
        "legacy": False,
        "clean_up_tokenization_spaces": False,
        "model_max_length": CONTEXT,
        "bos_token": special[BOS],
        "eos_token": special[EOS],
        "unk_token": special[UNKNOWN],
        "pad_token": special[PAD],
        "added_tokens_decoder": added,
        "chat_template": CHAT_TEMPLATE,
    }


def merges_of(pieces: dict[str, int]) -> list[tuple[str, str]]:
    """Return the merges of a SentencePiece BPE vocabulary: a piece's id is its rank."""
    merges = []
    for piece, rank in pieces.items():
        for cut in range(1, len(piece)):
            left, right = piece[:cut], piece[cut:]
            if left in pieces and right in pieces:
                merges.append((rank, pieces[left], pieces[right], left, right))
    return [(left, right) for *_, left, right in sorted(merges)]


def build_tokenizer_json(model_path: Path) -> Any:
    """Return a `tokenizers.Tokenizer` with the pieces of a SentencePiece BPE model."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, processors

    processor = sentencepiece.SentencePieceProcessor(model_file=str(model_path))
    vocabulary = {processor.id_to_piece(i): i for i in range(processor.vocab_size())}
    plain = {
        piece: index
        for piece, index in vocabulary.items()
        if not (
            processor.is_control(index) or processor.is_byte(index) or processor.is_unknown(index)
        )
        and piece not in (USER, ASSISTANT)
    }
    tokenizer = Tokenizer(
        models.BPE(
            vocab=vocabulary,
            merges=merges_of(plain),
            unk_token=processor.id_to_piece(UNKNOWN),
            fuse_unk=True,
            byte_fallback=True,
        )
    )
    tokenizer.normalizer = normalizers.Replace(" ", SPACE_MARK)
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace(SPACE_MARK, " "), decoders.ByteFallback(), decoders.Fuse()]
    )
    control = [processor.id_to_piece(i) for i in (UNKNOWN, BOS, EOS, PAD)]
    tokenizer.add_special_tokens([AddedToken(c, normalized=False, special=True) for c in control])
    tokenizer.add_tokens(
        [AddedToken(c, normalized=False, special=False) for c in (USER, ASSISTANT)]
    )
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{control[1]} $A",
        pair=f"{control[1]} $A {control[1]} $B",
        special_tokens=[(control[1], BOS)],
    )
    return tokenizer


def check_tokenizers(model_path: Path, tokenizer: Any, count: int = 3000) -> None:
    """Raise if the two tokenizers disagree on a document of the corpus or on text outside it."""
    processor = sentencepiece.SentencePieceProcessor(model_file=str(model_path))
    texts = ["", " ", "  two  spaces\n", "Grüße, 你好 \U0001f642!", "O'Neil & Zoltan_3 = 007"]
    for document in islice(pocket_corpus.documents(5), count):
        texts.append(f"{USER}{document.prompt or ''}{ASSISTANT}{document.answer}")
    for text in texts:
        theirs, ours = processor.encode(text), tokenizer.encode(text, add_special_tokens=False).ids
        if theirs != ours:
            raise SystemExit(
                f"tokenizer.json cuts {text!r} into {ours}, SentencePiece into {theirs}"
            )


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Write an indented JSON file."""
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def export(checkpoint: Path, config: PocketConfig, tokenizer: Path, out: Path) -> None:
    """Write the model of a checkpoint, its tokenizer and its configuration into the folder `out`."""
    from safetensors.torch import save_file

    out.mkdir(parents=True, exist_ok=True)
    state = torch.load(checkpoint, weights_only=True)["model"]
    weights = {name: value.half().contiguous() for name, value in state.items()}
    save_file(weights, out / "model.safetensors", metadata={"format": "pt"})
    write_json(out / "config.json", model_config(config))
    generation = {"bos_token_id": BOS, "eos_token_id": EOS, "pad_token_id": PAD}
    write_json(out / "generation_config.json", generation)
    write_json(out / "tokenizer_config.json", tokenizer_config())
    shutil.copyfile(tokenizer, out / "tokenizer.model")
    fast = build_tokenizer_json(tokenizer)
    check_tokenizers(tokenizer, fast)
    fast.save(str(out / "tokenizer.json"))
    size = (out / "model.safetensors").stat().st_size
    print(f"{out.name}: {size} bytes of weights written", flush=True)
