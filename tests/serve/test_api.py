"""OpenAI's own client against the server: what it gets is what the engine writes."""

import asyncio
import json
from typing import Any

import httpx
import pytest

from openelm.data.chat import encode_chat
from openelm.infer.sampling import Sampling

openai = pytest.importorskip("openai")

PROMPT = "After the night "
TALK = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Where is the </s> river?"}]


def written(engine: Any, prompt: str | list[int], tokens: int, **options: Any) -> Any:
    ids = engine.tokenizer.encode(prompt) if isinstance(prompt, str) else prompt
    return engine.generate([ids], tokens, **options)[0]


def test_a_completion_is_what_the_engine_writes(served, engine):
    found = served.client().completions.create(model="tiny", prompt=PROMPT, max_tokens=20, temperature=0)
    expected = written(engine, PROMPT, 20)
    assert (found.choices[0].text, found.choices[0].finish_reason) == (expected.text, expected.finish_reason)
    prompt = len(engine.tokenizer.encode(PROMPT)) + 1
    assert (found.usage.prompt_tokens, found.usage.completion_tokens) == (prompt, len(expected.ids))
    assert found.usage.total_tokens == prompt + len(expected.ids)
    assert found.object == "text_completion" and found.model == "tiny"


def test_prompts_and_samples_are_numbered_in_order(served, engine):
    prompts = [PROMPT, "The river "]
    found = served.client().completions.create(
        model="tiny", prompt=prompts, n=3, max_tokens=9, temperature=0.8, top_p=0.9, seed=40
    )
    choices = sorted(found.choices, key=lambda choice: choice.index)
    sampling = Sampling(temperature=0.8, top_p=0.9)
    expected = [
        written(engine, prompt, 9, sampling=sampling, seeds=[40 + n]).text for prompt in prompts for n in range(3)
    ]
    assert [choice.text for choice in choices] == expected
    assert len(set(expected)) > 2
    assert found.usage.prompt_tokens == sum(len(engine.tokenizer.encode(prompt)) + 1 for prompt in prompts)


def test_token_ids_are_taken_as_they_are(served, engine):
    ids = engine.tokenizer.encode(PROMPT)
    create = served.client().completions.create
    expected = [written(engine, ids, 8, add_bos=False).text, written(engine, ids[:2], 8, add_bos=False).text]
    assert create(model="tiny", prompt=ids, max_tokens=8, temperature=0).choices[0].text == expected[0]
    several = create(model="tiny", prompt=[ids, ids[:2]], max_tokens=8, temperature=0).choices
    assert [choice.text for choice in several] == expected


def test_without_a_seed_each_text_is_another(served):
    client = served.client()
    texts = {client.completions.create(model="tiny", prompt=PROMPT, max_tokens=30).choices[0].text for _ in range(3)}
    assert len(texts) == 3


def test_a_stream_gives_the_same_text_in_pieces(served, engine):
    options: dict[str, Any] = dict(model="tiny", prompt=PROMPT, max_tokens=25, temperature=0, n=2)
    stream = served.client().completions.create(**options, stream=True, stream_options={"include_usage": True})
    chunks = list(stream)
    expected = written(engine, PROMPT, 25)
    for index in range(2):
        mine = [chunk.choices[0] for chunk in chunks if chunk.choices and chunk.choices[0].index == index]
        assert "".join(choice.text for choice in mine) == expected.text
        assert [choice.finish_reason for choice in mine][-1] == expected.finish_reason
        assert len(mine) > 5
    assert chunks[-1].choices == [] and chunks[-1].usage.completion_tokens == 2 * len(expected.ids)
    assert all(chunk.usage is None for chunk in chunks[:-1])
    assert len({chunk.id for chunk in chunks}) == 1


def test_a_chat_is_laid_out_by_the_template_and_special_tokens_of_users_are_text(served, engine):
    ids, _ = encode_chat(engine.tokenizer, TALK, add_generation_prompt=True)
    expected = written(engine, ids, 30, add_bos=False)
    assert ids.count(engine.tokenizer.eos_id) == 2
    client = served.client()
    found = client.chat.completions.create(model="tiny", messages=TALK, max_completion_tokens=30, temperature=0)
    assert found.choices[0].message.content == expected.text
    assert found.usage.prompt_tokens == len(ids)
    in_parts = [{**turn, "content": [{"type": "text", "text": turn["content"]}]} for turn in TALK]
    in_parts[0]["role"] = "developer"
    assert client.chat.completions.create(
        model="tiny", messages=in_parts, max_tokens=30, temperature=0
    ).choices[0].message.content == expected.text  # fmt: skip


