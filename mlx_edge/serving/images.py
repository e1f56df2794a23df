"""Images in the messages of a request: out of their `data:` URIs, checked, and in the order of the prompt's places.

Nothing is fetched from anywhere. Whatever is wrong is said with the place, as messages[3].content[1], before the
request begins. Knows no model beyond the token that stands for an image; pixels are the engine's.
"""

from collections.abc import Iterator, Sequence
from typing import Any

from mlx_edge.errors import InvalidRequestError
from mlx_edge.serving.errors import ApiError, invalid
from mlx_edge.serving.messages import ImagePart, Message
from mlx_edge.serving.models import Served
from mlx_edge.serving.wire import ChatRequest

MEANS = "send the image itself as a data: URI (data:image/png;base64,...)"


def read_images(messages: Sequence[Message], served: Served, most: int) -> tuple[bytes, ...]:
    """The image files of the messages, in their order; their text is let go of.

    Raises: ApiError that names the part: more than `most`, a model that reads text alone, a message of another role
    than user, an address on the web, base64 that is none, and a file that cannot be decoded.
    """
    found = list(_find(messages))
    if not found:
        return ()
    place, _, _ = found[0]
    if served.engine.image_token_id is None:
        raise _refuse(place, f"the model {served.name!r} reads text only; leave out the image")
    if len(found) > most:
        raise _refuse(
            found[most][0],
            f"the request has {len(found)} images, at most {most} are read; send fewer, or start the server with "
            "--max-images",
        )
    for place, role, _ in found:
        if role != "user":
            raise _refuse(
                place, f"an image in a message of role {role!r}, expected 'user'; move it to one"
            )
    images = tuple(_read(place, part.url) for place, _, part in found)
    for _, _, part in found:
        part.image_url = ""  # the request lives as long as its answer, and this can be 30 MB
    return images


def choose_max_pixels(body: ChatRequest) -> int | None:
    """To how many pixels images are scaled down, None: as the model says. Raises: ApiError for two answers."""
    other = body.mm_processor_kwargs.max_pixels if body.mm_processor_kwargs else None
    if None not in (other, body.max_pixels) and other != body.max_pixels:
        raise invalid(
            f"max_pixels is {body.max_pixels} and mm_processor_kwargs.max_pixels {other}; send one of them",
            "max_pixels",
        )
    return other if body.max_pixels is None else body.max_pixels


def check_places(tokens: Sequence[int], messages: Sequence[Message], served: Served) -> None:
    """Whether the prompt has a place for each image. Raises: ApiError that names the part, or the text, in the way."""
    token = served.engine.image_token_id
    if token is None:
        return
    found = [place for place, _, _ in _find(messages)]
    num_places = sum(each == token for each in tokens)
    if num_places == len(found):
        return
    mark = served.engine.tokenizer.id_to_token(token)
    if num_places < len(found):
        raise _refuse(
            found[num_places],
            f"the chat template has no place for it: {num_places} of {len(found)} images would be seen; "
            "leave it out, or start the server with another --chat-template",
        )
    raise invalid(
        f"a text of the messages holds {mark!r}, which stands for an image in this model's prompts; take it out",
        "messages",
    )


def _find(messages: Sequence[Message]) -> Iterator[tuple[str, str, ImagePart]]:
    """Place, role and part of every image."""
    for number, message in enumerate(messages):
        parts: Any = message.content if isinstance(message.content, list) else ()
        for index, part in enumerate(parts):
            if isinstance(part, ImagePart):
                yield f"messages[{number}].content[{index}]", message.role, part


def _read(place: str, url: str) -> bytes:
    """The file in a `data:` URI, which is decoded once so that what is wrong with it is said now."""
    from mlx_edge.models.vision.image import read_data_uri, read_image

    if url[:5].lower() != "data:":
        scheme = url[:16].partition(":")[0] if ":" in url[:16] else "no scheme"
        raise _refuse(
            place, f"the image is an address ({scheme}), and no address is fetched; {MEANS}"
        )
    try:
        data = read_data_uri(url)
        read_image(data, "the image")
    except InvalidRequestError as error:
        raise _refuse(place, str(error)) from None
    return data


def _refuse(place: str, message: str) -> ApiError:
    return invalid(f"{place}: {message}", place, "invalid_image")
