"""Ready grammars: what they let through is what the program they are made for can read."""

import ast
import json
import re
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mlx_edge.decoding.constraints import Constraint, make_constraint
from mlx_edge.decoding.grammars import GRAMMARS, read_grammar
from mlx_edge.errors import InvalidRequestError
from mlx_edge.text import Tokenizer, load_tokenizer
from mlx_edge.weights.hub import find_model
from tests.serving.phone_agent import read_action, split_reply

pytest.importorskip("llguidance", reason="constraints need the package llguidance")

ARGUMENTS = {  # of each action: those it must have, and those it may have
    "Launch": ({"app"}, set()),
    "Tap": ({"element"}, {"message"}),
    "Type": ({"text"}, set()),
    "Swipe": ({"start", "end"}, set()),
    "Long Press": ({"element"}, set()),
    "Double Tap": ({"element"}, set()),
    "Back": (set(), set()),
    "Home": (set(), set()),
    "Interact": (set(), set()),
    "Wait": (set(), {"duration"}),
    "Take_over": (set(), {"message"}),
    "Note": (set(), {"message"}),
    "Call_API": (set(), {"instruction"}),
}
GOOD = [
    'do(action="Launch", app="微信")',
    'do(action="Tap", element=[0,999])',
    'do(action="Tap", element=[12, 7])',
    'do(action="Tap", element=[1,2], message="Pay \\"now\\"?")',
    'do(action="Type", text="Hello World")',
    'do(action="Type", text="")',
    'do(action="Type", text="two\nlines, (a) \\d and say "hi"")',
    'do(action="Type_Name", text="王")',
    'do(action="Interact")',
    'do(action="Swipe", start=[1,2], end=[3,4])',
    'do(action="Note", message="True")',
    'do(action="Call_API", instruction="sum up")',
    'do(action="Long Press", element=[5,6])',
    'do(action="Double Tap",element=[5,6])',
    'do(action="Take_over", message="log in")',
    'do(action="Back")',
    'do(action="Home")',
    'do(action="Wait", duration="2 seconds")',
    'do(action="Wait", duration="0.5")',
    'finish(message="Done: "do(action=" was the last")',
]
BAD = [
    'do(action="Type", text="</answer>")',
    'finish(message="a <think> b")',
    "",
    "I would tap.",
    "do()",
    'do(action="Back") ',
    'do(action="Back")</answer>',
    "do(action='Back')",
    'do(action="Fly")',
    'do(action="Launch", app="")',
    'do(action="Launch")',
    'do(action="Tap", element=[1000,2])',
    'do(action="Tap", element=[012,2])',
    'do(action="Tap", element=[1.5,2])',
    'do(action="Tap", element=[-1,2])',
    'do(action="Tap", element=[1])',
    'do(action="Tap", element=(1,2))',
    'do(action="Tap", element=[1,2]',
    'do(action="Tap",\nelement=[1,2])',
    'do(action="Tap", element=[1,2], message="a\nb")',
    'do(action="Tap", element=[1,2], message="\\x")',
    'do(action="Tap", app="x")',
    'do(action="Swipe", start=[1,2])',
    'do(action="Type", text="a", enter="b")',
    'do(action="Type", text="finish(message=")',
    'do(action="Wait", duration="soon")',
    'finish(message="a") finish(message="b")',
    "finish()",
]


@cache
def tokenizer_of(folder: Path | None = None) -> Tokenizer:
    return load_tokenizer(folder or find_model("pocket"))


def constrain(tokenizer: Tokenizer) -> Constraint:
    return make_constraint(tokenizer, lark=read_grammar("autoglm", tokenizer))


def accepts(tokenizer: Tokenizer, text: str) -> bool:
    constraint = constrain(tokenizer)
    try:
        for token in tokenizer.encode(text, add_special_tokens=False):
            constraint.advance(token)
    except InvalidRequestError:
        return False
    return constraint.is_accepting


@pytest.mark.parametrize("thoughts", ["", "<think>It is there, do(it).\n</think>\n<answer>\n"])
@pytest.mark.parametrize("text", GOOD)
def test_what_the_agents_prompts_teach_is_taken_and_read(text: str, thoughts: str) -> None:
    assert accepts(tokenizer_of(), thoughts + text)
    found, action = split_reply(thoughts + text)
    assert (found, action) == (thoughts.strip(), text)
    check_action(action)


