"""response_format: answers that are JSON, or follow a JSON Schema, by the grammars of the llguidance library."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import torch
from torch import Tensor

from openelm.data.tokenizer import Tokenizer
from openelm.serve.choosing import Grammar
from openelm.serve.errors import Refused
from openelm.serve.requests import ResponseFormat


class Formats:
    """Grammars for one tokenizer."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._prepared: Any = None  # the library's table of tokens, made when it is first needed

    def grammar(self, wanted: ResponseFormat | None) -> Grammar | None:
        """What to allow; None where anything may come. Refused for what cannot be done."""
        if wanted is None or wanted.type == "text":
            return None
        schema: dict[str, Any] = {"type": "object"}
        if wanted.type == "json_schema":
            if wanted.json_schema is None:
                raise Refused(400, "json_schema is missing: give its name and schema", param="response_format")
            schema = wanted.json_schema.schema_ or schema
        return _Matched(self._matcher(schema), self._tokenizer)

    def _matcher(self, schema: dict[str, Any]) -> Any:
        try:
            import llguidance
        except ImportError as error:
            message = "response_format is not installed on this server (llguidance): ask for JSON in words"
            raise Refused(400, message, param="response_format") from error
        if self._prepared is None:
            self._prepared = _prepared(self._tokenizer)
        try:
            # Without room for white space, of which a small model would write without end.
            grammar = llguidance.LLMatcher.grammar_from_json_schema(
                json.dumps(schema), overrides={"whitespace_flexible": False}
            )
            matcher = llguidance.LLMatcher(self._prepared, grammar, log_level=0)
            problem = matcher.get_error()
        except ValueError as error:
            problem = str(error)
        if problem:
            raise Refused(400, f"json_schema: {problem.splitlines()[0]}", param="response_format")
        return matcher


def _prepared(tokenizer: Tokenizer) -> Any:
    """The vocabulary as the library takes it. Refused for one whose tokens have no bytes of their own."""
    from llguidance import LLTokenizer, TokenizerWrapper

    table = tokenizer.backend.piece_bytes()
    if table is None:
        raise Refused(400, "response_format cannot be had with this tokenizer: ask for JSON in words")
    return LLTokenizer(TokenizerWrapper(_Vocabulary(tokenizer, table)), n_vocab=tokenizer.vocab_size)


class _Vocabulary:
    """What the library asks of a tokenizer, by its names."""

    def __init__(self, tokenizer: Tokenizer, table: list[bytes]) -> None:
        self.eos_token_id, self.bos_token_id = tokenizer.eos_id, tokenizer.bos_id
        self.special_token_ids = [id for id, piece in enumerate(table) if not piece]
        self.tokens = [piece or tokenizer.piece(id).encode() for id, piece in enumerate(table)]
        self._tokenizer = tokenizer
        # Behind it a text is cut as in the middle of one: without the space that a tokenizer may put before a text.
        self._before = "\x02"
        self._skipped = len(tokenizer.encode(self._before))

    def __call__(self, text: str | bytes) -> list[int]:
        text = text if isinstance(text, str) else text.decode()
        return self._tokenizer.encode(self._before + text)[self._skipped :]


class _Matched(Grammar):
    """One text's place in a grammar."""

    def __init__(self, matcher: Any, tokenizer: Tokenizer) -> None:
        self._matcher, self._vocab_size, self._eos_id = matcher, tokenizer.vocab_size, tokenizer.eos_id

    def mask(self) -> Tensor:
        """True (V,) for tokens that may come; only the end of the text where the grammar has no more to say."""
        allowed_V = torch.zeros(self._vocab_size, dtype=torch.bool)
        if not self._matcher.is_stopped():
            bits = np.frombuffer(self._matcher.compute_bitmask(), dtype=np.uint8)
            allowed_V |= torch.from_numpy(np.unpackbits(bits, bitorder="little")[: self._vocab_size].astype(bool))
        if not allowed_V.any():
            allowed_V[self._eos_id] = True
        return allowed_V

    def push(self, id: int) -> None:
        """Go on behind a token."""
        if not self._matcher.is_stopped():
            self._matcher.consume_token(id)
