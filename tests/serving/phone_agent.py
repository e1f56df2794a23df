"""An agent that drives a phone as Open-AutoGLM's does: the same fields, the same flow of messages, the same reading.

Written from what its client does (https://github.com/zai-org/Open-AutoGLM: phone_agent/model/client.py, agent.py and
actions/handler.py), so that a server that serves this one serves that one.
"""

import ast
import base64
import json
import time
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol

import openai

STARTS = ("finish(message=", "do(action=")  # the first of them that a reply holds begins its action
PARAMETERS: dict[str, Any] = {
    "max_tokens": 3000,
    "temperature": 0.0,
    "top_p": 0.85,
    "frequency_penalty": 0.2,
    "stream": True,
}
SYSTEM = (
    "You operate a phone. Think first, then write one action, such as "
    'do(action="Tap", element=[x,y]) or finish(message="...").'
)


class Phone(Protocol):
    """What is driven."""

    app: str

    def screenshot(self) -> bytes:
        """A PNG file."""

    def act(self, action: dict[str, Any]) -> None:
        """Do it."""


class Reply(NamedTuple):
    thoughts: str
    action: str
    first_token_s: float | None


def split_reply(text: str) -> tuple[str, str]:
    """Thoughts and action, as the agent cuts a reply."""
    for start in STARTS:
        if start in text:
            thoughts, _, rest = text.partition(start)
            return thoughts.strip(), start + rest
    if "<answer>" in text:
        thoughts, _, rest = text.partition("<answer>")
        for mark in ("<think>", "</think>"):
            thoughts = thoughts.replace(mark, "")
        return thoughts.strip(), rest.replace("</answer>", "").strip()
    return "", text


def read_action(text: str) -> dict[str, Any]:
    """The action's arguments; `_metadata` is do or finish. Raises: ValueError, SyntaxError."""
    text = text.strip()
    if text.startswith(('do(action="Type"', 'do(action="Type_Name"')):
        return {"_metadata": "do", "action": "Type", "text": text.split("text=", 1)[1][1:-2]}
    if text.startswith("do"):
        for char, escape in (("\n", "\\n"), ("\r", "\\r"), ("\t", "\\t")):
            text = text.replace(char, escape)
        call = ast.parse(text, mode="eval").body
        if not isinstance(call, ast.Call):
            raise ValueError(f"{text} is no call")
        arguments = {str(each.arg): ast.literal_eval(each.value) for each in call.keywords}
        return {"_metadata": "do", **arguments}
    if text.startswith("finish"):
        return {"_metadata": "finish", "message": text.replace("finish(message=", "")[1:-2]}
    raise ValueError(f"{text} is no action")


@dataclass
class Agent:
    """One conversation with the model about one task."""

    client: openai.OpenAI
    model: str
    phone: Phone
    system: str = SYSTEM
    context: list[dict[str, Any]] = field(default_factory=list)
    replies: list[Reply] = field(default_factory=list)
    extra_body: dict[str, Any] = field(default_factory=dict)

    def run(self, task: str, max_steps: int = 10) -> str:
        """Until it says that it has finished; what it says then."""
        self.context = [{"role": "system", "content": self.system}]
        for step in range(max_steps):
            action = self.step(task if step == 0 else None)
            if action["_metadata"] == "finish":
                return str(action["message"])
        return "Max steps reached"

    def step(self, task: str | None) -> dict[str, Any]:
        """A screenshot to the model, its action to the phone."""
        info = json.dumps({"current_app": self.phone.app}, ensure_ascii=False)
        text = f"** Screen Info **\n\n{info}" if task is None else f"{task}\n\n{info}"
        image = base64.b64encode(self.phone.screenshot()).decode()
        url = {"url": f"data:image/png;base64,{image}"}
        parts: list[dict[str, Any]] = [{"type": "image_url", "image_url": url}]
        parts.append({"type": "text", "text": text})
        self.context.append({"role": "user", "content": parts})
        reply = self.ask()
        action = read_action(reply.action)
        # Only the newest screenshot is ever sent.
        self.context[-1]["content"] = [part for part in parts if part["type"] == "text"]
        if action["_metadata"] == "do":
            self.phone.act(action)
        said = f"<think>{reply.thoughts}</think><answer>{reply.action}</answer>"
        self.context.append({"role": "assistant", "content": said})
        return action

    def ask(self) -> Reply:
        """The model's answer, streamed."""
        begun, first = time.monotonic(), None
        text = ""
        stream = self.client.chat.completions.create(
            model=self.model,
            messages=self.context,
            extra_body=self.extra_body,
            **PARAMETERS,
        )
        for chunk in stream:
            if chunk.choices and chunk.choices[0].delta.content is not None:
                text += chunk.choices[0].delta.content
                first = first or time.monotonic() - begun
        self.replies.append(Reply(*split_reply(text), first))
        return self.replies[-1]
