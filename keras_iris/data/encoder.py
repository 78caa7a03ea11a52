"""Conversations to token ids: one path for generation and for training.

The prompt's ids don't depend on the response, so the ids that generation
starts from are the ids that training conditions on.
"""

from collections.abc import Sequence
from typing import NamedTuple, TypeAlias

from keras_iris.data.chat_template import ChatTemplate
from keras_iris.data.conversations import (
    Conversation,
    Message,
    Prompt,
    read_conversation,
)
from keras_iris.data.marked_text import MarkedText
from keras_iris.data.tokenizer import Tokenizer

TokenPair: TypeAlias = tuple[list[int], list[int]]  # prompt, response


class _Rendered(NamedTuple):
    """A conversation's texts; at `cut` the last special token starts."""

    marked: MarkedText
    prompt: str
    full: str
    cut: int


def encode_prompt(
    prompt: Prompt,
    tokenizer: Tokenizer,
    template: ChatTemplate | None = None,
) -> list[int]:
    """The ids that a response is generated from: those `tokenize` gives.

    Args:
        prompt: A string, or messages.
        tokenizer: A `Tokenizer`.
        template: Renders the messages.

    Returns:
        Token ids, at least one.

    Raises:
        ValueError: If the prompt cannot be rendered or has no ids.
    """
    template = template and template.bind(tokenizer)
    encoder = Encoder(tokenizer, template)
    row = read_conversation(Conversation(prompt, ""), "The prompt")
    return encoder.encode([row])[0][0]


class Encoder:
    """Conversations to (prompt ids, response ids).

    Args:
        tokenizer: A `Tokenizer`.
        template: Bound to the tokenizer, or `None`.
    """

    def __init__(self, tokenizer: Tokenizer, template: ChatTemplate | None):
        self.tokenizer = tokenizer
        self.template = template
        self._cuts: list[str] = []
        if template is not None:
            probe = template.render_prompt(as_messages("?"))
            added = tokenizer.added_tokens
            self._cuts = [
                token
                for token in tokenizer.cutting_tokens
                if token in probe and not _is_within(token, added)
            ]

    def encode(self, rows: Sequence[Conversation]) -> list[TokenPair]:
        """Encodes rows, on all cores.

        Raises:
            ValueError: If one of them can't be.
        """
        if self.template is None:
            prompts = [_as_text(row.prompt) for row in rows]
            responses = [row.response for row in rows]
            encode = self.tokenizer.encode_batch
            start = list(self.tokenizer.start_token_ids)
            prompt_ids = encode(prompts, parse_special=False)
            rests = encode(responses, parse_special=False)
            pairs = [
                (start + ids if ids else [], rest)
                for ids, rest in zip(prompt_ids, rests, strict=True)
            ]
        else:
            pairs = self._encode_rendered(rows, self.template)
        if not all(prompt_ids for prompt_ids, _ in pairs):
            raise ValueError(
                "The prompt has no token ids. Expected at least one, which "
                "the first token of the response is predicted from."
            )
        return [(prompt_ids, self._close(rest)) for prompt_ids, rest in pairs]

    def _encode_rendered(
        self, rows: Sequence[Conversation], template: ChatTemplate
    ) -> list[TokenPair]:
        texts = self._render(rows, template)
        # Most of a prompt is encoded once: up to its last special token.
        heads = self._encode_texts(
            [(t.marked, t.prompt[: t.cut]) for t in texts]
        )
        tails = self._encode_texts(
            [(t.marked, t.prompt[t.cut :]) for t in texts]
        )
        fulls = self._encode_texts([(t.marked, t.full[t.cut :]) for t in texts])
        pairs = []
        for text, head, tail, full in zip(
            texts, heads, tails, fulls, strict=True
        ):
            if full[: len(tail)] == tail:
                rest = full[len(tail) :]
            else:
                # A token spans prompt and response: generation never sees it.
                rest = text.marked.encode(
                    text.full[len(text.prompt) :], continues=True
                )
            pairs.append((head + tail, rest))
        return pairs

    def _render(
        self, rows: Sequence[Conversation], template: ChatTemplate
    ) -> list[_Rendered]:
        all_marked, pairs = [], []
        for row in rows:
            turn = {"role": "assistant", "content": row.response}
            messages = [*as_messages(row.prompt), turn]
            marked = MarkedText(messages, self.tokenizer)
            *history, turn = marked.messages
            all_marked.append(marked)
            pairs.append((history, turn["content"]))
        rendered = []
        for marked, (prompt, full) in zip(
            all_marked, template.render_pairs(pairs), strict=True
        ):
            cuts = self._cuts if marked.is_plain else []
            cut = max([0, *(prompt.rfind(token) for token in cuts)])
            rendered.append(_Rendered(marked, prompt, full, cut))
        return rendered

    def _encode_texts(
        self, texts: Sequence[tuple[MarkedText, str]]
    ) -> list[list[int]]:
        plain = [text for marked, text in texts if marked.is_plain]
        ids = iter(self.tokenizer.encode_batch(plain))
        return [
            next(ids) if marked.is_plain else marked.encode(text)
            for marked, text in texts
        ]

    def _close(self, token_ids: list[int]) -> list[int]:
        """Ids up to the first end token, appended if there is none."""
        ends = self.tokenizer.end_token_ids
        places = [token_ids.index(end) for end in ends if end in token_ids]
        if places:
            return token_ids[: min(places) + 1]
        return [*token_ids, ends[0]]


def _is_within(token: str, others: Sequence[str]) -> bool:
    """Whether an occurrence of a token may begin inside of another one."""
    return any(
        token in other[1:]
        or any(token.startswith(other[i:]) for i in range(1, len(other)))
        for other in others
    )


def as_messages(prompt: Prompt) -> tuple[Message, ...]:
    """The messages of a prompt; a string is one of the user."""
    if isinstance(prompt, str):
        return ({"role": "user", "content": prompt},)
    return prompt


def _as_text(prompt: Prompt) -> str:
    if isinstance(prompt, str):
        return prompt
    raise ValueError(
        f"The prompt is a list of {len(prompt)} messages, expected a string, "
        "because there is no chat template. Pass a template, for instance "
        "`template=ChatTemplate.named('spin')`, which suits every tokenizer."
    )