def test_a_chat_streams(served, engine):
    ids, _ = encode_chat(engine.tokenizer, TALK, add_generation_prompt=True)
    expected = written(engine, ids, 30, add_bos=False)
    chunks = list(
        served.client().chat.completions.create(
            model="tiny", messages=TALK, max_tokens=30, temperature=0, stream=True,
            stream_options={"include_usage": True},
        )
    )  # fmt: skip
    deltas = [chunk.choices[0].delta for chunk in chunks if chunk.choices]
    assert deltas[0].role == "assistant" and all(delta.role is None for delta in deltas[1:])
    assert "".join(delta.content or "" for delta in deltas) == expected.text
    assert chunks[-2].choices[0].finish_reason == expected.finish_reason
    assert chunks[-1].usage.prompt_tokens == len(ids)


def test_a_chat_without_a_bound_ends_where_the_context_does(served, engine):
    found = served.client().chat.completions.create(
        model="tiny", messages=TALK, temperature=0, logit_bias={str(engine.tokenizer.eos_id): -100}
    )
    assert found.choices[0].finish_reason == "length"
    assert found.usage.total_tokens == served.service.limit


def test_the_async_client_has_many_answers_at_once(served, engine):
    prompts = [f"{word} and the river " for word in ("Night", "Water", "Paper", "Garden", "Summer", "Window")] * 4

    async def ask() -> list[str]:
        client = openai.AsyncOpenAI(base_url=f"{served.url}/v1", api_key="none", max_retries=0)

        async def one(prompt: str) -> str:
            stream = await client.completions.create(
                model="tiny", prompt=prompt, max_tokens=20, temperature=0, stream=True
            )
            return "".join([chunk.choices[0].text async for chunk in stream])

        texts = await asyncio.gather(*map(one, prompts))
        await client.close()
        return texts

    assert asyncio.run(ask()) == [written(engine, prompt, 20).text for prompt in prompts]


def test_log_probabilities_are_the_models(served, engine):
    import torch

    expected = written(engine, PROMPT, 10)
    prompt = [engine.tokenizer.bos_id, *engine.tokenizer.encode(PROMPT)]
    with torch.no_grad():
        logits = engine.model(torch.tensor([[*prompt, *expected.ids]]))[0].float().log_softmax(-1)
    places = range(len(prompt) - 1, len(prompt) - 1 + len(expected.ids))
    wanted = [logits[place, id].item() for place, id in zip(places, expected.ids, strict=True)]

    client = served.client()
    found = client.completions.create(model="tiny", prompt=PROMPT, max_tokens=10, temperature=0, logprobs=3)
    scores = found.choices[0].logprobs
    assert scores.token_logprobs == pytest.approx(wanted, abs=1e-4)
    assert scores.tokens[0] == expected.text[: len(scores.tokens[0])]
    assert [max(top.values()) for top in scores.top_logprobs] == pytest.approx(wanted, abs=1e-4)
    assert all(len(top) <= 3 for top in scores.top_logprobs)

    ids, _ = encode_chat(engine.tokenizer, TALK, add_generation_prompt=True)
    text = written(engine, ids, 6, add_bos=False).text
    options: dict[str, Any] = dict(model="tiny", messages=TALK, max_tokens=6, temperature=0)
    chat = client.chat.completions.create(**options, logprobs=True, top_logprobs=2).choices[0]
    assert b"".join(bytes(one.bytes) for one in chat.logprobs.content).decode("utf-8", "replace") == text
    for one in chat.logprobs.content:
        assert len(one.top_logprobs) == 2 and one.top_logprobs[0].logprob >= one.logprob
    stream = client.chat.completions.create(**options, logprobs=True, top_logprobs=2, stream=True)
    parts = [one for chunk in stream if chunk.choices[0].logprobs for one in chunk.choices[0].logprobs.content]
    assert [one.bytes for one in parts] == [one.bytes for one in chat.logprobs.content]
    assert [one.logprob for one in parts] == pytest.approx([one.logprob for one in chat.logprobs.content], abs=1e-4)


