import json

import pytest
import transformers

from keras_iris.data import ChatTemplate
from keras_iris.data.named_templates import NAMED_TEMPLATES

NAMES = sorted(NAMED_TEMPLATES)
ONE_TURN = [{"role": "user", "content": "Hi"}]
THREE_TURNS = [
    {"role": "user", "content": "Hello, é 😀"},
    {"role": "assistant", "content": "  Hi there.\n\n```py\n  x = 1\n```"},
    {"role": "user", "content": "What is\n\n2 + 2?"},
]
WITH_SYSTEM = [{"role": "system", "content": "Be kind."}, *THREE_TURNS]

CASES = [
    (name, messages)
    for name in NAMES
    for messages in (ONE_TURN, THREE_TURNS, WITH_SYSTEM)
    if (name, messages) != ("gemma", WITH_SYSTEM)  # which refuses it
]

# The formats as the models' documentation shows them: prompt, rest.
EXPECTED = {
    "zephyr": ("<|user|>\nHi</s>\n<|assistant|>\n", "Yo</s>\n"),
    "chatml": (
        "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n",
        "Yo<|im_end|>\n",
    ),
    "llama3": (
        "<|begin_of_text|><|start_header_id|>user<|end_header_id|>\n\n"
        "Hi<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n",
        "Yo<|eot_id|>",
    ),
    "gemma": (
        "<bos><start_of_turn>user\nHi<end_of_turn>\n<start_of_turn>model\n",
        "Yo<end_of_turn>\n",
    ),
    "plain": ("Hi", "Yo"),
    "spin": ("### Instruction: Hi\n\n### Response: ", "Yo"),
}


@pytest.mark.parametrize("name", NAMES)
def test_named_templates_write_the_documented_formats(name):
    template = ChatTemplate.named(name)
    prompt, rest = EXPECTED[name]
    assert template.render_prompt(ONE_TURN) == prompt
    assert template.render(ONE_TURN, "Yo") == prompt + rest


def test_system_message_and_history():
    expected = (
        "<|system|>\nBe kind.</s>\n<|user|>\nHello, é 😀</s>\n"
        "<|assistant|>\n  Hi there.\n\n```py\n  x = 1\n```</s>\n"
        "<|user|>\nWhat is\n\n2 + 2?</s>\n<|assistant|>\n"
    )
    template = ChatTemplate.named("zephyr")
    assert template.render_prompt(WITH_SYSTEM) == expected


@pytest.mark.parametrize(("name", "messages"), CASES)
def test_rendered_as_transformers_renders(
    name, messages, tokenizer, as_transformers
):
    source = ChatTemplate.named(name).source
    template = ChatTemplate(source, eos_token="</s>", bos_token="<s>")
    theirs = as_transformers(tokenizer, template)
    assert template.render_prompt(messages) == theirs.apply_chat_template(
        messages, tokenize=False, add_generation_prompt=True
    )
    turn = {"role": "assistant", "content": "Yo\n"}
    assert template.render(messages, "Yo\n") == theirs.apply_chat_template(
        [*messages, turn], tokenize=False
    )


# Features of the environment that published templates use.
ODD_TEMPLATES = [
    "{% for m in messages %}{% if loop.index > 2 %}{% break %}{% endif %}"
    "{{ m | tojson(indent=2) }}{% endfor %}",
    "    {% if true %}\n  {{ messages[0].content }}\n    {% endif %}\n",
    "{% set ns = namespace(x='a') %}{% for m in messages %}"
    "{% set ns.x = ns.x ~ m['role'] %}{% endfor %}{{ ns.x }}",
    "{{ bos_token }}{% for m in messages %}"
    "{% if m.role == 'assistant' %}{% generation %}{{ m.content }}"
    "{% endgeneration %}{% else %}{{ m.content }}{% endif %}{% endfor %}",
    "{{ messages[0]['content'].split('l')[-1] }}",
    "{% if tools is not none %}T{% endif %}{% if documents %}D{% endif %}"
    "{% macro f(x) %}[{{ x }}]{% endmacro %}{{ f(messages[-1].content) }}",
    "{{ messages[0].content | tojson }}<>&'",
]


