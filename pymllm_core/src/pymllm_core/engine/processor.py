"""The processor: text and chats become requests; a checkpoint's own defaults complete their parameters."""

from __future__ import annotations

import functools
import logging
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pymllm_core import plugins
from pymllm_core.builtin.sources import resolve_model
from pymllm_core.config import ServerSettings
from pymllm_core.engine.detokenizer import Detokenizer
from pymllm_core.engine.headers import read_json
from pymllm_core.errors import CheckpointError, RequestError
from pymllm_core.plan import Plan
from pymllm_core.protocols.parser import ReasoningParser, ToolCallParser
from pymllm_core.protocols.source import SourceOptions
from pymllm_core.request import Request, SamplingParams

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

logger = logging.getLogger(__name__)

TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "vocab.json", "tokenizer.model")
# As much of the rendered prompt as a parser needs to see which tags are open at its end.
_TAIL = 256
_GENERATION_FIELDS = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty")


@dataclass(frozen=True, slots=True)
class ChatRequest:
    """A chat's request and the end of its rendered prompt, for the reasoning parser."""

    request: Request
    prompt_tail: str


class Processor:
    """Tokenises, renders chats and makes parsers for one model. Its methods may run on any thread.

    tokenizer is None where the model has none; then only token ids are accepted.
    """

    def __init__(
        self,
        plan: Plan,
        tokenizer: PreTrainedTokenizerBase | None,
        config: Mapping[str, Any],
    ) -> None:
        self._plan = plan
        self.tokenizer = tokenizer
        self._byte_level = _is_byte_level(tokenizer)
        generation = plan.model_path / "generation_config.json"
        defaults = read_json(generation) if generation.is_file() else {}
        self._defaults = {
            name: defaults[name] for name in _GENERATION_FIELDS if defaults.get(name) is not None
        }
        if defaults.get("do_sample") is False:
            self._defaults = {"temperature": 0.0}
        self.eos_token_ids = frozenset(
            _ids(defaults.get("eos_token_id"))
            | _ids(config.get("eos_token_id"))
            | _ids(getattr(tokenizer, "eos_token_id", None))
        )

    @property
    def vocab_size(self) -> int | None:
        """How many ids the tokenizer knows; None without one."""
        return None if self.tokenizer is None else len(self.tokenizer)

    def sampling(self, **fields: Any) -> SamplingParams:
        """Parameters; what is None or absent is the checkpoint's default, else `SamplingParams`'s own."""
        given = {name: value for name, value in fields.items() if value is not None}
        return SamplingParams(**{**self._defaults, **given})

    def from_ids(
        self, ids: Sequence[int], params: SamplingParams | None = None, *, request_id: str | None = None
    ) -> Request:
        """A request of token ids. Raises RequestError for ids outside the vocabulary."""
        limit = self._plan.vocab_size
        if ids and (min(ids) < 0 or max(ids) >= limit):
            bad = next(token for token in ids if not 0 <= token < limit)
            raise RequestError(f"token id {bad} is outside the vocabulary of {limit}", param="prompt")
        return Request(request_id or new_id(), tuple(ids), params or self.sampling())

    def from_text(
        self, text: str, params: SamplingParams | None = None, *, request_id: str | None = None
    ) -> Request:
        """A request of plain text, tokenised as the checkpoint's tokenizer does by default."""
        ids = self._require_tokenizer()(_valid_unicode(text))["input_ids"]
        return self.from_ids(ids, params, request_id=request_id)

    def from_chat(
        self,
        messages: list[dict[str, Any]],
        params: SamplingParams | None = None,
        *,
        request_id: str | None = None,
        tools: list[dict[str, Any]] | None = None,
        template_kwargs: Mapping[str, Any] | None = None,
    ) -> ChatRequest:
        """A request of OpenAI-style messages, rendered by the checkpoint's chat template.

        Raises RequestError where the template is missing or refuses the messages.
        """
        tokenizer = self._require_tokenizer()
        if not tokenizer.chat_template:
            raise RequestError(
                f"model {self._plan.settings.server.public_name!r} has no chat template; use /v1/completions",
                param="messages",
            )
        try:
            text = tokenizer.apply_chat_template(
                [_flatten(message) for message in messages],
                tools=tools or None,  # type: ignore[arg-type]
                tokenize=False,
                **{"add_generation_prompt": True, **(template_kwargs or {})},
            )
        except RequestError:
            raise
        except Exception as error:  # the template is the checkpoint's code: anything may come out of it
            raise RequestError(
                f"the chat template cannot render these messages: {error}", param="messages"
            ) from error
        assert isinstance(text, str)
        ids = tokenizer(_valid_unicode(text), add_special_tokens=False)["input_ids"]
        request = self.from_ids(ids, params, request_id=request_id)
        return ChatRequest(request, text[-_TAIL:])

    def detokenizer(self, request: Request) -> Detokenizer | None:
        """A fresh detokenizer for the request's answer; None without a tokenizer."""
        params = request.params
        if self.tokenizer is None:
            if params.stop:
                raise RequestError("stop strings need a tokenizer, and this model has none", param="stop")
            return None
        return Detokenizer(
            self.tokenizer,
            stop=params.stop,
            skip_special_tokens=params.skip_special_tokens,
            at_once=not request.stream and not params.stop,
        )

    def decode(self, ids: Sequence[int], *, skip_special_tokens: bool = True) -> str:
        """Token ids to text, all at once."""
        text = self._require_tokenizer().decode(list(ids), skip_special_tokens=skip_special_tokens)
        assert isinstance(text, str)
        return text

    def token_text(self, token_id: int) -> str:
        """One token's text, as logprobs show it; empty without a tokenizer."""
        if self.tokenizer is None:
            return ""
        text = self.tokenizer.decode([token_id], skip_special_tokens=False)
        assert isinstance(text, str)
        return text

    def token_bytes(self, token_id: int) -> bytes:
        """One token's bytes, which may be part of a character; empty without a tokenizer."""
        if self.tokenizer is None:
            return b""
        piece = self.tokenizer.convert_ids_to_tokens(token_id)
        alphabet = _byte_level_alphabet()
        if isinstance(piece, str) and self._byte_level and all(char in alphabet for char in piece):
            return bytes(alphabet[char] for char in piece)
        return self.token_text(token_id).encode()

    def reasoning_parser(
        self, *, prompt_tail: str = "", thinking: bool | None = None
    ) -> ReasoningParser | None:
        """A parser for one answer; None where reasoning is not split."""
        choice = self._plan.parsers["reasoning"]
        if choice is None:
            return None
        parser: ReasoningParser = choice.spec.load()(prompt_tail=prompt_tail, thinking=thinking)
        return parser

    def tool_call_parser(self) -> ToolCallParser | None:
        """A parser for one answer; None where tool calls are not parsed."""
        choice = self._plan.parsers["tool_calls"]
        if choice is None:
            return None
        parser: ToolCallParser = choice.spec.load()()
        return parser

    def _require_tokenizer(self) -> PreTrainedTokenizerBase:
        if self.tokenizer is None:
            raise RequestError(
                f"{self._plan.model_path} has no tokenizer, so that text cannot be read; send token ids, or "
                "start with --server.tokenizer_path",
                param="prompt",
            )
        return self.tokenizer


