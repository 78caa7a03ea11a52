"""Data and held-out scores of the study on SmolLM2: see smollm2_study.py."""

import importlib.resources
import json
from collections import Counter

import numpy as np
from sklearn.feature_extraction.text import HashingVectorizer
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import GroupKFold, cross_val_predict

import keras_iris
from keras_iris.metrics import ExampleScore
from keras_iris.models.values import hash_variables
from keras_iris.self_play.held_out import Scores

NLL = "nll_per_token"
TOLD_APART = "told_apart"
# Lower is better; of the others it depends on the annotated answers.
SCORE_MODES = {NLL: "min", TOLD_APART: "min"}
_PROMPT_WORDS = range(3, 13)
_LEAST_RESPONSE_WORDS = 5


def load_rows():
    """What people wrote each other: a message and its answer.

    One of each conversation of the package `chitchat-dataset`, so that no two
    have a writer's words in common, in random order.
    """
    package = importlib.resources.files("chitchat_dataset")
    chats = json.loads((package / "dataset.json").read_text())
    generator = np.random.default_rng(0)
    rows = []
    for chat in chats.values():
        texts = [" ".join(m["text"] for m in turn) for turn in chat["messages"]]
        turns = [
            {"prompt": prompt, "response": response}
            for prompt, response in zip(texts, texts[1:], strict=False)
            if len(prompt.split()) in _PROMPT_WORDS
            and len(response.split()) >= _LEAST_RESPONSE_WORDS
        ]
        if turns:
            rows.append(turns[generator.integers(len(turns))])
    return [rows[i] for i in generator.permutation(len(rows))]


class AnswerScores:
    """Likelihood of annotated answers, and how drawn ones differ from them.

    It is what `SelfPlay(evaluate=...)` takes.

    Args:
        engine: Draws one answer to each prompt; its seed is always the same.
        tokenizer: Makes texts of answers.
        examples: Held-out examples.
        settings: Of the study.
        known: Scores by the hash of the weights, so that the start is scored
            once for all methods.
    """

    def __init__(self, engine, tokenizer, examples, settings, known):
        self.engine = engine
        self.tokenizer = tokenizer
        self.examples = examples
        self.folds = settings["folds"]
        self.known = known
        self.likelihood = keras_iris.evaluation.HeldOut(
            examples, batch_size=settings["score_batch_size"], samples=0
        )

    def __call__(self, model):
        """Scores and answers of a `SelfPlayModel`."""
        key = hash_variables(model.trainable_variables)
        if key not in self.known:
            self.known[key] = self._score(model)
        return self.known[key]

    def annotated(self):
        """The scores of the annotated answers themselves."""
        return score_texts([e.response_ids.tolist() for e in self.examples])

    def _score(self, model):
        prompts = [example.prompt_ids for example in self.examples]
        completions = self.engine.generate(prompts, seed=1)
        drawn = [list(completion.token_ids) for completion in completions]
        texts = list(map(self._text, drawn))
        annotated = [self._text(e.response_ids) for e in self.examples]
        apart = told_apart(annotated, texts, folds=self.folds)
        scores = self.likelihood(model) | score_texts(drawn)
        answers = [
            {"prompt": self._text(prompt), "annotated": real, "answer": text}
            for prompt, real, text in zip(
                prompts, annotated, texts, strict=True
            )
        ]
        return Scores(scores | {TOLD_APART: apart}, answers)

    def _text(self, token_ids):
        ids = np.asarray(token_ids).tolist()
        return self.tokenizer.decode(ids, skip_special=True)


def score_texts(answers):
    """Length, repetition and variety of answers, of each with its examples.

    Args:
        answers: Lists of token ids.
    """
    grams = {n: [list_grams(ids, n) for ids in answers] for n in (1, 2, 3)}
    sizes = {n: list(map(len, found)) for n, found in grams.items()}
    repeated = [len(found) - len(set(found)) for found in grams[3]]
    return {
        "length": ExampleScore(sizes[1]),
        "repeated_3": ExampleScore(repeated, sizes[3]),
        **{
            f"distinct_{n}": ExampleScore(shares_of_distinct(grams[n]), size)
            for n, size in sizes.items()
            if n < 3
        },
    }


def list_grams(token_ids, n):
    """The n-grams of a list."""
    return list(zip(*(token_ids[i:] for i in range(n)), strict=False))


def shares_of_distinct(grams):
    """What each answer has of the distinct n-grams of all answers.

    One that occurs k times counts 1/k at each place, so the sum is the number
    of distinct ones. An interval over examples leaves these k as they are.

    Args:
        grams: The n-grams of each answer.
    """
    counts = Counter(gram for found in grams for gram in found)
    return [sum(1 / counts[gram] for gram in found) for found in grams]


def told_apart(annotated, drawn, *, folds):
    """A classifier two-sample test: how often it says which is which.

    Logistic regression on hashed n-grams of one to three characters, tested
    on prompts that it wasn't fitted on. 0.5 is chance. It sees no lengths, as
    the features of a text are scaled to norm 1.

    Args:
        annotated: A text for each prompt.
        drawn: Another one.
        folds: Of the cross-validation.

    Returns:
        The accuracy; an example is a prompt, and gives two answers.

    Reference:
        Lopez-Paz and Oquab, Revisiting classifier two-sample tests, 2017.
    """
    size = len(drawn)
    hashing = HashingVectorizer(
        analyzer="char", ngram_range=(1, 3), lowercase=False, n_features=2**14
    )
    is_drawn = np.repeat([0, 1], size)
    said = cross_val_predict(
        LogisticRegression(C=10.0, max_iter=1000),
        hashing.transform([*annotated, *drawn]),
        is_drawn,
        groups=np.tile(np.arange(size), 2),
        cv=GroupKFold(folds),
    )
    right = (said == is_drawn).reshape(2, size).sum(axis=0)
    return ExampleScore(right, np.full(size, 2))
