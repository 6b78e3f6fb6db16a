"""Conversations as token ids, by the chat template of the model's own tokenizer."""

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from tpjax.checkpoint.safetensors import one_line
from tpjax.errors import UsageError

Conversation = Sequence[Mapping[str, Any]]
_MESSAGE = '{"role": ..., "content": ...}'


def chat_ids(
    tokenizer, messages: Conversation | Sequence[Conversation], where: Path
) -> list[list[int]]:
    """The token ids of one conversation or many, up to where the model's answer begins.

    The template comes from the checkpoint; transformers renders it in jinja's sandbox, where it can
    make text or refuse, nothing else.
    """
    if tokenizer is None:
        raise UsageError(f"{where}: no tokenizer; use generate with token ids")
    if not getattr(tokenizer, "chat_template", None):
        raise UsageError(
            f"{where}: the tokenizer has no chat template; use generate with a plain prompt"
        )
    return [_ids(tokenizer, *of) for of in _conversations(messages).items()]


def _conversations(messages) -> dict[str, list[dict]]:
    """Every conversation, checked, under the name that a refusal calls it by."""
    if not _is_list(messages):
        raise UsageError(f"messages={messages!r:.80}: give a list of {_MESSAGE}, or several lists")
    items = list(messages)
    many = {"messages": items}
    if items and all(_is_list(item) for item in items):
        many = {f"messages[{i}]": list(item) for i, item in enumerate(items)}
    for name, conversation in many.items():
        if not conversation:
            raise UsageError(f"{name}: an empty conversation; give at least one message")
    return {
        name: [_message(f"{name}[{i}]", message) for i, message in enumerate(conversation)]
        for name, conversation in many.items()
    }


def _is_list(x) -> bool:
    return isinstance(x, Iterable) and not isinstance(x, str | bytes | Mapping)


def _message(name: str, message) -> dict:
    words = ("role", "content")
    if not isinstance(message, Mapping) or not all(isinstance(message.get(w), str) for w in words):
        raise UsageError(f"{name}={message!r:.80}: a message is {_MESSAGE}, both text")
    return dict(message)


def _ids(tokenizer, name: str, conversation: list[dict]) -> list[int]:
    try:
        # It also tokenizes: the template has written the special tokens, none may be added.
        return tokenizer.apply_chat_template(
            conversation, add_generation_prompt=True, tokenize=True, return_dict=False
        )
    except Exception as error:  # a template may raise what it likes
        raise UsageError(
            f"{name}: the tokenizer's chat template refuses this ({one_line(error)});"
            " change the messages, or use generate with a plain prompt"
        ) from error
