"""Messages as clients send them, as strict types: roles, and what a content is made of.

Knows neither what a model can read nor what an image holds (`images.py`).
"""

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Discriminator, Field, Tag, model_validator

Text = Annotated[str, Field(max_length=1 << 26)]
Name = Annotated[str, Field(max_length=256)]


class Wire(BaseModel):
    """Strict: no coercion, no unknown fields, no infinities."""

    model_config = ConfigDict(
        extra="forbid", strict=True, allow_inf_nan=False, protected_namespaces=()
    )


class TextPart(Wire):
    """A piece of a message."""

    type: Literal["text"]
    text: Text


class ImageUrl(Wire):
    """An image in a `data:` URI."""

    url: Text
    detail: Literal["auto", "low", "high"] | None = None


def _of_url(value: Any) -> str:
    return "<url>" if isinstance(value, str) else "<object>"


class ImagePart(Wire):
    """An image in a message; `images.py` reads it. The bare string is what some clients send for the object."""

    type: Literal["image_url"]
    image_url: Annotated[
        Annotated[Text, Tag("<url>")] | Annotated[ImageUrl, Tag("<object>")],
        Discriminator(_of_url),
    ]

    @property
    def url(self) -> str:
        """What was sent for the image."""
        return self.image_url if isinstance(self.image_url, str) else self.image_url.url


class OtherPart(BaseModel):
    """A piece of a message that no model here can read."""

    model_config = ConfigDict(extra="allow")
    type: str

    @model_validator(mode="after")
    def _refuse(self) -> "OtherPart":
        if noun := {"input_audio": "audio", "file": "files"}.get(self.type):
            raise ValueError(f"this model takes no {noun}")
        raise ValueError(
            f"the type of a content part is {self.type[:40]!r}, expected 'text' or 'image_url'"
        )


def read_field(value: Any, name: str) -> Any:
    """A field of what was sent, or of what was made of it."""
    return value.get(name) if isinstance(value, dict) else getattr(value, name, None)


def _of_part(value: Any) -> str:
    kind = read_field(value, "type")
    return f"<{kind}>" if kind in ("text", "image_url") else "<other>"


Part = Annotated[
    Annotated[TextPart, Tag("<text>")]
    | Annotated[ImagePart, Tag("<image_url>")]
    | Annotated[OtherPart, Tag("<other>")],
    Discriminator(_of_part),
]
Content = Text | Annotated[list[Part], Field(max_length=1024)]


class FunctionCall(Wire):
    """What the model called."""

    name: Name
    arguments: Text


class ToolCall(Wire):
    """A call in an earlier answer."""

    id: Name
    type: Literal["function"] = "function"
    function: FunctionCall
    index: int | None = None


class SystemMessage(Wire):
    """What the model is told about its part; `developer` is OpenAI's newer word."""

    role: Literal["system", "developer"]
    content: Content
    name: Name | None = None


class UserMessage(Wire):
    """What was asked."""

    role: Literal["user"]
    content: Content
    name: Name | None = None


class AssistantMessage(Wire):
    """What was answered before."""

    role: Literal["assistant"]
    content: Content | None = None
    name: Name | None = None
    tool_calls: Annotated[list[ToolCall], Field(max_length=128)] | None = None
    reasoning: Text | None = None
    reasoning_content: Text | None = None
    refusal: Text | None = None
    annotations: list[Any] | None = None  # clients send answers back as they got them
    audio: None = None
    function_call: None = None


class ToolMessage(Wire):
    """What a tool answered."""

    role: Literal["tool"]
    content: Content
    tool_call_id: Name
    name: Name | None = None


def _of_role(value: Any) -> str:
    role = read_field(value, "role")
    return f"<{'system' if role == 'developer' else role}>"


Message = Annotated[
    Annotated[SystemMessage, Tag("<system>")]
    | Annotated[UserMessage, Tag("<user>")]
    | Annotated[AssistantMessage, Tag("<assistant>")]
    | Annotated[ToolMessage, Tag("<tool>")],
    Discriminator(
        _of_role,
        custom_error_type="unknown_role",
        custom_error_message="Expected a message whose role is system, developer, user, assistant or tool",
    ),
]
