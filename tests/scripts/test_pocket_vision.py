"""The bundled vision model: its folder, the screens it is scored on, and exact taps on a few of them."""

from __future__ import annotations

import hashlib
import importlib
import json
import sys
from pathlib import Path

import pytest
import tokenizers

from mlx_edge.decoding.multimodal import MultimodalGenerator

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "scripts"))
screens = importlib.import_module("pocket_vision_screens")
tasks = importlib.import_module("pocket_vision_tasks")
tokens = importlib.import_module("pocket_vision_tokens")
score = importlib.import_module("pocket_vision_score")

FOLDER = ROOT / "mlx_edge" / "assets" / "pocket_vision"
SCREENS = "7976e0782e7b5361"
PINNED = {
    1: ("Tap the Skip button", 'finish(message="Task completed.")'),
    2: ("Click News", 'do(action="Tap", element=[750,687])'),
    3: ("Tap Contacts", 'do(action="Tap", element=[500,406])'),
    7: ("Click on the red circle icon", 'do(action="Tap", element=[500,687])'),
    9: ("Select the pink heart", 'do(action="Tap", element=[166,839])'),
    12: ("Press the back button", 'do(action="Tap", element=[125,62])'),
}


def read(name: str) -> dict:
    return json.loads((FOLDER / name).read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def generator() -> MultimodalGenerator:
    return MultimodalGenerator("pocket-vision")


def test_the_folder_is_a_small_glm4v():
    config, vision = read("config.json"), read("config.json")["vision_config"]
    assert config["model_type"] == "glm4v"
    assert vision["patch_size"] == 14
    assert vision["spatial_merge_size"] == 2
    assert vision["out_hidden_size"] == config["text_config"]["hidden_size"]
    assert sum(path.stat().st_size for path in FOLDER.iterdir()) < 4 << 20


def test_the_stored_tokenizer_is_the_one_the_script_builds():
    stored = tokenizers.Tokenizer.from_file(str(FOLDER / "tokenizer.json"))
    built = tokens.build_tokenizer()
    assert stored.get_vocab() == built.get_vocab()
    assert stored.get_vocab_size() <= read("config.json")["text_config"]["vocab_size"]
    for text in ("Tap Wi-Fi", 'do(action="Tap", element=[45,900])', "Grüße, 你好\n\n🙂"):
        assert stored.encode(text).ids == built.encode(text).ids
        assert stored.decode(stored.encode(text).ids) == text


def test_a_prompt_is_the_newest_task_behind_its_screenshot(generator):
    system = {"role": "system", "content": "You operate a phone. " * 100}
    image = {"type": "image"}
    first = {"type": "text", "text": 'Open Photos\n\n{"current_app": "Home"}'}
    later = {"type": "text", "text": '** Screen Info **\n\n{"current_app": "Photos"}'}
    said = '<think></think><answer>do(action="Tap", element=[1,2])</answer>'
    alone = [system, {"role": "user", "content": [image, first]}]
    second = [
        system,
        {"role": "user", "content": [first]},
        {"role": "assistant", "content": said},
        {"role": "user", "content": [image, later]},
    ]
    for messages in (alone, second):
        text = generator.tokenizer.apply_chat_template(messages, tokenize=False)
        assert text == tokens.prompt_text("Open Photos")


def test_screens_are_the_same_everywhere():
    """By what stands on them, not by pixels: these are Pillow's."""
    found = hashlib.sha256()
    for index in range(50):
        screen, asked = tasks.draw_example(index, 4, screens.HELD_OUT)
        found.update(repr([screen.marks, asked]).encode())
    assert found.hexdigest()[:16] == SCREENS


def test_held_out_screens_and_phrases_are_not_those_of_training():
    shown = {screens.draw_screen(index).image.tobytes() for index in range(200)}
    held = {screens.draw_screen(index, screens.HELD_OUT).image.tobytes() for index in range(200)}
    assert not shown & held
    for kind, phrases in tasks.HELD_OUT_PHRASES.items():
        assert not set(phrases) & set(tasks.PHRASES[kind])
        known = {
            word for all_of in tasks.PHRASES.values() for text in all_of for word in text.split()
        }
        assert {word for text in phrases for word in text.split()} <= known


def test_every_target_holds_the_tap_that_training_asks_for():
    for index in range(100):
        for task in tasks.draw_example(index, 8)[1]:
            assert score.is_right(task, task.answer)
            assert not score.is_right(task, 'do(action="Tap", element=[0,0])')


@pytest.mark.parametrize("index", PINNED)
def test_exact_actions(generator, index):
    screen, task = tasks.held_out_examples(index + 1)[index]
    instruction, answer = PINNED[index]
    assert task.instruction == instruction
    assert generator.generate(instruction, [screen.pixels], max_tokens=16) == answer
