"""OpenAI's messages as a chat template wants them: arguments as it reads them, ids that it takes, text as text.

Knows no roles beyond what it changes, and not whether a template can show tools at all.
"""

from __future__ import annotations

import copy
import hashlib
import json
import weakref
from collections.abc import Mapping, Sequence
from typing import Any

from mlx_edge.errors import InvalidRequestError, ModelFormatError
from mlx_edge.text.reasoning import read_template
from mlx_edge.text.tokenizer import Tokenizer
from mlx_edge.text.tools.families import find_format

_PROBE = "probe_of_arguments"
_ID_ALPHABET = "0123456789abcdefghijklmnopqrstuvwxyz"
_takes_text: weakref.WeakKeyDictionary[Tokenizer, bool] = weakref.WeakKeyDictionary()


def to_template(
    tokenizer: Tokenizer, messages: Sequence[Mapping[str, Any]]
) -> list[dict[str, Any]]:
    """The messages for `tokenizer.apply_chat_template`, as copies.

    A `content` of text parts becomes one text, one with images stays, an absent one is the empty text. The arguments
    of calls, which OpenAI gives as JSON text, become objects where the template writes objects as JSON. A message of
    role "tool" gets the `name` of the function whose `tool_call_id` it answers, if it has none.

    Raises: InvalidRequestError, naming the field, for arguments that are no JSON object and parts that are no text.
    """
    form = find_format(read_template(tokenizer))
    names: dict[str, str] = {}
    written = []
    for number, message in enumerate(messages):
        one = copy.deepcopy(dict(message))
        one["content"] = _join_parts(f"messages[{number}].content", one.get("content"))
        if one.get("tool_calls"):
            place = f"messages[{number}].tool_calls"
            one["tool_calls"] = [
                _write_call(tokenizer, f"{place}[{n}]", call, names, form.id_length)
                for n, call in enumerate(one["tool_calls"])
            ]
        else:
            one.pop("tool_calls", None)
        call_id = one.get("tool_call_id")
        if isinstance(call_id, str):
            if call_id in names:
                one.setdefault("name", names[call_id])
            one["tool_call_id"] = _shorten(call_id, form.id_length)
        written.append(one)
    return written


def _join_parts(place: str, content: Any) -> str | list[dict[str, Any]]:
    if content is None or isinstance(content, str):
        return content or ""
    if not isinstance(content, Sequence):
        raise InvalidRequestError(f"{place} is no text, expected a string or a list of parts")
    if any(isinstance(part, Mapping) and part.get("type") == "image" for part in content):
        return [dict(part) for part in content]  # the template says where an image stands
    texts = []
    for number, part in enumerate(content):
        text = (
            part.get("text") if isinstance(part, Mapping) and part.get("type") == "text" else None
        )
        if not isinstance(text, str):
            kind = part.get("type") if isinstance(part, Mapping) else part
            raise InvalidRequestError(
                f"{place}[{number}].type is {str(kind)[:40]!r}, expected 'text': this model reads text alone"
            )
        texts.append(text)
    return "\n".join(texts)


def _write_call(
    tokenizer: Tokenizer, place: str, call: Any, names: dict[str, str], id_length: int | None
) -> dict[str, Any]:
    function = call.get("function") if isinstance(call, Mapping) else None
    if not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
        raise InvalidRequestError(f"{place}.function is missing, expected a name and arguments")
    arguments = function.get("arguments")
    found = arguments
    if isinstance(arguments, str):
        try:
            found = json.loads(arguments or "{}")
        except (ValueError, RecursionError):
            found = None
    if not isinstance(found, Mapping):
        raise InvalidRequestError(
            f"{place}.function.arguments is {str(arguments)[:40]!r}, expected the JSON text of an object"
        )
    given: Any = found
    if _wants_text(tokenizer):
        given = arguments if isinstance(arguments, str) else json.dumps(found, ensure_ascii=False)
    call_id = str(call.get("id", ""))
    names[call_id] = function["name"]
    return {
        **call,
        "id": _shorten(call_id, id_length),
        "type": "function",
        "function": {**function, "arguments": given},
    }


def _shorten(call_id: str, length: int | None) -> str:
    """An id of `length` letters and digits, always the same for the same id."""
    if length is None or (len(call_id) == length and call_id.isalnum()):
        return call_id
    number = int.from_bytes(hashlib.sha256(call_id.encode()).digest())
    digits = []
    for _ in range(length):
        number, digit = divmod(number, len(_ID_ALPHABET))
        digits.append(_ID_ALPHABET[digit])
    return "".join(digits)


def _wants_text(tokenizer: Tokenizer) -> bool:
    """Whether the template takes arguments as JSON text: found by showing it an object."""
    if tokenizer not in _takes_text:
        _takes_text[tokenizer] = not _shows_object(tokenizer)
    return _takes_text[tokenizer]


def _shows_object(tokenizer: Tokenizer) -> bool:
    function = {"name": "f", "arguments": {_PROBE: "x"}}
    call = {"id": "a1b2c3d4e", "type": "function", "function": function}
    messages: list[dict[str, Any]] = [
        {"role": "user", "content": "x"},
        {"role": "assistant", "content": "", "tool_calls": [call]},
        {"role": "tool", "content": "x", "tool_call_id": call["id"], "name": "f"},
    ]
    try:
        text = tokenizer.apply_chat_template(messages, tokenize=False)
    except (InvalidRequestError, ModelFormatError):
        return False
    return f"'{_PROBE}'" not in str(text)