def load_processor(plan: Plan) -> Processor:
    """The processor of the plan's model. Raises CheckpointError where its tokenizer cannot be loaded."""
    server = plan.settings.server
    folder = plan.model_path
    if server.tokenizer_path is not None and server.tokenizer_path != server.model_path:
        folder = Path(server.tokenizer_path).expanduser()
        if not folder.is_dir():
            options = SourceOptions(download_dir=server.download_dir, weights=False)
            folder = resolve_model(server.tokenizer_path, plugins.registry(), options)
    config = read_json(plan.model_path / "config.json")
    return Processor(plan, load_tokenizer(folder, server, plan.model.spec.tokenizer), config)


def load_tokenizer(
    folder: Path, settings: ServerSettings, known: str | None = None
) -> PreTrainedTokenizerBase | None:
    """The folder's tokenizer; None (and a warning) where a model has none, which then takes token ids only.

    known: the model family's class (`specs.ModelSpec`).
    Raises CheckpointError where it is broken, or missing from a folder that was named for it.
    """
    if not any((folder / name).is_file() for name in TOKENIZER_FILES):
        missing = f"{folder} holds no tokenizer ({', '.join(TOKENIZER_FILES)})"
        if settings.tokenizer_path is not None and settings.tokenizer_path != settings.model_path:
            raise CheckpointError(f"{missing}; correct --server.tokenizer_path")
        logger.warning("%s: only token ids can be served; name one with --server.tokenizer_path", missing)
        return None
    try:
        tokenizer = _read_tokenizer(folder, settings, known)
    except Exception as error:  # third-party parsing of third-party files
        raise CheckpointError(f"the tokenizer in {folder} cannot be loaded: {error}") from error
    if settings.tokenizer_mode == "slow" and tokenizer.is_fast:
        raise CheckpointError(
            f"--server.tokenizer_mode slow was asked for, but {type(tokenizer).__name__} has no slow form"
        )
    return tokenizer


