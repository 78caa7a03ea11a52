import json

import datasets
import pytest

from keras_iris.data import Conversation, read_conversations

USER = {"role": "user", "content": "Hi"}
ASSISTANT = {"role": "assistant", "content": "Hello"}
SYSTEM = {"role": "system", "content": "Be kind."}

EQUIVALENT_ROWS = [
    {"prompt": [USER], "response": "Hello"},
    {"prompt": [USER], "completion": "Hello"},
    {"prompt": [USER], "completion": [ASSISTANT]},
    {"prompt": "Hi", "completion": [ASSISTANT]},
    {"messages": [USER, ASSISTANT]},
    {"messages": [USER, ASSISTANT, USER]},
    {"real": [USER, ASSISTANT], "generated": [USER, SYSTEM]},
    {"prompt": "ignored", "messages": [USER, ASSISTANT], "response": None},
    {"messages": [{**USER, "weight": 1}, ASSISTANT], "id": 7},
]


@pytest.mark.parametrize("row", EQUIVALENT_ROWS)
def test_formats_of_the_same_conversation_are_read_alike(row):
    assert read_conversations([row]) == [Conversation((USER,), "Hello")]


def test_strings_stay_strings():
    row = {"prompt": "2 + 2 =", "completion": "4"}
    assert read_conversations([row]) == [Conversation("2 + 2 =", "4")]


def test_the_last_assistant_turn_is_the_response():
    messages = [SYSTEM, USER, ASSISTANT, USER, {**ASSISTANT, "content": "B"}]
    (conversation,) = read_conversations([{"messages": messages}])
    assert conversation == Conversation(tuple(messages[:-1]), "B")


def test_conversations_pass_through():
    conversation = Conversation("a", "b")
    assert read_conversations([conversation]) == [conversation]


def test_files_and_datasets_give_what_the_list_gives(tmp_path):
    rows = [
        {"messages": [USER, {**ASSISTANT, "content": f"é {i}"}]}
        for i in range(5)
    ]
    expected = read_conversations(rows)
    table = datasets.Dataset.from_list(rows)
    lines = [json.dumps(row, ensure_ascii=False) for row in rows]
    jsonl = tmp_path / "rows.jsonl"
    jsonl.write_text("\n\n".join(lines), encoding="utf-8")
    table.to_parquet(tmp_path / "rows.parquet")
    assert read_conversations(table) == expected
    assert read_conversations(jsonl) == expected
    assert read_conversations(str(tmp_path / "rows.parquet")) == expected


GOOD = {"prompt": "a", "response": "b"}
CALL = {**ASSISTANT, "content": None}
BAD_ROWS = [
    ({"prompt": "a"}, r"row 1 has no response.*\['prompt'\]"),
    ({"prompt": "a", "response": " \n"}, "row 1 has no response.*empty"),
    ({"prompt": "a", "response": None}, "row 1 has no response"),
    ({"messages": [USER]}, r"row 1 has no response.*\['user'\]"),
    (
        {"prompt": [USER, ASSISTANT, USER], "response": [USER]},
        r"row 1 has no response.*\['user'\]",
    ),
    ({"messages": [ASSISTANT]}, "row 1 has an empty prompt"),
    ({"prompt": "", "response": "b"}, "row 1 has an empty prompt"),
    ({"q": "a", "a": "b"}, r"row 1 has an unknown format.*\['a', 'q'\].*real"),
    ({"messages": "Hi"}, "row 1: expected a list of messages.*'Hi'"),
    ({"messages": [{"from": "x"}]}, "row 1: expected messages.*'from'"),
    (
        {"messages": [USER, {**CALL, "tool_calls": [{"name": "f"}]}]},
        "a message of row 1 has 'tool_calls', which would be left out",
    ),
    (
        {"messages": [USER, {**CALL, "tool_calls": []}]},
        "row 1: .*'content': None.*Remove the row, or write",
    ),
    ({**GOOD, "system": "x"}, "row 1 has 'system', which would be left out"),
    ({**GOOD, "input": "x"}, "row 1 has 'input', .*Write it into the prompt"),
    ({**GOOD, "prompt": "a\ud83d"}, r"row 1 has half a char.*'a\\ud83d'"),
    ({**GOOD, "response": "a\ud83d"}, "row 1 has half a character"),
    ({"messages": [USER, {**ASSISTANT, "content": "\udc00"}]}, "row 1 has ha"),
    ("text", "row 1 is a str, expected a dict"),
]


