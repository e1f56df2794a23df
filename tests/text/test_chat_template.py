"""Chat templates: the dialect of transformers, one-line errors, and a sandbox that holds."""

import json

import pytest

from mlx_edge.errors import InvalidRequestError, MLXEdgeError, ModelFormatError
from mlx_edge.text.chat_template import ChatTemplate

MESSAGES = [{"role": "user", "content": "Hallå <b>"}, {"role": "assistant", "content": "Hej"}]


def render(source: str, messages=MESSAGES, *, add_generation_prompt=True, **variables) -> str:
    return ChatTemplate(source).render(
        messages, add_generation_prompt=add_generation_prompt, variables=variables
    )


def test_a_usual_template():
    source = """{{ bos_token }}
{%- for message in messages %}
    {%- if message.role == 'system' %}{% continue %}{% endif %}
<|{{ message['role'] }}|>{{ message.content | trim }}</s>
{% endfor %}
{% if add_generation_prompt %}
<|assistant|>
{% endif %}"""
    expected = "<s><|user|>Hallå <b></s>\n<|assistant|>Hej</s>\n"
    assert render(source, bos_token="<s>") == expected + "<|assistant|>\n"
    assert render(source, bos_token="<s>", add_generation_prompt=False) == expected


def test_blocks_are_trimmed():
    assert render("  {% if true %}\nyes\n  {% endif %}\n!") == "yes\n!"


def test_tojson_neither_escapes_html_nor_unicode():
    assert render("{{ messages[0] | tojson }}") == json.dumps(MESSAGES[0], ensure_ascii=False)
    assert render("{{ {'b': 1, 'a': 2} | tojson(indent=2, sort_keys=true) }}") == (
        '{\n  "a": 2,\n  "b": 1\n}'
    )


def test_generation_blocks_show_their_body():
    source = (
        "{% for m in messages %}{% generation %}{{ m.content }};{% endgeneration %}{% endfor %}"
    )
    assert render(source) == "Hallå <b>;Hej;"


def test_loop_controls_and_namespaces():
    source = (
        "{% set ns = namespace(n=0) %}{% for m in messages %}{% set ns.n = ns.n + 1 %}"
        "{% break %}{% endfor %}{{ ns.n }}"
    )
    assert render(source) == "1"


def test_dates_and_absent_tools():
    assert render("{{ strftime_now('%Y') }}").isdigit()
    assert render("{{ tools is none }} {{ documents is none }}") == "True True"
    assert render("{{ tools | length }}", tools=[{}]) == "1"


def test_loops_know_their_length_and_their_ends():
    source = (
        "{% for a in [1, 2] %}{{ loop.index }}/{{ loop.length }}{{ loop.last }} {% endfor %}"
        "{% for k, v in {'x': 1} | items %}{{ k }}{{ v }}{% else %}none{% endfor %}"
        "{% for n in nothing %}{{ n }}{% else %} empty{% endfor %}"
    )
    assert render(source) == "1/2False 2/2True x1 empty"


@pytest.mark.parametrize(
    "source",
    [
        "{% for i in range(99999) %}" * 3 + "{% endfor %}" * 3,
        "{% for i in range(99999) %}{% for c in 'x' * 99999 %}{% endfor %}{% endfor %}",
    ],
    ids=["ranges", "text"],
)
def test_a_template_that_loops_for_ever_is_stopped(source):
    with pytest.raises(ModelFormatError, match="loops more than 1,000,000 times"):
        render(source)


def test_a_template_can_refuse():
    source = "{{ raise_exception('roles must\nalternate') }}"
    with pytest.raises(InvalidRequestError, match=r"refuses these messages: roles must alternate$"):
        render(source)


@pytest.mark.parametrize(
    "source",
    [
        "{{ messages.nothing.deeper }}",
        "{{ 1 / 0 }}",
        "{{ messages | tojson(indent=[]) }}",
        "{{ nobody() }}",
        "{{ range(10 ** 9) | length }}",
        "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
        "{{ messages[0] + 1 }}",
        "{% include 'secrets.txt' %}",
    ],
)
def test_whatever_goes_wrong_inside_is_one_line(source):
    with pytest.raises(InvalidRequestError, match="cannot write these messages") as caught:
        render(source)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "source",
    [
        "{% if %}",
        "{{",
        "{% nothing %}",
        "{% for a in b %}" * 30 + "{% endfor %}" * 30,
        "{{ " + "(" * 3000 + ")" * 3000 + " }}",
    ],
    ids=["if", "brace", "tag", "nested", "deep"],
)
def test_a_template_that_is_no_template(source):
    with pytest.raises(ModelFormatError, match="is not valid Jinja") as caught:
        render(source)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "source",
    [
        "{{ ''.__class__.__mro__[1].__subclasses__() }}",
        "{{ messages.__class__.__init__.__globals__ }}",
        "{{ raise_exception.__globals__['json'] }}",
        "{{ strftime_now.__globals__ }}",
        "{{ cycler.__init__.__globals__.os.popen('id').read() }}",
        "{{ (messages | first)['__class__'].__base__ }}",
        "{{ ''['__class__']['__mro__'] }}",
        "{{ '{0.__class__.__init__.__globals__}'.format(messages) }}",
        "{% set f = '{0.__class__}'.format %}{{ f(messages).x.y }}",
        "{{ messages.append({'role': 'user', 'content': 'x'}) }}",
        "{{ messages[0].update(role='system') }}",
        "{{ messages | map(attribute='__class__') | list | first | attr('__mro__') }}",
        "{{ self.__init__.__globals__ }}",
    ],
)
def test_the_sandbox_holds(source):
    messages = [{"role": "user", "content": "Hi"}]
    with pytest.raises(MLXEdgeError) as caught:
        render(source, messages)
    assert "\n" not in str(caught.value)
    assert messages == [{"role": "user", "content": "Hi"}]


@pytest.mark.parametrize("messages", ["Hello", ["Hello"], [None]])
def test_messages_have_to_be_objects(messages):
    with pytest.raises(InvalidRequestError, match="list of objects"):
        render("", messages)
