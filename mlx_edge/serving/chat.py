"""/v1/chat/completions: a conversation written by the model's template; the reply as text, thoughts and calls."""

import logging
from typing import Any

from mlx_edge.engine.request import Piece
from mlx_edge.options import OWN_VARIABLES
from mlx_edge.serving.answer import Answer
from mlx_edge.serving.errors import invalid
from mlx_edge.serving.generation import (
    check_length,
    describe_logprob,
    make_choices,
    make_request,
)
from mlx_edge.serving.images import check_places, choose_max_pixels, read_images
from mlx_edge.serving.messages import ImagePart, Message
from mlx_edge.serving.models import Served
from mlx_edge.serving.settings import Settings
from mlx_edge.serving.structured import make_grammar
from mlx_edge.serving.wire import ChatRequest, dump
from mlx_edge.text.tool_calls import (
    ArgumentText,
    CallBegun,
    ContentText,
    Event,
    Note,
    ReasoningText,
    ReplyParser,
    collect,
    to_template,
)

logger = logging.getLogger(__name__)
EFFORT = "reasoning_effort"


class ChatAnswer(Answer):
    """The assistant's next message, as often as choices were asked for."""

    prefix, kinds = "chatcmpl", ("chat.completion", "chat.completion.chunk")

    def __init__(self, body: ChatRequest, served: Served, settings: Settings, client: str) -> None:
        super().__init__(body, served)
        check_combination(body)
        images = read_images(body.messages, served, settings.server.max_images)
        tools = [tool.model_dump(exclude_none=True) for tool in body.tools or ()]
        choice = dump(body.tool_choice)
        prompt = self._write_prompt(body, served, settings, [] if choice == "none" else tools)
        if settings.server.log_prompts:
            logger.info("%s asks: %s", self.id, prompt)
        check_length(served, prompt)
        tokenizer = served.engine.tokenizer
        tokens = tokenizer.encode(prompt, add_special_tokens=False)
        check_places(tokens, body.messages, served)
        form = dump(body.response_format)
        plan = make_grammar(
            tokenizer,
            prompt=prompt,
            response_format=served.default_format if form is None and not tools else form,
            tools=tools,
            tool_choice=choice,
            parallel_tool_calls=body.parallel_tool_calls is not False,
        )
        request = make_request(
            body,
            tokens,
            served,
            settings.defaults,
            max_tokens=body.max_completion_tokens or body.max_tokens,
            logprobs=(body.top_logprobs or 0) if body.logprobs else None,
            client=client,
            grammar=plan.grammar,
            grammar_after=plan.grammar_after,
            images=images,
            max_pixels=choose_max_pixels(body),
        )
        choices = (body.separate_reasoning, settings.defaults.separate_reasoning)
        self._is_apart = next((c for c in choices if c is not None), plan.marks is None)
        self._has_thought: set[int] = set()  # choices whose thoughts came last, as content
        self.requests = make_choices(request, self.num_choices)
        self._parsers = [
            ReplyParser(
                tokenizer,
                prompt=prompt,
                tools=[] if choice == "none" else tools,
                is_bound=plan.is_bound,
                reasoning=plan.marks,
            )
            for _ in self.requests
        ]

    def whole(self, index: int, piece: Piece) -> dict[str, Any]:
        """A choice with the whole message."""
        parser = self._parsers[index]
        reply = collect([*parser.feed(piece.text), *parser.finish()])
        self._log_notes(reply.notes)
        message: dict[str, Any] = {"role": "assistant", "content": reply.content}
        if reply.reasoning and not self._is_apart:
            message["content"] = "\n".join(filter(None, (reply.reasoning, reply.content)))
        elif reply.reasoning:
            message |= _write_reasoning(reply.reasoning)
        if reply.calls:
            message["content"] = message["content"] or None
            message["tool_calls"] = [
                {
                    "id": call.id,
                    "type": "function",
                    "function": {"name": call.name, "arguments": call.arguments},
                }
                for call in reply.calls
            ]
        return self._choice(index, "message", message, piece, piece.finish_reason)

    def open(self) -> list[dict[str, Any]]:
        """Who speaks."""
        return [
            {"index": index, "delta": {"role": "assistant", "content": ""}, "finish_reason": None}
            for index in range(len(self.requests))
        ]

    def advance(self, index: int, piece: Piece) -> list[dict[str, Any]]:
        """What has become certain of the message."""
        parser = self._parsers[index]
        events = parser.feed(piece.text) if piece.text else []
        if piece.finish_reason is not None:
            events = [*events, *parser.finish()]
        deltas = [delta for item in events if (delta := self._delta(index, item)) is not None]
        if piece.finish_reason is not None or (piece.logprobs and not deltas):
            deltas.append({})
        last = len(deltas) - 1
        return [
            self._choice(
                index,
                "delta",
                delta,
                piece if number == 0 else None,
                piece.finish_reason if number == last else None,
            )
            for number, delta in enumerate(deltas)
        ]

    def _delta(self, choice: int, item: Event) -> dict[str, Any] | None:
        match item:
            case ContentText(text):
                line = "\n" if choice in self._has_thought else ""
                self._has_thought.discard(choice)
                return {"content": line + text}
            case ReasoningText(text) if not self._is_apart:
                self._has_thought.add(choice)
                return {"content": text}
            case ReasoningText(text):
                return _write_reasoning(text)
            case CallBegun(index, call_id, name):
                function = {"name": name, "arguments": ""}
                call = {"index": index, "id": call_id, "type": "function", "function": function}
                return {"tool_calls": [call]}
            case ArgumentText(index, text):
                return {"tool_calls": [{"index": index, "function": {"arguments": text}}]}
            case Note(text):
                self._log_notes((text,))
        return None

    def _choice(
        self,
        index: int,
        key: str,
        content: dict[str, Any],
        piece: Piece | None,
        finish_reason: str | None,
    ) -> dict[str, Any]:
        if finish_reason == "stop" and self._parsers[index].num_calls:
            finish_reason = "tool_calls"
        choice = {"index": index, key: content, "finish_reason": finish_reason}
        if self.requests[index].logprobs is not None and piece is not None:
            items = [describe_logprob(item) for item in piece.logprobs]
            choice["logprobs"] = {"content": items}
        return choice

    def _write_prompt(
        self, body: ChatRequest, served: Served, settings: Settings, tools: list[dict[str, Any]]
    ) -> str:
        """The conversation as text. Raises: InvalidRequestError for messages that the template refuses."""
        tokenizer = served.engine.tokenizer
        variables = {**settings.defaults.chat_template_args, **(body.chat_template_kwargs or {})}
        if taken := sorted(OWN_VARIABLES & variables.keys()):
            raise invalid(
                f"chat_template_kwargs sets {', '.join(taken)}, which the server sets itself",
                "chat_template_kwargs",
            )
        if body.reasoning_effort is not None:
            template = tokenizer.read_chat_template(served.chat_template, with_tools=bool(tools))
            if EFFORT in (template or ""):
                variables[EFFORT] = body.reasoning_effort
            else:
                self.ignored.add(EFFORT)
        if tools:
            variables["tools"] = tools
        messages = [_plain(message) for message in body.messages]
        text = tokenizer.apply_chat_template(
            to_template(tokenizer, messages),
            add_generation_prompt=True,
            tokenize=False,
            chat_template=served.chat_template,
            **variables,
        )
        return str(text)

    def _log_notes(self, notes: tuple[str, ...]) -> None:
        for note in notes:
            logger.debug("%s: %s", self.id, note)


