import json

import keras
import keras_hub
import numpy as np
import pytest
from self_play_helpers import (
    END,
    make_examples,
    make_self_play,
)
from tiny_models import VOCABULARY_SIZE, make_causal_lm

import keras_iris
from keras_iris.data import ChatTemplate, SymbolTokenizer
from keras_iris.generation import Completion, Engine
from keras_iris.models import Lora, add_lora

# A KerasHub model made here has no longest length that an export could tell.
pytestmark = pytest.mark.filterwarnings("ignore:.*how long a sequence may be")


class _OtherProcess(Engine):
    """Stands in for an engine that has weights of its own."""

    reads = "export"

    def __init__(self):
        self.folders = []

    def update(self, folder):
        assert (folder / "model.safetensors").is_file()
        self.folders.append(folder)

    def generate(self, prompts, *, seed):
        return [Completion((3, END), "stop") for _ in prompts]


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        (lambda prompts: None, "10 prompts. Received: None"),
        (lambda prompts: [], r"10 prompts. Received: \[\]"),
        (
            lambda prompts: [Completion((END,), "stop")] * 11,
            r"10 prompts. Received: \[Completion",
        ),
        (lambda prompts: [(3, END)] * 10, r"Received: \[\(3, 1\), "),
        (
            lambda prompts: [Completion((VOCABULARY_SIZE,), "stop")] * 10,
            rf"vocabulary. Received: \({VOCABULARY_SIZE},\)",
        ),
        (
            lambda prompts: [Completion((), "stop")] * 10,
            r"Completion 0 of Answers .* Received: \(\)",
        ),
        (
            lambda prompts: [Completion((3,) * 7, "length")] * 10,
            "Completion 0 of Answers has 7 tokens, more than max_resp.*=6",
        ),
    ],
    ids=["None", "none", "many", "ids", "unknown id", "no id", "long"],
)
def test_what_an_engine_may_not_answer(answer, message, tmp_path):
    class Answers(Engine):
        def generate(self, prompts, *, seed):
            return answer(prompts)

    self_play = make_self_play(tmp_path / "run", engine=Answers())
    with pytest.raises(ValueError, match=message):
        self_play.run()


def test_what_is_no_engine(tmp_path):
    class OnlyGenerates:
        generate = _OtherProcess.generate

    for engine in (OnlyGenerates(), _OtherProcess):
        with pytest.raises(ValueError, match="`engine` has to be an object of"):
            make_self_play(tmp_path, engine=engine)


@pytest.mark.parametrize(
    "scores", [None, {"step": 1.0}, {"kind": 1.0}, {"score": [1.0, 2.0]}]
)
def test_what_evaluate_may_not_return(scores, tmp_path):
    self_play = make_self_play(tmp_path / "run", evaluate=lambda model: scores)
    with pytest.raises(ValueError) as error:
        self_play.run()
    assert str(error.value) == (
        "`evaluate` has to return a dictionary of numbers, of other names "
        "than ['iteration', 'kind', 'seconds', 'step']. "
        f"Received: {scores!r}"
    )


def test_engine_with_weights_of_its_own_gets_each_iteration(tmp_path):
    engine = _OtherProcess()
    self_play = make_self_play(tmp_path / "run", engine=engine, epochs=1)
    with pytest.warns(match="_OtherProcess gives no log-probs"):
        self_play.run()
    assert engine.folders == [tmp_path / "run" / "export"] * 2


class _FromModel(_OtherProcess):
    """Gives the model's own log-probs, plus an error of each token."""

    def __init__(self, causal_lm, errors):
        super().__init__()
        self.causal_lm, self.errors = causal_lm, np.array(errors, "float32")

    def generate(self, prompts, *, seed):
        completions = []
        for prompt in prompts:
            ids = np.array([[*prompt, 3, END, 0, 0, 0, 0, 0]])[:, :8]
            mask = np.arange(8)[None] < len(prompt) + 2
            logits = self.causal_lm({"token_ids": ids, "padding_mask": mask})
            table = keras.ops.convert_to_numpy(keras.ops.log_softmax(logits))
            start = len(prompt) - 1
            log_probs = table[0, [start, start + 1], [3, END]] + self.errors
            completions.append(Completion((3, END), "stop", log_probs))
        return completions


