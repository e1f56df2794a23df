"""Text about images: the class, the functions and the command, on tiny random models that see."""

from collections.abc import Callable, Iterable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from mlx_edge import InvalidRequestError, MultimodalGenerator, generate, load, stream_generate
from mlx_edge.convert import main as convert
from mlx_edge.decoding.multimodal import write_user_turn
from mlx_edge.generate import main
from mlx_edge.weights import Checkpoint
from tests.models.vision.folders import (
    FAMILIES,
    TEMPLATE,
    draw_picture,
    write_model,
    write_tokenizer,
)

Run = Callable[..., tuple[str, str]]
QUIET = ("--verbose", "False", "--max-tokens", "6")
ONE_PLACE = "see <image><|image|></image> this"


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("models")
    return {family: write_tokenizer(write_model(family, root / family)) for family in FAMILIES}


@pytest.fixture(scope="module")
def picture(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("pictures") / "one.png"
    Image.fromarray(draw_picture(1, 40, 24)).save(path)
    return path


@pytest.fixture
def run(capfd: pytest.CaptureFixture[str]) -> Run:
    """Run the command in this process; returns stdout and stderr, asserts the exit code."""

    def call(*arguments: str, code: int = 0) -> tuple[str, str]:
        found: object
        try:
            found = main(list(arguments))
        except SystemExit as exit_:
            found = exit_.code
        captured = capfd.readouterr()
        assert found == code, captured.err
        return captured.out, captured.err

    return call


@pytest.mark.parametrize("family", FAMILIES)
def test_every_way_to_ask_gives_the_same_text(
    family: str, folders: dict[str, Path], picture: Path, run: Run
) -> None:
    generator = MultimodalGenerator(str(folders[family]))
    wanted = generator.generate("what is this", [picture], max_tokens=6)
    pixels = np.asarray(Image.open(picture))
    for image in (picture, str(picture), picture.read_bytes(), pixels):
        found = "".join(r.text for r in generator.stream("what is this", [image], max_tokens=6))
        assert found == wanted
    assert generator.generate_caption(picture, "what is this", max_tokens=6) == wanted
    model, tokenizer = load(str(folders[family]))
    text = tokenizer.apply_chat_template([write_user_turn("what is this", 1)])
    assert isinstance(text, list)
    assert generate(model, tokenizer, text, images=[picture], max_tokens=6) == wanted
    assert generate(model, tokenizer, text, images=[picture], max_tokens=6, prompt_lookup=True) == (
        wanted
    )
    flags = ("--model", str(folders[family]), "--prompt", "what is this", *QUIET)
    assert run(*flags, "--image", str(picture))[0] == wanted + "\n"


def test_images_change_the_text_and_their_order_too(folders: dict[str, Path]) -> None:
    generator = MultimodalGenerator(str(folders["glm4v"]))
    one, two = draw_picture(1, 40, 24), draw_picture(2, 16, 56)
    asked: tuple[list[np.ndarray], ...] = ([], [one], [two], [one, two], [two, one])
    texts = [generator.generate("look", images, max_tokens=12) for images in asked]
    assert len(set(texts)) == len(texts)


def test_max_pixels_make_a_shorter_prompt(
    folders: dict[str, Path], picture: Path, run: Run
) -> None:
    generator = MultimodalGenerator(str(folders["glm4v"]))

    def count(max_pixels: int | None) -> int:
        [response] = generator.stream("look", [picture], max_tokens=1, max_pixels=max_pixels)
        return response.prompt_tokens

    assert count(None) == count(1 << 20) == 5 * 3 + len("look") + 4
    assert count(256) < count(None)


def test_a_prompt_behind_a_stored_text_is_that_of_the_whole(folders: dict[str, Path]) -> None:
    model, tokenizer = load(str(folders["glm4v"]))
    image = draw_picture(1, 40, 24)
    whole = generate(model, tokenizer, "hello " + ONE_PLACE, images=[image], max_tokens=8)
    cache = model.make_cache()
    for _ in stream_generate(model, tokenizer, "hello ", max_tokens=1, prompt_cache=cache):
        pass
    found = generate(model, tokenizer, ONE_PLACE, images=[image], max_tokens=8, prompt_cache=cache)
    assert found == whole
    with pytest.raises(InvalidRequestError, match="holds images"):
        generate(model, tokenizer, "and now", prompt_cache=cache)


def test_an_image_that_was_forgotten_is_refused(folders: dict[str, Path]) -> None:
    model, tokenizer = load(str(folders["glm4v"]))
    with pytest.raises(InvalidRequestError, match=r"0 images given.* 1 place"):
        generate(model, tokenizer, ONE_PLACE)
    with pytest.raises(InvalidRequestError, match=r"2 images given.* 1 place"):
        generate(model, tokenizer, ONE_PLACE, images=[draw_picture(1, 16, 16)] * 2)


@pytest.mark.parametrize(
    "image", [np.zeros((4, 4), np.uint8), np.zeros((4, 4, 4), np.uint8), np.zeros((4, 4, 3))]
)
def test_arrays_must_be_pictures(image: np.ndarray, folders: dict[str, Path]) -> None:
    model, tokenizer = load(str(folders["glm4v"]))
    with pytest.raises(InvalidRequestError, match=r"image 1 is an array .*expected \(height"):
        generate(model, tokenizer, ONE_PLACE, images=[image])


def test_a_model_of_text_alone_is_given_no_images(picture: Path, run: Run) -> None:
    with pytest.raises(InvalidRequestError, match="reads text only"):
        MultimodalGenerator("pocket")
    model, tokenizer = load("pocket")
    with pytest.raises(InvalidRequestError, match="reads text only"):
        generate(model, tokenizer, "hello", images=[picture])
    assert "reads text only" in run("--image", str(picture), code=2)[1]


@pytest.mark.parametrize(
    ("template", "said"),
    [
        (TEMPLATE.replace("<image><|image|></image>", ""), "1 image given, and the prompt has 0"),
        ("{{ messages[0].content }}", "1 image given, and the prompt has 0"),
        ("{{ 'hello ' + messages[0].content }}", "chat template cannot write these messages"),
    ],
)
def test_a_template_without_a_place_for_images(
    template: str, said: str, tmp_path: Path, picture: Path, run: Run
) -> None:
    folder = write_tokenizer(write_model("glm4v", tmp_path), template)
    error = run("--model", str(folder), "--image", str(picture), code=2)[1]
    assert said in error and error.count("\n") == 1


def test_without_a_template_nothing_of_it_is_taken(tmp_path: Path) -> None:
    generator = MultimodalGenerator(str(write_tokenizer(write_model("glm4v", tmp_path), None)))
    image = draw_picture(1, 16, 16)
    assert generator.generate(ONE_PLACE, [image], max_tokens=2)
    for option in ({"system_prompt": "be brief"}, {"template_variables": {"a": 1}}):
        with pytest.raises(InvalidRequestError, match="need a chat template"):
            generator.generate(ONE_PLACE, [image], **option)


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--image", "nowhere.png"], "no such file"),
        (["--image", __file__], "image"),
        (["--max-pixels", "100"], "there is no --image"),
        (["--image", "{picture}", "--max-pixels", "10"], "one token of this model"),
        (["--image", "{picture}", "--max-pixels", "0"], "--max-pixels"),
        (["--image", "{picture}"] * 20, "the model's context 256"),
        (["--image", "{picture}", "--ignore-chat-template"], "1 image given"),
        (["--image", "{picture}", "--prompt-cache-file", "x"], "does not go with"),
    ],
)
def test_wrong_images_are_told_in_one_line(
    flags: list[str], said: str, folders: dict[str, Path], picture: Path, run: Run
) -> None:
    flags = [flag.replace("{picture}", str(picture)) for flag in flags]
    error = run("--model", str(folders["glm4v"]), *flags, code=2)[1]
    assert said in error.splitlines()[-1]


