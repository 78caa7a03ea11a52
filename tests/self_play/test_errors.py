import json
import warnings

import keras
import numpy as np
import pytest
from self_play_helpers import (
    begin,
    final_arrays,
    make_examples,
    make_self_play,
)
from tiny_models import VOCABULARY_SIZE, make_causal_lm

import keras_iris
from keras_iris.data import Example, SymbolTokenizer
from keras_iris.data.encoder import Encoder
from keras_iris.data.example import hash_examples
from keras_iris.files import replaced
from keras_iris.self_play.arrays import write_arrays
from keras_iris.self_play.checkpoints import Checkpoints


def test_nan_stops_training_with_the_ids_and_keeps_the_checkpoint(tmp_path):
    self_play = make_self_play(
        tmp_path / "run", learning_rate=1e30, checkpoint_every_steps=1
    )
    with pytest.raises(FloatingPointError, match=r"examples \[[\d, ]+\]"):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", RuntimeWarning)
            self_play.run()
    for array in final_arrays(tmp_path / "run").values():
        assert np.isfinite(array.astype("float64")).all()


def test_nan_in_the_opponent(tmp_path):
    self_play = make_self_play(tmp_path / "run")
    variable = self_play.model.trainable_variables[-1]
    variable.assign(np.full(variable.shape, np.nan, "float32"))
    with pytest.raises(
        FloatingPointError, match="is not finite. What .* is older"
    ):
        self_play.run()


def test_too_long_responses_of_text(tmp_path):
    tokenizer = SymbolTokenizer(["a", "b", "c"])
    rows = [{"prompt": "a", "response": "b c b c b"}] * 8
    options = dict(examples=rows, tokenizer=tokenizer, max_response_length=3)
    with pytest.raises(
        ValueError, match="row 0: A prompt of 1 .* at most 1024 and 3"
    ):
        make_self_play(tmp_path, on_overflow="error", **options)
    with pytest.warns(UserWarning, match="8 of 8 .* a cut response"):
        self_play = make_self_play(tmp_path, on_overflow="truncate", **options)
    b, c = tokenizer.encode("b c")
    for example in self_play.examples:
        assert example.response_ids.tolist() == [b, c, b]


def test_a_file_is_tokenised_once(tmp_path, monkeypatch):
    tokenizer = SymbolTokenizer(["a", "b", "c"])
    rows = [{"prompt": "a", "response": "b c"}] * 8 + [{"prompt": "a"}]
    data = tmp_path / "data.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    options = dict(examples=data, tokenizer=tokenizer)
    with pytest.raises(ValueError, match="line 9 of .*data.jsonl has no resp"):
        make_self_play(tmp_path / "run", **options)
    with pytest.warns(UserWarning, match="1 of 9 rows were dropped"):
        first = make_self_play(tmp_path / "run", on_bad_row="drop", **options)
    monkeypatch.setattr(Encoder, "encode", None)
    again = make_self_play(tmp_path / "run", on_bad_row="drop", **options)
    assert hash_examples(again.examples) == hash_examples(first.examples)
    assert len(again.examples) == 8


def test_the_manifest_names_the_commit(tmp_path):
    self_play = make_self_play(tmp_path)
    self_play.model.causal_lm.commit = "0123abc"
    begin(self_play)
    manifest = json.loads((tmp_path / "manifest.json").read_text())
    assert manifest["commit"] == "0123abc"


