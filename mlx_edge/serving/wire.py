"""What clients send, as strict types: OpenAI's fields, mlx-lm's sampling fields and a few of our own.

Every unknown field is refused. `IGNORED` are fields that known clients send and that change nothing here; they are
accepted and listed in the response header `x-mlx-edge-ignored-fields`. Messages are in `messages.py`. Knows no engine.
"""

from typing import Annotated, Any, Literal

from pydantic import BaseModel, Discriminator, Field, Tag, model_validator
from pydantic_core import PydanticCustomError

from mlx_edge.serving.messages import ImagePart, ImageUrl, Message, Name, Text, Wire, read_field

IGNORED = {
    *("metadata", "modalities", "prediction", "prompt_cache_key", "prompt_cache_options"),
    *("prompt_cache_retention", "safety_identifier", "service_tier", "store", "verbosity"),
}
REFUSED = {  # not unknown: what to use instead
    "adapters": "adapters are not served; fuse them into a model and serve that",
    "audio": "this model makes no audio",
    "best_of": "best_of is not served; ask for n choices",
    "draft_model": "the draft model is chosen when the server starts, with --draft-model",
    "echo": "echo is not served; the prompt is known to who sent it",
    "function_call": "function_call is not served; use tool_choice",
    "functions": "functions are not served; use tools",
    "num_draft_tokens": "it is chosen when the server starts, with --num-draft-tokens",
    "role_mapping": "role_mapping is not served; the chat template writes the roles",
    "suffix": "suffix is not served: the model continues a text, it does not fill one",
    "web_search_options": "this server does not search the web",
}
MAX_MESSAGES = 4096
MAX_CHOICES = 128
MAX_TOP_LOGPROBS = 20

Ignored = Annotated[Any, Field(description="accepted, and changes nothing")]
TokenId = Annotated[int, Field(ge=0, lt=1 << 31)]
Penalty = Annotated[float, Field(ge=-100, le=100)]
ContextSize = Annotated[int, Field(ge=1, le=1 << 20)]
NumPixels = Annotated[int, Field(ge=1, le=1 << 40)]


class Function(Wire):
    """A tool: its name, what it does, and a JSON schema of its arguments."""

    name: Annotated[str, Field(pattern=r"^[a-zA-Z0-9_-]{1,64}$")]
    description: Text | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


class Tool(Wire):
    """Only functions are tools."""

    type: Literal["function"]
    function: Function


class NamedFunction(Wire):
    """A name of one of the tools."""

    name: Name


class NamedTool(Wire):
    """The one tool to call."""

    type: Literal["function"]
    function: NamedFunction


class TextFormat(Wire):
    """Any text."""

    type: Literal["text"]


class JsonObjectFormat(Wire):
    """Any JSON object."""

    type: Literal["json_object"]


class JsonSchema(Wire):
    """A JSON schema under a name."""

    name: Annotated[str, Field(pattern=r"^[a-zA-Z0-9_-]{1,64}$")]
    description: Text | None = None
    schema_: Annotated[dict[str, Any], Field(alias="schema")]
    strict: bool | None = None


class JsonSchemaFormat(Wire):
    """JSON that a schema allows."""

    type: Literal["json_schema"]
    json_schema: JsonSchema


class RegexFormat(Wire):
    """A text that a regular expression matches whole."""

    type: Literal["regex"]
    regex: Annotated[str, Field(min_length=1, max_length=65536)]


class GrammarFormat(Wire):
    """A text of a Lark grammar, or of a ready one by its name: autoglm."""

    type: Literal["grammar"]
    grammar: Annotated[str, Field(min_length=1, max_length=1 << 20)]


def _of_format(value: Any) -> str:
    return f"<{read_field(value, 'type')}>"


ResponseFormat = Annotated[
    Annotated[TextFormat, Tag("<text>")]
    | Annotated[JsonObjectFormat, Tag("<json_object>")]
    | Annotated[JsonSchemaFormat, Tag("<json_schema>")]
    | Annotated[RegexFormat, Tag("<regex>")]
    | Annotated[GrammarFormat, Tag("<grammar>")],
    Discriminator(
        _of_format,
        custom_error_type="unknown_format",
        custom_error_message="Expected an object whose type is text, json_object, json_schema, regex or grammar",
    ),
]


class ProcessorOptions(Wire):
    """vLLM's place for the size of images."""

    max_pixels: NumPixels | None = None


class StreamOptions(Wire):
    """What comes with a stream."""

    include_usage: bool | None = None
    include_obfuscation: Ignored = None


