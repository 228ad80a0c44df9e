"""The conversation format of the instruct models: as a function, and as a template for other engines."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

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


def render_chat(
    messages: Sequence[Mapping[str, str]], *, eos_token: str = "</s>", add_generation_prompt: bool = False
) -> str:
    """One string for a conversation of {"role": ..., "content": ...} turns.

    With `add_generation_prompt` it ends where the assistant's next answer begins. The Alignment Handbook puts an
    empty system turn first; models tuned with it expect one, so pass it then.
    UserError: an unknown role, or no content.
    """
    parts = []
    for index, turn in enumerate(messages):
        role, content = turn.get("role"), turn.get("content")
        if role not in ROLES:
            raise UserError(
                f"messages[{index}].role is {role!r}: a role is one of {', '.join(ROLES)}: use one of these"
            )
        if not isinstance(content, str):
            raise UserError(f"messages[{index}].content is {content!r}: content must be text: give a string")
        parts.append(f"<|{role}|>\n{content}{eos_token}\n")
    if add_generation_prompt:
        parts.append("<|assistant|>\n")
    return "".join(parts)
