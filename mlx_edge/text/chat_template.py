"""Renders chat templates, programs of strangers, in a sandbox with the functions they count on.

The dialect is that of transformers: trimmed blocks, `break` and `continue`, `{% generation %}`,
`raise_exception`, `strftime_now`, `tojson` without HTML escapes. Deliberately knows no tokens: the
result is text. Loops are counted, so that no template runs for ever.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence, Sized
from contextvars import ContextVar
from datetime import datetime
from typing import TYPE_CHECKING, Any, NoReturn

from mlx_edge.errors import InvalidRequestError, MLXEdgeError, ModelFormatError
from mlx_edge.text.message import one_line

MAX_TURNS = 1_000_000  # of all loops of one rendering together
_turns: ContextVar[Iterator[int]] = ContextVar("mlx_edge_template_turns")

if TYPE_CHECKING:
    from jinja2 import Template
    from jinja2.sandbox import ImmutableSandboxedEnvironment


class ChatTemplate:
    """One template, compiled when it is first rendered."""

    def __init__(self, source: str):
        """Take the source, unseen as yet: a broken template does not stop a plain prompt."""
        self.source = source

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        add_generation_prompt: bool,
        variables: Mapping[str, Any],
    ) -> str:
        """Return the conversation as text.

        What the template refuses or cannot cope with is an InvalidRequestError; a template that is
        no template, or that reaches out of the sandbox, is a ModelFormatError.
        """
        if isinstance(messages, str) or not all(
            isinstance(message, Mapping) for message in messages
        ):
            raise InvalidRequestError(
                "messages must be a list of objects such as {'role': 'user', 'content': 'Hello'}"
            )
        from jinja2.exceptions import SecurityError

        # Templates ask `tools is not none`, which an undefined variable would answer with yes.
        context = {"tools": None, "documents": None, **variables}
        context |= {"messages": messages, "add_generation_prompt": add_generation_prompt}
        template = self._template
        token = _turns.set(iter(range(MAX_TURNS)))
        try:
            return template.render(context)
        except MLXEdgeError:
            raise
        except SecurityError as failure:
            raise ModelFormatError(
                f"the chat template reaches out of its sandbox ({one_line(failure)}); do not "
                "trust this model"
            ) from failure
        except Exception as failure:  # a template is a program: any exception can come out of it
            raise InvalidRequestError(
                f"the chat template cannot write these messages ({one_line(failure)}); "
                "change the messages or give another template"
            ) from failure
        finally:
            _turns.reset(token)

    @functools.cached_property
    def _template(self) -> Template:
        try:
            return _environment().from_string(self.source)
        except Exception as failure:  # besides Jinja's own errors: SyntaxError, RecursionError, ...
            raise ModelFormatError(
                f"the chat template is not valid Jinja ({one_line(failure)}); mend it or give "
                "another"
            ) from failure


@functools.cache
def _environment() -> ImmutableSandboxedEnvironment:
    """Build the dialect of transformers: see its `utils/chat_template_utils.py`."""
    import jinja2.ext
    import jinja2.nodes
    import jinja2.parser
    from jinja2.exceptions import SecurityError
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    class Sandbox(ImmutableSandboxedEnvironment):
        """Jinja's sandbox, but a forbidden attribute is an error at once, not an empty text."""

        def unsafe_undefined(self, obj: Any, attribute: str) -> NoReturn:
            raise SecurityError(f"{type(obj).__name__}.{attribute} is forbidden")

        def _generate(self, source: jinja2.nodes.Template, *args: Any, **kwargs: Any) -> str:
            """Let every `for` count its turns."""
            for loop in source.find_all(jinja2.nodes.For):
                counted = jinja2.nodes.Filter(loop.iter, "_counted", [], [], None, None)
                loop.iter = counted.set_lineno(loop.lineno).set_environment(self)
            return super()._generate(source, *args, **kwargs)

    class Generation(jinja2.ext.Extension):
        """`{% generation %}` marks for training what the assistant said; it only shows its body."""

        tags = {"generation"}  # noqa: RUF012  (so declared by Jinja)

        def parse(self, parser: jinja2.parser.Parser) -> list[jinja2.nodes.Node]:
            next(parser.stream)
            return parser.parse_statements(("name:endgeneration",), drop_needle=True)

    environment = Sandbox(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, jinja2.ext.loopcontrols]
    )
    environment.filters["tojson"] = _tojson
    environment.filters["_counted"] = _Counted
    environment.globals["raise_exception"] = _raise_exception
    environment.globals["strftime_now"] = _strftime_now
    return environment


class _Counted:
    """What a loop runs over; its turns are taken from those of the whole rendering."""

    def __init__(self, items: Iterable[Any]):
        self._items = items

    def __iter__(self) -> Iterator[Any]:
        turns = _turns.get()
        for item in self._items:
            if next(turns, None) is None:
                raise ModelFormatError(
                    f"the chat template loops more than {MAX_TURNS:,} times; do not trust this model"
                )
            yield item

    def __len__(self) -> int:
        if not isinstance(self._items, Sized):
            raise TypeError("no length")  # Jinja then counts by itself
        return len(self._items)


def _raise_exception(message: str) -> NoReturn:
    raise InvalidRequestError(f"the chat template refuses these messages: {one_line(message)}")


def _strftime_now(pattern: str) -> str:
    return datetime.now().strftime(pattern)


def _tojson(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    return json.dumps(
        value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
    )
