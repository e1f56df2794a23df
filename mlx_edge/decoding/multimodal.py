"""Text about images: a model that sees and its tokenizer, with the names of mlx-vlm's command.

Writes the user's turn by the model's own chat template, images before text; all else is `stream.py`'s.
"""

from collections.abc import Generator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mlx_edge.decoding.stream import (
    GenerationResponse,
    encode_text,
    generate,
    stream_generate,
)
from mlx_edge.errors import InvalidRequestError
from mlx_edge.models.interface import check_reads_images
from mlx_edge.models.load import load

if TYPE_CHECKING:  # it stands on numpy
    from mlx_edge.models.vision.reading import ImageSource


def write_user_turn(prompt: str, num_images: int = 0) -> dict[str, Any]:
    """The message of a user who shows images and then asks; without images its content is the text itself."""
    if not num_images:
        return {"role": "user", "content": prompt}
    images: list[dict[str, str]] = [{"type": "image"} for _ in range(num_images)]
    return {"role": "user", "content": [*images, {"type": "text", "text": prompt}]}


class MultimodalGenerator:
    """A loaded model that reads images.

    generator = MultimodalGenerator("folder or owner/name")
    print(generator.generate_caption("photo.jpg"))
    """

    def __init__(self, path_or_hf_repo: str, **load_options: Any) -> None:
        """Load the model; options and errors are those of `load`, and InvalidRequestError for a model of text alone."""
        self.model, self.tokenizer = load(path_or_hf_repo, **load_options)
        check_reads_images(self.model, True)

    def stream(
        self,
        prompt: str,
        images: "Sequence[ImageSource]" = (),
        *,
        system_prompt: str | None = None,
        template_variables: Mapping[str, Any] | None = None,
        **options: Any,
    ) -> Generator[GenerationResponse, None, None]:
        """Yield a response per token of the answer; `options` are those of `stream_generate`, `max_pixels` among them.

        An image is a path, a file's bytes, or an array (H, W, 3) of uint8. Where the model has no chat template,
        the prompt is read as it is and must have a place for each image itself.

        Raises: InvalidRequestError for images or a prompt that cannot be read.
        """
        tokens = self._encode(prompt, len(images), system_prompt, template_variables or {})
        return stream_generate(self.model, self.tokenizer, tokens, images=images, **options)

    def generate(
        self,
        prompt: str,
        images: "Sequence[ImageSource]" = (),
        *,
        system_prompt: str | None = None,
        template_variables: Mapping[str, Any] | None = None,
        **options: Any,
    ) -> str:
        """The whole answer; as `stream`."""
        tokens = self._encode(prompt, len(images), system_prompt, template_variables or {})
        return generate(self.model, self.tokenizer, tokens, images=images, **options)

    def generate_caption(
        self, path: str | Path, prompt: str = "Describe this image.", **options: Any
    ) -> str:
        """What the model says of one image; as `generate`."""
        return self.generate(prompt, [path], **options)

    def _encode(
        self,
        prompt: str,
        num_images: int,
        system_prompt: str | None,
        variables: Mapping[str, Any],
    ) -> list[int]:
        if not self.tokenizer.has_chat_template:
            if system_prompt is not None or variables:
                raise InvalidRequestError(
                    "system_prompt and template_variables need a chat template, and this tokenizer has none"
                )
            return encode_text(self.tokenizer, prompt)
        messages = [write_user_turn(prompt, num_images)]
        if system_prompt is not None:
            messages.insert(0, {"role": "system", "content": system_prompt})
        tokens = self.tokenizer.apply_chat_template(messages, **variables)
        assert isinstance(tokens, list)
        return tokens
