"""From whatever data a user has to examples that fit the model."""

from pathlib import Path
from typing import Any

import keras

from keras_iris.data import Example, Tokenizer, tokenize
from keras_iris.data.example import check_vocabulary
from keras_iris.data.pairs import check_one_batch
from keras_iris.hub.convert_tokenizer import convert_keras_hub
from keras_iris.self_play.options import Options


def prepare_examples(
    data: Any, options: Options, cache_dir: Path
) -> tuple[list[Example], tuple[int, ...], str]:
    """Makes examples for a run's model.

    The model's own tokenizer and template are the defaults.

    Args:
        data: Rows, a path or a data set, or a list of `Example`.
        options: Of the run.
        cache_dir: Keeps the ids of a file.

    Returns:
        The examples, the ids that end a response, and a fingerprint of the
        tokenizer.

    Raises:
        ValueError: There is no tokenizer, the data are empty or can't be
            read, hold ids that the model doesn't know or fewer rows than a
            batch.
    """
    causal_lm = options.model.causal_lm
    tokenizer = options.tokenizer or _own_tokenizer(causal_lm)
    template = options.template or getattr(causal_lm, "chat_template", None)
    is_list = isinstance(data, list | tuple)
    if is_list and not data:
        raise ValueError("The data are empty. Expected at least one row.")
    if is_list and isinstance(data[0], Example):
        examples = _check_examples(data)
    elif tokenizer is None:
        raise ValueError(
            "Text needs a tokenizer, and the causal LM has no preprocessor. "
            "Pass `tokenizer=...`, or `data` as a list of "
            "`keras_iris.data.Example`."
        )
    else:
        examples = tokenize(
            data,
            tokenizer,
            template=template,
            max_prompt_length=options.max_prompt_length,
            max_response_length=options.max_response_length,
            on_overflow=options.on_overflow,
            on_bad_row=options.on_bad_row,
            cache_dir=cache_dir if isinstance(data, str | Path) else None,
        )
    check_vocabulary(examples, causal_lm.backbone.token_embedding.input_dim)
    check_one_batch(len(examples) * options.num_samples, options.batch_size)
    if tokenizer is not None:  # `export` writes what is trained with
        causal_lm.tokenizer = tokenizer
        causal_lm.chat_template = template and template.bind(tokenizer)
        return examples, tokenizer.end_token_ids, tokenizer.fingerprint()
    return examples, _common_end(examples), "ids"


def _check_examples(examples: Any) -> list[Example]:
    for i, example in enumerate(examples):
        if not isinstance(example, Example) or not (
            len(example.prompt_ids) and len(example.response_ids)
        ):
            raise ValueError(
                f"Number {i} of the data has to be a `keras_iris.data.Example`"
                " with at least one id in prompt and response. Received: "
                f"{str(example)[:80]}"
            )
    return list(examples)


def _own_tokenizer(causal_lm: keras.Model) -> Tokenizer | None:
    # `keras_iris.load` attaches one; KerasHub's preprocessor may have one.
    tokenizer = getattr(causal_lm, "tokenizer", None)
    if tokenizer is None and causal_lm.preprocessor is not None:
        hub = causal_lm.preprocessor.tokenizer
        tokenizer = convert_keras_hub(hub, None)
    return tokenizer


def _common_end(examples: list[Example]) -> tuple[int, ...]:
    ends = {int(example.response_ids[-1]) for example in examples}
    if len(ends) != 1:
        raise ValueError(
            "Without a tokenizer the responses have to end in one id, the end "
            f"token. Received responses that end in {len(ends)} different "
            "ids. Append the end token to each, or pass `tokenizer=...`."
        )
    return tuple(ends)
