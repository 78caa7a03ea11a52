import keras
import numpy as np
import pytest
from tiny_models import VOCABULARY_SIZE, make_causal_lm

from keras_iris import backend
from keras_iris.generation import KerasEngine
from keras_iris.generation.rowwise import Rowwise
from keras_iris.models import Lora, add_lora

END = 3
MAX_NEW_TOKENS = 6
BATCH_SIZE = 4
# More than rows, and in Gemma's 2 batches the last has a dummy row.
PROMPTS = [[1] * n for n in (3, 8, 2, 5, 2, 9, 4)]
LONGEST_PROMPT = 10
# Decoding with a cache against the training forward, float32.
LOG_PROBS_TOLERANCE = 2e-5
# Of the chi-square test below; its statistic has the same seed every time.
SIGNIFICANCE = 1e-3


def make_engine(causal_lm, **options):
    defaults = dict(
        end_token_ids=(END, 4),
        max_new_tokens=MAX_NEW_TOKENS,
        batch_size=BATCH_SIZE,
        bucket_lengths=(LONGEST_PROMPT,),
    )
    return KerasEngine(causal_lm, **{**defaults, **options})


@pytest.fixture(scope="module")
def causal_lm():
    """Its weights are never changed."""
    return make_causal_lm("qwen", num_layers=1)


@pytest.fixture(scope="module")
def engine(causal_lm):
    return make_engine(causal_lm)


@pytest.fixture
def steps(monkeypatch):
    """Has an entry for each call of a decoding step, or trace of one."""
    calls = []
    step = Rowwise.step

    def counting(self, *args):
        calls.append(args)
        return step(self, *args)

    monkeypatch.setattr(Rowwise, "step", counting)
    return calls


def next_log_probs(causal_lm, token_ids):
    """The training forward's log-probs of the next token: (time, vocabulary)"""
    length = LONGEST_PROMPT + MAX_NEW_TOKENS  # always, to compile once
    padded = np.pad(token_ids, (0, length - len(token_ids)))[None]
    mask = np.arange(length)[None] < len(token_ids)
    logits = causal_lm(
        {"token_ids": padded.astype("int32"), "padding_mask": mask}
    )
    log_probs = keras.ops.log_softmax(logits, -1)
    return keras.ops.convert_to_numpy(log_probs)[0, : len(token_ids)]


def rescored(causal_lm, prompt, completion):
    """The training forward's log-probs of a completion."""
    ids = completion.token_ids
    log_probs = next_log_probs(causal_lm, list(prompt) + list(ids))
    return log_probs[np.arange(len(ids)) + len(prompt) - 1, ids]


def ids(completions):
    return [completion.token_ids for completion in completions]


def test_first_tokens_follow_the_softmax(causal_lm):
    """Pearson's chi-square, with the oracle's probabilities."""
    num_samples = 4000
    prompt = [5, 6, 7]
    engine = make_engine(causal_lm, max_new_tokens=1, batch_size=500)
    completions = engine.generate([prompt] * num_samples, seed=0)
    first = [completion.token_ids[0] for completion in completions]
    counts = np.bincount(first, minlength=VOCABULARY_SIZE)
    probabilities = np.exp(next_log_probs(causal_lm, prompt)[-1], dtype="f8")
    expected = num_samples * probabilities / probabilities.sum()
    assert expected.min() > 5, "too few samples for the test"
    statistic = np.sum((counts - expected) ** 2 / expected)
    freedom = VOCABULARY_SIZE - 1
    # Wilson and Hilferty: the cube root is near normal; 3.09 is its 99.9%.
    z = (statistic / freedom) ** (1 / 3) - (1 - 2 / (9 * freedom))
    assert z / np.sqrt(2 / (9 * freedom)) < 3.09, SIGNIFICANCE


@pytest.mark.parametrize(
    ("architecture", "options"),
    [
        ("qwen", {}),
        ("mistral", {"sliding_window": 4}),
        ("llama", {}),
        ("gemma", {}),
    ],
)
def test_completions_keep_order_and_match_the_training_forward(
    architecture, options
):
    causal_lm = make_causal_lm(architecture, num_layers=1, **options)
    assert causal_lm.preprocessor is None
    prompts = [[5 + i] * len(prompt) for i, prompt in enumerate(PROMPTS)]
    completions = make_engine(causal_lm).generate(prompts, seed=4)
    assert len(completions) == len(prompts)
    for prompt, completion in zip(prompts, completions, strict=True):
        # Log-probs of another prompt, or after another one, would differ.
        np.testing.assert_allclose(
            completion.log_probs,
            rescored(causal_lm, prompt, completion),
            atol=LOG_PROBS_TOLERANCE,
        )


