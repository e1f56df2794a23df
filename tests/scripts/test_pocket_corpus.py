"""The pocket corpus: the same on every machine, honest about what it holds out, free of broken actions."""

from __future__ import annotations

import hashlib
import importlib
import os
import re
import subprocess
import sys
from itertools import islice
from pathlib import Path

import pytest

SCRIPTS = Path(__file__).resolve().parents[2] / "scripts"
sys.path.insert(0, str(SCRIPTS))

corpus = importlib.import_module("pocket_corpus")
commands = importlib.import_module("pocket_commands")
intents = importlib.import_module("pocket_intents")
stories = importlib.import_module("pocket_stories")
words = importlib.import_module("pocket_words")

ACTION = re.compile(r'(do|finish)\((\w+=("[^"]*"|\d+|\[\d+,\d+\])(, )?)+\)')
SIZES = {"command": 150, "paraphrase": 150, "names": 80, "qa": 100, "facts": 60, "screen": 60}


@pytest.fixture(scope="module")
def sample() -> list:
    """The first documents of the training stream."""
    return list(islice(corpus.documents(), 30_000))


@pytest.fixture(scope="module")
def tests() -> dict:
    """The held-out items."""
    return corpus.draw_tests(SIZES)


def test_stream_does_not_depend_on_the_hash_seed():
    """Two interpreters with other hash seeds print the same text."""

    def digest(seed: str) -> str:
        program = [sys.executable, str(SCRIPTS / "pocket_corpus.py"), "--documents", "300"]
        environment = {**os.environ, "PYTHONHASHSEED": seed}
        printed = subprocess.run(program, env=environment, capture_output=True, check=True).stdout
        return hashlib.sha256(printed).hexdigest()

    assert digest("1") == digest("2")


def test_stream_depends_on_its_seed():
    """Another seed is another text."""
    assert list(islice(corpus.documents(1), 20)) != list(islice(corpus.documents(2), 20))


def test_suites_are_full_and_repeatable(tests):
    """Each suite has its size, no item twice, and comes out the same again."""
    assert {suite: len(items) for suite, items in tests.items()} == SIZES
    for items in tests.values():
        assert len({(item.prompt, item.answer) for item in items}) == len(items)
    assert corpus.draw_tests(SIZES) == tests


def test_no_test_item_is_in_the_training_text(sample, tests):
    """Neither a pair, nor an unseen sentence's prompt, nor an unseen name is in the stream."""
    pairs = {(document.prompt, document.answer) for document in sample}
    prompts = {document.prompt for document in sample}
    for items in tests.values():
        assert not pairs & {(item.prompt, item.answer) for item in items}
    assert not prompts & {item.prompt for item in tests["paraphrase"]}
    held_name = re.compile(rf"\b({'|'.join(words.HELD_NAMES)})\b")
    assert not [d for d in sample if held_name.search(f"{d.prompt} {d.answer}")]


def test_the_leak_check_finds_what_is_there(sample):
    """The control: training items are found in the training text."""
    pairs = {(document.prompt, document.answer) for document in sample}
    again = list(islice(corpus.documents(), 500))
    assert all((document.prompt, document.answer) in pairs for document in again)


def test_held_out_items_are_marked_as_such(tests):
    """A paraphrase comes from a held template, a command from a known one with unseen values."""
    assert all(item.held_paraphrase for item in tests["paraphrase"])
    assert all(not i.held_paraphrase and i.held_combination for i in tests["command"])
    assert all(item.held_combination for item in tests["qa"])


def template_words(text: str) -> set[str]:
    """Return the words of a template without its slots."""
    return set(re.findall(r"[a-z']+", re.sub(r"\{.*?\}", " ", text)))


def test_every_word_of_an_unseen_sentence_is_known():
    """A held-out template has no word that no training template has."""
    templates = [t for groups in intents.TEMPLATES.values() for group in groups for t in group]
    known = set().union(*(template_words(t.text) for t in templates if not t.held))
    held = [t for t in templates if t.held]
    assert len(held) > 100
    assert {
        t.text: template_words(t.text) - known for t in held if template_words(t.text) - known
    } == {}


def test_no_unseen_sentence_equals_a_known_one():
    """Two patterns of one intent never make the same sentence, once held out and once not."""
    for name, groups in intents.TEMPLATES.items():
        held = {t.text for group in groups for t in group if t.held}
        known = {t.text for group in groups for t in group if not t.held}
        assert not held & known, name


def test_every_action_parses(sample, tests):
    """Every answer to a command is one call with plain arguments."""
    kinds = {*intents.INTENTS, "screen"}
    answers = [d.answer for d in sample if d.kind in kinds]
    answers += [i.answer for s in ("command", "paraphrase", "names", "screen") for i in tests[s]]
    assert len(answers) > 10_000
    assert not [answer for answer in answers if not ACTION.fullmatch(answer)]


def test_every_intent_is_in_the_stream(sample):
    """No intent is lost to its weights or to the hold-out."""
    assert {*intents.INTENTS, "screen", "story", "qa1", "qa2", "qa3"} <= {d.kind for d in sample}


def test_an_answer_to_a_question_stands_in_its_facts(sample):
    """A question is answered with words of the facts before it."""
    for document in sample:
        if document.kind.startswith("qa"):
            answer = document.answer.removeprefix("the ")
            assert answer in document.prompt, document


def test_a_story_begins_with_the_words_it_was_asked_for(sample):
    """A story's prompt is its beginning, or a wish."""
    wishes = re.compile(r"(?i)(please )?(tell|i want|can you|write|a story|a bedtime)")
    asked = [d for d in sample if d.kind == "story" and d.prompt is not None]
    assert len(asked) > 1000
    for document in asked:
        assert document.answer.startswith(document.prompt) or wishes.match(document.prompt)


def test_stories_are_consistent_and_the_check_notices_when_not(sample):
    """No story of the grammar is at fault; a swapped name, kind, colour or animal is."""
    texts = [d.answer for d in sample if d.kind == "story"]
    assert not [faults for text in texts if (faults := stories.inconsistencies(text))]
    good = (
        "Once upon a time, a shy fox named Lily lived near the hill. Lily had a red ball. "
        'Then Lily met a badger named Sam. "Can I help you?" asked Sam. Lily was very happy.'
    )
    assert not stories.inconsistencies(good)
    for old, new in (
        ("Lily was", "Mia was"),
        ("asked Sam", "asked Ned"),
        ("badger", "donkey"),
        ("Lily was very", "The duck was very"),
        ("was very happy.", "lost the blue ball."),
        ("asked Sam", "asked Zarko"),
        ("Can I help you?", 'Please help me," said the mole. "Yes'),
        ("happy.", "happy"),
    ):
        assert stories.inconsistencies(good.replace(old, new)), (old, new)


def test_times_are_written_as_said():
    """A few times of day that people say in words."""
    found = {}
    draw = words.Draw(1)
    for _ in range(20_000):
        said, written = commands.clock_time(draw)
        found.setdefault(said, set()).add(written)
    assert found["quarter to seven in the morning"] == {"06:45"}
    assert found["half past twelve in the afternoon"] == {"12:30"}
    assert found["12 am"] == {"00:00"}
    assert all(len(times) == 1 for times in found.values())