class TestErrors:
    def test_not_compiled(self, tmp_path):
        model = keras_iris.SelfPlayModel(make_causal_lm(num_layers=1))
        with pytest.raises(ValueError, match="compiled with a loss"):
            keras_iris.SelfPlay(model, make_examples(), tmp_path)

    @pytest.mark.parametrize("model", [None, make_causal_lm(num_layers=1)])
    def test_not_a_self_play_model(self, tmp_path, model):
        with pytest.raises(ValueError, match="`keras_iris.SelfPlayModel`"):
            keras_iris.SelfPlay(model, make_examples(), tmp_path)

    def test_steps_that_keras_chooses(self, tmp_path):
        options = {"steps_per_execution": "auto"}
        with pytest.raises(ValueError, match="`steps_per_execution` has to"):
            make_self_play(tmp_path, compile_options=options)

    @pytest.mark.parametrize(
        "callback",
        [
            keras.callbacks.BackupAndRestore("backup"),
            keras.callbacks.SwapEMAWeights(swap_on_epoch=True),
        ],
    )
    def test_callbacks_that_exchange_weights(self, tmp_path, callback):
        with pytest.raises(ValueError, match=type(callback).__name__):
            make_self_play(tmp_path, callbacks=[callback])

    def test_fewer_rows_than_a_batch(self, tmp_path):
        with pytest.raises(ValueError, match="fewer than batch_size=8"):
            make_self_play(tmp_path, examples=make_examples(3))

    def test_samples_that_do_not_divide_a_batch(self, tmp_path):
        with pytest.raises(ValueError, match="num_samples=3.* Received: 8"):
            make_self_play(tmp_path / "run", num_samples=3)
        assert not (tmp_path / "run").exists()

    def test_vocabulary(self, tmp_path):
        examples = make_examples()
        examples[0].prompt_ids[0] = VOCABULARY_SIZE
        with pytest.raises(ValueError, match="Vocabulary mismatch"):
            make_self_play(tmp_path, examples=examples)

    def test_text_without_a_tokenizer(self, tmp_path):
        rows = [{"prompt": "a", "response": "b"}] * 8
        with pytest.raises(ValueError, match="Text needs a tokenizer"):
            make_self_play(tmp_path, examples=rows)

    def test_no_common_end(self, tmp_path):
        examples = make_examples()
        examples[0].response_ids[-1] = 5
        with pytest.raises(ValueError, match="end in 2 different"):
            make_self_play(tmp_path, examples=examples)

    def test_no_data(self, tmp_path):
        with pytest.raises(ValueError, match="data are empty"):
            make_self_play(tmp_path, examples=())

    def test_negative_seed(self, tmp_path):
        with pytest.raises(ValueError, match="`seed`"):
            make_self_play(tmp_path, seed=-1)

    @pytest.mark.parametrize(
        "name", ["max_prompt_length", "checkpoint_every_steps", "epochs"]
    )
    @pytest.mark.parametrize("value", [0, 1.5, "8", True])
    def test_counts(self, name, value, tmp_path):
        with pytest.raises(ValueError, match=f"`{name}` has .* {value!r}"):
            make_self_play(tmp_path / "run", **{name: value})
        assert not (tmp_path / "run").exists()

    def test_counts_of_numpy(self, tmp_path):
        begin(
            make_self_play(tmp_path, batch_size=np.int64(8), seed=np.int64(1))
        )

    @pytest.mark.parametrize(
        "example",
        [
            {"prompt": "a", "response": "b"},
            Example(np.array([2], "int32"), np.array([], "int32")),
        ],
    )
    def test_what_is_no_example(self, example, tmp_path):
        examples = [*make_examples(), example]
        with pytest.raises(ValueError, match="Number 24 of the data"):
            make_self_play(tmp_path, examples=examples)

    def test_batches_that_cannot_be_logged(self, tmp_path):
        options = {"compile_options": {"steps_per_execution": 1000}}
        with pytest.raises(ValueError, match="4096 pairs at most.* 8 . 1000"):
            make_self_play(tmp_path, **options)

    @pytest.mark.skipif(
        keras.backend.backend() != "torch", reason="elsewhere there are some"
    )
    def test_steps_per_execution_that_a_backend_lacks(self, tmp_path):
        options = {"compile_options": {"steps_per_execution": 2}}
        with pytest.raises(ValueError, match="must be 1 with the PyTorch"):
            make_self_play(tmp_path / "run", **options)
        assert not (tmp_path / "run").exists()

    def test_callbacks_that_are_none(self, tmp_path):
        stop = keras.callbacks.EarlyStopping()
        nested = make_self_play(tmp_path, callbacks=[[stop], []])
        assert nested.callbacks == [stop]
        assert make_self_play(tmp_path, callbacks=None).callbacks == []
        others = (keras.callbacks.CallbackList([]), [print], [type(stop)])
        for callbacks in others:
            with pytest.raises(ValueError, match="Keras callback or a list"):
                make_self_play(tmp_path, callbacks=callbacks)

    @pytest.mark.parametrize(
        "text",
        [
            *("", "{}", "[]", "[" * 100_000),
            '{"settings": {}, "versions": {}, "left": [], '
            '"execution": {"iterations": 1}}',
            '{"settings": {}, "versions": {}, "earlier": 5, '
            '"execution": {"iterations": 1}}',
        ],
        ids=["empty", "object", "list", "deep", "left", "earlier"],
    )
    def test_broken_manifest(self, text, tmp_path):
        (tmp_path / "manifest.json").write_text(text)
        with pytest.raises(ValueError, match="not the manifest of a run"):
            make_self_play(tmp_path)

    def test_checkpoint_without_a_manifest(self, tmp_path):
        (tmp_path / "checkpoint.safetensors").write_text("")
        with pytest.raises(ValueError, match="without its manifest"):
            make_self_play(tmp_path)

    def test_all_checkpoints_are_broken(self, tmp_path):
        self_play = make_self_play(tmp_path)
        begin(self_play)
        (tmp_path / "checkpoint.safetensors").write_text("half")
        with pytest.raises(ValueError, match="Put back a whole checkpoint"):
            self_play.run()

    @pytest.mark.parametrize("damage", [b"5            ", b"{           }"])
    def test_damaged_position(self, damage, tmp_path):
        file = tmp_path / "checkpoint.safetensors"
        write_arrays(file, {}, {"position": '{"epoch": 0}'.ljust(13)})
        whole = b'{\\"epoch\\": 0} '
        assert whole in (content := file.read_bytes())
        file.write_bytes(content.replace(whole, damage.ljust(len(whole))))
        with pytest.raises(ValueError, match="its checksum is another one"):
            Checkpoints(tmp_path).load([])

    def test_folder_that_cannot_be_written(self, tmp_path):
        (tmp_path / "file").write_text("")
        with pytest.raises(ValueError, match="can't be written to"):
            make_self_play(tmp_path / "file" / "run")

    def test_log_that_cannot_be_written(self, tmp_path):
        (tmp_path / "metrics.jsonl").mkdir()
        with pytest.raises(ValueError, match="can't be written to"):
            make_self_play(tmp_path)


def test_replaced_keeps_the_old_file_when_writing_fails(tmp_path):
    path = tmp_path / "a"
    path.write_text("old")
    with pytest.raises(RuntimeError), replaced(path) as temporary:
        temporary.write_text("half")
        raise RuntimeError
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]