def test_engine_and_trainer_are_compared_token_by_token(tmp_path):
    self_play = make_self_play(tmp_path / "run", engine=_OtherProcess())
    causal_lm = self_play.model.causal_lm
    opponent = self_play.opponent
    # Errors that cancel in the sum of a completion.
    opponent.engine = _FromModel(causal_lm, [0.1, -0.1])  # as of rounding
    opponent.answer(1, "a key", is_over=False)
    opponent.engine = _FromModel(causal_lm, [1.0, -1.0])
    with pytest.raises(ValueError, match="1 nats per token"):
        opponent.answer(2, "a key", is_over=False)
    opponent.engine.max_difference_nats = 1.01
    opponent.answer(2, "a key", is_over=False)
    lines = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    differences = [json.loads(line) for line in lines if "nats_per" in line]
    assert [d["iteration"] for d in differences] == [1] * 3 + [2] * 3
    np.testing.assert_allclose(
        [d["nats_per_token"] for d in differences],
        [0.1] * 3 + [1.0] * 3,
        rtol=1e-5,
    )


class _Streams(_OtherProcess):
    """Begins a shard before it has given the one before."""

    def __init__(self, fails_at=None):
        super().__init__()
        self.fails_at, self.asked = fails_at, []

    def generate_shards(self, shards):
        answers = []
        for prompts, seed in shards:
            self.asked.append(seed)
            answers.append([Completion((3, END), "stop") for _ in prompts])
        for number, answer in enumerate(answers):
            if number == self.fails_at:
                raise ConnectionError
            yield answer


@pytest.mark.filterwarnings("ignore:.*gives no log-probs")
def test_one_queue_for_all_shards_that_are_missing(tmp_path):
    self_play = make_self_play(tmp_path, engine=_Streams(1), shard_size=5)
    opponent = self_play.opponent
    with pytest.raises(ConnectionError):
        opponent.answer(1, "a key", is_over=False)
    seeds = opponent.engine.asked
    assert len(seeds) == len(set(seeds)) == 5  # of 24 prompts
    folder = tmp_path / "iteration_001" / "synthetic"
    assert len(list(folder.iterdir())) == 1
    opponent.engine = _Streams()
    opponent.answer(1, "a key", is_over=False)
    assert opponent.engine.asked == seeds[1:]
    # One that is missing before others, and one of something else.
    (folder / "00001.safetensors").unlink()
    (folder / "00003.safetensors").write_bytes(b"")
    opponent.engine = _Streams()
    with pytest.warns(match="00003"):
        opponent.answer(1, "a key", is_over=False)
    assert opponent.engine.asked == [seeds[1], seeds[3]]


def test_int8_and_exported_weights(tmp_path):
    causal_lm = make_causal_lm(num_layers=1, hidden_dim=64)
    causal_lm.quantize(
        "int8", filters=lambda x: isinstance(x, keras.layers.EinsumDense)
    )
    add_lora(causal_lm.backbone, Lora(2))
    model = keras_iris.SelfPlayModel(causal_lm)
    model.compile(loss=keras_iris.losses.IRIS())
    with pytest.raises(
        ValueError, match="_OtherProcess reads .* export .*int8"
    ):
        keras_iris.SelfPlay(
            model,
            make_examples(),
            tmp_path,
            batch_size=8,
            engine=_OtherProcess(),
        )


def test_a_template_that_drops_the_response(tmp_path):
    template = ChatTemplate(
        "{% for m in messages if m.role == 'user' %}{{ m.content }}{% endfor %}"
    )
    tokenizer = SymbolTokenizer(["a", "b"])
    with pytest.raises(ValueError, match="template"):
        make_self_play(
            tmp_path,
            examples=[{"prompt": "a", "response": "b"}] * 8,
            tokenizer=tokenizer,
            template=template,
        )


def _gpt2():
    """Of an architecture without a row in the table."""
    backbone = keras_hub.models.GPT2Backbone(
        vocabulary_size=VOCABULARY_SIZE,
        num_layers=1,
        num_heads=2,
        hidden_dim=16,
        intermediate_dim=32,
        max_sequence_length=32,
    )
    causal_lm = keras_hub.models.GPT2CausalLM(backbone, preprocessor=None)
    add_lora(backbone, Lora(2))
    return causal_lm


@pytest.mark.parametrize(
    ("make", "reads", "message"),
    [
        (_gpt2, "export", "Cannot write a GPT2Backbone"),
        (_gpt2, "adapter", "Cannot write a GPT2Backbone"),
        (make_causal_lm, "adapter", "has 0 of them"),
    ],
)
def test_models_that_an_engine_could_not_read(make, reads, message, tmp_path):
    """Known before the first step, not after it."""
    model = keras_iris.SelfPlayModel(make())
    model.compile(loss=keras_iris.losses.IRIS())
    engine = _OtherProcess()
    engine.reads = reads
    message = f"_OtherProcess reads each iteration's {reads}.*{message}"
    with pytest.raises(ValueError, match=message):
        keras_iris.SelfPlay(
            model, make_examples(), tmp_path, batch_size=8, engine=engine
        )
    assert not list(tmp_path.iterdir())