_GENERAL = ("TokenizersBackend", "PreTrainedTokenizerFast")
"""Names of the class that takes tokenizer.json as it is, in transformers 5 and before."""


def _read_tokenizer(folder: Path, settings: ServerSettings, known: str | None) -> PreTrainedTokenizerBase:
    """By the class `known` or the general one where the folder names it, else as ``AutoTokenizer`` decides.

    That one asks for the model's config first, and imports seconds' worth of transformers for it.
    """
    import transformers

    file = folder / "tokenizer_config.json"
    stored = read_json(file) if file.is_file() else {}
    options: dict[str, Any] = {"local_files_only": True}
    reader: Any = None
    if known is not None and "auto_map" not in stored and settings.tokenizer_mode != "slow":
        named = str(stored.get("tokenizer_class"))
        if named.removesuffix("Fast") == known:
            reader = getattr(transformers, known, None)
        elif named in _GENERAL:
            reader = transformers.PreTrainedTokenizerFast
    if reader is None:
        reader = transformers.AutoTokenizer
        options |= {
            "use_fast": settings.tokenizer_mode != "slow",
            "trust_remote_code": settings.trust_remote_code,
        }
    tokenizer: PreTrainedTokenizerBase = reader.from_pretrained(str(folder), **options)
    return tokenizer


@functools.cache
def _byte_level_alphabet() -> dict[str, int]:
    """The character that stands for each byte in a byte-level vocabulary."""
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    characters = bytes_to_unicode()  # type: ignore[no-untyped-call, unused-ignore]
    return {character: byte for byte, character in characters.items()}


def _is_byte_level(tokenizer: PreTrainedTokenizerBase | None) -> bool:
    """Whether pieces are bytes in disguise, by what the tokenizer makes of a letter outside of ASCII."""
    if tokenizer is None:
        return False
    alphabet = _byte_level_alphabet()
    pieces = tokenizer.tokenize("é")
    return bytes(alphabet.get(char, 0) for piece in pieces for char in piece) == "é".encode()


def new_id() -> str:
    """A fresh request id."""
    return uuid.uuid4().hex


def _ids(value: Any) -> set[int]:
    if value is None:
        return set()
    return {int(v) for v in value} if isinstance(value, list | tuple) else {int(value)}


def _valid_unicode(text: str) -> str:
    """JSON can carry half a surrogate pair, which has no UTF-8 form."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise RequestError(f"the text is no valid Unicode: {error.reason}", param="prompt") from None
    return text


def _flatten(message: dict[str, Any]) -> dict[str, Any]:
    """Text parts become one string: templates of text models render a list as nothing."""
    content = message.get("content")
    if not isinstance(content, list):
        return message
    texts = []
    for part in content:
        kind = part.get("type") if isinstance(part, Mapping) else type(part).__name__
        if kind != "text":
            raise RequestError(
                f"this model takes text only; a content part of type {kind!r} was sent", param="messages"
            )
        texts.append(str(part.get("text", "")))
    return {**message, "content": "".join(texts)}
