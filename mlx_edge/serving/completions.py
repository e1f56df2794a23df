"""/v1/completions: one prompt or several, as text or tokens, continued as they are."""

from collections.abc import Sequence
from typing import Any

from mlx_edge.decoding.stream import encode_text
from mlx_edge.engine.request import Piece, TokenLogprob
from mlx_edge.serving.answer import Answer
from mlx_edge.serving.errors import invalid
from mlx_edge.serving.generation import check_length, make_choices, make_request
from mlx_edge.serving.models import Served
from mlx_edge.serving.settings import Defaults
from mlx_edge.serving.structured import make_grammar
from mlx_edge.serving.wire import MAX_CHOICES, CompletionRequest, dump


class CompletionAnswer(Answer):
    """Texts that follow the prompts: choice `p * n + k` is the k-th of prompt p."""

    prefix, kinds = "cmpl", ("text_completion", "text_completion")

    def __init__(
        self, body: CompletionRequest, served: Served, defaults: Defaults, client: str
    ) -> None:
        super().__init__(body, served)
        prompts = _read_prompts(body)
        if len(prompts) * self.num_choices > MAX_CHOICES:
            count = len(prompts) * self.num_choices
            raise invalid(f"{count} choices were asked for, at most {MAX_CHOICES} are given", "n")
        form = dump(body.response_format) or served.default_format
        plan = make_grammar(served.engine.tokenizer, response_format=form)
        self._offsets = [0] * (len(prompts) * self.num_choices)
        requests = []
        for prompt in prompts:
            request = make_request(
                body,
                _encode(served, prompt),
                served,
                defaults,
                max_tokens=body.max_tokens,
                logprobs=body.logprobs,
                client=client,
                grammar=plan.grammar,
            )
            requests += make_choices(request, self.num_choices)
        self.requests = requests

    def whole(self, index: int, piece: Piece) -> dict[str, Any]:
        """A choice with all its text."""
        return self._choice(index, piece)

    def advance(self, index: int, piece: Piece) -> list[dict[str, Any]]:
        """A choice with the text that is new."""
        is_empty = not piece.text and not piece.logprobs and piece.finish_reason is None
        return [] if is_empty else [self._choice(index, piece)]

    def _choice(self, index: int, piece: Piece) -> dict[str, Any]:
        return {
            "index": index,
            "text": piece.text,
            "logprobs": self._logprobs(index, piece.logprobs) if piece.logprobs else None,
            "finish_reason": piece.finish_reason,
        }

    def _logprobs(self, index: int, items: Sequence[TokenLogprob]) -> dict[str, Any]:
        """Four lists, in the older form of OpenAI's API."""
        offsets = []
        for item in items:
            offsets.append(self._offsets[index])
            self._offsets[index] += len(item.text)
        return {
            "tokens": [item.text for item in items],
            "token_logprobs": [max(item.logprob, -9999.0) for item in items],
            "top_logprobs": [
                {other.text: max(other.logprob, -9999.0) for other in item.top} for item in items
            ],
            "text_offset": offsets,
        }


def _read_prompts(body: CompletionRequest) -> list[str] | list[list[int]]:
    prompt: Any = body.prompt
    if isinstance(prompt, str) or isinstance(prompt[0], int):
        return [prompt]
    return list(prompt)


def _encode(served: Served, prompt: str | list[int]) -> Sequence[int]:
    if isinstance(prompt, str):
        check_length(served, prompt)
        return encode_text(served.engine.tokenizer, prompt)
    size = served.engine.vocab_size
    if over := [token for token in prompt if token >= size]:
        raise invalid(f"the prompt has token {over[0]}, the vocabulary has {size}", "prompt")
    return prompt
