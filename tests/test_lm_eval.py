"""The harness' own `hf` model on the same folder is the oracle."""

import json
import pickle
import re
import shutil
import sqlite3
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import keras
import lm_eval
import nltk
import numpy as np
import pytest
from lm_eval.api.instance import Instance
from lm_eval.api.task import ConfigurableTask
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager, _factory
from programs import environments
from tiny_checkpoints import edit
from tiny_models import make_causal_lm
from tokenizer_texts import TEXTS

import keras_iris
from keras_iris.generation import Completion
from keras_iris.lm_eval import TEN, KerasLM, evaluate
from keras_iris.lm_eval import harness as ours
from keras_iris.lm_eval.continuations import ContinuationScorer

ROOT = Path(__file__).parents[1]
LOG_PROB_TOLERANCE = 1e-3  # nats
# Shorter than some prompts and texts: they lose their beginning, or are cut
# into windows.
MAX_LENGTH = 112
BATCH_SIZE = 4
ROWS = [
    {
        "question": "".join(TEXTS[i : i + 1 + 2 * i]),
        "endings": [" no", " not at all", " not", TEXTS[i][:12]],
        "answer": i % 3,
        "text": "".join(TEXTS[i : i + 1 + 2 * i]),
    }
    for i in range(5)
]


@pytest.fixture(scope="module")
def tasks(tmp_path_factory):
    """One of each kind."""
    folder = tmp_path_factory.mktemp("tasks")
    (folder / "rows.json").write_text(json.dumps(ROWS))
    common = {
        "dataset_path": "json",
        "dataset_kwargs": {
            "data_files": {"test": str(folder / "rows.json")},
            "cache_dir": str(folder),
        },
        "test_split": "test",
        "doc_to_text": "{{question}}\nAnswer:",
    }
    choice = {"output_type": "multiple_choice", "doc_to_target": "answer"}
    options = {"until": ["e", "\n"], "do_sample": False, "max_gen_toks": 70}
    configs = {
        "letters": {**choice, "doc_to_choice": ["A", "B", "C"]}
        | {"num_fewshot": 1, "fewshot_split": "test"},
        "endings": {**choice, "doc_to_choice": "endings"},
        "no_context": {**choice, "doc_to_choice": "endings", "doc_to_text": ""},
        "rolling": {
            "output_type": "loglikelihood_rolling",
            "doc_to_text": "",
            "doc_to_target": "{{text}}",
            "metric_list": [{"metric": "word_perplexity"}],
        },
        "answers": {
            "output_type": "generate_until",
            "doc_to_target": "text",
            "generation_kwargs": options,
            "metric_list": [{"metric": "exact_match"}],
        },
    }
    return [
        {"task": name, **common, **config} for name, config in configs.items()
    ]


@pytest.fixture(scope="module")
def manager():
    return TaskManager(include_defaults=False)


def _models(folder, dtype="float32"):
    """Ours in float32, and the harness' own."""
    sizes = {"batch_size": BATCH_SIZE, "max_length": MAX_LENGTH}
    reference = HFLM(str(folder), device="cpu", dtype=dtype, **sizes)
    causal_lm = keras_iris.load(folder, dtype="float32")
    return KerasLM(causal_lm, **sizes), reference


def _same_scores(found, expected):
    np.testing.assert_allclose(
        [log_prob for log_prob, _ in found],
        [log_prob for log_prob, _ in expected],
        atol=LOG_PROB_TOLERANCE,
        rtol=0,
    )
    assert [g for _, g in found] == [g for _, g in expected]


@pytest.mark.parametrize("apply_chat_template", [False, True])
def test_tasks(apply_chat_template, checkpoint, tasks, manager):
    models = _models(checkpoint("qwen2"))
    _compare_on_tasks(models, apply_chat_template, tasks, manager)


@pytest.mark.slow
@pytest.mark.parametrize("apply_chat_template", [False, True])
def test_tasks_of_a_real_model(apply_chat_template, smollm2, tasks, manager):
    # In float32 `hf` is 3e-3 nats away from itself in float64 over the longest
    # of the texts, and we are 2e-4.
    models = _models(smollm2[0], "float64")
    _compare_on_tasks(models, apply_chat_template, tasks, manager)


