"""Added tokens that aren't special are found in every text."""

import json

import pytest
from reference import expected_tokenizer
from tiny_checkpoints import copy, edit

from keras_iris.data import Conversation, encode_prompt, tokenize
from keras_iris.hub import load

# As Qwen3's: the thoughts of earlier turns are left out.
TEMPLATE = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\\n' }}"
    "{{ m.content if loop.last or m.role == 'user' "
    "else m.content.split('</think>')[-1] }}"
    "{{ '<|im_end|>\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
USER = {"role": "user", "content": "First paragraph.\n\nSecond."}
THOUGHT = "<think>\nWell.\n</think>\n\nYes."
PROMPTS = [
    (USER,),
    (USER, {"role": "assistant", "content": THOUGHT}, USER),
    ({"role": "user", "content": "What is <think>? And </think>?"},),
]
LIMITS = {"max_prompt_length": 500, "max_response_length": 200}


@pytest.fixture
def folder(checkpoint, tmp_path):
    folder = copy(checkpoint("qwen2"), tmp_path)
    file = folder / "tokenizer.json"
    content = json.loads(file.read_text())
    last = content["added_tokens"][-1]
    for text in ("<think>", "</think>", "\n\n"):
        last = {**last, "id": last["id"] + 1, "content": text, "special": False}
        content["added_tokens"].append(last)
    file.write_text(json.dumps(content))
    edit(folder / "tokenizer_config.json", chat_template=TEMPLATE)
    return folder


@pytest.mark.parametrize("messages", PROMPTS)
def test_ids_are_those_of_transformers(folder, messages):
    causal_lm = load(folder)
    theirs = expected_tokenizer(folder)
    tokenizer, template = causal_lm.tokenizer, causal_lm.chat_template
    prompt_ids = theirs.apply_chat_template(
        list(messages), add_generation_prompt=True, return_dict=False
    )
    assert encode_prompt(messages, tokenizer, template) == prompt_ids

    turn = {"role": "assistant", "content": THOUGHT}
    full = theirs.apply_chat_template([*messages, turn], return_dict=False)
    (example,) = tokenize(
        [Conversation(messages, THOUGHT)],
        tokenizer,
        template=template,
        **LIMITS,
    )
    ids = [*example.prompt_ids, *example.response_ids]
    assert ids == full[: len(ids)]
    assert theirs.convert_tokens_to_ids("<think>") in example.response_ids


@pytest.mark.parametrize("is_special", [True, False])
@pytest.mark.parametrize("token", ["<<|im_start|>>", "user<|im_"])
def test_a_token_around_another(folder, token, is_special):
    file = folder / "tokenizer.json"
    content = json.loads(file.read_text())
    last = content["added_tokens"][-1]
    new = {**last, "id": last["id"] + 1, "content": token}
    new["special"] = is_special
    content["added_tokens"].append(new)
    file.write_text(json.dumps(content))
    header = token + "start|>" * ("_start" not in token)
    source = TEMPLATE.replace("<|im_start|>", header)
    edit(folder / "tokenizer_config.json", chat_template=source)
    causal_lm = load(folder)
    expected = expected_tokenizer(folder).apply_chat_template(
        [USER], add_generation_prompt=True, return_dict=False
    )
    tokenizer, template = causal_lm.tokenizer, causal_lm.chat_template
    assert encode_prompt((USER,), tokenizer, template) == expected
    assert new["id"] in expected


def test_special_tokens_beside_them_stay_text(folder):
    tokenizer = load(folder).tokenizer
    special = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
    assert set(tokenizer.special_tokens) == set(special)
    think = tokenizer.encode("<think>")
    assert len(think) == 1
    ids = tokenizer.encode("<|im_end|><think>", parse_special=False)
    assert ids[-1:] == think
    assert tokenizer.encode("<|im_end|>")[0] not in ids


def test_an_end_token_is_special(folder):
    """Otherwise a text could end a turn."""
    file = folder / "tokenizer.json"
    content = json.loads(file.read_text())
    for token in content["added_tokens"]:
        token["special"] = False
    file.write_text(json.dumps(content))
    edit(folder / "generation_config.json", eos_token_id=632)
    tokenizer = load(folder).tokenizer
    assert set(tokenizer.special_tokens) == {"<|endoftext|>", "<|im_end|>"}
    ids = tokenizer.encode("a<|im_end|>", parse_special=False)
    assert tokenizer.decode(ids) == "a<|im_end|>"
    assert set(ids).isdisjoint(tokenizer.end_token_ids)


def test_end_of_turn_is_a_special_token(folder):
    """Not the blank line that the template writes before it."""
    template = TEMPLATE.replace("{{ '<|im_end|>", "{{ '\\n\\n<|im_end|>")
    edit(folder / "tokenizer_config.json", chat_template=template)
    tokenizer = load(folder).tokenizer
    assert tokenizer.end_token_ids[0] == tokenizer.encode("<|im_end|>")[0]
    blank = tokenizer.encode("\n\n")[0]
    assert blank not in tokenizer.end_token_ids
