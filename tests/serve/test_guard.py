"""--guard sees every text before it is computed or shown; response_format allows JSON only."""

import json
from typing import Any

import pytest

from openelm.errors import UserError
from openelm.serve.guard import load_guard

openai = pytest.importorskip("openai")

PROMPT: dict[str, Any] = {
    "model": "tiny",
    "prompt": "After the night ",
    "temperature": 0,
    "max_tokens": 110,
    "logit_bias": {"2": -100},
}
TALK: dict[str, Any] = {"model": "tiny", "messages": [{"role": "user", "content": "Where is the river?"}]}


@pytest.fixture(scope="module")
def guarded(serving, engine) -> Any:
    """A server whose guard forbids prompts with "forbidden", and answers from their 150th character on."""
    seen: list[tuple[str, str]] = []

    def guard(prompt: str, answer: str) -> bool:
        seen.append((prompt, answer))
        return "forbidden" in prompt or len(answer) > 150

    served = serving(guard=guard)
    served.seen = seen
    return served


@pytest.mark.parametrize("stream", [False, True])
def test_a_prompt_that_is_not_let_through_is_not_computed(guarded, stream):
    tokens = guarded.service.scheduler.totals.prompt_tokens
    found = guarded.client().completions.create(**{**PROMPT, "prompt": "forbidden"}, stream=stream)
    choices = [chunk.choices[0] for chunk in found] if stream else found.choices
    assert choices[-1].finish_reason == "content_filter" and "".join(choice.text for choice in choices) == ""
    talk = {**TALK, "messages": [{"role": "user", "content": "forbidden"}]}
    chat = guarded.client().chat.completions.create(**talk)
    assert (chat.choices[0].finish_reason, chat.choices[0].message.content) == ("content_filter", "")
    assert guarded.service.scheduler.totals.prompt_tokens == tokens


@pytest.mark.parametrize("stream", [False, True])
def test_an_answer_ends_before_the_part_that_is_not_let_through(guarded, served, stream):
    whole = served.client().completions.create(**PROMPT).choices[0].text
    assert len(whole) > 200
    guarded.seen.clear()
    found = guarded.client().completions.create(**PROMPT, stream=stream)
    choices = [chunk.choices[0] for chunk in found] if stream else found.choices
    text = "".join(choice.text for choice in choices)
    assert choices[-1].finish_reason == "content_filter"
    assert 100 <= len(text) <= 150 and whole.startswith(text)
    shown = [answer for _, answer in guarded.seen]
    assert shown[0] == "" and shown[1] == text and len(shown[2]) > 150
    assert guarded.idle(1)


def test_what_is_let_through_is_as_without_a_guard(guarded, engine):
    short = {**PROMPT, "max_tokens": 10}
    found = guarded.client().completions.create(**short, logprobs=1)
    assert found.choices[0].text == engine.generate([engine.tokenizer.encode(PROMPT["prompt"])], 10)[0].text
    assert len(found.choices[0].logprobs.tokens) == 10


def test_a_guard_that_fails_lets_nothing_through(serving):
    def guard(prompt: str, answer: str) -> bool:
        if "at once" in prompt or len(answer) > 150:
            raise RuntimeError
        return False

    client = serving(guard=guard).client()
    for stream in (False, True):
        with pytest.raises(openai.InternalServerError, match="the guard has failed") as found:
            client.completions.create(**{**PROMPT, "prompt": "at once"}, stream=stream)
        assert found.value.code == "guard"
    with pytest.raises(openai.InternalServerError, match="the guard has failed"):
        client.completions.create(**PROMPT)
    with pytest.raises(openai.APIError, match="the guard has failed"):
        list(client.completions.create(**PROMPT, stream=True))