def _compare_on_tasks(models, apply_chat_template, tasks, manager):
    """Requests, log-probs, greedy or not, and answers are those of `hf`."""
    model, reference = models
    options = dict(
        tasks=tasks,
        task_manager=manager,
        apply_chat_template=apply_chat_template,
        bootstrap_iters=0,
    )
    found = lm_eval.simple_evaluate(model=model, **options)
    expected = lm_eval.simple_evaluate(model=reference, **options)
    for name, samples in expected["samples"].items():
        for a, b in zip(found["samples"][name], samples, strict=True):
            assert a["arguments"] == b["arguments"]
            ours, theirs = (
                [resp for (resp,) in sample["resps"]] for sample in (a, b)
            )
            if name == "rolling":
                assert ours == pytest.approx(theirs, abs=LOG_PROB_TOLERANCE)
            elif name == "answers":
                assert ours == theirs
            else:
                _same_scores(ours, theirs)
    assert (
        found["results"]["letters"]["acc,none"]
        == (expected["results"]["letters"]["acc,none"])
    )


SHARE = """
import json, sys
from lm_eval.tasks import TaskManager
import keras_iris
from keras_iris.lm_eval import KerasLM, evaluate

keras_iris.distribution.initialize()
folder, tasks, batch_size, max_length = json.loads(sys.argv[1])
scored = []
score = KerasLM._loglikelihood_tokens

def counting(self, requests, **options):
    scored.append(len(requests))
    return score(self, requests, **options)

KerasLM._loglikelihood_tokens = counting
found = evaluate(
    keras_iris.load(folder, dtype="float32"),
    tasks,
    batch_size=batch_size,
    max_length=max_length,
    task_manager=TaskManager(include_defaults=False),
    bootstrap_iters=0,
)
samples = {
    name: sorted([row["doc_id"], row["filtered_resps"]] for row in rows)
    for name, rows in found.get("samples", {}).items()
}
print(json.dumps([sum(scored), found.get("results"), samples]))
"""


@pytest.mark.skipif(
    keras.backend.backend() != "torch", reason="one program on JAX"
)
def test_processes_share_the_examples(checkpoint, tasks):
    """Five rows each: one process has three, and the other two and a copy."""
    arguments = [str(checkpoint("qwen2")), tasks, BATCH_SIZE, MAX_LENGTH]
    programs = [
        subprocess.Popen(
            [sys.executable, "-c", SHARE, json.dumps(arguments)],
            env=variables,
            stdout=subprocess.PIPE,
            text=True,
        )
        for variables in environments(1) + environments(2)
    ]
    outputs = [program.communicate(timeout=300)[0] for program in programs]
    alone, first, second = (
        json.loads(text.splitlines()[-1]) for text in outputs
    )
    assert second[1:] == [None, {}]
    assert max(first[0], second[0]) < 0.7 * alone[0]
    for name, scores in alone[1].items():
        assert first[1][name] == pytest.approx(scores), name
    assert first[2].keys() == alone[2].keys()
    for found, expected in zip(
        *map(keras.tree.flatten, (first[2], alone[2])), strict=True
    ):
        if isinstance(expected, float):
            expected = pytest.approx(expected, abs=LOG_PROB_TOLERANCE)
        assert found == expected


def test_start_tokens_and_stops(checkpoint):
    """A tokenizer that begins a text with a token, and what answers end at."""
    model, reference = _models(checkpoint("mistral"))
    contexts = ["Hello", "A [INST] " * 60]
    stops = [[], ["</s>"], [" a", "\n"]]

    def both(method, arguments):
        instances = [
            Instance(method, doc={}, arguments=pair, idx=i)
            for i, pair in enumerate(arguments)
        ]
        return [
            getattr(m, method)(instances, disable_tqdm=True)
            for m in (model, reference)
        ]

    greedy = [("", "Hello")]
    # 64 are drawn at a time. `hf` goes by the first prompt of a batch.
    for limit, prompts in ((3, contexts), (66, contexts), (3, ["<s>It is "])):
        requests = [
            (prompt, {"until": until, "max_gen_toks": limit})
            for prompt in prompts
            for until in stops
        ]
        found, answers = both("generate_until", requests)
        assert found == answers
        greedy += zip(prompts, answers[:: len(stops)], strict=True)
    found, expected = both("loglikelihood", greedy)
    _same_scores(found, expected)
    assert {is_greedy for _, is_greedy in found} == {False, True}
    assert model.prefix_token_id == reference.prefix_token_id


