"""Text to token ids and back, from the files of a model folder, with the names of mlx-lm.

Deliberately knows no model and no tokenizer classes: the files decide, `tokenizer_class` does not.
What special tokens stand around a text is said by `add_bos_token` and `add_eos_token`, else by
tokenizer.json's post-processor, else (for a tokenizer.model) a BOS token stands before it.
`clean_up_tokenization_spaces` is not applied: it was made for WordPiece, transformers 5 ignores it
for BPE too, and a vocabulary that would need it is refused.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from mlx_edge.errors import InvalidRequestError, ModelFormatError
from mlx_edge.text.backend import Backend, PieceReader
from mlx_edge.text.chat_template import ChatTemplate
from mlx_edge.text.detokenizer import StreamingDetokenizer
from mlx_edge.text.tokenizer_config import TokenizerConfig, read_tokenizer_config

# Arguments of transformers' apply_chat_template that are no variables of a template.
_REFUSED_ARGUMENTS = {
    *("continue_final_message", "max_length", "padding", "return_assistant_tokens_mask"),
    *("return_dict", "return_tensors", "tokenizer_kwargs", "truncation"),
}


def load_tokenizer(folder: Path) -> Tokenizer:
    """Read the tokenizer of a model folder: tokenizer.json if there is one, else tokenizer.model.

    A broken, missing or contradictory file is a ModelFormatError of one line.
    """
    folder = Path(folder)
    config = read_tokenizer_config(folder)
    json_path, model_path = folder / "tokenizer.json", folder / "tokenizer.model"
    backend: Backend
    if json_path.exists():
        from mlx_edge.text.backend_json import JsonBackend

        backend = JsonBackend(json_path, config)
    elif model_path.exists():
        from mlx_edge.text.backend_sentencepiece import SentencePieceBackend

        backend = SentencePieceBackend(model_path, config)
    else:
        raise ModelFormatError(
            f"{folder} has no tokenizer, expected tokenizer.json or tokenizer.model; download "
            "the model again"
        )
    return Tokenizer(backend, config)


class Tokenizer:
    """A vocabulary with its special tokens and chat templates."""

    def __init__(self, backend: Backend, config: TokenizerConfig):
        """Join a vocabulary with the files beside it; a contradiction is a ModelFormatError."""
        self._backend = backend
        named = {name: token.content for name, token in config.named_tokens.items()}
        self._named_tokens = {**backend.named_tokens, **named}
        self._named_ids = {
            name: backend.token_to_id(token) for name, token in self._named_tokens.items()
        }
        for name in ("bos_token", "eos_token"):
            if name in named and self._named_ids[name] is None:
                raise ModelFormatError(
                    f"the {name} is {named[name]!r}, which the vocabulary of "
                    f"{backend.vocab_size} tokens lacks; correct tokenizer_config.json or "
                    "special_tokens_map.json"
                )
        self._eos_token_ids = self._collect_eos_ids(config.eos_ids)
        self._ends = self._find_ends(config)
        self._chat_templates = {
            name: ChatTemplate(source) for name, source in config.chat_templates.items()
        }
        self._special_ids = backend.special_ids | {
            index for index in self._named_ids.values() if index is not None
        }

    @property
    def vocab_size(self) -> int:
        """One more than the largest id that has a token, added ones included."""
        return self._backend.vocab_size

    @property
    def bos_token(self) -> str | None:
        """The token that begins a text, None if there is none."""
        return self._named_tokens.get("bos_token")

    @property
    def bos_token_id(self) -> int | None:
        """The id of `bos_token`."""
        return self._named_ids.get("bos_token")

    @property
    def eos_token(self) -> str | None:
        """The token that ends a text, None if there is none."""
        return self._named_tokens.get("eos_token")

    @property
    def eos_token_id(self) -> int | None:
        """The id of `eos_token`."""
        return self._named_ids.get("eos_token")

    @property
    def eos_token_ids(self) -> frozenset[int]:
        """All ids that end a generation: `eos_token`'s, the generation config's, those added."""
        return self._eos_token_ids

    @property
    def special_ids(self) -> frozenset[int]:
        """The ids that `skip_special_tokens` leaves out."""
        return self._special_ids

    def add_eos_token(self, token: str) -> None:
        """Let one more token end a generation: an id written as a number, else a token's text."""
        index = int(token) if token.isdecimal() and len(token) <= 10 else self.token_to_id(token)
        if index is None or self.id_to_token(index) is None:
            raise InvalidRequestError(
                f"{token!r} is no token of this vocabulary, expected a token's text or an id "
                f"below {self.vocab_size}"
            )
        self._eos_token_ids |= {index}

    def token_to_id(self, token: str) -> int | None:
        """Return the id of a piece or added token, None if there is none."""
        return self._backend.token_to_id(token)

    def id_to_token(self, token_id: int) -> str | None:
        """Return the piece or added token of an id in the vocabulary's spelling, else None."""
        return self._backend.id_to_token(token_id)

    def new_reader(self) -> PieceReader:
        """Return a reader of the bytes that each token adds to a new text."""
        return self._backend.new_reader()

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        """Return the ids of `text`; special tokens written out in it always become single ids."""
        try:
            text.encode()
        except UnicodeEncodeError as failure:
            raise InvalidRequestError(
                f"the prompt has half a surrogate pair at character {failure.start}, expected "
                "Unicode text; remove it"
            ) from failure
        if self._ends is None:
            return self._backend.encode(text, post_process=add_special_tokens)
        ids = self._backend.encode(text, post_process=False)
        before, after = self._ends if add_special_tokens else ([], [])
        return [*before, *ids, *after]

    def decode(self, ids: Iterable[int], skip_special_tokens: bool = False) -> str:
        """Return the text of `ids`; unknown ids add nothing, bad UTF-8 becomes U+FFFD."""
        detokenizer = self.new_detokenizer(skip_special_tokens=skip_special_tokens)
        for index in ids:
            detokenizer.add_token(index)
        detokenizer.finalize()
        return detokenizer.text

    @property
    def detokenizer(self) -> StreamingDetokenizer:
        """A fresh streaming detokenizer that shows special tokens."""
        return self.new_detokenizer()

    def new_detokenizer(self, *, skip_special_tokens: bool = False) -> StreamingDetokenizer:
        """Return a streaming detokenizer for one text."""
        skipped = self._special_ids if skip_special_tokens else frozenset()
        return StreamingDetokenizer(self._backend, skipped_ids=skipped)

    @property
    def has_chat_template(self) -> bool:
        """Whether the model says how a conversation is written."""
        return bool(self._chat_templates)

    def apply_chat_template(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        add_generation_prompt: bool = True,
        tokenize: bool = True,
        chat_template: str | None = None,
        **template_kwargs: Any,
    ) -> list[int] | str:
        """Write a conversation as the model was taught to read it: ids, or text without `tokenize`.

        `chat_template` is a template's name in the model's files, or a template itself;
        `template_kwargs` (`tools`, `enable_thinking`, ...) are variables of the template. The
        template writes the BOS token itself.
        """
        refused = sorted(_REFUSED_ARGUMENTS & set(template_kwargs))
        if refused:
            raise InvalidRequestError(
                f"apply_chat_template does not take {', '.join(refused)}; leave it out (to "
                "continue a message, append it to the text that tokenize=False returns)"
            )
        template = self._choose_template(chat_template, bool(template_kwargs.get("tools")))
        variables = {**self._named_tokens, **template_kwargs}
        text = template.render(
            messages, add_generation_prompt=add_generation_prompt, variables=variables
        )
        return self.encode(text, add_special_tokens=False) if tokenize else text

    def read_chat_template(
        self, chat_template: str | None = None, *, with_tools: bool = False
    ) -> str | None:
        """The source of the template that `apply_chat_template` would take, None if there is none."""
        try:
            return self._choose_template(chat_template, with_tools).source
        except InvalidRequestError:
            return None

    def _choose_template(self, wanted: str | None, with_tools: bool) -> ChatTemplate:
        """Choose as transformers does: by name, else "tool_use" with tools, else "default"."""
        known = self._chat_templates
        if wanted is not None:
            return known.get(wanted) or ChatTemplate(wanted)
        name = "tool_use" if with_tools and "tool_use" in known else "default"
        if name in known:
            return known[name]
        if not known:
            raise InvalidRequestError(
                "the model has no chat template; give the prompt as plain text or give a template"
            )
        names = ", ".join(map(repr, sorted(known)))
        raise InvalidRequestError(
            f"the model has no default chat template, only {names}; name one as chat_template"
        )

    def _collect_eos_ids(self, configured: Iterable[int]) -> frozenset[int]:
        for index in configured:
            if self._backend.id_to_token(index) is None:
                raise ModelFormatError(
                    f"eos_token_id {index} has no token in the vocabulary of {self.vocab_size}; "
                    "correct generation_config.json or config.json"
                )
        own = () if self.eos_token_id is None else (self.eos_token_id,)
        return frozenset((*configured, *own))

    def _find_ends(self, config: TokenizerConfig) -> tuple[list[int], list[int]] | None:
        """What `add_special_tokens` puts around a text, None if the post-processor knows."""
        if config.add_bos is None and config.add_eos is None and self._backend.post_processes:
            return None
        by_default = not self._backend.post_processes and self.bos_token_id is not None
        add_bos = by_default if config.add_bos is None else config.add_bos
        ends: list[list[int]] = []
        for name, wanted in (("bos_token", add_bos), ("eos_token", bool(config.add_eos))):
            index = self._named_ids.get(name)
            if wanted and index is None:
                raise ModelFormatError(
                    f"tokenizer_config.json says add_{name}, but there is no {name}; name it or "
                    "say false"
                )
            ends.append([index] if wanted and index is not None else [])
        return ends[0], ends[1]
