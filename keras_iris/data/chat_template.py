"""Chat templates: messages to the text a model reads."""

import copy
import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from keras_iris.data.conversations import Message
from keras_iris.data.named_templates import NAMED_TEMPLATES
from keras_iris.data.rows import shorten
from keras_iris.data.template_process import RenderError, render
from keras_iris.data.text_files import read_json, read_text
from keras_iris.data.tokenizer import Tokenizer

_CHECK_USER = "What is the capital of France?"
_CHECK_RESPONSE = "The capital of France is Paris."
# Beside the start and end token: what transformers hands to a template.
_OTHER_TOKENS = (
    "unk_token",
    "sep_token",
    "pad_token",
    "cls_token",
    "mask_token",
)
_SHOWN = 700  # characters of a rendered text in a message
_OTHER_TEMPLATE = (
    "Change the template's source, or take a template that suits every "
    "tokenizer: `template=ChatTemplate.named('spin')`."
)
_CHECK_MESSAGES = (
    ({"role": "user", "content": _CHECK_USER},),
    (
        {"role": "user", "content": "Hello."},
        {"role": "assistant", "content": "Hi there."},
        {"role": "user", "content": _CHECK_USER},
    ),
)


class ChatTemplate:
    r"""A Jinja chat template, rendered in a sandbox.

    The same template makes the prompt for generation and for training. A
    source that writes today's date (`strftime_now`) always writes 26 July
    2024, so that the same messages give the same ids on every day.

    Args:
        source: The Jinja source, as in a checkpoint's `chat_template`. It sees
            `messages`, `add_generation_prompt` and the tokens.
        bos_token: The start token's string. `None` stands for the tokenizer's
            own, where there is one (`bind`).
        eos_token: The end token's string. `None` as for the start token.
        other_tokens: Strings of further tokens that the source sees, by name,
            such as `{"pad_token": "<pad>"}`.

    Examples:
        >>> template = ChatTemplate.named("spin")
        >>> template.render_prompt([{"role": "user", "content": "Hello"}])
        '### Instruction: Hello\n\n### Response: '
    """

    def __init__(
        self,
        source: str,
        *,
        bos_token: str | None = None,
        eos_token: str | None = None,
        other_tokens: Mapping[str, str] | None = None,
    ):
        self.source = source
        self.bos_token = bos_token
        self.eos_token = eos_token
        self.other_tokens = dict(other_tokens or {})

    @classmethod
    def named(
        cls,
        name: str,
        *,
        bos_token: str | None = None,
        eos_token: str | None = None,
    ) -> "ChatTemplate":
        """A template that comes with the package.

        Args:
            name: `"zephyr"`, `"chatml"`, `"llama3"`, `"gemma"`, `"plain"` or
                `"spin"`.
            bos_token: Replaces the template's usual start token, which is
                the tokenizer's own unless the format has another.
            eos_token: Replaces the template's usual end token, likewise.

        Raises:
            ValueError: If there is none of that name, or it doesn't write a
                token that is given.
        """
        if name not in NAMED_TEMPLATES:
            raise ValueError(
                f"Unknown chat template {name!r}. Expected one of "
                f"{sorted(NAMED_TEMPLATES)}, or make a `ChatTemplate` of its "
                "Jinja source."
            )
        source, bos, eos = NAMED_TEMPLATES[name]
        given = {"bos_token": bos_token, "eos_token": eos_token}
        for token, text in given.items():
            if text is not None and token not in source:
                raise ValueError(
                    f"The chat template {name!r} doesn't write the "
                    f"`{token}`. Received: {text!r}. Leave out the argument, "
                    "or make a `ChatTemplate` of a Jinja source that does."
                )
        return cls(
            source,
            bos_token=bos if bos_token is None else bos_token,
            eos_token=eos if eos_token is None else eos_token,
        )

    @classmethod
    def from_folder(cls, folder: str | Path) -> "ChatTemplate | None":
        """The template of a checkpoint folder in Hugging Face's layout.

        Args:
            folder: It has a `chat_template.jinja`, or a
                `tokenizer_config.json` with a `chat_template`.

        Returns:
            The template, or `None` if the folder has none.

        Raises:
            ValueError: If a file isn't UTF-8 or valid JSON.
        """
        folder = Path(folder)
        config = read_json(folder / "tokenizer_config.json")
        file = folder / "chat_template.jinja"
        source = _find_source(config.get("chat_template"), folder)
        if file.is_file():
            source = read_text(file)
        if source is None:
            return None
        tokens = read_json(folder / "special_tokens_map.json") | config
        other = {name: token_text(tokens.get(name)) for name in _OTHER_TOKENS}
        return cls(
            source,
            bos_token=token_text(tokens.get("bos_token")),
            eos_token=token_text(tokens.get("eos_token")),
            other_tokens={name: text for name, text in other.items() if text},
        )

    def bind(self, tokenizer: Tokenizer) -> "ChatTemplate":
        """The template with a tokenizer's tokens where it has none itself.

        Args:
            tokenizer: Its start tokens and its first end token are taken.
        """
        if self.bos_token is not None and self.eos_token is not None:
            return self
        bound = copy.copy(self)
        if bound.bos_token is None:
            bound.bos_token = tokenizer.decode(tokenizer.start_token_ids)
        if bound.eos_token is None:
            bound.eos_token = tokenizer.decode(tokenizer.end_token_ids[:1])
        return bound

    def render_prompt(self, messages: Sequence[Message]) -> str:
        """The text up to where the response starts.

        Args:
            messages: What comes before the response.

        Raises:
            ValueError: If the template cannot be rendered.
        """
        return self._render([(messages, True)])[0]

    def render(self, messages: Sequence[Message], response: str) -> str:
        """The text of prompt, response and end of turn.

        Args:
            messages: What comes before the response.
            response: The response.

        Returns:
            A text that starts with `render_prompt(messages)`.

        Raises:
            ValueError: If the template cannot be rendered, or its text
                doesn't start with the prompt.
        """
        return self.render_pairs([(messages, response)])[0][1]

    def render_pairs(
        self, pairs: Sequence[tuple[Sequence[Message], str]]
    ) -> list[tuple[str, str]]:
        """For each pair the texts of `render_prompt` and of `render`."""
        jobs: list[tuple[Sequence[Message], bool]] = []
        for messages, response in pairs:
            turn = {"role": "assistant", "content": response}
            jobs += [(messages, True), ([*messages, turn], False)]
        texts = self._render(jobs)
        rendered = list(zip(texts[::2], texts[1::2], strict=True))
        for prompt, full in rendered:
            if not full.startswith(prompt):
                raise ValueError(
                    "The chat template changes the prompt once the response "
                    "is known, so a model would be trained on other prompts "
                    "than it generates from. Expected the whole text to start "
                    f"with the prompt.\n{_show(prompt, full)}\n"
                    f"{_OTHER_TEMPLATE}"
                )
        return rendered

    def check(self, tokenizer: Tokenizer | None = None) -> None:
        """Refuses a template that cannot be used, before any work is done.

        Args:
            tokenizer: What the texts are encoded with. If given, it has to
                know what the template ends a response with.

        Raises:
            ValueError: If a one-turn or a three-turn conversation cannot be
                rendered, doesn't start with its prompt, lacks the text of
                a message, has the response's header but in the prompt, or an
                end of turn that generation wouldn't stop at.
        """
        if tokenizer is not None:
            self = self.bind(tokenizer)
        for messages in _CHECK_MESSAGES:
            [(prompt, full)] = self.render_pairs([(messages, _CHECK_RESPONSE)])
            header, found, end = full[len(prompt) :].partition(_CHECK_RESPONSE)
            if _CHECK_USER not in prompt or not found:
                raise ValueError(
                    "The chat template leaves out the text of a message. "
                    f"Expected {_CHECK_USER!r} in the prompt and "
                    f"{_CHECK_RESPONSE!r} after it.\n{_show(prompt, full)}"
                )
            [without] = self._render([(messages, False)])
            if header.strip() and without == prompt:
                raise ValueError(
                    "The chat template has no generation prompt, so a model "
                    f"would have to write the header {shorten(repr(header))} "
                    "of its own turn. Add `{% if add_generation_prompt %}"
                    "{{ header }}{% endif %}` to the end of its source."
                )
            if tokenizer is not None:
                _check_end(end, tokenizer)

    def fingerprint(self) -> str:
        """A hash of the source and its tokens."""
        tokens = [self.bos_token, self.eos_token, self.other_tokens]
        text = json.dumps([self.source, *tokens], sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()

    def _render(
        self, jobs: Sequence[tuple[Sequence[Message], bool]]
    ) -> list[str]:
        """The texts of messages, with a generation prompt or without."""
        always = {
            "bos_token": self.bos_token or "",
            "eos_token": self.eos_token or "",
            "tools": None,
            "documents": None,
            **self.other_tokens,
        }
        variables = [
            {"messages": messages, "add_generation_prompt": is_prompt, **always}
            for messages, is_prompt in jobs
        ]
        try:
            return render(self.source, variables)
        except RenderError as error:
            if error.is_unsafe:
                raise ValueError(
                    "The chat template reaches for Python, which the sandbox "
                    f"refuses: {error}. A chat template may only format "
                    "messages; don't trust this one."
                ) from error
            roles = [message.get("role") for message in jobs[error.index][0]]
            raise ValueError(
                "The chat template cannot be rendered: "
                f"{shorten(str(error), _SHOWN)}. The messages' roles are "
                f"{roles}."
            ) from error


def _show(prompt: str, full: str) -> str:
    texts = (shorten(repr(text), _SHOWN) for text in (prompt, full))
    return "Prompt:\n{}\nPrompt and response:\n{}".format(*texts)


def _check_end(end: str, tokenizer: Tokenizer) -> None:
    """Refuses an end of turn without an end token."""
    token_ids = tokenizer.encode(end)
    if not end.strip() or set(token_ids) & set(tokenizer.end_token_ids):
        return
    known = [tokenizer.decode([i]) for i in tokenizer.end_token_ids]
    written = [t for t in tokenizer.special_tokens if t in end]
    reason, remedy = f"which is {len(token_ids)} tokens, none", _OTHER_TEMPLATE
    if written:
        reason = f"and {written} isn't one"
        remedy = "Pass it as `load(default_template=...)`, which makes it one."
    raise ValueError(
        f"The chat template ends a response with {shorten(repr(end))}, "
        f"{reason} of the "
        f"tokenizer's end tokens {known}, so generation would not stop there. "
        f"{remedy}"
    )


def _find_source(entry: Any, folder: Path) -> str | None:
    """The source in tokenizer_config.json: a text, or several by name."""
    try:
        if isinstance(entry, list):
            entry = {t["name"]: t["template"] for t in entry}.get("default")
    except (KeyError, TypeError):
        entry = 0
    if not isinstance(entry, str | None):
        raise ValueError(
            f"The 'chat_template' in {folder / 'tokenizer_config.json'} isn't "
            "a text, nor a list of objects with 'name' and 'template'. "
            "Download the file again."
        )
    return entry


def token_text(token: Any) -> str:
    """The string of a token of tokenizer_config.json, or an empty one."""
    if isinstance(token, dict):  # a saved AddedToken
        token = token.get("content")
    return token if isinstance(token, str) else ""
