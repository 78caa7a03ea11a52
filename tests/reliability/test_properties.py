"""What holds for any rows, texts and lengths; hypothesis looks for others."""

import json
import tempfile
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from keras_iris.data import (
    Conversation,
    Example,
    PairDataset,
    pad_pairs,
    read_conversations,
    tokenize,
)
from keras_iris.data.buckets import choose_bucket_lengths
from keras_iris.evaluation.run_record import RunRecord
from keras_iris.generation.batch_plan import pad_prompts, plan_prompts
from keras_iris.hub import inspect
from keras_iris.self_play.run_dir import RunDir

# The same examples in every run of the suite.
hundred = settings(
    max_examples=100, deadline=None, derandomize=True, database=None
)
PAD = 0
# Any text of whole characters, some of which mean something to somebody.
pieces = st.one_of(
    st.text(st.characters(codec="utf-8"), max_size=8),
    st.sampled_from(
        [
            *("<|eot_id|>", "<|begin_of_text|>", "<|eot_id", "assistant"),
            *("<|start_header_id|>assistant<|end_header_id|>\n\n", "{{ x }}"),
            *("\U0010fffd", "\U0010fffc", "\u2028", "\ufeff", "\r\n", "\0"),
            *("e\u0301", "\u0645\u0631", "\U0001f468\u200d\U0001f469", " "),
        ]
    ),
)
texts = st.lists(pieces, max_size=5).map("".join)
whole = texts.filter(str.strip)
values = st.recursive(
    st.none() | st.booleans() | st.floats() | st.integers() | st.text(),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.text(max_size=3), inner, max_size=3)
    ),
    max_leaves=5,
)
messages = st.fixed_dictionaries(
    {},
    optional={
        "role": st.sampled_from(["system", "user", "assistant"]) | values,
        "content": st.text() | values,
    },
)
rows = values | st.fixed_dictionaries(
    {},
    optional={
        name: st.text() | st.lists(messages, max_size=3) | values
        for name in ("prompt", "response", "completion", "messages", "real")
    },
)
ids = st.lists(st.integers(1, 999), min_size=1, max_size=20)
pairs = st.lists(st.tuples(ids, ids, ids), min_size=1, max_size=12)


@pytest.fixture(scope="session")
def llama(checkpoint):
    """Tokenizer and chat template; texts come back from the ids as they are."""
    _, tokenizer, template = inspect(checkpoint("llama"))
    return tokenizer, template


def _arrays(triples):
    array = [[np.array(part, "int32") for part in t] for t in triples]
    return [Example(t[0], t[1]) for t in array], [t[2] for t in array]


@hundred
@given(st.lists(rows, min_size=1, max_size=3))
def test_any_row_is_read_or_refused(given_rows):
    """From a file as from a list: the same, or an error of ours."""
    ends = []
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "rows.jsonl"
        file.write_text("".join(f"{json.dumps(row)}\n" for row in given_rows))
        for source in (given_rows, file):
            try:
                ends.append(read_conversations(source))
            except ValueError as error:
                assert type(error) is ValueError
                assert "row" in str(error)
                ends.append(None)
    assert ends[0] == ends[1]


@hundred
@given(st.lists(st.tuples(whole, whole), min_size=1, max_size=3), st.booleans())
def test_texts_of_rows_come_back(given_texts, ensure_ascii):
    keys = ("prompt", "response")
    lines = [dict(zip(keys, pair, strict=True)) for pair in given_texts]
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "rows.jsonl"
        dumped = (json.dumps(x, ensure_ascii=ensure_ascii) for x in lines)
        file.write_bytes("".join(f"{line}\n" for line in dumped).encode())
        read = read_conversations(file)
    assert [(row.prompt, row.response) for row in read] == given_texts


@hundred
@given(whole, whole, whole)
def test_texts_come_back_from_the_ids(llama, system, question, response):
    """The prompt's and the response's, each from its own ids.

    The oracle is the text that the template writes, put together here.
    """
    tokenizer, template = llama
    turns = [("system", system), ("user", question)]
    prompt = tuple({"role": r, "content": text} for r, text in turns)
    (example,) = tokenize(
        [Conversation(prompt, response)],
        tokenizer,
        template=template,
        max_prompt_length=10_000,
        max_response_length=10_000,
    )
    header = "<|start_header_id|>{}<|end_header_id|>\n\n"
    expected = "".join(
        f"{header.format(role)}{text}<|eot_id|>" for role, text in turns
    )
    expected = f"<|begin_of_text|>{expected}{header.format('assistant')}"
    assert tokenizer.decode(example.prompt_ids) == expected
    assert tokenizer.decode(example.response_ids) == f"{response}<|eot_id|>"
    # What a text says of special tokens is text: those here are the template's.
    names = "begin_of_text start_header_id end_header_id eot_id".split()
    special = {tokenizer.encode(f"<|{name}|>")[0] for name in names}
    assert sum(i in special for i in example.prompt_ids.tolist()) == 9
    assert [i in special for i in example.response_ids.tolist()].index(
        True
    ) == len(example.response_ids) - 1


