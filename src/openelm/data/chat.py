"""The conversation format of the instruct models: as text, as ids, and as a template for other engines."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from openelm.data.pieces import Tokenizer
from openelm.errors import UserError

ROLES = ("system", "user", "assistant")

# For chat_template.jinja. transformers renders with trim_blocks and lstrip_blocks; every newline that belongs to the
# text is written out, so that the template gives the same under any setting.
CHAT_TEMPLATE = (
    "{%- for turn in messages -%}"
    "{{- '<|' + turn['role'] + '|>\\n' + turn['content'] + eos_token + '\\n' -}}"
    "{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{- '<|assistant|>\\n' -}}{%- endif -%}"
)
# For models tuned with the Alignment Handbook, which puts an empty system turn where a conversation has none.
HANDBOOK_TEMPLATE = (
    "{%- if not messages or messages[0]['role'] != 'system' -%}"
    "{{- '<|system|>\\n' + eos_token + '\\n' -}}"
    "{%- endif -%}" + CHAT_TEMPLATE
)


def compile_template(text: str) -> Any:
    """Other people's Jinja, rendered in a sandbox with transformers' settings; TemplateError where it is none."""
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)
    environment.globals["raise_exception"] = _refuse  # templates that check their input call it
    return environment.from_string(text)


def _refuse(message: str) -> None:
    from jinja2 import TemplateError

    raise TemplateError(message)


def render_chat(
    messages: Sequence[Mapping[str, str]], *, eos_token: str = "</s>", add_generation_prompt: bool = False
) -> str:
    """One string for a conversation of {"role": ..., "content": ...} turns.

    With `add_generation_prompt` it ends where the assistant's next answer begins. The Alignment Handbook puts an
    empty system turn first; models tuned with it expect one, so pass it then.
    UserError: an unknown role, or no content.
    """
    parts = [f"<|{role}|>\n{content}{eos_token}\n" for role, content in _turns(messages)]
    if add_generation_prompt:
        parts.append("<|assistant|>\n")
    return "".join(parts)


def encode_chat(
    tokenizer: Tokenizer,
    messages: Sequence[Mapping[str, str]],
    *,
    empty_system_turn: bool = False,
    add_generation_prompt: bool = False,
) -> tuple[list[int], list[bool]]:
    """Ids of a conversation, BOS first, and which of them the assistant is to say: its content and the EOS behind it.

    Behind the BOS they are what transformers gives for `render_chat`'s text (CHAT_TEMPLATE): it cuts the text at each
    EOS and encodes what stands between by itself, with a dummy space before it if the tokenizer puts one before a
    text. There a user who types "</s>" ends the turn, and can then speak as anyone; here these are four characters,
    so the ids differ. With `empty_system_turn` they are those of HANDBOOK_TEMPLATE.
    UserError: as `render_chat`.
    """
    turns = _turns(messages)
    if empty_system_turn and (not turns or turns[0][0] != "system"):
        turns.insert(0, ("system", ""))
    ids, counts = [tokenizer.bos_id], [False]
    lead = ""  # what the template puts behind the EOS of the turn before
    for role, content in turns:
        head = f"{lead}<|{role}|>\n"
        turn = tokenizer.encode(head + content)
        # A token may hold the end of the head and the beginning of the content: then it is the assistant's.
        start = common_length(tokenizer.encode(head), turn) if role == "assistant" else len(turn) + 1
        ids += [*turn, tokenizer.eos_id]
        counts += [place >= start for place in range(len(turn) + 1)]
        lead = "\n"
    if tail := lead + ("<|assistant|>\n" if add_generation_prompt else ""):
        rest = tokenizer.encode(tail)
        ids, counts = ids + rest, counts + [False] * len(rest)
    return ids, counts


def common_length(one: Sequence[object], other: Sequence[object]) -> int:
    """How many items, ids mostly, two sequences share at their beginnings."""
    pairs = enumerate(zip(one, other, strict=False))
    return next((place for place, (a, b) in pairs if a != b), min(len(one), len(other)))


def _turns(messages: Sequence[Mapping[str, str]]) -> list[tuple[str, str]]:
    """Role and content of each message, checked; other keys are passed over."""
    turns = []
    for index, turn in enumerate(messages):
        role, content = turn.get("role"), turn.get("content")
        if role not in ROLES:
            raise UserError(
                f"messages[{index}].role is {role!r}: a role is one of {', '.join(ROLES)}: use one of these"
            )
        if not isinstance(content, str):
            raise UserError(f"messages[{index}].content is {content!r}: content must be text: give a string")
        turns.append((role, content))
    return turns