@pytest.mark.parametrize("source", ODD_TEMPLATES)
def test_environment_is_that_of_transformers(
    source, tokenizer, as_transformers
):
    template = ChatTemplate(source, bos_token="<s>", eos_token="</s>")
    theirs = as_transformers(tokenizer, template)
    assert template.render_prompt(THREE_TURNS) == theirs.apply_chat_template(
        THREE_TURNS, tokenize=False, add_generation_prompt=True
    )


def test_an_error_shows_the_beginning_of_long_texts():
    template = ChatTemplate("{{ 'x' * 10000 }}{{ messages | length }}")
    with pytest.raises(ValueError, match="changes the prompt") as caught:
        template.check()
    assert len(str(caught.value)) < 2500


def test_the_date_is_always_the_same():
    template = ChatTemplate("{{ strftime_now('%d %B %Y %H:%M') }}")
    assert template.render_prompt(ONE_TURN) == "26 July 2024 00:00"


@pytest.mark.parametrize("name", ["plain", "spin", "zephyr"])
def test_start_token_of_named_templates(name):
    prompt, rest = EXPECTED[name]
    rest = rest.removesuffix("</s>\n")
    newline = "\n" if name == "zephyr" else ""
    template = ChatTemplate.named(name, bos_token="<s>", eos_token="</s>")
    assert template.render(ONE_TURN, "Yo") == f"<s>{prompt}{rest}</s>{newline}"
    history = ChatTemplate.named(name).render_prompt(WITH_SYSTEM)
    template = ChatTemplate.named(name, bos_token="<s>")
    assert template.render_prompt(WITH_SYSTEM) == "<s>" + history


@pytest.mark.parametrize(
    ("name", "token"),
    [("chatml", "eos_token"), ("gemma", "eos_token")],
)
def test_a_token_that_a_named_template_does_not_write(name, token):
    with pytest.raises(
        ValueError, match=f"'{name}' doesn't write the `{token}"
    ):
        ChatTemplate.named(name, **{token: "<x>"})


@pytest.mark.parametrize("name", NAMES)
def test_named_templates_pass_their_check(name):
    ChatTemplate.named(name).check()


def test_unknown_name():
    with pytest.raises(ValueError, match=r"'zefyr'.*'chatml'.*'zephyr'"):
        ChatTemplate.named("zefyr")


def test_a_template_that_changes_the_prompt_is_refused_with_both_strings():
    source = (
        "{% for m in messages %}[{{ m.role }} {{ loop.length }}] "
        "{{ m.content }}\n{% endfor %}"
    )
    with pytest.raises(ValueError) as error:
        ChatTemplate(source).check()
    text = str(error.value)
    assert "[user 1] What is the capital of France?" in text
    assert "[user 2] What is the capital of France?" in text


def test_a_template_that_drops_a_message_is_refused():
    with pytest.raises(ValueError, match="leaves out the text"):
        ChatTemplate("{{ messages[0].content }}").check()


@pytest.mark.parametrize(
    "source",
    [
        "{% for m in messages %}",
        "{{ messages[0].content.missing.attribute }}",
        "{{ raise_exception('only tools') }}",
        "{% import 'os' as os %}",
        "{% for i in range(10 ** 9) %}{% endfor %}",
        "{{ messages[99].content }}",
        "{{ 'a' * 3000000000 }}",
        "{{ 3000000000 * [0] }}",
        "{% set x = 2 ** 900000 %}{{ x * x }}",
    ],
)
def test_a_template_that_cannot_render_is_refused(source):
    with pytest.raises(ValueError, match="cannot be rendered: [A-Z].*roles"):
        ChatTemplate(source).check()


def test_a_template_without_generation_prompt_is_refused():
    """Else a response begins with the header of its turn."""
    turn = "{% for m in messages %}<|{{ m.role }}|>\n{{ m.content }}\n"
    source = turn + "{% endfor %}"
    with pytest.raises(ValueError, match=r"the header '<\|assistant\|>.*Add"):
        ChatTemplate(source).check()
    source += "{% if add_generation_prompt %}<|assistant|>{% endif %}"
    ChatTemplate(source).check()
    # As Mistral's, which needs none.
    ChatTemplate(
        "{% for m in messages %}{% if m.role == 'user' %}[INST] "
        "{{ m.content }} [/INST]{% else %} {{ m.content }}{% endif %}"
        "{% endfor %}"
    ).check()