def test_chat_template(checkpoint):
    for architecture in ("qwen2", "llama"):
        model, reference = _models(checkpoint(architecture))
        messages = [
            {"role": "user", "content": "What is it?"},
            {"role": "assistant", "content": "It is "},
        ]
        for history, prompts in ((messages[:1], True), (messages, False)):
            found = model.apply_chat_template(history, prompts)
            assert found == reference.apply_chat_template(history, prompts)
            ids = model.tok_encode(found)
            assert ids == reference.tok_encode(found)
        assert model.chat_template(True) == reference.chat_template(True)
        ids = list(range(model.tokenizer.vocabulary_size))
        assert model.tokenizer.decode(ids, skip_special=True) == (
            reference.tok_decode(ids)
        )


def test_special_token_as_stop(checkpoint):
    """Answers don't show special tokens, and yet stop at them."""
    model = KerasLM(keras_iris.load(checkpoint("qwen2")))
    ids = model.tokenizer.encode("yes<|im_start|>no")
    drawn = Completion((*ids, *model.tokenizer.end_token_ids[:1]), "stop")
    model._answers._engine = lambda size, ends: SimpleNamespace(
        generate=lambda prompts, seed: [drawn] * len(prompts)
    )
    requests = [
        Instance("generate_until", {}, ("A", {"until": until}), 0)
        for until in ([], ["<|im_start|>"])
    ]
    assert model.generate_until(requests, disable_tqdm=True) == ["yesno", "yes"]


def test_answers_end_at_tokens_with_a_stop_string(checkpoint):
    """They aren't drawn to the limit, and not cut where it isn't one."""
    model = KerasLM(keras_iris.load(checkpoint("qwen2")))
    answers, tokenizer = model._answers, model.tokenizer
    script = tokenizer.encode("one two" + "!" * 70 + "\n more" * 3)
    (newline,) = tokenizer.encode("\n")
    drawn = []

    def engine(size, ends):
        def generate(prompts, seed):
            rest = script[len(prompts[0]) - 1 :][:size]
            places = [i + 1 for i, token in enumerate(rest) if token in ends]
            drawn.append(min([*places, len(rest)]))
            return [Completion(tuple(rest[: drawn[-1]]), "any")]

        return SimpleNamespace(generate=generate)

    answers._engine = engine
    until, rest = {"until": "\n"}, script[: script.index(newline)]

    def answer(limit):
        drawn.clear()
        request = ("A", until | {"max_gen_toks": limit})
        instance = Instance("generate_until", {}, request, 0)
        (text,) = model.generate_until([instance], disable_tqdm=True)
        return text

    assert len(tokenizer.encode("A")) == 1 and 64 < len(rest) < 100
    assert answer(200) == tokenizer.decode(rest)
    assert drawn == [64, len(rest) + 1 - 64]
    assert answer(9) == tokenizer.decode(rest[:9]) and drawn == [9]
    # A token whose text is another one among others doesn't end an answer.
    answers._texts[rest[2]] += "\n"
    answers._ends.cache_clear()
    assert answer(200) == tokenizer.decode(rest)
    assert answer(9) == tokenizer.decode(rest[:9])
    assert drawn[0] == 3 and sum(drawn) == 9


def test_cache(checkpoint, tasks, manager, tmp_path, monkeypatch):
    """What was scored before a crash isn't scored again."""
    causal_lm = keras_iris.load(checkpoint("qwen2"))
    scored = []
    score = ContinuationScorer._score

    def count(self, rows):
        if len(scored) == 1:
            scored.append(None)
            raise KeyboardInterrupt
        texts = [text for row in rows for text in row.texts]
        scored.append(sum(len(text.requests) for text in texts))
        return score(self, rows)

    monkeypatch.setattr(ContinuationScorer, "_score", count)
    options = dict(
        tasks=tasks[:1],
        task_manager=manager,
        bootstrap_iters=0,
        batch_size=2,
        use_cache=str(tmp_path / "cache"),
    )
    with pytest.raises(KeyboardInterrupt):
        evaluate(causal_lm, **options)
    found = evaluate(causal_lm, **options)
    # Three letters are a row.
    assert scored == [6, None, 6, 3]
    again = evaluate(causal_lm, **options)
    assert len(scored) == 4
    # It is for the weights with which it was written.
    cache = options.pop("use_cache")
    expected = evaluate(causal_lm, **options)
    for one in (found, again):
        for a, b in zip(
            one["samples"]["letters"],
            expected["samples"]["letters"],
            strict=True,
        ):
            _same_scores(
                [resp for (resp,) in a["resps"]],
                [resp for (resp,) in b["resps"]],
            )
    number = len(scored)
    causal_lm.variables[0].assign(causal_lm.variables[0] * 2)
    evaluate(causal_lm, use_cache=cache, **options)
    assert len(scored) == number + 3
    # Nor for another model with the same weights.
    other = tmp_path / "other"
    shutil.copytree(checkpoint("qwen2"), other)
    rope = {"rope_type": "default", "rope_theta": 123.0}
    edit(other / "config.json", rope_parameters=rope)
    evaluate(keras_iris.load(other), use_cache=cache, **options)
    assert len(scored) == number + 6


