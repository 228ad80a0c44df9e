"""The chat templates, rendered by jinja2 and by transformers as a folder's chat_template.jinja."""

from typing import Any

import pytest

from openelm.data.chat import CHAT_TEMPLATE, HANDBOOK_TEMPLATE, render_chat
from openelm.data.tokenizer import Tokenizer

Case = dict[str, Any]


@pytest.fixture(scope="module")
def cases(golden) -> list[Case]:
    found: list[Case] = golden("chat_template")["cases"]
    assert len(found) == 10
    return found


def without_empty_system_turn(case: Case) -> list[dict[str, str]]:
    return [turn for turn in case["messages"] if turn["role"] != "system" or turn["content"]]


def rendered(template: str, messages: list[dict[str, str]], case: Case, *, blocks: bool) -> str:
    jinja2 = pytest.importorskip("jinja2")
    made = jinja2.Environment(trim_blocks=blocks, lstrip_blocks=blocks).from_string(template)
    options = {name: case[name] for name in ("eos_token", "add_generation_prompt")}
    text: str = made.render(messages=messages, **options)
    return text


@pytest.mark.parametrize("blocks", [True, False])
def test_the_template_gives_every_golden_case_under_any_setting_of_blocks(cases, blocks):
    for case in cases:
        assert rendered(CHAT_TEMPLATE, case["messages"], case, blocks=blocks) == case["rendered"]
        options = {name: case[name] for name in ("eos_token", "add_generation_prompt")}
        assert render_chat(case["messages"], **options) == case["rendered"]


@pytest.mark.parametrize("blocks", [True, False])
def test_the_handbooks_template_puts_the_empty_system_turn_first_by_itself(cases, blocks):
    for case in cases[-4:]:
        assert len(without_empty_system_turn(case)) == len(case["messages"]) - 1
        assert rendered(HANDBOOK_TEMPLATE, without_empty_system_turn(case), case, blocks=blocks) == case["rendered"]


def test_the_handbooks_template_leaves_a_conversation_with_a_system_turn_as_it_is(cases):
    with_system = [case for case in cases if case["messages"][0]["role"] == "system"]
    assert len(with_system) == 6
    for case in with_system:
        assert rendered(HANDBOOK_TEMPLATE, case["messages"], case, blocks=True) == case["rendered"]
    empty = {"eos_token": "</s>", "add_generation_prompt": True}
    assert rendered(HANDBOOK_TEMPLATE, [], empty, blocks=True) == "<|system|>\n</s>\n<|assistant|>\n"


def test_transformers_renders_the_same_from_a_folder(cases, tokenizer_file, tmp_path):
    transformers = pytest.importorskip("transformers")
    for template, chosen in ((CHAT_TEMPLATE, cases), (HANDBOOK_TEMPLATE, cases[-4:])):
        folder = tmp_path / str(len(chosen))
        Tokenizer.load(tokenizer_file).save(folder)
        (folder / "chat_template.jinja").write_text(template, encoding="utf-8")
        tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
        assert tokenizer.eos_token == "</s>"
        for case in chosen:
            messages = case["messages"] if template is CHAT_TEMPLATE else without_empty_system_turn(case)
            text = tokenizer.apply_chat_template(
                messages, tokenize=False, add_generation_prompt=case["add_generation_prompt"]
            )
            assert text == case["rendered"]
