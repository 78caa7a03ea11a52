"""Where a preset's files are."""

from pathlib import Path

from keras_iris.data.text_files import read_json

_HUGGING_FACE = "hf://"
_SNAPSHOTS = "snapshots"  # where huggingface_hub keeps a folder per commit
_SMALL_FILES = ["*.json", "*.jinja", "*.model", "*.spm", "*.txt"]
_WEIGHTS = ["*.safetensors", "*.weights.h5"]
_OTHER_COPIES = ["original/*", "consolidated*", "onnx/*", "openvino/*"]


def find_folder(
    preset: str | Path,
    revision: str | None = None,
    *,
    with_weights: bool = True,
) -> Path | None:
    """The local folder of a preset, downloaded if it is `hf://org/name`.

    Args:
        preset: As in `keras_iris.load`.
        revision: As in `keras_iris.load`.
        with_weights: Whether to download the large files too.

    Returns:
        The folder, or `None` for presets that KerasHub finds itself.

    Raises:
        ValueError: If there is no such folder or preset, or none of its
            revisions can be meant.
    """
    text = str(preset)
    if text.startswith(_HUGGING_FACE):
        name, _, pinned = text.removeprefix(_HUGGING_FACE).partition("@")
        if pinned and revision not in (None, pinned):
            raise ValueError(
                f"{text!r} has another revision than {revision!r}, which is "
                "given beside it. Expected one of the two."
            )
        return _download(name, revision or pinned or None, with_weights)
    if revision is not None:
        raise ValueError(
            f"`revision` is for 'hf://org/name': {text!r} has none. "
            f"Received: {revision!r}. Leave it out."
        )
    if "://" in text:
        return None
    folder = Path(preset).expanduser()
    if folder.is_dir():
        return folder
    if folder.exists():
        raise ValueError(
            f"{folder} is a file, expected a model's folder. Pass the folder "
            "that holds its config.json."
        )
    from keras_hub import models

    if isinstance(preset, Path) or text not in models.CausalLM.presets:
        raise ValueError(
            f"There is no folder {text!r}, and no KerasHub preset of that "
            "name. Expected a folder, 'hf://org/name', 'kaggle://...', or a "
            "name out of `keras_hub.models.CausalLM.presets`."
        )
    return None


def read_commit(folder: Path | None) -> str | None:
    """The commit that a folder was downloaded of, or `None`."""
    if folder and folder.parent.name == _SNAPSHOTS:
        return folder.name
    return None


def _download(name: str, revision: str | None, with_weights: bool) -> Path:
    """Fetches a repository: first what says whether it can be loaded."""
    import huggingface_hub

    repository = f"{name}@{revision}" if revision else name
    downloads = [_SMALL_FILES]
    if with_weights:
        downloads.append([*_SMALL_FILES, *_WEIGHTS])
    try:
        for patterns in downloads:
            folder = Path(
                huggingface_hub.snapshot_download(
                    name,
                    revision=revision,
                    allow_patterns=patterns,
                    ignore_patterns=_OTHER_COPIES,
                )
            )
            if not read_json(folder / "config.json"):
                raise ValueError(
                    f"The repository {repository!r} has no config.json. "
                    "Expected one of a causal language model."
                )
    except (OSError, huggingface_hub.errors.HFValidationError) as error:
        raise ValueError(
            f"Cannot download {repository!r} from the Hugging Face Hub: "
            f"{error} Check the name, the revision, the connection and, for a "
            "gated model, your token; or pass a local folder."
        ) from error
    return folder
