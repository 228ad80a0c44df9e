"""A conversation as the ids of a prompt, by the chat template of a model folder.

The template is other people's Jinja: it runs in a sandbox. What people write never becomes a special token: "</s>" in
a message is four characters, as everywhere in this project.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path

from openelm.data.chat import ROLES, compile_template
from openelm.data.tokenizer import Tokenizer
from openelm.errors import UserError
from openelm.interop.source import read_chat_template

TEMPLATE_FILE = "chat_template.jinja"
# A character that Unicode keeps out of texts. It breaks up special tokens in messages while the template is applied.
_MARK = "\ufdd0"


class ChatTemplate:
    """A template and the tokenizer that it was written for; for data/chat.py's templates ids are `encode_chat`'s."""

    def __init__(self, text: str, tokenizer: Tokenizer, name: str = TEMPLATE_FILE) -> None:
        """UserError where ``text`` is no template; ``name`` is what messages call it."""
        from jinja2 import TemplateError

        self._tokenizer, self._name = tokenizer, name
        try:
            self._template = compile_template(text)
        except TemplateError as error:
            raise UserError(f"{name} is no chat template ({error}): correct it") from error
        self._special = _special_tokens(tokenizer)
        longest_first = sorted(self._special, key=len, reverse=True)
        self._cut = re.compile(f"({'|'.join(map(re.escape, longest_first))})")

    @classmethod
    def load(cls, folder: Path, tokenizer: Tokenizer) -> ChatTemplate | None:
        """The template of a model folder; None for one without, a base model."""
        text = read_chat_template(folder)
        return cls(text, tokenizer, str(folder / TEMPLATE_FILE)) if text else None

    def encode(self, messages: Sequence[Mapping[str, str]], *, add_generation_prompt: bool = True) -> list[int]:
        """Ids of a conversation of {"role": ..., "content": ...}, BOS first, ready for the assistant's answer.

        UserError: an unknown role, content that is no text, a conversation that the template does not take.
        """
        tokenizer = self._tokenizer
        names = {"bos_token": tokenizer.piece(tokenizer.bos_id), "eos_token": tokenizer.piece(tokenizer.eos_id)}
        turns = [self._marked(index, turn) for index, turn in enumerate(messages)]
        try:
            text = self._template.render(messages=turns, add_generation_prompt=add_generation_prompt, **names)
        except Exception as error:  # a program of others may fail in any way
            raise UserError(f"{self._name} does not take this conversation: {error}") from error
        ids: list[int] = []
        for part in self._cut.split(text):
            if part in self._special:
                ids.append(self._special[part])
            elif part:
                ids += tokenizer.encode(part.replace(_MARK, ""))
        return ids if ids[:1] == [tokenizer.bos_id] else [tokenizer.bos_id, *ids]

    def _marked(self, index: int, turn: Mapping[str, str]) -> dict[str, str]:
        role, content = turn.get("role"), turn.get("content")
        if role not in ROLES:
            raise UserError(f"messages[{index}].role is {role!r}: use one of {', '.join(ROLES)}")
        if not isinstance(content, str):
            raise UserError(f"messages[{index}].content is {content!r}: content must be text: give a string")
        return {"role": role, "content": self._cut.sub(lambda found: found[0][0] + _MARK + found[0][1:], content)}


def _special_tokens(tokenizer: Tokenizer) -> dict[str, int]:
    """Spelling and id of the tokens that stand for no text."""
    table = tokenizer.backend.piece_bytes()
    ends = [tokenizer.bos_id, tokenizer.eos_id]
    ids = ends if table is None else [*ends, *(id for id, piece in enumerate(table) if not piece)]
    return {spelling: id for id in ids if (spelling := tokenizer.piece(id))}