def test_nothing_is_unpickled(checkpoint, tasks, manager, tmp_path):
    """A cache that came with a stranger's folder."""
    causal_lm = keras_iris.load(checkpoint("qwen2"))
    options = dict(
        tasks=tasks[:1],
        task_manager=manager,
        bootstrap_iters=0,
        use_cache=str(tmp_path / "cache"),
    )
    evaluate(causal_lm, **options)
    (file,) = tmp_path.glob("cache*")
    ran = tmp_path / "ran"

    class Opened:
        def __reduce__(self):
            return Path.touch, (ran,)

    with sqlite3.connect(file) as database:
        value = pickle.dumps(Opened())
        database.execute("UPDATE unnamed SET value = ?", (value,))
    with pytest.raises(ValueError, match=f"Expected JSON in .*{file.name}"):
        evaluate(causal_lm, **options)
    assert not ran.exists()
    file.write_text("It is no database. " * 99)
    with pytest.raises(ValueError, match="cache.* can't be used: .*database"):
        evaluate(causal_lm, **options)
    with pytest.raises(ValueError, match="unpickles"):
        evaluate(causal_lm, ["colours"], cache_requests=True)


def test_document(checkpoint, tasks, manager, monkeypatch):
    """What docs/evaluation.md shows, with the tasks above."""
    text = (ROOT / "docs/evaluation.md").read_text()
    (block,) = re.findall(r"```python\n(.*?)```", text, re.S)
    folder = checkpoint("qwen2")
    simple_evaluate = lm_eval.simple_evaluate
    asked = []

    def with_tasks(model, tasks, use_cache, **options):
        asked.extend([tasks, use_cache])
        return simple_evaluate(
            model, tasks=local, task_manager=manager, **options
        )

    local = tasks[:1]
    monkeypatch.setattr(lm_eval, "simple_evaluate", with_tasks)
    names = {}
    exec(block.replace("path/to/folder", str(folder)), names)
    assert asked == [["hellaswag", "gsm8k"], "runs/own/harness"]
    assert "letters" in names["results"]["results"]


def test_requests_share_rows():
    scorer = ContinuationScorer(make_causal_lm(), batch_size=1, max_length=16)
    requests = [
        ([3, 4], [5]),
        ([3, 4], [6]),
        ([3, 4], [6, 7, 8]),
        ([3, 4, 6], [9]),
        ([3, 4], [9, 7]),
    ]
    batches = list(scorer(requests))
    assert sorted(map(sorted, batches)) == [[0, 1, 2, 3], [4]]
    alone = [next(scorer([request]))[0] for request in requests]
    together = batches[0] | batches[1]
    _same_scores([together[i] for i in range(len(requests))], alone)


@pytest.mark.parametrize(
    ("architecture", "options", "num_tokens"),
    [
        ("qwen", {}, 30 + 3 * 10 + 10),
        ("mistral", {"sliding_window": 9}, 30 + 3 * 10 + 10),
        ("gemma", {}, 3 * 40 + 10),  # masks are its own
    ],
)
def test_requests_share_beginnings(architecture, options, num_tokens):
    """Three questions behind the same examples, with endings, and another."""
    causal_lm = make_causal_lm(architecture, **options)
    scorer = ContinuationScorer(causal_lm, batch_size=8, max_length=64)
    rng = np.random.default_rng(0)

    def ids(length):
        return rng.integers(1, 37, length).tolist()

    examples, alone = ids(30), ids(10)
    requests = [(alone, ids(1))]
    for _ in range(3):
        question = examples + ids(8)
        # The second is in part the first, and no text of its own.
        requests += [(question, [5, 6, 7]), (question, [5, 9])]
    batches = []
    predict = scorer._network.predict_on_batch

    def counted(batch):
        batches.append(int(batch["padding_mask"].sum()))
        return predict(batch)

    scorer._network.predict_on_batch = counted
    found = {}
    for scores in scorer(requests):
        found |= scores
    assert sum(batches) == num_tokens
    plain = ContinuationScorer(causal_lm, batch_size=1, max_length=64)
    expected = [next(plain([request]))[0] for request in requests]
    _same_scores([found[i] for i in range(len(requests))], expected)


