"""The text files of a model folder from the `tokenizer.*` metadata of a GGUF file, made by the `tokenizers` library.

Two kinds of vocabulary: "gpt2" (byte-level BPE, merges in order, a pre-tokenizer known by name) and "llama"
(SentencePiece BPE, a score for each piece). Keys: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md; what is
absent is what llama.cpp takes it for. Knows no weights.
"""

import json
from collections.abc import Mapping, Sequence
from typing import Any

from mlx_edge.conversion.gguf.pretokenizers import PRE_TOKENIZERS, PreTokenizer
from mlx_edge.conversion.gguf.vocabulary import (
    BYTE,
    CONTROL,
    PREFIX,
    UNKNOWN,
    USER_DEFINED,
    Vocabulary,
    rank_merges,
    read_merges,
    read_vocabulary,
)
from mlx_edge.errors import ModelFormatError, UnsupportedModelError
from mlx_edge.models.fields import Fields
from mlx_edge.text.message import one_line
from mlx_edge.weights.gguf_header import Value

SPACE_MARK = "\u2581"  # "▁"

# Control tokens that end a turn in llama and qwen models, of which files name one or two as eos and eot.
_ENDS = ("<|eot_id|>", "<|eom_id|>", "<|end_of_text|>", "<|im_end|>", "<|endoftext|>")
_NEUTRAL_IDS = tuple("seperator mask cls prefix suffix middle fim_pre fim_suf fim_mid".split())
_NEUTRAL_IDS += tuple("fim_pad fim_rep fim_sep".split())
_NEUTRAL = {f"{PREFIX}{word}_token_id" for word in _NEUTRAL_IDS}
_NEUTRAL |= {f"{PREFIX}token_type_count", "tokenizer.huggingface.json"}


def make_tokenizer_files(
    source: str, metadata: Mapping[str, Value], vocab_size: int
) -> dict[str, str]:
    """The content of tokenizer.json, tokenizer_config.json and generation_config.json, by name.

    `vocab_size` is the number of the token table's rows. Raises: ModelFormatError for a broken vocabulary,
    UnsupportedModelError for a kind, a pre-tokenizer or a key that is not known.
    """
    own = {key: value for key, value in metadata.items() if key.startswith("tokenizer.")}
    fields = Fields(own, source)
    kind = fields.string(f"{PREFIX}model")
    try:
        if kind == "gpt2":
            pre = _find_pre_tokenizer(fields)
            vocabulary = read_vocabulary(fields, vocab_size, adds_bos=pre.adds_bos, defaults={})
            tokenizer = _make_byte_level(vocabulary, read_merges(fields), pre)
        elif kind == "llama":
            vocabulary = read_vocabulary(
                fields, vocab_size, adds_bos=True, defaults={"bos": 1, "eos": 2, "unk": 0}
            )
            tokenizer = _make_sentencepiece(vocabulary, fields)
        else:
            raise UnsupportedModelError(
                f"{source}: {PREFIX}model is {kind[:40]!r}, expected gpt2 or llama; "
                "take the tokenizer from the model's own folder"
            )
        _add_tokens(tokenizer, vocabulary)
        tokenizer.encode("")
        tokenizer_json = tokenizer.to_str(pretty=True)
    except BaseException as error:
        if type(error) is Exception or type(error).__name__ == "PanicException":
            raise ModelFormatError(
                f"{source}: the vocabulary is not one ({one_line(error)}); convert the model again"
            ) from error
        raise
    config = _make_tokenizer_config(vocabulary, fields)
    fields.unread -= _NEUTRAL
    fields.refuse_unread()
    return {
        "tokenizer.json": tokenizer_json,
        "tokenizer_config.json": json.dumps(config, indent=2, ensure_ascii=False),
        "generation_config.json": json.dumps(_make_generation_config(vocabulary), indent=2),
    }


def _find_pre_tokenizer(fields: Fields) -> PreTokenizer:
    name = fields.string(f"{PREFIX}pre", "default")
    if name not in PRE_TOKENIZERS:
        raise UnsupportedModelError(
            f"{fields.name}: {PREFIX}pre is {name[:40]!r}, expected one of {', '.join(PRE_TOKENIZERS)}; "
            "take the tokenizer from the model's own folder"
        )
    return PRE_TOKENIZERS[name]


