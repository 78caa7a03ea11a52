import pytest

from keras_iris.metrics import score_mode


@pytest.mark.parametrize(
    "names, expected",
    [
        ("word_accuracy exact_match exact_match,strict-match f1 val_f1", "max"),
        ("bleu BLEU-4 rougeL win_rate winrate mmlu_stem_acc acc", "max"),
        ("acc_norm,none pass@1 em token_f1 macro_recall", "max"),
        ("nll_per_token real_nll perplexity ppl loss val_loss", "min"),
        ("phoneme_error_rate error wer bits_per_byte", "min"),
        # A growing margin isn't progress; nor are those quality.
        ("margin margin_accuracy real_log_ratio synthetic_log_ratio", None),
        ("alpha gap nll_gap divergence real_ess synthetic_ess", None),
        ("synthetic_nll acc_stderr accuracy_std", None),
        # Names that say nothing, and those that speak of both.
        ("answer_length fact temper accuracy_loss", None),
    ],
)
def test_score_mode(names, expected):
    assert {name: score_mode(name) for name in names.split()} == dict.fromkeys(
        names.split(), expected
    )


def test_users_score_mode_counts_first():
    modes = {"answer_length": "min", "word_accuracy": "min", "margin": "max"}
    assert {name: score_mode(name, modes) for name in modes} == modes
    assert score_mode("nll", modes) == "min"


@pytest.mark.parametrize("modes", [{"f1": "up"}, {"f1": None}, "max", ["f1"]])
def test_wrong_score_modes(modes):
    with pytest.raises(ValueError, match="'min' or 'max'.*Received: .*Leave"):
        score_mode("nll", modes)