@pytest.mark.parametrize(("row", "error"), BAD_ROWS)
def test_a_bad_row_is_named(row, error):
    with pytest.raises(ValueError, match=error):
        read_conversations([GOOD, row])


def test_empty_data():
    with pytest.raises(ValueError, match="data is empty.*at least one row"):
        read_conversations([])


def test_an_empty_file_is_named(tmp_path):
    path = tmp_path / "none.jsonl"
    path.write_text("\n")
    with pytest.raises(ValueError, match="none.jsonl has no rows"):
        read_conversations(path)


def test_a_bad_json_line_is_named(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps(GOOD) + '\n{"prompt": "a", \n')
    with pytest.raises(ValueError, match="line 2 of .*rows.jsonl is not val"):
        read_conversations(path)


def test_a_line_that_is_nested_too_deeply(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text("\n" + "[" * 100_000)
    with pytest.raises(ValueError, match="line 2 of .*nested too") as caught:
        read_conversations(path)
    assert len(str(caught.value)) < 1000
    with pytest.raises(ValueError) as caught:
        read_conversations([{"a" * 10_000: 1}])
    assert len(str(caught.value)) < 1000


def test_a_bad_row_of_a_file_is_named(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps(GOOD) + "\n\n[1]\n")
    with pytest.raises(ValueError, match="line 3 of .* is a list"):
        read_conversations(path)


@pytest.mark.parametrize(
    ("source", "error"),
    [
        ({"train": [GOOD]}, r"mapping with the keys \['train'\].*one split"),
        ("rows.csv", "ends in '.csv', expected '.jsonl' or '.parquet'"),
        (7, "received int"),
    ],
)
def test_sources_that_cannot_be_read(source, error):
    with pytest.raises(ValueError, match=error):
        read_conversations(source)


def test_byte_order_mark(tmp_path):
    file = tmp_path / "data.jsonl"
    file.write_text('{"prompt": "a", "response": "é"}', encoding="utf-8-sig")
    assert read_conversations(file) == [Conversation("a", "é")]


def test_text_that_is_not_utf8(tmp_path):
    file = tmp_path / "data.jsonl"
    file.write_text('\n{"prompt": "a", "response": "é"}', encoding="latin-1")
    with pytest.raises(ValueError, match="line 2 of .* in UTF-8"):
        read_conversations(file)


def test_damaged_parquet(tmp_path):
    file = tmp_path / "data.parquet"
    datasets.Dataset.from_list([GOOD] * 2000).to_parquet(file)
    whole = file.read_bytes()
    for damaged in (b"", b"x" * 100, whole[:-9], b"\0" * 99 + whole[99:]):
        file.write_bytes(damaged)
        with pytest.raises(ValueError, match="data.parquet is not a Parquet"):
            read_conversations(file)


@pytest.mark.parametrize("suffix", ["jsonl", "parquet"])
def test_no_such_file(tmp_path, suffix):
    with pytest.raises(ValueError, match="There is no file"):
        read_conversations(tmp_path / f"data.{suffix}")


def test_bad_rows_can_be_dropped():
    with pytest.warns(UserWarning, match="2 of 4 rows .* first .*row 1 has no"):
        rows = [GOOD, {"prompt": "a"}, "text", {**GOOD, "input": ""}]
        conversations = read_conversations(rows, on_bad_row="drop")
    assert conversations == [Conversation("a", "b")] * 2
    assert [c.where for c in conversations] == ["row 0", "row 3"]
    with (
        pytest.raises(ValueError, match="No row is left. The first: row 0"),
        pytest.warns(UserWarning),
    ):
        read_conversations(["text"], on_bad_row="drop")