def test_echo_gives_the_prompt_and_its_scores(served, engine):
    client = served.client()
    found = client.completions.create(model="tiny", prompt=PROMPT, max_tokens=0, echo=True, logprobs=1)
    choice = found.choices[0]
    assert (choice.text, choice.finish_reason, found.usage.completion_tokens) == (PROMPT, "length", 0)
    assert len(choice.logprobs.tokens) == found.usage.prompt_tokens
    assert choice.logprobs.token_logprobs[0] is None and all(value < 0 for value in choice.logprobs.token_logprobs[1:])
    expected = written(engine, PROMPT, 5).text
    options: dict[str, Any] = dict(model="tiny", prompt=PROMPT, max_tokens=5, temperature=0, echo=True)
    assert client.completions.create(**options).choices[0].text == PROMPT + expected
    pieces = [chunk.choices[0].text for chunk in client.completions.create(**options, stream=True)]
    assert pieces[0] == PROMPT and "".join(pieces) == PROMPT + expected


@pytest.mark.parametrize("stream", [False, True])
def test_stop_strings_across_tokens_and_split_characters_come_out_right(served, engine, stream):
    whole = written(engine, PROMPT, 40).text
    stop = whole[11:15]  # wherever its tokens are cut
    options: dict[str, Any] = dict(model="tiny", prompt=PROMPT, max_tokens=40, temperature=0, stop=[stop, "\x00"])
    found = served.client().completions.create(**options, stream=stream)
    choices = [chunk.choices[0] for chunk in found] if stream else found.choices
    assert "".join(choice.text for choice in choices) == whole[: whole.index(stop)]
    assert choices[-1].finish_reason == "stop"
    # The bytes of "ñ€" one token each.
    ids = [engine.tokenizer.backend.pieces.index(f"<0x{byte:02X}>") for byte in "ñ€".encode()]
    forced = served.client().completions.create(
        model="tiny", prompt=[1, *ids], max_tokens=0, echo=True, logprobs=0, stream=stream
    )
    choices = [chunk.choices[0] for chunk in forced] if stream else forced.choices
    assert "".join(choice.text for choice in choices) == "ñ€"
    tokens = [token for choice in choices if choice.logprobs for token in choice.logprobs.tokens]
    assert tokens[1:3] == ["bytes:\\xc3", "bytes:\\xb1"]


REFUSED = [
    ("completions", {"prompt": "a", "model": "gpt"}, 404, "model", "gpt"),
    ("completions", {}, 400, "prompt", "required"),
    ("completions", {"prompt": 3}, 400, "prompt", "a list of texts"),
    ("completions", {"prompt": [1, 400]}, 400, "prompt", "token 400 is not in the vocabulary of 400"),
    ("completions", {"prompt": [1, -1]}, 400, "prompt", "prompt: should be a text, a list of texts, token ids"),
    ("completions", {"prompt": []}, 400, "prompt", ""),
    ("completions", {"prompt": "a", "max_tokens": "5"}, 400, "max_tokens", "valid integer"),
    ("completions", {"prompt": "a", "temperature": 3}, 400, "temperature", "less than or equal to 2"),
    ("completions", {"prompt": "a", "tools": []}, 400, "tools", "tools is not known here"),
    ("completions", {"prompt": "a", "stop": [""]}, 400, "stop", "1 to 256"),
    ("completions", {"prompt": "a", "stop": ["a"] * 33}, 400, "stop", "32 texts at most"),
    ("completions", {"prompt": "a", "logprobs": 6}, 400, "logprobs", "5"),
    ("completions", {"prompt": "a", "logit_bias": {"400": 1}}, 400, "logit_bias", "400"),
    ("completions", {"prompt": ["a"] * 65, "n": 2}, 400, "n", "130 texts: 128 at most"),
    ("completions", {"prompt": [5] * 129}, 400, None, "129 tokens, the context only 128"),
    ("completions", {"prompt": "a" * 100_000}, 400, None, "100000 characters, the context only 128"),
    ("completions", [], 400, None, "the body"),
    ("chat/completions", {"messages": []}, 400, "messages", "at least 1"),
    ("chat/completions", {"messages": [{"role": "bot", "content": "a"}]}, 400, "messages[0].role", "system"),
    ("chat/completions", {"messages": [{"role": "user", "content": 3}]}, 400, "messages[0].content", "a text, or"),
    (
        "chat/completions",
        {"messages": [{"role": "user", "content": [{"type": "image_url", "text": ""}]}]},
        400, "messages[0].content", "",
    ),
    ("chat/completions", {"messages": TALK, "top_logprobs": 2}, 400, "top_logprobs", "needs logprobs"),
    ("chat/completions", {"messages": [{"role": "user", "content": "a " * 300}]}, 400, None, "the context only 128"),
    ("nothing", {}, 404, None, "there is nothing at /v1/nothing"),
]  # fmt: skip