def check_combination(body: ChatRequest) -> None:
    """Raises: ApiError for fields that contradict each other."""
    if body.top_logprobs is not None and not body.logprobs:
        raise invalid("top_logprobs needs logprobs: true", "top_logprobs")
    if body.tool_choice not in (None, "none", "auto") and not body.tools:
        raise invalid("tool_choice asks for a tool and there are no tools", "tool_choice")
    both = (body.max_tokens, body.max_completion_tokens)
    if None not in both and both[0] != both[1]:
        raise invalid(
            f"max_tokens is {both[0]} and max_completion_tokens {both[1]}; send one of them",
            "max_tokens",
        )


def _plain(message: Message) -> dict[str, Any]:
    """A message as templates know it: `developer` is the older `system`, thoughts have one name, images no content."""
    plain: dict[str, Any] = dump(message)
    if isinstance(message.content, list):
        parts = zip(message.content, plain["content"], strict=True)
        plain["content"] = [
            {"type": "image"} if isinstance(part, ImagePart) else each for part, each in parts
        ]
    if plain["role"] == "developer":
        plain["role"] = "system"
    for name in ("annotations", "refusal"):  # parts of OpenAI's answers that no template reads
        plain.pop(name, None)
    thoughts = plain.pop("reasoning", None)
    if thoughts is not None:
        plain.setdefault("reasoning_content", thoughts)
    return plain


def _write_reasoning(text: str) -> dict[str, str]:
    """Under mlx-lm's name and under the one that most clients read."""
    return {"reasoning": text, "reasoning_content": text}
