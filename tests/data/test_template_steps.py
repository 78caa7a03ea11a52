"""Chat templates end: what they take is counted, and changes no text."""

import jinja2.sandbox
import pytest

from keras_iris.data import ChatTemplate, template_steps
from keras_iris.data.named_templates import NAMED_TEMPLATES

MESSAGES = [{"role": "user", "content": "Hello, world. "}]
# What is in it doubles with every level.
DEEP = (
    "{% set ns = namespace(x=(), y=()) %}{% for i in range(40) %}"
    "{% set ns.x = (ns.x, ns.x) %}{% set ns.y = (ns.y, ns.y) %}{% endfor %}"
)
LONG = "{% set x = 'ab' * 50000 %}{% set y = 'ab' * 50000 %}"
LIST = "{% set x = range(1000) | list %}"


def _repeat(body, before=""):
    return f"{before}{{% for i in range(100000) %}}{body}{{% endfor %}}"


ENDLESS = {
    "nested loops": _repeat(_repeat("")),
    "loops without a turn": _repeat(
        "{% for j in range(100000) if j < 0 %}{% endfor %}"
    ),
    "recursive loop": DEEP
    + "{% for part in ns.x recursive %}{{ loop(part) }}{% endfor %}",
    "recursive macro": "{% macro m(n) %}{% if n %}{{ m(n - 1) }}{{ m(n - 1) }}"
    "{% endif %}{% endmacro %}{{ m(60) }}",
    "recursive caller": "{% macro twice() %}{{ caller() }}{{ caller() }}"
    "{% endmacro %}{% macro m(n) %}{% call twice() %}{% if n %}{{ m(n - 1) }}"
    "{% endif %}{% endcall %}{% endmacro %}{{ m(20) }}",
    "recursive block": "{% set ns = namespace(n=0) %}{% block a %}"
    "{% set ns.n = ns.n + 1 %}{% if ns.n < 30 %}{{ self.a() }}{{ self.a() }}"
    "{% endif %}{% set ns.n = ns.n - 1 %}{% endblock %}",
    "texts in a buffer": _repeat("{% set y %}{{ x }}{{ x }}{% endset %}", LONG),
    "static text": _repeat("{% set y %}" + 900 * "text" + "{% endset %}"),
    "text of a deep value": DEEP + "{{ ns.x }}",
    "text of a namespace": DEEP + "{{ ns }}",
    "text in a text": DEEP + "{{ '%s' % (ns.x,) }}",
    "comparison of deep values": DEEP + "{% if ns.x == ns.y %}{% endif %}",
    "search in deep values": DEEP + "{% if 1 in ns.x %}{% endif %}",
    "hash of a deep key": DEEP + "{% set y = {ns.x: 1} %}",
    "hash of a deep index": DEEP + "{{ {}[ns.x] }}",
    "JSON of a deep value": DEEP + "{{ ns.x | tojson }}",
    "test of deep values": DEEP + "{{ ns.x is eq(ns.y) }}",
    "comparison of texts": _repeat("{% if x == y %}{% endif %}", LONG),
    "search in a text": _repeat("{% if 'c' in x %}{% endif %}", LONG),
    "search from the end": LONG + "{{ x.rfind('bb' + x) }}",
    "slices": _repeat("{% set y = x[1:] %}", LONG),
    "methods": _repeat("{% set y = x.upper() %}", LONG),
    "filters": _repeat("{% set y = x | upper %}", LONG),
    "concatenation": _repeat("{% set z = x ~ y %}", LONG),
    "formatted text": _repeat("{% set y = '{}'.format(x) %}", LONG),
    "words": _repeat("{% set y = x.split() %}", LONG),
    "select in": LIST + "{{ x | select('in', x) | list }}",
    "map": _repeat("{{ range(1000) | map('string') | map('int') | list }}"),
    "path of attributes": LIST + "{{ x | map(attribute='0.' * 900) | list }}",
    "a generator's elements": _repeat("{{ 1 in (x | map(attribute='a')) }}")
    .replace("{%", LIST + "{%", 1),
    "marks of its own": _repeat("{{ [-1000] | map('*take') | list }}"),
}  # fmt: skip
for name in (
    "sort",
    "unique | list",
    "map('string') | groupby(0)",
    "batch(2) | list",
    "join",
):
    ENDLESS[name] = _repeat("{% set y = x | " + name + " %}", LIST)
for name in ("wordwrap(5)", "title", "wordcount", "urlencode"):
    ENDLESS[name] = _repeat("{% set y = x | " + name + " %}", LONG)


@pytest.mark.parametrize("source", ENDLESS.values(), ids=ENDLESS.keys())
def test_templates_that_would_not_end(source, monkeypatch):
    monkeypatch.setattr(template_steps, "MAX_STEPS", 50_000)
    with pytest.raises(
        ValueError, match="OverflowError: it takes more than 50,"
    ):
        ChatTemplate(source).render_prompt(MESSAGES)


@pytest.mark.parametrize("name", ["nested loops", "recursive macro", "map"])
def test_real_limit(name):
    with pytest.raises(ValueError, match="it takes more than 2,000,000 steps"):
        ChatTemplate(ENDLESS[name]).render_prompt(MESSAGES)