def test_a_user_shows_images_before_the_text() -> None:
    assert write_user_turn("hi") == {"role": "user", "content": "hi"}
    content = write_user_turn("hi", 2)["content"]
    assert content == [{"type": "image"}, {"type": "image"}, {"type": "text", "text": "hi"}]


@pytest.mark.parametrize("family", FAMILIES)
def test_a_quantized_folder_sees_with_eyes_of_floats(
    family: str, folders: dict[str, Path], picture: Path, tmp_path: Path
) -> None:
    target = tmp_path / "q8"
    flags = ["--model", str(folders[family]), "--mlx-path", str(target), "-q", "--q-bits", "8"]
    assert convert([*flags, "--q-group-size", "32", "--no-receipt"]) == 0
    names = set(load_tensors(target))
    packed = {name.removesuffix(".scales") for name in names if name.endswith(".scales")}
    assert any(name.endswith("embed_tokens") for name in packed)
    assert not any("visual" in name for name in packed)
    generator = MultimodalGenerator(str(target))
    [response] = generator.stream("what is this", [picture], max_tokens=1)
    [wanted] = MultimodalGenerator(str(folders[family])).stream(
        "what is this", [picture], max_tokens=1
    )
    difference = np.abs(np.array(response.logprobs) - np.array(wanted.logprobs)).max()
    assert 0 < difference < 0.3


def load_tensors(folder: Path) -> Iterable[str]:
    with Checkpoint.open(folder) as checkpoint:
        return checkpoint.names()
