"""Answers as the OpenAPI file describes them. Only tests hold answers against these: replies.py writes them."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict


class Problem(BaseModel):
    """What was wrong."""

    message: str
    type: str
    param: str | None
    code: str | None


class ErrorReply(BaseModel):
    """Every answer that is none."""

    error: Problem


class PromptDetails(BaseModel):
    """Of a prompt, what was there from other texts."""

    cached_tokens: int


class Usage(BaseModel):
    """Numbers of tokens."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: PromptDetails


FinishReason = Literal["stop", "length", "content_filter"]


class TextLogprobs(BaseModel):
    """Tokens of a completion with their log-probabilities, one entry each."""

    tokens: list[str]
    token_logprobs: list[float | None]
    top_logprobs: list[dict[str, float] | None]
    text_offset: list[int]


class TextChoice(BaseModel):
    """One completion."""

    index: int
    text: str
    logprobs: TextLogprobs | None
    finish_reason: FinishReason


class Envelope(BaseModel):
    """What answers have around their choices."""

    id: str
    created: int
    model: str
    usage: Usage


class CompletionReply(Envelope):
    """The answer of /v1/completions."""

    object: Literal["text_completion"]
    choices: list[TextChoice]


class TokenLogprob(BaseModel):
    """A token with its log-probability."""

    token: str
    logprob: float
    bytes: list[int]


class ChosenLogprob(TokenLogprob):
    """A token that was chosen, and the likeliest at its place."""

    top_logprobs: list[TokenLogprob]


class ChatLogprobs(BaseModel):
    """Tokens of a message."""

    content: list[ChosenLogprob]
    refusal: None


class AnswerMessage(BaseModel):
    """What the assistant says."""

    role: Literal["assistant"]
    content: str
    refusal: None


class ChatChoice(BaseModel):
    """One answer."""

    index: int
    message: AnswerMessage
    logprobs: ChatLogprobs | None
    finish_reason: FinishReason


class ChatReply(Envelope):
    """The answer of /v1/chat/completions."""

    object: Literal["chat.completion"]
    choices: list[ChatChoice]


class Model(BaseModel):
    """A model; the last two are not OpenAI's."""

    model_config = ConfigDict(protected_namespaces=())

    id: str
    object: Literal["model"]
    created: int
    owned_by: str
    context_length: int
    chat: bool


class ModelList(BaseModel):
    """All models: one."""

    object: Literal["list"]
    data: list[Model]


class Health(BaseModel):
    """That requests are answered."""

    status: Literal["ok"]


def _answers(model: type[BaseModel], *, stream: bool = False) -> dict[int | str, dict[str, Any]]:
    found: dict[str, Any] = {"model": model}
    if stream:
        found["content"] = {"text/event-stream": {"schema": {"type": "string"}}}
    problem = {"model": ErrorReply}
    return {200: found, "4XX": problem, "5XX": problem}


ANSWERS = {
    "completions": _answers(CompletionReply, stream=True),
    "chat": _answers(ChatReply, stream=True),
    "models": _answers(ModelList),
    "model": _answers(Model),
    "health": _answers(Health),
}