@pytest.mark.parametrize("text", BAD)
def test_what_the_agent_would_stumble_over_is_refused(text: str) -> None:
    assert not accepts(tokenizer_of(), text)


def check_action(text: str) -> None:
    """The agent reads it, and its arguments are those of the action."""
    action = read_action(text)
    if action.pop("_metadata") == "finish":
        assert set(action) == {"message"}
        return
    name = action.pop("action")
    needed, allowed = ARGUMENTS[name]
    assert needed <= set(action) <= needed | allowed
    for key in {"element", "start", "end"} & set(action):
        point = action[key]
        assert len(point) == 2 and all(type(n) is int and 0 <= n < 1000 for n in point)
    if "duration" in action:
        assert 0 <= float(action["duration"].replace("seconds", "").strip()) < 1000
    if not re.match(r'do\(action="Type', text):
        call = ast.parse(text.replace("\n", "\\n"), mode="eval").body
        assert isinstance(call, ast.Call) and not call.args


@pytest.mark.parametrize("seed", range(30))
def test_random_logits_make_an_action(seed: int) -> None:
    tokenizer = tokenizer_of()
    rng = np.random.default_rng(seed)
    spoken = [tokenizer.new_reader().read(index) for index in range(tokenizer.vocab_size)]
    # What ends a text gains, so that none goes on for ever.
    closing = np.array([any(c in text for c in b'")]') for text in spoken])
    constraint = constrain(tokenizer)
    start = ["Go on. finish(message=", "Hm\ndo(action=", "do(action=", 'do(action="Type", text="'][
        seed % 4
    ]
    tokens = tokenizer.encode(start, add_special_tokens=False)
    for token in tokens:
        constraint.advance(token)
    while not constraint.is_finished:
        logits = rng.normal(size=tokenizer.vocab_size) + closing * (0.03 * len(tokens))
        tokens.append(int(np.argmax(np.where(constraint.mask(), logits, -np.inf))))
        constraint.advance(tokens[-1])
        assert len(tokens) < 1000
    _, action = split_reply(tokenizer.decode(tokens, skip_special_tokens=True))
    check_action(action)


def with_special_marks(folder: Path) -> Tokenizer:
    """Pocket's tokenizer in which the marks of thoughts and answers are special tokens."""
    source = find_model("pocket")
    contents: dict[str, Any] = json.loads((source / "tokenizer.json").read_text())
    size = len(contents["model"]["vocab"])
    kinds = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    for index, mark in enumerate(("<think>", "</think>", "<answer>", "</answer>"), start=size):
        contents["added_tokens"].append({"id": index, "content": mark, "special": True, **kinds})
    (folder / "tokenizer.json").write_text(json.dumps(contents))
    (folder / "tokenizer_config.json").write_text((source / "tokenizer_config.json").read_text())
    return load_tokenizer(folder)


@pytest.mark.parametrize(
    ("text", "is_good"),
    [
        ('<think>I see.</think><answer>do(action="Back")', True),
        ('<think>I see.</think>\ndo(action="Back")', True),
        ('I see.</think>do(action="Back")', True),  # the prompt has opened the thoughts
        ('<answer>finish(message="x")', True),
        ('do(action="Back")', True),
        ('<answer><think>do(action="Back")', False),
        ('<think>do(action="Back")</think>do(action="Home")', False),
        ('<answer>do(action="Back")</answer>', False),
        ('do(action="<think>")', False),
    ],
)
def test_marks_that_are_special_tokens(tmp_path: Path, text: str, is_good: bool) -> None:
    assert accepts(with_special_marks(tmp_path), text) is is_good


def test_a_grammar_is_named_read_or_given(tmp_path: Path) -> None:
    tokenizer = tokenizer_of()
    file = tmp_path / "mine.lark"
    file.write_text('start: "x"')
    assert read_grammar(str(file), tokenizer) == read_grammar('start: "x"', tokenizer)
    assert set(GRAMMARS) == {"autoglm"}
    with pytest.raises(InvalidRequestError, match="autoglm"):
        read_grammar("autoglmm", tokenizer)