def test_the_end_token_is_kept_and_nothing_follows(engine):
    ended = 0
    for seed in range(8):
        for completion in engine.generate(PROMPTS, seed=seed):
            *before, last = completion.token_ids
            assert not {END, 4} & set(before)
            assert len(completion.token_ids) <= MAX_NEW_TOKENS
            if completion.finish_reason == "stop":
                assert last in (END, 4)
                ended += 1
            else:
                assert len(completion.token_ids) == MAX_NEW_TOKENS
                assert last not in (END, 4)
    assert ended > 0


@pytest.mark.skipif(
    keras.backend.backend() != "torch", reason="counts calls, not traces"
)
def test_rows_do_not_wait_for_longer_prompts(causal_lm, steps):
    """As many steps as the longest answer of a batch has tokens."""
    completions = make_engine(causal_lm).generate(PROMPTS[:4], seed=0)
    assert len(steps) == max(len(c.token_ids) for c in completions)


@pytest.mark.skipif(
    keras.backend.backend() != "torch", reason="counts calls, not traces"
)
def test_answers_that_are_over_make_room(causal_lm, steps):
    """As many steps as if each row took the next prompt as it gets free."""
    options = {"max_new_tokens": 40, "end_token_ids": tuple(range(3, 7))}
    engine = make_engine(causal_lm, **options)
    prompts = [[5 + i % 20] * 3 for i in range(32)]
    completions = engine.generate(prompts, seed=0)
    lengths = [len(c.token_ids) for c in completions]
    rows = [0] * BATCH_SIZE
    for length in lengths:
        rows[np.argmin(rows)] += length
    assert len(steps) == max(rows)
    in_batches = np.reshape(lengths, (-1, BATCH_SIZE)).max(axis=1).sum()
    assert len(steps) < 0.7 * in_batches, "the test shows nothing"
    # And each is what it is on its own.
    alone = make_engine(causal_lm, **options, batch_size=1)
    assert ids(alone.generate(prompts, seed=0)) == ids(completions)


def test_an_end_token_in_the_prompt_ends_nothing(engine):
    completions = engine.generate([[END, 5, END]] * 12, seed=0)
    assert max(len(c.token_ids) for c in completions) > 1


def test_a_restart_gives_the_same_ids(engine):
    again = make_engine(make_causal_lm("qwen", num_layers=1))
    engine.generate(PROMPTS, seed=5)
    expected = ids(engine.generate(PROMPTS, seed=1))
    assert ids(again.generate(PROMPTS, seed=1)) == expected
    assert ids(engine.generate(PROMPTS, seed=2)) != expected


@pytest.mark.parametrize("floatx", ["bfloat16", "float16"])
def test_floatx_changes_no_answer(floatx, causal_lm):
    """Keras' default type, set after the model was made."""
    expected = ids(make_engine(causal_lm).generate(PROMPTS, seed=0))
    keras.config.set_floatx(floatx)
    try:
        found = ids(make_engine(causal_lm).generate(PROMPTS, seed=0))
    finally:
        keras.config.set_floatx("float32")
    assert found == expected


@pytest.mark.parametrize("architecture", ["qwen", "gemma"])
def test_the_batch_changes_no_answer(architecture):
    """Noise is that of a prompt's place, whatever it is answered with."""
    causal_lm = make_causal_lm(architecture, num_layers=1)
    prompts = [[5, 6]] * 5 + PROMPTS
    expected = ids(make_engine(causal_lm).generate(prompts, seed=0))
    assert len(set(expected[:5])) == 5
    for options in (
        {"batch_size": 5},
        {"batch_size": None, "bucket_lengths": (3, 6, LONGEST_PROMPT)},
    ):
        engine = make_engine(causal_lm, **options)
        assert ids(engine.generate(prompts, seed=0)) == expected
        assert ids(engine.generate(prompts[:7], seed=0)) == expected[:7]


@pytest.mark.parametrize(
    ("rows", "num_prompts", "expected"),
    [
        (30, 40, {6: 32, LONGEST_PROMPT: 16}),  # 0.8 of 30, and 10/6 of that
        (30, 13, {6: 16, LONGEST_PROMPT: 16}),
        (30, 4, {6: 4, LONGEST_PROMPT: 4}),
        (0.1, 40, {6: 1, LONGEST_PROMPT: 1}),
        (1e9, 5000, {6: 1024, LONGEST_PROMPT: 1024}),
        (None, 5000, {6: 32, LONGEST_PROMPT: 32}),
    ],
)
def test_rows_follow_the_free_memory(
    rows, num_prompts, expected, causal_lm, monkeypatch
):
    engine = make_engine(
        causal_lm, batch_size=None, bucket_lengths=(6, LONGEST_PROMPT)
    )
    # Keys and values, an eighth more of those that begin, with their hidden
    # states and inner products, 8 answers of ids and log-probs; float32.
    total = (LONGEST_PROMPT + MAX_NEW_TOKENS) * 2 * 2 * 8
    begin = LONGEST_PROMPT * (2 * 32 + 3 * 64)
    answers = 8 * MAX_NEW_TOKENS * 2
    bytes_of_row = 4 * (total + (total + begin) / 8 + answers)
    free = rows and rows * bytes_of_row
    monkeypatch.setattr(backend, "free_bytes", lambda: free)
    assert engine._num_rows(num_prompts) == expected


