"""What may be asked for: OpenAI's names and bounds, and the three settings of sampling that it does not have.

A field that is not here is refused rather than passed over: who asks for tools should not get an answer without.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, WrapValidator
from pydantic_core import PydanticCustomError

from openelm.infer.sampling import Sampling
from openelm.serve.choosing import Rules
from openelm.serve.errors import Refused


def _or(words: str) -> WrapValidator:
    """One sentence for what fits none of a union's kinds, instead of one for each of them."""

    def checked(value: Any, handler: Any) -> Any:
        try:
            return handler(value)
        except ValidationError as error:
            raise PydanticCustomError("union", "should be {words}", {"words": words}) from error

    return WrapValidator(checked)


Number = Annotated[int, Field(ge=0)]
Ids = Annotated[list[Number], Field(min_length=1)]
TokenId = Annotated[str, Field(pattern=r"^[0-9]{1,9}$")]
Bias = Annotated[float, Field(ge=-100, le=100)]


class _Strict(BaseModel):
    """No conversions ("1" is no number), nothing unknown."""

    model_config = ConfigDict(extra="forbid", strict=True)


class StreamOptions(_Strict):
    """With ``include_usage`` a stream's last chunk has the numbers of tokens."""

    include_usage: bool | None = None


class _Ask(_Strict):
    """What completions and chats have in common."""

    model: str | None = Field(None, description="the name that /v1/models gives, or nothing")
    max_tokens: Number | None = Field(None, description="tokens at most; the context is a bound in any case")
    n: int | None = Field(None, ge=1, le=128, description="completions of each prompt")
    stop: str | list[str] | None = Field(None, description="where to end; what is found is not part of the text")
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    seed: int | None = Field(None, description="same seed, same text; without one every text is another")
    temperature: float | None = Field(None, ge=0, le=2, description="0 is greedy; default 1")
    top_p: float | None = Field(None, gt=0, le=1)
    presence_penalty: float | None = Field(None, ge=-2, le=2)
    frequency_penalty: float | None = Field(None, ge=-2, le=2)
    logit_bias: dict[TokenId, Bias] | None = Field(None, description="token id to what is added to its logit")
    # Ours
    top_k: Number | None = Field(None, description="only so many of the likeliest tokens; 0: all")
    min_p: float | None = Field(None, ge=0, le=1, description="only tokens so many times as likely as the likeliest")
    repetition_penalty: float | None = Field(None, gt=0, le=10, description="above 1: avoid earlier tokens")
    # Taken, and of no effect
    user: str | None = None
    metadata: dict[str, str] | None = None
    store: bool | None = None

    def stops(self) -> tuple[str, ...]:
        """The stop strings."""
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())

    def counts(self) -> int | None:
        """How many of the likeliest tokens are wanted; None where no log-probabilities are."""
        raise NotImplementedError

    def rules(self, seed: int, vocab_size: int) -> Rules:
        """How tokens are chosen. Refused for a token id that there is not."""
        bias = {int(id): value for id, value in (self.logit_bias or {}).items()}
        outside = next((id for id in bias if id >= vocab_size), None)
        if outside is not None:
            message = f"logit_bias names token {outside}: the vocabulary ends at {vocab_size - 1}"
            raise Refused(400, message, param="logit_bias")
        sampling = Sampling(
            temperature=1.0 if self.temperature is None else self.temperature,
            top_k=self.top_k or 0,
            top_p=1.0 if self.top_p is None else self.top_p,
            min_p=self.min_p or 0.0,
            repetition_penalty=1.0 if self.repetition_penalty is None else self.repetition_penalty,
            seed=seed % 2**63,
        )
        return Rules(
            sampling, self.presence_penalty or 0.0, self.frequency_penalty or 0.0, tuple(bias.items()), self.counts()
        )


class CompletionRequest(_Ask):
    """POST /v1/completions: continue one or several prompts, texts or token ids."""

    prompt: Annotated[
        str | Annotated[list[str], Field(min_length=1)] | Ids | Annotated[list[Ids], Field(min_length=1)],
        _or("a text, a list of texts, token ids, or a list of lists of these"),
    ]
    echo: bool | None = Field(None, description="give the prompt too, and with logprobs its log-probabilities")
    logprobs: int | None = Field(None, ge=0, le=5)
    best_of: Literal[1] | None = None

    def counts(self) -> int | None:
        return self.logprobs

    def prompts(self) -> list[str] | list[list[int]]:
        """The prompts, one or several."""
        if isinstance(self.prompt, str):
            return [self.prompt]
        if isinstance(self.prompt[0], int):
            return [self.prompt]
        return self.prompt


class TextPart(_Strict):
    """A part of a message: this model reads text."""

    type: Literal["text"]
    text: str


class Message(BaseModel):
    """A turn of a conversation; what answers have beside role and content may be sent back, and is passed over."""

    model_config = ConfigDict(strict=True)

    role: Literal["system", "developer", "user", "assistant"]
    content: Annotated[
        str | Annotated[list[TextPart], Field(min_length=1)], _or("a text, or a list of parts of type text")
    ]

    def plain(self) -> dict[str, str]:
        """Role and text, as templates take them."""
        text = self.content if isinstance(self.content, str) else "".join(part.text for part in self.content)
        return {"role": "system" if self.role == "developer" else self.role, "content": text}


class JsonSchema(_Strict):
    """A JSON Schema that the answer shall follow."""

    name: str
    schema_: dict[str, Any] | None = Field(None, alias="schema")
    description: str | None = None
    strict: bool | None = None


class ResponseFormat(_Strict):
    """What the answer shall be: any text, any JSON object, or JSON that follows a schema."""

    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchema | None = None


class ChatRequest(_Ask):
    """POST /v1/chat/completions: the assistant's next turn, by the model's chat template."""

    messages: Annotated[list[Message], Field(min_length=1)]
    max_completion_tokens: Number | None = None
    logprobs: bool | None = None
    top_logprobs: int | None = Field(None, ge=0, le=20)
    response_format: ResponseFormat | None = None

    def counts(self) -> int | None:
        return self.top_logprobs or 0 if self.logprobs else None