class GenerationFields(Wire):
    """What both routes take."""

    model: Annotated[str, Field(min_length=1, max_length=512)] | None = None
    max_tokens: Annotated[int, Field(ge=1, le=1 << 24)] | None = None
    n: Annotated[int, Field(ge=1, le=MAX_CHOICES)] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    seed: Annotated[int, Field(ge=-(1 << 63), lt=1 << 63)] | None = None
    stop: (
        Annotated[str, Field(max_length=4096)]
        | Annotated[list[Annotated[str, Field(max_length=4096)]], Field(max_length=64)]
        | None
    ) = None
    temperature: Annotated[float, Field(ge=0, le=100)] | None = None
    top_p: Annotated[float, Field(ge=0, le=1)] | None = None
    top_k: Annotated[int, Field(ge=-1, le=1 << 31)] | None = None
    min_p: Annotated[float, Field(ge=0, le=1)] | None = None
    min_tokens_to_keep: Annotated[int, Field(ge=1, le=1 << 20)] | None = None
    xtc_probability: Annotated[float, Field(ge=0, le=1)] | None = None
    xtc_threshold: Annotated[float, Field(ge=0, le=0.5)] | None = None
    logit_bias: dict[Annotated[str, Field(pattern=r"^[0-9]{1,9}$")], Penalty] | None = None
    repetition_penalty: Annotated[float, Field(gt=0, le=100)] | None = None
    repetition_context_size: ContextSize | None = None
    presence_penalty: Penalty | None = None
    presence_context_size: ContextSize | None = None
    frequency_penalty: Penalty | None = None
    frequency_context_size: ContextSize | None = None
    response_format: ResponseFormat | None = None
    user: Name | None = None
    priority: Annotated[int, Field(ge=-100, le=100)] | None = None
    deadline_s: Annotated[float, Field(gt=0, le=86400)] | None = None
    ignore_eos: bool | None = None
    stop_token_ids: Annotated[list[TokenId], Field(max_length=1024)] | None = None
    prompt_lookup: bool | None = None
    use_prefix_cache: bool | None = None
    metadata: Ignored = None
    prediction: Ignored = None
    prompt_cache_key: Ignored = None
    prompt_cache_options: Ignored = None
    prompt_cache_retention: Ignored = None
    safety_identifier: Ignored = None
    service_tier: Ignored = None
    store: Ignored = None

    @model_validator(mode="before")
    @classmethod
    def _refuse(cls, value: Any) -> Any:
        if isinstance(value, dict):
            for name in sorted(REFUSED.keys() & value.keys()):
                if value[name] not in (None, False, [], {}):
                    words = {"words": REFUSED[name], "field": name}
                    raise PydanticCustomError("refused_field", "{words}", words)
            value = {key: item for key, item in value.items() if key not in REFUSED}
        return value

    def ignored(self) -> set[str]:
        """The fields that were sent and change nothing."""
        found = sent_fields(self) & IGNORED
        if self.stream_options and self.stream_options.include_obfuscation is not None:
            found.add("stream_options.include_obfuscation")
        return found

    @property
    def has_images(self) -> bool:
        """Whether there is an image to be decoded."""
        return False


class ChatRequest(GenerationFields):
    """The body of /v1/chat/completions."""

    messages: Annotated[list[Message], Field(min_length=1, max_length=MAX_MESSAGES)]
    max_completion_tokens: Annotated[int, Field(ge=1, le=1 << 24)] | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=MAX_TOP_LOGPROBS)] | None = None
    tools: Annotated[list[Tool], Field(max_length=128)] | None = None
    tool_choice: Literal["none", "auto", "required"] | NamedTool | None = None
    parallel_tool_calls: bool | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    reasoning_effort: Name | None = None
    separate_reasoning: bool | None = None
    max_pixels: NumPixels | None = None
    mm_processor_kwargs: ProcessorOptions | None = None
    modalities: list[Literal["text"]] | None = None
    verbosity: Ignored = None

    def ignored(self) -> set[str]:
        """As of every request; how closely an image is looked at is `max_pixels` alone."""
        found = super().ignored()
        if not self.has_images:
            found |= {"max_pixels", "mm_processor_kwargs"} & sent_fields(self)
        urls = [image.image_url for image in self._images()]
        if any(isinstance(url, ImageUrl) and url.detail is not None for url in urls):
            found.add("image_url.detail")
        return found

    @property
    def has_images(self) -> bool:
        """Whether a message shows an image."""
        return bool(self._images())

    def _images(self) -> list[ImagePart]:
        parts = [p for m in self.messages if isinstance(m.content, list) for p in m.content]
        return [part for part in parts if isinstance(part, ImagePart)]


class CompletionRequest(GenerationFields):
    """The body of /v1/completions."""

    prompt: (
        Text
        | Annotated[list[Text], Field(min_length=1, max_length=256)]
        | Annotated[list[TokenId], Field(min_length=1, max_length=1 << 22)]
        | Annotated[
            list[Annotated[list[TokenId], Field(min_length=1, max_length=1 << 22)]],
            Field(min_length=1, max_length=256),
        ]
    )
    logprobs: Annotated[int, Field(ge=0, le=MAX_TOP_LOGPROBS)] | None = None


FIELDS = sorted({*ChatRequest.model_fields, *CompletionRequest.model_fields})  # for "did you mean"


def sent_fields(body: BaseModel) -> set[str]:
    """The names of fields that a client has set."""
    return {name for name in body.model_fields_set if getattr(body, name) is not None}


def dump(value: BaseModel | str | None) -> Any:
    """A part of the body as the client sent it."""
    if isinstance(value, BaseModel):
        return value.model_dump(by_alias=True, exclude_none=True)
    return value