def test_rows_are_never_more_again(causal_lm, monkeypatch):
    engine = make_engine(causal_lm, batch_size=None)
    found = []
    for free in (10**6, 10**4, 10**6):
        monkeypatch.setattr(backend, "free_bytes", lambda free=free: free)
        found += engine._num_rows(5000).values()
    assert found[0] > found[1] == found[2]


def test_nothing_compiles_twice(causal_lm, steps):
    engine = make_engine(causal_lm, bucket_lengths=(6, LONGEST_PROMPT))
    first = ids(engine.generate(PROMPTS, seed=0))
    traces = len(steps)
    assert traces > 0
    for seed in range(1, 4):
        engine.generate(PROMPTS[: 2 * seed + 1], seed=seed)
    if keras.backend.backend() != "torch":  # which compiles nothing
        assert len(steps) == traces
    assert ids(engine.generate(PROMPTS, seed=0)) == first


@pytest.mark.parametrize("architecture", ["qwen", "gemma"])
def test_prefill_computes_no_prompt_logits(architecture, monkeypatch):
    causal_lm = make_causal_lm(architecture, num_layers=1)
    head = causal_lm.backbone.token_embedding
    call = type(head).call
    lengths = []

    def recording(self, inputs, reverse=False):
        if reverse:
            lengths.append(inputs.shape[1])
        return call(self, inputs, reverse=reverse)

    monkeypatch.setattr(type(head), "call", recording)
    make_engine(causal_lm).generate([[5] * 9], seed=0)
    assert max(lengths) <= 2
    # And the layer is as it was.
    assert next_log_probs(causal_lm, [5] * 9).shape == (9, VOCABULARY_SIZE)


def test_current_weights_are_used():
    causal_lm = make_causal_lm("qwen", num_layers=1)
    engine = make_engine(causal_lm, temperature=0)
    before = engine.generate(PROMPTS, seed=0)
    for variable in causal_lm.trainable_variables:
        variable.assign(-3.0 * variable)
    after = engine.generate(PROMPTS, seed=0)
    assert ids(before) != ids(after)
    # LoRA adds variables to a model that was traced without them.
    add_lora(causal_lm.backbone, Lora(2, targets="all"))
    for variable in causal_lm.trainable_variables:
        variable.assign(keras.random.normal(variable.shape, seed=1))
    for prompt, completion in zip(
        PROMPTS, engine.generate(PROMPTS, seed=0), strict=True
    ):
        np.testing.assert_allclose(
            completion.log_probs,
            rescored(causal_lm, prompt, completion),
            atol=1e-3,
        )


def test_the_model_stays_as_it_was():
    causal_lm = make_causal_lm("qwen", num_layers=1)
    causal_lm.compile(sampler="top_k", optimizer="sgd")
    sampler = causal_lm.sampler
    make_engine(causal_lm).generate([[5]], seed=0)
    assert causal_lm.sampler is sampler
    assert causal_lm.generate_function is None


def test_no_prompts(engine):
    assert engine.generate([], seed=0) == []


@pytest.mark.parametrize(
    ("prompts", "message"),
    [
        ([[5], [], [5, 6]], "1 of 3 prompts are empty, the first is number 1"),
        (
            [[5] * 11, [5], [5] * 30],
            "2 of 3 prompts are too long: the longest has 30 tokens, the "
            "limit is 10. .*max_prompt_length",
        ),
        ([[5], [6, 37]], r"below 37, .* in prompt 1. Received: \[6, 37\]"),
    ],
)
def test_bad_prompts(engine, prompts, message):
    with pytest.raises(ValueError, match=message):
        engine.generate(prompts, seed=0)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"end_token_ids": ()}, "at least one id in `end_token_ids`"),
        ({"end_token_ids": (99,)}, r"below 37.* in end_token_ids. .*\[99\]"),
        ({"pad_token_id": -1}, r"below 37.* in pad_token_id. .*\[-1\]"),
        ({"max_new_tokens": 0}, "`max_new_tokens` has to be an int.* 0"),
        ({"batch_size": 4.0}, "`batch_size` has to be an int.* 4.0"),
        ({"bucket_lengths": ()}, r"increasing.*\(\)"),
        ({"bucket_lengths": (8, 4)}, r"increasing.*\(8, 4\)"),
        ({"temperature": -1.0}, r"`temperature` has to be .*\[0, 100\]. .* -1"),
    ],
)
def test_bad_arguments(causal_lm, options, message):
    with pytest.raises(ValueError, match=message):
        make_engine(causal_lm, **options)


def test_a_model_without_a_cache():
    with pytest.raises(ValueError, match="call_with_cache.*received Sequent"):
        make_engine(keras.Sequential())
