"""A conversation as a user meets it: pipes, a terminal, Ctrl-C, a full context, and what the cache saves."""

import functools
import io
import json
import os
import pty
import re
import select
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from shutil import copytree
from typing import Any

import pytest

from mlx_edge.chat import HELP, Conversation, Interrupt, main, make_parser
from mlx_edge.errors import InvalidRequestError
from mlx_edge.models import load as loading
from mlx_edge.weights.hub import find_model

POCKET = find_model("pocket")
STORY = "tell me a story about a frog"
ORDER = "open the maps app"
Talk = Callable[..., tuple[str, str]]


@pytest.fixture(autouse=True, scope="module")
def load_once() -> Iterator[None]:
    """Load each model once for all tests in this process; nothing here changes one."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loading, "load", functools.cache(loading.load))
        yield


@pytest.fixture
def talk(capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Talk:
    """Pipe lines into the command in this process; returns stdout and stderr, asserts the exit code."""

    def call(lines: str | bytes, *arguments: str, code: int = 0) -> tuple[str, str]:
        data = lines.encode() if isinstance(lines, str) else lines
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(data)))
        try:
            found = main(list(arguments))
        except SystemExit as exit_:
            found = exit_.code
        captured = capfd.readouterr()
        assert found == code, captured.err
        return captured.out, captured.err

    return call


def begin(*arguments: str) -> Conversation:
    return Conversation(make_parser().parse_args(arguments))


def ask(conversation: Conversation, question: str, *, stop_after: int | None = None) -> str:
    """The answer, if need be stopped by a real SIGINT after so many pieces."""
    parts: list[str] = []

    def show(text: str) -> None:
        parts.append(text)
        if len(parts) == stop_after:
            os.kill(os.getpid(), signal.SIGINT)

    with Interrupt() as interrupt:
        conversation.ask(question, show, interrupt)
    return "".join(parts)


def test_piped_lines_are_answered_and_nothing_else_is_said() -> None:
    command = [sys.executable, "-m", "mlx_edge", "chat", "-m", "12"]
    found = subprocess.run(
        command, input=f"{ORDER}\n\n{STORY}", capture_output=True, text=True, check=True
    )
    lines = found.stdout.splitlines()
    assert lines[0] == 'do(action="Launch", app="Maps")'
    assert len(lines) == 2 and lines[1]
    assert found.stderr == ""


def test_end_of_input_leaves_quietly(talk: Talk) -> None:
    assert talk("") == ("", "")


def test_q_leaves(talk: Talk) -> None:
    assert talk(f"q\n{ORDER}\n") == ("", "")


def test_h_shows_the_commands_apart_from_the_answers(talk: Talk) -> None:
    assert talk("h\n") == ("", HELP + "\n")


def test_r_forgets_the_conversation(talk: Talk) -> None:
    alone, _ = talk(f"{ORDER}\n")
    later, errors = talk(f"{STORY}\nr\n{ORDER}\n", "-m", "14")
    assert later.splitlines()[1:] == alone.splitlines()
    assert errors == ""
    remembered, _ = talk(f"{STORY}\n{ORDER}\n", "-m", "14")
    assert remembered.splitlines()[1:] != alone.splitlines()


def test_reset_keeps_the_system_prompt() -> None:
    conversation = begin("--system-prompt", "Be kind.", "-m", "8")
    first = ask(conversation, STORY)
    processed = conversation.num_processed
    conversation.reset()
    assert conversation.messages == [{"role": "system", "content": "Be kind."}]
    assert ask(conversation, STORY) == first
    assert (conversation.num_processed, conversation.num_reused) == (processed, 0)


@pytest.mark.parametrize("limit", ["20", "9"], ids=["ended by the model", "cut by max-tokens"])
def test_a_later_turn_processes_only_what_is_new(limit: str) -> None:
    conversation = begin("-m", limit)
    ask(conversation, ORDER)
    tokens = conversation.tokenizer.apply_chat_template(conversation.messages[:1])
    assert (conversation.num_processed, conversation.num_reused) == (len(tokens), 0)
    ask(conversation, STORY)
    tokens = conversation.tokenizer.apply_chat_template(conversation.messages[:3])
    assert conversation.num_processed + conversation.num_reused == len(tokens)
    # The question and its frame; after a cut also the answer's last token and the end that the template adds.
    question = conversation.tokenizer.encode(STORY, add_special_tokens=False)
    assert len(question) < conversation.num_processed <= len(question) + 4


@pytest.mark.parametrize(
    "flags",
    [("-m", "14"), ("-m", "8", "--temp", "0.8", "--seed", "3", "--max-kv-size", "400")],
    ids=" ".join,
)
def test_the_cache_changes_no_answer(flags: tuple[str, ...]) -> None:
    reusing, anew = begin(*flags), begin(*flags)
    for question in (ORDER, STORY, ORDER):  # the first ends by itself, the second is cut
        anew.drop_cache()
        assert ask(reusing, question) == ask(anew, question)
    assert reusing.num_reused > 0 and anew.num_reused == 0


def test_an_answer_that_reads_differently_gets_a_new_cache() -> None:
    conversation = begin("-m", "8")
    ask(conversation, ORDER)
    conversation.messages[1]["content"] = "something else"
    ask(conversation, STORY)
    assert conversation.num_reused == 0 and conversation.num_processed > 0


@pytest.mark.parametrize(
    "flags", [("--draft-model", "pocket-draft"), ("--prompt-lookup",)], ids=str
)
def test_drafts_change_no_answer_of_a_conversation(flags: tuple[str, ...]) -> None:
    options = ("--max-tokens", "24", "--temp", "0.7", "--seed", "5")
    plain, drafting = begin(*options), begin(*options, *flags)
    for question in (STORY, STORY, ORDER):
        assert ask(drafting, question) == ask(plain, question)
    assert ask(drafting, STORY, stop_after=3) == ask(plain, STORY, stop_after=3)
    assert drafting._held == plain._held[: len(drafting._held)]
    assert ask(drafting, ORDER) == ask(plain, ORDER)


def test_a_small_memory_still_answers(talk: Talk) -> None:
    flags = ("--kv-bits", "4", "--kv-group-size", "32", "--quantized-kv-start", "0")
    text, errors = talk(f"{STORY}\n{STORY}\n", "--max-kv-size", "24", "-m", "20", *flags)
    assert len(text.splitlines()) >= 2 and errors == ""


def test_a_seed_replays_the_conversation_and_not_the_turn(talk: Talk) -> None:
    lines, sampled = f"{STORY}\nr\n{STORY}\n", ("--temp", "1.5", "-m", "10")
    first, _ = talk(lines, *sampled, "--seed", "7")
    assert talk(lines, *sampled, "--seed", "7")[0] == first
    assert talk(lines, *sampled, "--seed", "8")[0] != first
    one, other = first.splitlines()
    assert one != other


def test_a_full_context_is_one_line_and_r_begins_anew(talk: Talk) -> None:
    question = "word " * 150
    text, errors = talk(f"{question}\n{question * 5}\n{question}\nr\n{ORDER}\n", "-m", "8")
    assert text.splitlines()[-1].startswith('do(action="Launch"')
    assert 2 <= errors.count("\n") <= 3
    for line in errors.splitlines():
        assert line.startswith("mlx_edge.chat: ") and "context" in line and "r forgets" in line


def test_an_answer_cut_by_the_context_says_so(talk: Talk) -> None:
    conversation = begin()
    room = conversation.model.config.context_size - 8
    question = conversation.tokenizer.decode(conversation.tokenizer.encode("word " * 300)[1:room])
    text, errors = talk(f"{question}\n", "--temp", "2", "--seed", "1")
    assert text
    assert "context of 512 tokens is full; r forgets" in errors and errors.count("\n") == 1


def test_a_question_that_does_not_fit_is_not_remembered() -> None:
    conversation = begin("-m", "4")
    ask(conversation, ORDER)
    said = list(conversation.messages)
    with pytest.raises(InvalidRequestError, match="r forgets"):
        ask(conversation, "word " * 600)
    assert conversation.messages == said
    ask(conversation, STORY)
    assert conversation.num_reused > 0


def test_a_stopped_answer_stays_as_far_as_it_came() -> None:
    conversation = begin("-m", "12")
    whole = ask(conversation, STORY)
    conversation.reset()
    part = ask(conversation, STORY, stop_after=5)
    assert whole.startswith(part) and 0 < len(part) < len(whole)
    assert conversation.messages[-1] == {"role": "assistant", "content": part}
    assert ask(conversation, ORDER)
    assert conversation.num_reused > 0


def test_a_second_interrupt_breaks_off_and_leaves_no_torn_cache() -> None:
    conversation = begin("-m", "12")

    def interrupt_twice(_text: str) -> None:
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)

    with Interrupt() as interrupt:
        conversation.ask(STORY, interrupt_twice, interrupt)
    assert len(conversation.messages) == 2
    assert ask(conversation, ORDER)
    assert conversation.num_reused == 0


def test_a_question_stopped_before_its_answer_is_not_remembered() -> None:
    conversation = begin("--prefill-step-size", "2")
    with Interrupt() as interrupt:
        os.kill(os.getpid(), signal.SIGINT)
        conversation.ask(STORY, pytest.fail, interrupt)
    assert conversation.messages == []
    assert ask(conversation, ORDER) == 'do(action="Launch", app="Maps")'


def test_every_answer_follows_the_grammar(talk: Talk) -> None:
    pytest.importorskip("llguidance", reason="needs the extra grammar")
    out, _ = talk(f"{ORDER}\n{STORY}\n", "--grammar", 'start: "yes" | "no"')
    assert set(out.split()) <= {"yes", "no"} and len(out.split()) == 2
    assert "autoglm" in talk("", "--grammar", "autoglmm", code=2)[1]


@pytest.fixture
def terminal() -> Iterator[tuple[int, "subprocess.Popen[bytes]"]]:
    """The command at a terminal of its own; the file descriptor is what its user types and sees."""
    program = (
        "import fcntl, sys, termios; fcntl.ioctl(0, termios.TIOCSCTTY, 0)\n"
        "import time\n"
        "from mlx_edge.chat import main\n"
        "from mlx_edge.decoding import loop\n"
        "read = loop.value_of\n"  # an answer that takes seconds, however fast the machine is
        "loop.value_of = lambda token: (time.sleep(0.01), read(token))[1]\n"
        "sys.exit(main(['--temp', '2', '--seed', '1', '-m', '400']))"
    )
    user, own = pty.openpty()
    process = subprocess.Popen(
        [sys.executable, "-c", program],
        stdin=own,
        stdout=own,
        stderr=own,
        start_new_session=True,
        env={**os.environ, "TERM": "dumb"},
    )
    os.close(own)
    yield user, process
    process.kill()
    process.wait()
    os.close(user)


def see(user: int, pattern: str) -> str:
    """What the terminal shows until the pattern is in it."""
    shown, end = b"", time.monotonic() + 20
    while not re.search(pattern.encode(), shown, re.DOTALL):
        assert time.monotonic() < end, shown
        if select.select([user], [], [], 1)[0]:
            shown += os.read(user, 1024)
    return shown.decode(errors="replace")


def test_ctrl_c_stops_the_answer_and_leaves_at_the_prompt(
    terminal: tuple[int, "subprocess.Popen[bytes]"],
) -> None:
    user, process = terminal
    assert HELP in see(user, ">> $")
    os.write(user, STORY.encode() + b"\n")
    see(user, "frog\r\n.*[a-z]")
    os.write(user, b"\x03")
    see(user, "\n>> $")
    os.write(user, b"r\n")
    assert "forgotten" in see(user, "\n>> $")
    end = time.monotonic() + 60
    while process.poll() is None and time.monotonic() < end:
        # Again and again: Python overlooks a signal between showing the prompt and waiting for keys.
        os.write(user, b"\x03")
        time.sleep(0.3)
    assert process.poll() in (130, -signal.SIGINT)  # the latter when one more came as it left


def test_ctrl_d_leaves_quietly(terminal: tuple[int, "subprocess.Popen[bytes]"]) -> None:
    user, process = terminal
    see(user, ">> $")
    os.write(user, b"\x04")
    assert process.wait(timeout=60) == 0


def test_broken_text_is_one_line(talk: Talk) -> None:
    _, error = talk(b"\xff\xfe\n", code=2)
    assert error == "mlx_edge.chat: error: line 1 of stdin is not UTF-8: invalid start byte\n"


def test_a_model_without_a_chat_template_is_one_line(talk: Talk, tmp_path: Path) -> None:
    model = Path(copytree(POCKET, tmp_path / "model"))
    path = model / "tokenizer_config.json"
    config: dict[str, Any] = json.loads(path.read_text())
    del config["chat_template"]
    path.write_text(json.dumps(config))
    text, error = talk(f"{ORDER}\n", "--model", str(model), code=2)
    assert "has no chat template" in error and error.count("\n") == 1 and text == ""


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["--max-tokens", "0"], "'0' is not a whole number from 1"),
        (["--temp", "-1"], "'-1' is not a number from 0"),
        (["--top-p", "0"], "expected above 0"),
        (["--no-such-flag"], "--no-such-flag"),
        (["--max-kv-size", "4"], "'4' is not a whole number from 5"),
        (["--kv-bits", "5"], "5 bits in groups of 64"),
        (["--kv-bits", "4", "--kv-group-size", "128"], "heads of 64 do not divide"),
        (["--chat-template-config", "[1]"], "must be an object"),
        (["--chat-template-config", '{"tokenize": true}'], "sets tokenize"),
        (["--chat-template-config", '{"padding": true}'], "padding"),
        (["--system-prompt", "word " * 600], "shorten the system prompt"),
        (["--model", "/no/such/folder"], "/no/such/folder: no such folder"),
    ],
    ids=lambda value: " ".join(value)[:30] if isinstance(value, list) else "",
)
def test_bad_flags_are_one_line(talk: Talk, arguments: list[str], named: str) -> None:
    _, error = talk(f"{ORDER}\n", *arguments, code=2)
    assert named in error
    assert error.startswith("mlx_edge.chat: error: ")
    assert error.count("\n") == 1


def test_help_loads_no_mlx() -> None:
    program = (
        "import sys; from mlx_edge.chat import main\n"
        "try: main(['--help'])\n"
        "except SystemExit: pass\n"
        "sys.exit('mlx.core' in sys.modules)"
    )
    subprocess.run([sys.executable, "-c", program], check=True, capture_output=True)
