"""The objects that clients send, field by field."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal

from pydantic import BeforeValidator, Field, WithJsonSchema

from pymllm_server.fields import ListOf, Refused, Wire

MAX_CHOICES = 128
MAX_TOKEN_ID = 2**31 - 1
COMPLETION_MAX_TOKENS = 16
"""OpenAI's default for completions; chats go as far as the context reaches."""

# Fields of OpenAI and of other servers that describe the caller or hint at scheduling.
_HARMLESS = frozenset(
    "user store metadata service_tier safety_identifier prompt_cache_key prompt_cache_retention prediction "
    "reasoning_effort verbosity cache_prompt keep_alive".split()
)
_GRAMMAR = Refused("answers cannot be bound to a grammar yet")
_LATER = Refused("it is not implemented", (False, 0, "", [], {}))
# Fields of vLLM, SGLang and llama.cpp, known so that the message need not say "unknown".
_REFUSED: dict[str, Refused] = {
    "response_format": Refused(_GRAMMAR.reason, ({"type": "text"},)),
    **dict.fromkeys(
        "guided_json guided_regex guided_choice guided_grammar structured_outputs grammar json_schema "
        "regex ebnf structural_tag".split(),
        _GRAMMAR,
    ),
    "best_of": Refused("choices are not ranked", (1,)),
    "use_beam_search": Refused("there is no beam search", (False,)),
    "length_penalty": Refused("there is no beam search", (1, 1.0)),
    "early_stopping": Refused("there is no beam search", (False,)),
    "repeat_penalty": Refused("use repetition_penalty"),
    "add_special_tokens": Refused("the tokenizer's own default applies", (True,)),
    "spaces_between_special_tokens": Refused("the tokenizer's own default applies", (True,)),
    "lora_path": Refused("there are no adapters"),
    **dict.fromkeys(
        "min_tokens include_stop_str_in_output prompt_logprobs allowed_token_ids bad_words priority "
        "truncate_prompt_tokens logits_processors return_tokens_as_token_ids return_token_ids typical_p "
        "mirostat dynatemp_range dry_multiplier xtc_probability stop_regex no_stop_trim".split(),
        _LATER,
    ),
}


class StreamOptions(Wire):
    """What a stream reports beside text."""

    IGNORED: ClassVar[frozenset[str]] = frozenset({"include_obfuscation"})
    include_usage: bool | None = None
    continuous_usage_stats: bool | None = None


class Sampling(Wire):
    """How tokens are chosen: shared by the OpenAI routes. None falls back to the checkpoint's defaults."""

    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    frequency_penalty: float | None = None
    presence_penalty: float | None = None
    repetition_penalty: float | None = None
    logit_bias: dict[str, float] | None = None
    seed: int | None = None
    stop: str | ListOf[str] | None = None
    stop_token_ids: ListOf[int] | None = None
    ignore_eos: bool | None = None
    skip_special_tokens: bool | None = None


class OpenAIBody(Sampling):
    """What both OpenAI routes take."""

    IGNORED: ClassVar[frozenset[str]] = _HARMLESS
    model: str = "default"
    max_tokens: int | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    n: Annotated[int, Field(ge=1, le=MAX_CHOICES)] | None = None


class Message(Wire):
    """One message of a chat; content parts and tool calls are checked in `messages`."""

    # What the official client returns in an answer's message, and so comes back in the history.
    IGNORED: ClassVar[frozenset[str]] = frozenset({"refusal", "annotations", "id", "parsed"})
    REFUSED: ClassVar[Mapping[str, Refused]] = {
        "audio": Refused("this model neither takes nor gives audio"),
        "function_call": Refused("it was replaced by tool_calls"),
    }
    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: str | ListOf[dict[str, Any]] | None = None
    name: str | None = None
    tool_calls: ListOf[dict[str, Any]] | None = None
    tool_call_id: str | None = None
    reasoning_content: str | None = None
    reasoning: str | None = None