def _make_byte_level(
    vocabulary: Vocabulary, merges: Sequence[tuple[str, str]], pre: PreTokenizer
) -> Any:
    from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers

    model = models.BPE(
        vocab=vocabulary.ids(), merges=list(merges), ignore_merges=pre.ignores_merges
    )
    tokenizer = Tokenizer(model)
    if pre.normalizes:
        tokenizer.normalizer = normalizers.NFC()
    splits = [pre_tokenizers.Split(Regex(split), "isolated") for split in pre.splits]
    spelling = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([*splits, spelling])
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def _make_sentencepiece(vocabulary: Vocabulary, fields: Fields) -> Any:
    """A BPE that merges as SentencePiece does: always the two neighbours whose union has the highest score."""
    from tokenizers import Tokenizer, decoders, models, normalizers

    fields.string(f"{PREFIX}pre", "default")  # says nothing for this kind
    if fields.boolean(f"{PREFIX}remove_extra_whitespaces", False):
        raise UnsupportedModelError(
            f"{fields.name}: {PREFIX}remove_extra_whitespaces is not supported; "
            "take the tokenizer from the model's own folder"
        )
    model = models.BPE(
        vocab=vocabulary.ids(),
        merges=rank_merges(fields, vocabulary),
        unk_token=vocabulary.text("unk"),
        fuse_unk=True,
        byte_fallback=BYTE in vocabulary.types,
    )
    tokenizer = Tokenizer(model)
    marks: list[Any] = [normalizers.Replace(" ", SPACE_MARK)]
    spaces: list[Any] = [
        decoders.Replace(SPACE_MARK, " "),
        decoders.ByteFallback(),
        decoders.Fuse(),
    ]
    if fields.boolean(f"{PREFIX}add_space_prefix", True):
        marks.insert(0, normalizers.Prepend(SPACE_MARK))
        spaces.append(decoders.Strip(" ", 1, 0))
    tokenizer.normalizer = normalizers.Sequence(marks)
    tokenizer.decoder = decoders.Sequence(spaces)
    return tokenizer


def _add_tokens(tokenizer: Any, vocabulary: Vocabulary) -> None:
    """Tokens that are found in a text before anything else is, and what stands around a text."""
    from tokenizers import AddedToken
    from tokenizers.processors import TemplateProcessing

    is_special = {CONTROL: True, UNKNOWN: True, USER_DEFINED: False}
    added = [
        AddedToken(token, special=is_special[kind], normalized=False)
        for token, kind in zip(vocabulary.tokens, vocabulary.types, strict=True)
        if kind in is_special
    ]
    tokenizer.add_tokens(added)
    before = [vocabulary.text("bos")] if vocabulary.adds_bos else []
    after = [vocabulary.text("eos")] if vocabulary.adds_eos else []
    ids = vocabulary.ids()
    if before or after:
        tokenizer.post_processor = TemplateProcessing(
            single=[*before, "$A", *after],
            pair=[*before, "$A", *after, *before, "$B", *after],
            special_tokens=[(token, ids[token]) for token in (*before, *after) if token],
        )


def _make_tokenizer_config(vocabulary: Vocabulary, fields: Fields) -> dict[str, Any]:
    names = ("bos", "eos", "unk", "pad")
    config: dict[str, Any] = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "add_bos_token": vocabulary.adds_bos,
        "add_eos_token": vocabulary.adds_eos,
        "clean_up_tokenization_spaces": False,
    }
    config |= {f"{name}_token": vocabulary.text(name) for name in names if vocabulary.text(name)}
    templates = _read_templates(fields)
    if list(templates) == ["default"]:
        config["chat_template"] = templates["default"]
    elif templates:
        config["chat_template"] = [{"name": n, "template": t} for n, t in templates.items()]
    return config


def _read_templates(fields: Fields) -> dict[str, str]:
    key = "tokenizer.chat_template"
    templates = {"default": fields.string(key)} if key in fields.raw else {}
    for name in fields.strings("tokenizer.chat_templates"):
        if f"{key}.{name}" in fields.raw:
            templates[name] = fields.string(f"{key}.{name}")
    return templates


def _make_generation_config(vocabulary: Vocabulary) -> dict[str, Any]:
    """The ids that end a generation: the first is that of eos."""
    ids = [
        vocabulary.named_ids[name] for name in ("eos", "eot", "eom") if name in vocabulary.named_ids
    ]
    known = vocabulary.ids()
    ids += [known[t] for t in _ENDS if t in known and vocabulary.types[known[t]] == CONTROL]
    config: dict[str, Any] = {}
    if "bos" in vocabulary.named_ids:
        config["bos_token_id"] = vocabulary.named_ids["bos"]
    if ids:
        unique = list(dict.fromkeys(ids))
        config["eos_token_id"] = unique if len(unique) > 1 else unique[0]
    return config