def test_more_endings_than_a_batch_has_texts():
    """Five endings of a context, three of another one, and one alone."""
    causal_lm = make_causal_lm("mistral", sliding_window=9)
    scorer = ContinuationScorer(causal_lm, batch_size=2, max_length=40)
    rng = np.random.default_rng(0)

    def ids(length):
        return rng.integers(1, 37, length).tolist()

    long, other, alone = ids(30), ids(14), ids(20)
    requests = [(long, ids(n)) for n in (2, 5, 3, 1, 6)]
    requests += [(other, ids(n)) for n in (4, 2, 3)] + [(alone, ids(3))]
    found = {}
    for scores in scorer(requests):
        found |= scores
    plain = ContinuationScorer(causal_lm, batch_size=1, max_length=40)
    expected = [next(plain([request]))[0] for request in requests]
    _same_scores([found[i] for i in range(len(requests))], expected)


class _Task(ConfigurableTask):
    """A task without its data."""

    config = task_name = None

    def __init__(self, config):
        self.config = config
        self.task_name = config["task"]

    def set_config(self, key, value):
        self.config[key] = value


def test_ten(monkeypatch):
    """They are the installed harness' tasks, with these shots and scores."""
    monkeypatch.setattr(nltk.data, "find", lambda name: name)  # no download
    monkeypatch.setattr(_factory, "ConfigurableTask", _Task)
    folder = Path(lm_eval.__file__).parent / "tasks"
    names = ["gsm8k", "leaderboard", "mmlu", "hellaswag", "winogrande"]
    folders = [folder / name for name in (*names, "ifeval")]
    manager = TaskManager(include_defaults=False, include_path=folders)
    seen = {}

    def simple_evaluate(model, tasks, task_manager, limit):
        seen.update(task_manager.load(tasks))
        values = dict.fromkeys([metric for *_, metric in TEN.values()], 0.5)
        tasks = [*seen["tasks"], *seen["groups"]]
        return {"results": dict.fromkeys(tasks, values)}

    monkeypatch.setattr(lm_eval, "simple_evaluate", simple_evaluate)
    monkeypatch.setattr(ours, "KerasLM", lambda *args, **kwargs: None)
    results = evaluate(None, task_manager=manager, limit=1)
    assert results["ten"] == dict.fromkeys(TEN, 0.5)
    # Subjects of MMLU, of BBH and of MATH, kinds of GPQA and MUSR, five others.
    assert len(seen["tasks"]) == 57 + 24 + 7 + 3 + 3 + 5
    for name, num_fewshot, metric in TEN.values():
        group = seen["groups"].get(name)
        leaves = (
            [seen["tasks"][name]] if group is None else group.get_all_tasks()
        )
        for leaf in leaves:
            assert leaf.config["num_fewshot"] == num_fewshot
            metrics = [m["metric"] for m in leaf.config["metric_list"]]
            assert metric.split(",")[0] in metrics


def test_refusals(checkpoint):
    causal_lm = keras_iris.load(checkpoint("qwen2"))
    causal_lm.chat_template = None
    model = KerasLM(causal_lm, max_length=64)

    def answer(**options):
        request = Instance("generate_until", {}, ("A", options), 0)
        model.generate_until([request], disable_tqdm=True)

    with pytest.raises(ValueError, match="no room"):
        answer(max_gen_toks=64)
    with pytest.raises(ValueError, match=r"greedy.*num_beams"):
        answer(num_beams=2)
    with pytest.raises(ValueError, match="greedy"):
        answer(do_sample=True, temperature=1.0)
    with pytest.raises(ValueError, match="no chat template"):
        model.apply_chat_template([])
    with pytest.raises(ValueError, match=r"max_length=64.*1 and 65 tokens"):
        model._loglikelihood_tokens([(None, [1], [2] * 65)])
    with pytest.raises(ValueError, match="with a tokenizer"):
        KerasLM(make_causal_lm())
