"""What a checkpoint is, without its weights."""

from pathlib import Path
from typing import Any, NamedTuple

from keras_iris.data import ChatTemplate, Tokenizer
from keras_iris.data.text_files import read_json
from keras_iris.hub.architecture_table import ARCHITECTURES
from keras_iris.hub.checkpoint import find_weights
from keras_iris.hub.decoder_config import DecoderConfig
from keras_iris.hub.sources import find_folder
from keras_iris.hub.tokenizer_folder import check_embeddings, load_tokenizer


class Checkpoint(NamedTuple):
    """The parts of a checkpoint that aren't weights.

    Attributes:
        config: The decoder's sizes, which `RunEstimate` takes.
        tokenizer: The tokenizer.
        chat_template: The checkpoint's template, or else the default.
    """

    config: DecoderConfig
    tokenizer: Tokenizer
    chat_template: ChatTemplate | None


def inspect(
    preset: str | Path,
    *,
    revision: str | None = None,
    default_template: ChatTemplate | None = None,
) -> Checkpoint:
    """Reads and checks all of a checkpoint but the values of its weights.

    Of `"hf://org/name"` only the small files are downloaded. Of a folder that
    has weights, their names, shapes and files' sizes are checked.

    Args:
        preset: `"hf://org/name"`, or a folder in Hugging Face's layout; of
            an architecture in the table.
        revision: As in `keras_iris.load`.
        default_template: Used where the checkpoint has no chat template.

    Returns:
        The config, the tokenizer and the chat template.

    Raises:
        ValueError: If the preset isn't found or of another kind, or
            `keras_iris.load` would refuse it.

    Examples:
        ```python
        config, tokenizer, template = keras_iris.hub.inspect("path/to/folder")
        ```
    """
    folder = find_folder(preset, revision, with_weights=False)
    content = {} if folder is None else read_json(folder / "config.json")
    if folder is None or str(content.get("model_type")) not in ARCHITECTURES:
        raise ValueError(
            f"{preset} has no config.json with a model_type out of "
            f"{tuple(ARCHITECTURES)}. Expected 'hf://org/name' or a "
            "folder in Hugging Face's layout; what else there is, "
            "`keras_iris.load` loads."
        )
    checkpoint = read_checkpoint(folder, content, default_template)
    # An interrupted download is no fault: the next one goes on.
    is_local = "://" not in str(preset)
    if is_local and any(folder.glob("*.safetensors")):
        find_weights(folder, checkpoint.config.weight_shapes())
    return checkpoint


def read_checkpoint(
    folder: Path,
    content: dict[str, Any],
    default_template: ChatTemplate | None,
) -> Checkpoint:
    """Reads a Hugging Face folder, given the content of its config.json.

    Raises:
        ValueError: If a part is missing or damaged, or they don't fit.
    """
    config = DecoderConfig.from_json(content)
    template = ChatTemplate.from_folder(folder) or default_template
    tokenizer = load_tokenizer(folder, template)
    check_embeddings(tokenizer, config.vocabulary_size)
    template = template and template.bind(tokenizer)
    return Checkpoint(config, tokenizer, template)