@pytest.mark.parametrize(
    "source",
    [
        "{{ ''.__class__.__mro__[1].__subclasses__() }}",
        "{{ messages.append(1) }}",
        "{{ cycler.__init__.__globals__.os.popen('id').read() }}",
    ],
)
def test_python_in_a_template_is_refused(source):
    with pytest.raises(ValueError, match="reaches for Python.*refuses"):
        ChatTemplate(source).check()


def test_gemma_says_it_has_no_system_role():
    with pytest.raises(ValueError, match=r"no system role.*'system'"):
        ChatTemplate.named("gemma").render_prompt(WITH_SYSTEM)


def test_folder_saved_by_transformers(tmp_path, tokenizer, as_transformers):
    template = ChatTemplate.named("zephyr")
    as_transformers(tokenizer, template).save_pretrained(tmp_path)
    loaded = ChatTemplate.from_folder(tmp_path)
    assert loaded.fingerprint() == template.bind(tokenizer).fingerprint()


def test_template_in_the_tokenizer_config(tmp_path):
    config = {
        "chat_template": [
            {"name": "tool_use", "template": "T"},
            {"name": "default", "template": "{{ bos_token }}D"},
        ],
        "bos_token": {"content": "<s>", "lstrip": False},
        "eos_token": None,
    }
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    template = ChatTemplate.from_folder(tmp_path)
    assert template.render_prompt(ONE_TURN) == "<s>D"
    assert template.eos_token == ""
    (tmp_path / "chat_template.jinja").write_text("J{{ bos_token }}")
    assert ChatTemplate.from_folder(tmp_path).source == "J{{ bos_token }}"


def test_all_named_tokens_of_a_folder(tmp_path, tokenizer):
    source = "{% for t in [bos_token, eos_token, unk_token, pad_token] %}"
    source += "{{ t }}{% endfor %}{{ cls_token is defined }}"
    theirs = transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer.inner,
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        pad_token="<pad>",
        chat_template=source,
    )
    theirs.save_pretrained(tmp_path)
    template = ChatTemplate.from_folder(tmp_path)
    expected = "<s></s><unk><pad>False"
    assert theirs.apply_chat_template(ONE_TURN, tokenize=False) == expected
    assert template.render_prompt(ONE_TURN) == expected
    bare = ChatTemplate(source, bos_token="<s>", eos_token="</s>")
    assert bare.fingerprint() != template.fingerprint()


def test_folder_without_a_template(tmp_path):
    assert ChatTemplate.from_folder(tmp_path) is None
    (tmp_path / "tokenizer_config.json").write_text("{}")
    assert ChatTemplate.from_folder(tmp_path) is None


def test_damaged_tokenizer_config(tmp_path):
    (tmp_path / "tokenizer_config.json").write_text('{"chat_template": ')
    with pytest.raises(ValueError, match="tokenizer_config.json is not valid"):
        ChatTemplate.from_folder(tmp_path)


def test_tokenizer_config_that_is_no_object(tmp_path):
    (tmp_path / "tokenizer_config.json").write_text("[1]")
    with pytest.raises(ValueError, match="tokenizer_config.json holds a list"):
        ChatTemplate.from_folder(tmp_path)


@pytest.mark.parametrize(
    "name", ["chat_template.jinja", "tokenizer_config.json"]
)
def test_files_that_are_not_utf8(tmp_path, name):
    (tmp_path / name).write_bytes("{'é'}".encode("latin-1"))
    with pytest.raises(ValueError, match=f"{name} is not text in UTF-8"):
        ChatTemplate.from_folder(tmp_path)


def test_fingerprints_differ():
    prints = {ChatTemplate.named(name).fingerprint() for name in NAMES}
    prints.add(ChatTemplate.named("plain", eos_token="</s>").fingerprint())
    assert len(prints) == len(NAMES) + 1