class ChatBody(OpenAIBody):
    """POST /v1/chat/completions."""

    REFUSED: ClassVar[Mapping[str, Refused]] = {
        **_REFUSED,
        "functions": Refused("it was replaced by tools", ([],)),
        "function_call": Refused("it was replaced by tool_choice", ("none",)),
        "parallel_tool_calls": Refused("calls cannot be limited to one yet", (True,)),
        "modalities": Refused("this model answers in text only", (["text"],)),
        "audio": Refused("this model answers in text only"),
        "web_search_options": Refused("this server searches nothing"),
        "moderation": Refused("this server moderates nothing"),
        "echo": Refused("it is for completions", (False,)),
        "chat_template": Refused("the checkpoint's template applies"),
        "documents": Refused("it is not implemented", ([],)),
        "add_generation_prompt": Refused("a chat is always answered", (True,)),
        "continue_final_message": Refused("it is not implemented", (False,)),
        "mm_processor_kwargs": Refused("this model takes no images", ({},)),
        "thinking_budget": Refused("reasoning cannot be bounded yet"),
    }
    messages: Annotated[ListOf[Message], Field(min_length=1)]
    max_completion_tokens: int | None = None
    logprobs: bool | None = None
    top_logprobs: int | None = None
    tools: ListOf[dict[str, Any]] | None = None
    tool_choice: str | dict[str, Any] | None = None
    separate_reasoning: bool = True
    stream_reasoning: bool = True
    chat_template_kwargs: dict[str, Any] | None = None


def _prompts(value: Any) -> Any:
    """Accept the four forms of a prompt as a list of texts or of token lists.

    By hand, because a union would try each form on every one of a million tokens.
    """
    if isinstance(value, str):
        return [value]
    if isinstance(value, list) and value:
        if _are_ints(value):
            return [_token_ids(value)]
        if all(isinstance(item, str) for item in value):
            return value
        if all(isinstance(item, list) and item and _are_ints(item) for item in value):
            return [_token_ids(item) for item in value]
    raise ValueError(
        "must be a text, a list of texts, a list of token ids or a list of such lists, not empty"
    )


def _are_ints(values: list[Any]) -> bool:
    """Whether all are, and none is a bool; without a step of Python for each of what may be a million."""
    return set(map(type, values)) == {int}


def _token_ids(ids: list[int]) -> list[int]:
    if min(ids) < 0 or max(ids) > MAX_TOKEN_ID:
        raise ValueError(f"token ids must lie between 0 and {MAX_TOKEN_ID}")
    return ids


_IDS = {"type": "array", "items": {"type": "integer", "minimum": 0}, "minItems": 1}
_PROMPT_SCHEMA = {
    "anyOf": [
        {"type": "string"},
        {"type": "array", "items": {"type": "string"}, "minItems": 1},
        _IDS,
        {"type": "array", "items": _IDS, "minItems": 1},
    ]
}
Prompts = Annotated[Any, BeforeValidator(_prompts), WithJsonSchema(_PROMPT_SCHEMA)]


class CompletionBody(OpenAIBody):
    """POST /v1/completions; `prompt` arrives as a list of texts or of token lists."""

    REFUSED: ClassVar[Mapping[str, Refused]] = {
        **_REFUSED,
        "suffix": Refused("the model continues text, it does not fill gaps", ("",)),
    }
    prompt: Prompts
    echo: bool | None = None
    logprobs: int | None = None


def _input_ids(value: Any) -> Any:
    """Accept one list of token ids, or a list of such lists, unchanged: the answer has the same shape."""
    if value is None:
        return None
    if isinstance(value, str) or any(isinstance(item, str) for item in _prompts(value)):
        raise ValueError("must be a list of token ids or a list of such lists")
    return value


_INPUT_IDS_SCHEMA = {"anyOf": [*_PROMPT_SCHEMA["anyOf"][2:], {"type": "null"}]}
InputIds = Annotated[Any, BeforeValidator(_input_ids), WithJsonSchema(_INPUT_IDS_SCHEMA)]


class SamplingParamsBody(Sampling):
    """`sampling_params` of /generate, in its own names."""

    REFUSED: ClassVar[Mapping[str, Refused]] = {
        **_REFUSED,
        "n": Refused("send the prompt several times", (1,)),
    }
    max_new_tokens: int | None = None


class GenerateBody(Wire):
    """POST or PUT /generate. rid names the request, or each of a list."""

    REFUSED: ClassVar[Mapping[str, Refused]] = {
        "image_data": Refused("this model takes no images", ([],)),
        "audio_data": Refused("this model takes no audio", ([],)),
        "video_data": Refused("this model takes no video", ([],)),
        "return_logprob": Refused("ask /v1/completions for logprobs", (False,)),
        "logprob_start_len": Refused("ask /v1/completions for logprobs", (-1, 0)),
        "top_logprobs_num": Refused("ask /v1/completions for logprobs", (0,)),
        "lora_path": Refused("there are no adapters"),
        "session_params": Refused("there are no sessions", ({},)),
        "input_embeds": Refused("it is not implemented"),
    }
    text: str | ListOf[str] | None = None
    input_ids: InputIds = None
    sampling_params: SamplingParamsBody = SamplingParamsBody()
    stream: bool | None = None
    rid: str | ListOf[str] | None = None


class AbortBody(Wire):
    """POST /abort_request."""

    rid: Annotated[str, Field(min_length=1)]
