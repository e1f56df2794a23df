"""The small JSON files beside a vocabulary, read into one frozen dataclass.

    special_tokens_map.json, tokenizer_config.json  names of special tokens (the latter file wins)
    tokenizer_config.json, added_tokens.json        added tokens (the latter: older repositories)
    generation_config.json, else config.json        end-of-text ids
    chat_template.jinja, else tokenizer_config.json, else chat_template.json; further templates
        in additional_chat_templates/*.jinja

Deliberately knows no vocabulary: whether a token exists is for the tokenizer to say. Keys that
steer neither text nor ids (`model_max_length`, `padding_side`, `tokenizer_class`, ...) are not
read; a `tokenizer_class` is never imported.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mlx_edge.errors import ModelFormatError
from mlx_edge.text.message import one_line

_TOKEN_NAMES = frozenset(("bos_token", "eos_token", "unk_token", "pad_token"))


@dataclass(frozen=True)
class AddedToken:
    """A token matched in a text before the vocabulary is asked; `id` None if only named."""

    content: str
    id: int | None = None
    special: bool = True
    lstrip: bool = False
    rstrip: bool = False
    single_word: bool = False
    normalized: bool = False


@dataclass(frozen=True)
class TokenizerConfig:
    """What the files of a folder say beside its vocabulary; None where they say nothing."""

    named_tokens: Mapping[str, AddedToken] = field(default_factory=dict)  # "bos_token" -> ...
    added_tokens: tuple[AddedToken, ...] = ()  # by id, those without an id last
    eos_ids: tuple[int, ...] = ()
    add_bos: bool | None = None
    add_eos: bool | None = None
    add_prefix_space: bool | None = None
    legacy: bool = False
    clean_up_spaces: bool = False
    chat_templates: Mapping[str, str] = field(default_factory=dict)  # "default", "tool_use", ...


def read_tokenizer_config(folder: Path) -> TokenizerConfig:
    """Read the files that are there; one that cannot be understood is a ModelFormatError."""
    config_path = folder / "tokenizer_config.json"
    config = read_json(config_path)
    names = {**read_json(folder / "special_tokens_map.json"), **config}
    return TokenizerConfig(
        named_tokens=_named_tokens(names, config_path),
        added_tokens=_added_tokens(folder, names),
        eos_ids=_eos_ids(folder),
        add_bos=_flag(config, "add_bos_token", config_path),
        add_eos=_flag(config, "add_eos_token", config_path),
        add_prefix_space=_flag(config, "add_prefix_space", config_path),
        legacy=bool(_flag(config, "legacy", config_path)),
        clean_up_spaces=bool(_flag(config, "clean_up_tokenization_spaces", config_path)),
        chat_templates=_chat_templates(folder, config.get("chat_template")),
    )


def read_json(path: Path) -> dict[str, Any]:
    """Return the object in a JSON file, {} if there is no such file."""
    try:
        content = json.loads(read_text(path))
    except FileNotFoundError:
        return {}
    except (ValueError, RecursionError) as failure:
        raise ModelFormatError(
            f"{path} is not valid JSON ({one_line(failure)}); download it again or mend it"
        ) from failure
    if not isinstance(content, dict):
        raise _unexpected(path, "the top level", content, "an object")
    return content


def read_text(path: Path) -> str:
    """Return the text of a file; FileNotFoundError if there is none, else ModelFormatError."""
    try:
        return path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise
    except (OSError, UnicodeDecodeError) as failure:
        raise ModelFormatError(
            f"{path} cannot be read as UTF-8 text ({one_line(failure)}); download it again"
        ) from failure


def _unexpected(path: Path, key: str, found: object, expected: str) -> ModelFormatError:
    shown = repr(found)
    shown = shown if len(shown) <= 60 else shown[:57] + "..."
    return ModelFormatError(f"{path}: {key} is {shown}, expected {expected}; mend the file")


def _flag(config: Mapping[str, Any], key: str, path: Path) -> bool | None:
    value = config.get(key)
    if value is None or isinstance(value, bool):
        return value
    raise _unexpected(path, key, value, "true, false or null")


def _token(value: object, path: Path, key: str, *, token_id: int | None = None) -> AddedToken:
    """Read a token: a string, or an object with `content` and its flags."""
    if isinstance(value, str) and value:
        return AddedToken(value, token_id)
    if not isinstance(value, dict) or not isinstance(value.get("content"), str):
        raise _unexpected(path, key, value, "a string or an object with a content")
    if not value["content"]:
        raise _unexpected(path, key, value, "a token that is not empty")
    flags = {
        name: flag
        for name in ("special", "lstrip", "rstrip", "single_word", "normalized")
        if (flag := _flag(value, name, path)) is not None
    }
    if token_id is not None:  # a numbered token is special only where the file says so
        flags.setdefault("special", False)
    return AddedToken(value["content"], token_id, **flags)


def _named_tokens(names: Mapping[str, Any], path: Path) -> dict[str, AddedToken]:
    extra = names.get("extra_special_tokens")
    if isinstance(extra, dict):  # {"image_token": "<image>"}: more names
        names = {**extra, **names}
    return {
        key: _token(value, path, key)
        for key, value in names.items()
        if value not in (None, "") and (key in _TOKEN_NAMES or _may_be_token(key, value))
    }


def _may_be_token(key: str, value: object) -> bool:
    """Other keys in `_token` are tokens only if they look like one (`add_bos_token` is a flag)."""
    return key.endswith("_token") and isinstance(value, str | dict)


def _added_tokens(folder: Path, names: Mapping[str, Any]) -> tuple[AddedToken, ...]:
    path = folder / "tokenizer_config.json"
    numbered = names.get("added_tokens_decoder") or {}
    if not isinstance(numbered, dict):
        raise _unexpected(path, "added_tokens_decoder", numbered, "an object")
    tokens: dict[int, AddedToken] = {}
    old_path = folder / "added_tokens.json"
    for content, token_id in read_json(old_path).items():
        index = _token_id(token_id, old_path, content)
        tokens[index] = AddedToken(content, index, special=False)
    for key, value in numbered.items():
        is_number = key.isdecimal() and len(key) <= 10
        index = _token_id(int(key) if is_number else key, path, "added_tokens_decoder")
        tokens[index] = _token(value, path, f"added_tokens_decoder.{key}", token_id=index)
    unnumbered = []
    for key in ("additional_special_tokens", "extra_special_tokens"):
        entries = names.get(key) or []
        if not isinstance(entries, list | dict):
            raise _unexpected(path, key, entries, "a list of tokens")
        unnumbered += [
            _token(entry, path, key) for entry in entries if not isinstance(entries, dict)
        ]
    return (*(tokens[index] for index in sorted(tokens)), *unnumbered)


def _token_id(value: object, path: Path, key: str) -> int:
    if isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 2**31:
        return value
    raise _unexpected(path, key, value, "a token id")


def _eos_ids(folder: Path) -> tuple[int, ...]:
    """End-of-text ids: the generation config outranks the model config, then its text part."""
    generation, model = folder / "generation_config.json", folder / "config.json"
    config = read_json(model)
    text_config = config.get("text_config")
    sources = [(generation, read_json(generation)), (model, config)]
    if isinstance(text_config, dict):
        sources.append((model, text_config))
    for path, source in sources:
        value = source.get("eos_token_id")
        if value is not None:
            values = value if isinstance(value, list) else [value]
            return tuple(_token_id(entry, path, "eos_token_id") for entry in values)
    return ()


def _chat_templates(folder: Path, configured: object) -> dict[str, str]:
    templates = _read_configured(configured, folder / "tokenizer_config.json")
    if not templates:
        path = folder / "chat_template.json"
        templates = _read_configured(read_json(path).get("chat_template"), path)
    for path in sorted(folder.glob("additional_chat_templates/*.jinja")):
        templates[path.stem] = read_text(path)
    path = folder / "chat_template.jinja"
    if path.is_file():
        templates["default"] = read_text(path)
    return templates


def _read_configured(value: object, path: Path) -> dict[str, str]:
    """Read the three spellings: one string, an object of strings, a list of {name, template}."""
    if value is None:
        return {}
    if isinstance(value, str):
        return {"default": value}
    if isinstance(value, list) and all(isinstance(entry, dict) for entry in value):
        value = {entry.get("name"): entry.get("template") for entry in value}
    if isinstance(value, dict) and all(
        isinstance(part, str) for item in value.items() for part in item
    ):
        return dict(value)
    raise _unexpected(path, "chat_template", value, "a string or a list of {name, template}")