@hundred
@given(pairs, st.integers(0, 9))
def test_masks_cover_exactly_the_responses(triples, room):
    examples, synthetic = _arrays(triples)
    length = room + max(len(p) + max(len(r), len(s)) for p, r, s in triples)
    x = pad_pairs(examples, synthetic, length, PAD)
    for row, (prompt, *responses) in enumerate(triples):
        for column, response in enumerate(responses):
            found, padding, mask = (
                x[name][row, column]
                for name in ("token_ids", "padding_mask", "response_mask")
            )
            assert found[mask].tolist() == response
            assert found[padding].tolist() == prompt + response
            assert (found[~padding] == PAD).all()
            assert len(found) == length
            assert not (mask & ~padding).any()


@hundred
@given(
    pairs,
    st.integers(1, 3),
    st.integers(1, 3),
    st.integers(0, 2**32),
    st.integers(0, 5),
)
def test_an_epoch_has_each_pair_once(triples, k, prompts, seed, epoch):
    """In buckets that are long enough, in an order of seed and epoch alone."""
    examples, synthetic = _arrays(triples)
    synthetic = [np.append(s, i + 1) for s in synthetic for i in range(k)]
    log_probs = np.arange(2 * len(synthetic)).reshape(-1, 2)
    options = dict(batch_size=min(prompts, len(examples)) * k, num_samples=k)
    options["seed"] = seed

    def make(epoch):
        return PairDataset(
            examples, synthetic, log_probs, epoch=epoch, **options
        )

    dataset, seen = make(epoch), []
    moved = make(0).at_epoch(epoch)
    for number in range(len(dataset)):
        (x, y, weight), places = dataset[number], dataset.indices(number)
        np.testing.assert_array_equal(places, moved.indices(number))
        assert x["token_ids"].shape[-1] in dataset.bucket_lengths
        np.testing.assert_array_equal(weight, places >= 0)
        for row, place in enumerate(places):
            if place < 0:
                continue
            seen.append(place)
            ids, mask = x["token_ids"][row], x["response_mask"][row]
            example = examples[place // k]
            for column, response in enumerate(
                (example.response_ids, synthetic[place])
            ):
                found = ids[column][mask[column]]
                np.testing.assert_array_equal(found, response)
            np.testing.assert_array_equal(y[row], log_probs[place])
    assert sorted(seen) == list(range(len(synthetic)))


@hundred
@given(st.lists(st.integers(1, 10_000), min_size=1, max_size=50))
def test_buckets_hold_all_lengths(lengths):
    buckets = choose_bucket_lengths(np.array(lengths))
    assert 1 <= len(buckets) <= 4
    assert list(buckets) == sorted(set(buckets))
    assert buckets[-1] >= max(lengths)
    # No more padding than a step beyond the longest.
    assert buckets[-1] - max(lengths) < 64


@hundred
@given(
    st.lists(ids, min_size=1, max_size=12), st.integers(1, 5), st.integers(1, 3)
)
def test_prompts_come_back_from_their_batches(prompts, num_rows, waves):
    plan = plan_prompts(
        [len(prompt) for prompt in prompts],
        dict.fromkeys((5, 10, 20), num_rows),
        waves,
    )
    seen = [index for batch in plan for index in batch.indices]
    assert sorted(seen) == list(range(len(prompts)))
    for batch in plan:
        arrays = pad_prompts(prompts, batch, pad_token_id=PAD, waves=waves)
        shape = (waves * num_rows, batch.bucket_length)
        assert arrays["prompts"].shape == shape
        assert arrays["is_active"].sum() == len(batch.indices)
        for row, index in enumerate(batch.indices):
            assert arrays["is_active"][row]
            ids, length = (arrays[n][row] for n in ("prompts", "lengths"))
            assert ids[:length].tolist() == prompts[index]
            assert (ids[length:] == PAD).all()


@hundred
@given(st.lists(st.tuples(texts, texts, texts), min_size=1, max_size=3))
def test_answers_come_back_from_the_log(rows_of_texts):
    names = ("prompt", "annotated", "answer")
    lines = [dict(zip(names, row, strict=True)) for row in rows_of_texts]
    with tempfile.TemporaryDirectory() as folder:
        RunDir(folder).log.write_texts("answers", 1, lines)
        found = RunRecord("run", [], {}, Path(folder)).answers()
    read = [found[i, 1] for i in range(len(lines))]
    assert [{name: line[name] for name in names} for line in read] == lines