def test_a_guard_is_a_function_of_a_file_or_a_module(tmp_path):
    file = tmp_path / "mine.py"
    file.write_text("def judge(prompt, answer):\n    return 'bad' in prompt + answer\n")
    guard = load_guard(f"{file}:judge")
    assert guard("", "a bad word") and not guard("a", "b")
    assert load_guard("operator:contains")("abc", "b")
    broken = tmp_path / "broken.py"
    broken.write_text("def judge(:")
    for reference, words in (
        (f"{file}:nobody", "has no function nobody; it has judge"),
        (f"{tmp_path}/none.py:judge", "is not there"),
        ("no_such_module:judge", "cannot be imported"),
        (f"{broken}:judge", r"cannot be imported \(SyntaxError"),
        ("alone", "names no guard"),
    ):
        with pytest.raises(UserError, match=words):
            load_guard(reference)


def test_a_guard_may_be_a_classifier(tmp_path, tokenizer_file):
    transformers = pytest.importorskip("transformers")
    import torch

    from openelm.data.tokenizer import Tokenizer

    Tokenizer.load(tokenizer_file).save(tmp_path)
    config = transformers.LlamaConfig(
        vocab_size=400, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=1,
        id2label={0: "fine", 1: "toxic"}, label2id={"fine": 0, "toxic": 1}, pad_token_id=0,
    )  # fmt: skip
    torch.manual_seed(1)
    model = transformers.LlamaForSequenceClassification(config).eval()
    model.save_pretrained(tmp_path)
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path)
    with torch.no_grad():
        odds = model(**tokenizer("The river", return_tensors="pt")).logits.softmax(-1)[0, 1].item()
    assert load_guard(f"{tmp_path}:toxic:{odds - 0.01:.4f}")("The river", "")
    assert not load_guard(f"{tmp_path}:toxic:{odds + 0.01:.4f}")("The river", "")
    with pytest.raises(UserError, match="there is no label bad: take one of fine, toxic"):
        load_guard(f"{tmp_path}:bad")
    with pytest.raises(UserError, match="high is no probability"):
        load_guard(f"{tmp_path}:toxic:high")


SCHEMA = {
    "type": "object",
    "properties": {"wet": {"type": "boolean"}, "word": {"enum": ["river", "night"]}, "size": {"enum": [1, 20]}},
    "required": ["wet", "word", "size"],
    "additionalProperties": False,
}


def test_an_answer_follows_a_schema_and_its_neighbours_do_not(served, engine):
    pytest.importorskip("llguidance")
    asked = {"type": "json_schema", "json_schema": {"name": "answer", "schema": SCHEMA}}
    found = served.client().chat.completions.create(**TALK, n=6, seed=1, response_format=asked)
    answers = [json.loads(choice.message.content) for choice in found.choices]
    assert all(answer.keys() == {"wet", "word", "size"} and answer["size"] in (1, 20) for answer in answers)
    assert len({json.dumps(answer) for answer in answers}) > 1
    assert {choice.finish_reason for choice in found.choices} == {"stop"}
    plain = served.client().chat.completions.create(**TALK, max_tokens=9, temperature=0).choices[0].message.content
    assert not plain.startswith("{")


def test_any_object_may_be_asked_for(served):
    pytest.importorskip("llguidance")
    found = served.client().chat.completions.create(**TALK, max_tokens=20, response_format={"type": "json_object"})
    assert found.choices[0].message.content.startswith("{")


def test_a_schema_that_is_none_is_refused(served):
    pytest.importorskip("llguidance")
    for schema in ({"type": "nothing"}, {"$ref": "#/nowhere"}):
        asked = {"type": "json_schema", "json_schema": {"name": "a", "schema": schema}}
        with pytest.raises(openai.BadRequestError, match="json_schema: "):
            served.client().chat.completions.create(**TALK, response_format=asked)
    with pytest.raises(openai.BadRequestError, match="json_schema is missing"):
        served.client().chat.completions.create(**TALK, response_format={"type": "json_schema"})


def test_without_the_library_a_format_is_refused(served, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "llguidance", None)
    with pytest.raises(openai.BadRequestError, match="not installed on this server"):
        served.client().chat.completions.create(**TALK, response_format={"type": "json_object"})