@pytest.mark.parametrize(
    ("source", "error"),
    [
        ("{{ (1).to_bytes(3000000000, 'big') }}", "sandbox refuses"),
        ("{{ 'a'.encode().center(3000000000) }}", "sandbox refuses"),
        ("{% set x = 'a' * 9999 %}{{ x.translate({97: x}) }}", "refuses"),
        ("{% set x = 'f' * 9999 %}{{ x | int(base=16) // 3 }}", "10,000 bits"),
        ("{{ 0x" + 9999 * "f" + " // 3 }}", "10,000 bits"),
        ("{{ 2 ** 9999999 // 3 }}", "the result of '\\*\\*'"),
        ("{{ 1.5 | round(1000000000, 'floor') }}", "the result of 'round'"),
        ("{{ [[1]] | sum(start=[]) }}", "'sum' adds numbers"),
        ("{{ '{:>{w[0]}}'.format(1, w=[9 ** 9]) }}", "the result of 'format'"),
        ("{% set x = 'a' * 9000000 %}{{ (x ~ x) | length }}", "result of '~'"),
        ("{{ strftime_now('%c' * 1000) }}", "the result of 'strftime_now'"),
        ("{{ lipsum(1000000) }}", "'lipsum' is undefined"),
        ("{{ '<' | striptags }}", "No filter named 'striptags'"),
        (100_001 * "x", "reading the source"),
        ("{{ " + 5_000 * "(" + "1", "cannot be rendered"),
    ],
)
def test_small_templates_that_take_much(source, error):
    with pytest.raises(ValueError, match=error):
        ChatTemplate(source).render_prompt(MESSAGES)


PARTS = r"""
{% macro show(m, mark='-') %}{{ mark }}{{ m.role }}: {{ m['content'] }}
{% endmacro %}{% macro twice() %}{{ caller(1) }}{{ caller(2) }}{% endmacro %}
{% for m in messages if m.role != 'system' %}{{ loop.index }}/{{ loop.length }}
{{ show(m) }}{{ m.content | trim | upper | replace('L', 'l') }}
{%- if loop.last and not loop.first or m.content is string %} .{% endif %}
{% if m.role in ('user', 'tool') and 'o' in m.content %}+{% endif %}
{% else %}none{% endfor %}
{% for x in [1, [2, [3]]] recursive %}{% if x is iterable %}[{{ loop(x) }}]
{%- else %}{{ x }}{% endif %}{% endfor %}
{% call(n) twice() %}<{{ n }}>{% endcall %}
{% set text %}{{ 'a' ~ 1 ~ none ~ messages[0].role }}{% endset %}{{ text }}
{% set ns = namespace(n=0) %}{% for i in range(9) %}{% if i is odd %}
{% continue %}{% elif i > 6 %}{% break %}{% endif %}{% set ns.n = ns.n + i %}
{% endfor %}{{ ns.n }} {{ 7 // 2 - 1 }} {{ 2 ** 3 % 5 }} {{ 7 / 2 }}
{{ messages[::-1][0].content[:5] }} {{ messages[-1]['content'].split(',')[0] }}
{{ [3, 1, 2] | sort | join(', ') }} {{ [1, 1, 2] | unique | list }}
{{ messages | map(attribute='role') | list }} {{ [1, 2] | map('int') | list }}
{{ messages | selectattr('role', 'equalto', 'user') | list | length }}
{{ [1, 2, 3, 4] | select('>', 2) | sum }} {{ 1.25 | round(1) }}
{% for key, group in messages | groupby('role') %}{{ key }}{{ group | length }}
{% endfor %}{{ {'b': 1, 'a': 2} | dictsort }} {{ {'k': 1}.items() | list }}
{{ 1 < 2 <= 2 }} {{ 3 not in [1, 2] }} {{ x is defined }} {{ x | default('d') }}
{{ '%s-%d' % ('a', 3) }} {{ '{:>4}'.format('b') }} {{ 'c'.center(5, '*') }}
{% filter upper %}filtered{% endfilter %}{% with z = 5 %}{{ z }}{% endwith %}
{% block b scoped %}{{ messages | length }}{% endblock %}{{ self.b() }}
{{ ['a b', 'c'] | batch(2) | list }} {{ 'a b' | wordwrap(1) }} {{ -1 | abs }}
{{ '<' | e }} {{ 'x' if messages else 'y' }} {{ messages[1 - 1].role }}
{{ 'aXb' | title }} {{ ['a'] + ['b'] }} {{ [0] * 2 }} {{ 'ab' | list | last }}
"""


def test_texts_are_those_of_jinja():
    """What is put into the tree of a template changes nothing."""
    environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True,
        lstrip_blocks=True,
        extensions=["jinja2.ext.loopcontrols"],
    )
    messages = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "Hello, world."},
        {"role": "assistant", "content": " Hi! "},
    ]
    expected = environment.from_string(PARTS).render(messages=messages)
    assert len(expected) > 300
    assert ChatTemplate(PARTS).render_prompt(messages) == expected


@pytest.mark.parametrize("name", NAMED_TEMPLATES)
def test_long_conversations(name):
    template = ChatTemplate.named(name)
    turns = [
        {"role": role, "content": 500 * "Well, "}
        for _ in range(1_000)
        for role in ("user", "assistant")
    ]
    text = template.render_prompt(turns[:-1])
    assert text.count("Well,") == 500 * len(turns[:-1])


def test_each_rendering_has_its_own_steps(monkeypatch):
    template = ChatTemplate("{% for i in range(500) %}{{ i }}{% endfor %}")
    text = template.render_prompt(MESSAGES)
    monkeypatch.setattr(template_steps, "MAX_STEPS", 4_000)
    for _ in range(3):
        assert template.render_prompt(MESSAGES) == text
    monkeypatch.setattr(template_steps, "MAX_STEPS", 1_000)
    with pytest.raises(ValueError, match="more than 1,000 steps"):
        template.render_prompt(MESSAGES)
