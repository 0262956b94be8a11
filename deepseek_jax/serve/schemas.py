"""What may be asked of the server: the bodies of its routes, checked to the letter.

A field that nobody here knows is refused, so that a setting with a slip in its name is not quietly left out. Fields
that change no answer are taken and left alone.
"""

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

MAX_N = 128
MAX_MESSAGES = 1024
MAX_PROMPTS = 256
_MAX_TEXT = 1 << 22
_MAX_STOP = 256
_TOKEN = 2**31 - 1

Text = Annotated[str, Field(max_length=_MAX_TEXT)]
Stop = Annotated[str, Field(min_length=1, max_length=_MAX_STOP)]
Number = Annotated[float, Field(allow_inf_nan=False)]
Seed = Annotated[int, Field(ge=-(2**53 - 1), le=2**53 - 1)]  # what JSON's readers all have, to the last digit
Token = Annotated[int, Field(ge=0, le=_TOKEN)]
Ignored = Annotated[Any, Field(default=None, description="Taken, and without effect.")]


class Body(BaseModel):
    """Of every kind."""

    model_config = ConfigDict(extra="forbid", strict=True)


class StreamOptions(Body):
    """What a stream has beside its text."""

    include_usage: bool = False
    continuous_usage_stats: Annotated[bool, Field(description="With include_usage: in every chunk, as in vLLM.")] = (
        False
    )
    include_obfuscation: Ignored = None


class Thinking(Body):
    """DeepSeek's switch; `budget_tokens` limits the thought."""

    type: Literal["enabled", "disabled"]
    budget_tokens: Annotated[int, Field(ge=0)] | None = None


class JsonSchema(Body):
    """A schema that the answer keeps to."""

    name: Annotated[str, Field(max_length=64)] = "answer"
    description: Annotated[str, Field(max_length=1024)] | None = None
    json_schema: dict[str, Any] | None = Field(default=None, alias="schema")
    strict: bool | None = None


class ResponseFormat(Body):
    """Plain text, any JSON object, or JSON under a schema."""

    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchema | None = None


class Sampling(Body):
    """How tokens are drawn: OpenAI's fields, and vLLM's."""

    model: Annotated[str, Field(max_length=256)] | None = None
    n: Annotated[int, Field(ge=1, le=MAX_N)] | None = None
    seed: Seed | None = None
    stop: Stop | Annotated[list[Stop], Field(max_length=16)] | None = None
    temperature: Annotated[Number, Field(ge=0, le=100)] | None = None
    top_p: Annotated[Number, Field(gt=0, le=1)] | None = None
    top_k: Annotated[int, Field(ge=-1, le=_TOKEN)] | None = None
    min_p: Annotated[Number, Field(ge=0, le=1)] | None = None
    presence_penalty: Annotated[Number, Field(ge=-2, le=2)] | None = None
    frequency_penalty: Annotated[Number, Field(ge=-2, le=2)] | None = None
    repetition_penalty: Annotated[Number, Field(gt=0, le=100)] | None = None
    logit_bias: (
        Annotated[dict[Annotated[str, Field(pattern=r"^[0-9]{1,10}$")], Number], Field(max_length=300)] | None
    ) = None
    min_tokens: Annotated[int, Field(ge=0, le=_TOKEN)] | None = None
    ignore_eos: Annotated[bool, Field(description="The end of sequence is a token as others, as in vLLM.")] | None = (
        None
    )
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    user: Ignored = None
    metadata: Ignored = None
    store: Ignored = None
    service_tier: Ignored = None
    safety_identifier: Ignored = None
    prompt_cache_key: Ignored = None
    prompt_cache_retention: Ignored = None


class TextPart(Body):
    """A piece of a message."""

    type: Literal["text"]
    text: Text


class Message(Body):
    """A turn of a conversation."""

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: Text | Annotated[list[TextPart], Field(max_length=MAX_MESSAGES)] | None = None
    reasoning_content: Text | None = None
    reasoning: Text | None = None
    name: Annotated[str, Field(max_length=256)] | None = None
    tool_call_id: Annotated[str, Field(max_length=256)] | None = None
    refusal: Ignored = None
    annotations: Ignored = None
    audio: Annotated[None, Field(description="Not known here.")] = None
    tool_calls: Annotated[list[Any], Field(max_length=0, description="Not known here.")] | None = None
    function_call: Annotated[None, Field(description="Not known here.")] = None


class ChatBody(Sampling):
    """Of /v1/chat/completions."""

    messages: Annotated[list[Message], Field(min_length=1, max_length=MAX_MESSAGES)]
    max_tokens: Annotated[int, Field(ge=1, le=_TOKEN)] | None = None
    max_completion_tokens: Annotated[int, Field(ge=1, le=_TOKEN)] | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=20)] | None = None
    thinking: Thinking | None = None
    reasoning_effort: Literal["none", "minimal", "low", "medium", "high", "xhigh", "max"] | None = None
    response_format: ResponseFormat | None = None
    modalities: list[Literal["text"]] | None = None
    parallel_tool_calls: Ignored = None
    verbosity: Ignored = None
    tools: Annotated[list[Any], Field(max_length=0, description="Not known here.")] | None = None
    tool_choice: Literal["none", "auto"] | None = None


class CompletionBody(Sampling):
    """Of /v1/completions."""

    prompt: (
        Text
        | Annotated[list[Token], Field(min_length=1)]
        | Annotated[list[Text], Field(min_length=1, max_length=MAX_PROMPTS)]
        | Annotated[list[Annotated[list[Token], Field(min_length=1)]], Field(min_length=1, max_length=MAX_PROMPTS)]
    )
    max_tokens: Annotated[int, Field(ge=0, le=_TOKEN)] | None = None
    logprobs: Annotated[int, Field(ge=0, le=20)] | None = None
    echo: bool | None = None
    best_of: Annotated[int, Field(ge=1, le=1)] | None = None
    suffix: Annotated[None, Field(description="Not known here.")] = None


class ReasoningBody(Body):
    """Of /v1/reasoning."""

    prompt: Annotated[str, Field(min_length=1, max_length=_MAX_TEXT)]
    domain: Literal["general", "math", "code", "science"] = "general"
    max_tokens: Annotated[int, Field(ge=2, le=_TOKEN)] = 8192
    temperature: Annotated[Number, Field(ge=0, le=100)] = 0.6
    top_p: Annotated[Number, Field(gt=0, le=1)] = 0.95
    enforce_thinking: bool = True
    samples: Annotated[int, Field(ge=1, le=MAX_N)] = 1
    seed: Seed | None = None
    model: Annotated[str, Field(max_length=256)] | None = None


class ErrorDetail(BaseModel):
    """What is wrong."""

    message: str
    type: str
    param: str | None = None
    code: str | None = None


class ErrorBody(BaseModel):
    """Every answer that is an error."""

    error: ErrorDetail


class ReasoningReply(BaseModel):
    """What /v1/reasoning answers."""

    response: str
    thinking_tokens: int
    total_tokens: int
    reasoning_steps: list[str]
    confidence_score: float = Field(ge=0, le=1)
    id: str
    model: str
    finish_reason: Literal["stop", "length"]
    agreement: float | None = None
