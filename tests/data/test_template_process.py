"""A template that takes too much is ended, and takes nothing with it."""

import os
import signal
import threading
import time

import pytest

from keras_iris.data import (
    ChatTemplate,
    SymbolTokenizer,
    template_process,
    tokenize,
)
from keras_iris.data.named_templates import NAMED_TEMPLATES

USER = {"role": "user", "content": "Hello"}
MESSAGES = [USER]
CHECKS = "What is the capital of France? The is Paris. Hello. Hi there. Hello"
LETTERS = SymbolTokenizer(dict.fromkeys(f"a b c d e {CHECKS}".split()))
GOOD = ChatTemplate.named("plain")


def _repeat(body):
    return f"{{% for i in range(100000) %}}{body}{{% endfor %}}"


ENDLESS = {
    "nested loops": _repeat(_repeat("")),
    "recursive macro": "{% macro m(n) %}{% if n %}{{ m(n - 1) }}{{ m(n - 1) }}"
    "{% endif %}{% endmacro %}{{ m(60) }}",
    "one operation": "{{ 10 ** 999999999 }}",
    "long texts": "{% set x = 'ab' * 4000000 %}" + _repeat("{{ 'c' in x }}"),
}  # fmt: skip


@pytest.fixture
def one_second(monkeypatch):
    monkeypatch.setattr(template_process, "SECONDS", 1.0)


@pytest.mark.parametrize("source", ENDLESS.values(), ids=ENDLESS.keys())
def test_templates_that_would_not_end(source, one_second):
    template = ChatTemplate(source)
    start = time.perf_counter()
    with pytest.raises(ValueError, match=r"more than 1 seconds.*\['user'"):
        template.render_prompt(MESSAGES)
    assert time.perf_counter() - start < 5
    assert GOOD.render_prompt(MESSAGES) == "Hello"


def test_a_template_is_slow_for_one_text_only(one_second):
    slow = _repeat(_repeat(""))
    template = ChatTemplate(
        "{% for m in messages %}{{ m.content + ' ' }}{% endfor %}"
        f"{{% if messages[0].content == 'slow' %}}{slow}{{% endif %}}"
    )
    texts = ["a", "slow", "b c", "slow", "d"]
    rows = [{"prompt": [USER | {"content": t}], "response": "e"} for t in texts]
    options = {"template": template, "max_prompt_length": 9}
    options |= {"max_response_length": 9}
    with pytest.warns(UserWarning, match=r"2 of 5.*row 1: .*more than 1 sec"):
        examples = tokenize(rows, LETTERS, on_bad_row="drop", **options)
    prompts = [LETTERS.decode(example.prompt_ids) for example in examples]
    assert prompts == ["a", "b c", "d"]
    with pytest.raises(ValueError, match="row 1: .*more than 1 seconds"):
        tokenize(rows, LETTERS, **options)


def test_many_texts_may_take_longer(one_second):
    """Than one of them: a file's, of a slow template."""
    body = "{% for i in range(100000) %}{% endfor %}{{ messages[0].content }}"
    template, pairs = ChatTemplate(body + "{{ n }}"), [(MESSAGES, "")] * 500
    start = time.perf_counter()
    assert template.render_pairs(pairs) == [("Hello", "Hello")] * 500
    assert time.perf_counter() - start > 1, "the test shows nothing"


def test_an_error_names_the_text_that_it_is_of():
    source = "{% if messages[0].content == '40' %}{{ x.y.z }}{% endif %}"
    pairs = [([{"role": str(i), "content": str(i)}], "") for i in range(60)]
    with pytest.raises(ValueError, match=r"'x' is undefined.*\['40'\]"):
        ChatTemplate(source).render_pairs(pairs)


@pytest.mark.parametrize(
    "source",
    [
        "{{ 'a' * 3000000000 }}",
        "{{ 'a'.center(3000000000) }}",
        "{{ 'a' | center(3000000000) }}",
        "{{ '%3000000000d' % 1 }}",
        "{{ '{:>{w}}'.format(1, w=3000000000) }}",
        "{% set x = 'a' * 1000000 %}" + _repeat("{{ x }}"),
        "{% set y %}{% set x = 'a' * 9000000 %}" + _repeat("{{ x }}")
        + "{% endset %}",
    ],
)  # fmt: skip
def test_templates_that_fill_the_memory(source):
    with pytest.raises(ValueError, match="MemoryError|OverflowError"):
        ChatTemplate(source).render_prompt(MESSAGES)
    assert GOOD.render_prompt(MESSAGES) == "Hello"


@pytest.mark.parametrize("source", ["{{ " + 5_000 * "(" + "1", 10**6 * "{{("])
def test_deep_templates(source):
    with pytest.raises(ValueError, match="cannot be rendered"):
        ChatTemplate(source).render_prompt(MESSAGES)
    assert GOOD.render_prompt(MESSAGES) == "Hello"


def test_a_process_that_somebody_ends():
    """It says nothing of the template."""
    assert GOOD.render_prompt(MESSAGES) == "Hello"
    renderer = template_process._renderer(os.getpid())
    renderer._process.kill()
    renderer._process.wait()
    assert GOOD.render_prompt(MESSAGES) == "Hello"


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


def test_an_interrupt_leaves_no_answer_behind():
    """The next call doesn't read what the interrupted one asked for."""
    # Not SIGINT, which tests before may have left to others.
    number = signal.SIGUSR1
    before = signal.signal(number, signal.default_int_handler)
    interrupt = (threading.get_ident(), number)
    timer = threading.Timer(0.5, signal.pthread_kill, interrupt)
    timer.start()
    with pytest.raises(KeyboardInterrupt):
        ChatTemplate("slow" + _repeat(_repeat(""))).render_prompt(MESSAGES)
    signal.signal(number, before)
    assert GOOD.render_prompt(MESSAGES) == "Hello"


def test_a_fork_has_a_process_of_its_own():
    """Else parent and child would read each other's answers."""
    assert GOOD.render_prompt(MESSAGES) == "Hello"
    renderer = template_process._renderer(os.getpid())
    assert template_process._renderer(os.getpid()) is renderer
    assert template_process._renderer(0) is not renderer


def test_threads_get_their_own_answers():
    def render(name):
        messages = [{"role": "user", "content": name}]
        texts.append((name, GOOD.render_prompt(messages)))

    texts = []
    threads = [
        threading.Thread(target=render, args=[str(i)]) for i in range(20)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(texts) == 20
    assert all(name == text for name, text in texts)