@pytest.mark.parametrize(("path", "body", "status", "param", "words"), REFUSED)
def test_what_cannot_be_done_is_said_as_openai_does(served, path, body, status, param, words):
    found = httpx.post(f"{served.url}/v1/{path}", json=body)
    error = found.json()["error"]
    assert (found.status_code, error["param"]) == (status, param)
    assert words in error["message"] and "\n" not in error["message"]
    assert error.keys() == {"message", "type", "param", "code"}


def test_the_client_knows_our_errors(served):
    client = served.client()
    with pytest.raises(openai.NotFoundError, match="there is no model gpt: tiny is served") as found:
        client.completions.create(model="gpt", prompt="a")
    assert found.value.code == "model_not_found" and found.value.type == "invalid_request_error"
    with pytest.raises(openai.BadRequestError, match="the context only 128"):
        client.completions.create(model="tiny", prompt="a " * 200)


def test_odd_bodies_are_refused(served):
    def post(body: bytes, **headers: str) -> tuple[int, str]:
        headers = {"Content-Type": "application/json", **headers}
        found = httpx.post(f"{served.url}/v1/completions", content=body, headers=headers)
        return found.status_code, found.json()["error"]["message"]

    assert post(b"{") == (400, "the body is no JSON (Expecting property name enclosed in double quotes)")
    assert post(b"[" * 100_000)[0] == 400
    assert post(b"\xff\xfe")[0] == 400
    assert post(b'{"prompt": "a", "temperature": NaN}')[0] == 400
    assert post(b'{"prompt": "a", "max_tokens": ' + b"9" * 5000 + b"}")[0] == 400
    assert post(b'{"prompt": "a", "model": "\\ud800"}')[0] == 404
    assert post(b'{"prompt": "a"}', **{"Content-Type": "text/plain"}) == (
        415, "the body is text/plain: send Content-Type: application/json",
    )  # fmt: skip
    found = httpx.get(f"{served.url}/v1/completions")
    assert (found.status_code, found.json()["error"]["type"]) == (405, "invalid_request_error")


def test_half_a_surrogate_pair_is_repaired(served):
    body = b'{"prompt": "a \\ud800 b", "max_tokens": 3, "echo": true, "temperature": 0}'
    found = httpx.post(f"{served.url}/v1/completions", content=body, headers={"Content-Type": "application/json"})
    assert found.status_code == 200 and json.loads(found.content)["choices"][0]["text"].startswith("a ")


def test_models_and_health(served):
    client = served.client()
    [model] = client.models.list().data
    assert (model.id, model.object, model.context_length, model.chat) == ("tiny", "model", 128, True)
    assert client.models.retrieve("tiny") == model
    with pytest.raises(openai.NotFoundError, match="there is no model a/b"):
        client.models.retrieve("a/b")
    assert httpx.get(f"{served.url}/health").json() == {"status": "ok"}


def test_a_base_model_completes_and_does_not_chat(serving):
    base = serving(template=False)
    client = base.client()
    assert not client.models.retrieve("tiny").chat
    with pytest.raises(openai.BadRequestError, match="no chat template: it is a base model; use /v1/completions"):
        client.chat.completions.create(model="tiny", messages=TALK)
    assert client.completions.create(model="tiny", prompt="a", max_tokens=2).usage.completion_tokens == 2
