"""What a run is evaluated by: likelihood and answers on held-out examples."""

from collections.abc import Mapping
from typing import Any

import numpy as np

from keras_iris.data import Example
from keras_iris.data.example import hash_examples
from keras_iris.generation import KerasEngine
from keras_iris.metrics import ExampleScore
from keras_iris.models import SelfPlayModel
from keras_iris.models.score import score_pairs


class Scores(dict[str, float]):
    """Scores by name, and what the model answered meanwhile.

    Attributes:
        answers: For each prompt the texts `"prompt"`, `"annotated"` and
            `"answer"`.
    """

    def __init__(
        self, scores: Mapping[str, float], answers: list[dict[str, str]]
    ) -> None:
        super().__init__(scores)
        self.answers = answers


class HeldOut:
    """Scores a model on examples that it isn't trained on.

    It is what `SelfPlay(evaluate=...)` takes. The score is `nll_per_token`,
    the mean over all tokens of the annotated responses, in nats. The first few
    prompts are answered as well, each time the likeliest token, and the report
    shows the answers beside the annotated ones.

    Args:
        examples: Prompts and annotated responses.
        batch_size: Examples of a forward pass.
        samples: Prompts that are answered; 0 for none. The causal LM needs a
            tokenizer for it, as that from `keras_iris.load` has.
        max_new_tokens: Tokens of an answer.

    Raises:
        ValueError: There are no examples.
    """

    score_names = ("nll_per_token",)

    def __init__(
        self,
        examples: list[Example],
        *,
        batch_size: int,
        samples: int = 8,
        max_new_tokens: int = 256,
    ) -> None:
        if not examples:
            raise ValueError(
                "HeldOut needs examples to score. Received: none. Rows that "
                "are too long may have been dropped from them."
            )
        self.examples = examples
        self.batch_size = batch_size
        self.samples = min(samples, len(examples))
        self.max_new_tokens = max_new_tokens
        self._engine: KerasEngine | None = None

    def __call__(self, model: SelfPlayModel) -> Scores:
        """Scores and answers.

        Args:
            model: The model.

        Raises:
            ValueError: Prompts are to be answered without a tokenizer.
        """
        log_probs = score_pairs(
            model, self.examples, None, batch_size=self.batch_size
        )
        num_tokens = [len(example.response_ids) for example in self.examples]
        nll = ExampleScore(-log_probs[:, 0], num_tokens)
        answers = self._answer(model.causal_lm) if self.samples else []
        return Scores({"nll_per_token": nll}, answers)

    def get_config(self) -> dict[str, Any]:
        """What the scores are of: a run goes on with the same."""
        return {"examples": hash_examples(self.examples)}

    def _answer(self, causal_lm: Any) -> list[dict[str, str]]:
        tokenizer = getattr(causal_lm, "tokenizer", None)
        if tokenizer is None:
            raise ValueError(
                "HeldOut answers prompts, for which the causal LM needs a "
                "tokenizer. Load it with `keras_iris.load`, set "
                "`causal_lm.tokenizer`, or pass samples=0."
            )
        if self._engine is None or self._engine.causal_lm is not causal_lm:
            self._engine = KerasEngine(
                causal_lm,
                end_token_ids=tokenizer.end_token_ids,
                max_new_tokens=self.max_new_tokens,
                temperature=0,
            )
        examples = self.examples[: self.samples]
        completions = self._engine.generate(
            [example.prompt_ids for example in examples], seed=0
        )

        def text(token_ids: Any) -> str:
            return str(tokenizer.decode(np.asarray(token_ids).tolist()))

        return [
            {
                "prompt": text(example.prompt_ids),
                "annotated": text(example.response_ids),
                "answer": text(completion.token_ids),
            }
            for example, completion in zip(examples, completions, strict=True)
        ]
