"""The offline API: a model in this process, without a server."""

from __future__ import annotations

import itertools
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import replace
from typing import Any, Literal, overload

from typing_extensions import Self

from pymllm_core.config import Settings
from pymllm_core.engine.build import assemble, build_engine
from pymllm_core.engine.processor import Processor
from pymllm_core.engine.status import EngineStats, Progress, ProgressCallback
from pymllm_core.errors import EngineError, RequestError
from pymllm_core.output import Completion, Delta
from pymllm_core.plan import Plan
from pymllm_core.request import Request, SamplingParams

Prompt = str | Sequence[int]
Message = dict[str, Any]
Params = SamplingParams | None


class LLM:
    """A loaded model.

    >>> with LLM("demo") as llm:  # doctest: +SKIP
    ...     print(llm.chat([{"role": "user", "content": "Hello!"}]).text)

    model: a folder, ``demo``, or a hub's id. Further keywords are the fields of `config.ServerSettings`,
    plus ``quantization`` and ``kv_cache_dtype``. Not thread-safe; a server uses `AsyncEngine`.
    """

    def __init__(self, model: str, *, progress: ProgressCallback | None = None, **settings: Any) -> None:
        self._start(Settings.of(model, **settings), progress)

    @classmethod
    def from_settings(cls, settings: Settings, *, progress: ProgressCallback | None = None) -> LLM:
        """Like the constructor, from complete settings."""
        llm = cls.__new__(cls)
        llm._start(settings, progress)
        return llm

    def _start(self, settings: Settings, progress: ProgressCallback | None) -> None:
        report = progress or (lambda _: None)
        assembly = assemble(settings, progress=lambda *step: report(Progress(*step)), weights=True)
        self._engine = build_engine(assembly, progress=report)
        self._numbers = itertools.count()
        self._queues: dict[str, deque[Delta]] = {}

    @property
    def plan(self) -> Plan:
        return self._engine.plan

    @property
    def processor(self) -> Processor:
        return self._engine.processor

    def stats(self) -> EngineStats:
        return self._engine.stats()

    # -- generation -------------------------------------------------------------------------------

    @overload
    def generate(  # type: ignore[overload-overlap]  # a str is a sequence of str, and comes first
        self, prompts: str, params: Params = ..., *, stream: Literal[False] = ..., progress: bool = ...
    ) -> Completion: ...
    @overload
    def generate(
        self,
        prompts: Sequence[Prompt],
        params: Params | Sequence[SamplingParams] = ...,
        *,
        stream: Literal[False] = ...,
        progress: bool = ...,
    ) -> list[Completion]: ...
    @overload
    def generate(
        self,
        prompts: str | Sequence[Prompt],
        params: Params | Sequence[SamplingParams] = ...,
        *,
        stream: Literal[True],
    ) -> Iterator[Delta]: ...
    def generate(
        self,
        prompts: str | Sequence[Prompt],
        params: Params | Sequence[SamplingParams] = None,
        *,
        stream: bool = False,
        progress: bool = False,
    ) -> Completion | list[Completion] | Iterator[Delta]:
        """Continue one prompt or many; each is text or token ids.

        A list gives a list in the same order. stream: an iterator of deltas instead, whose `request_id`
        is the prompt's index in the list. progress: show a bar. Raises RequestError for a bad prompt.
        """
        single = isinstance(prompts, str)
        many: Sequence[Prompt] = [prompts] if isinstance(prompts, str) else prompts
        if any(isinstance(prompt, int) for prompt in many):
            raise RequestError(
                "a prompt of token ids goes into a list of prompts: [[1, 2, 3]], not [1, 2, 3]"
            )
        requests = [
            self._prompt(prompt, p, str(index))
            for index, (prompt, p) in enumerate(zip(many, self._each(params, len(many)), strict=True))
        ]
        if stream:
            return self._stream(requests)
        completions = self._complete(requests, progress)
        return completions[0] if single else completions

    @overload
    def chat(
        self,
        messages: list[Message],
        params: Params = ...,
        *,
        stream: Literal[False] = ...,
        progress: bool = ...,
        tools: list[dict[str, Any]] | None = ...,
        template_kwargs: dict[str, Any] | None = ...,
    ) -> Completion: ...
    @overload
    def chat(
        self,
        messages: list[list[Message]],
        params: Params | Sequence[SamplingParams] = ...,
        *,
        stream: Literal[False] = ...,
        progress: bool = ...,
        tools: list[dict[str, Any]] | None = ...,
        template_kwargs: dict[str, Any] | None = ...,
    ) -> list[Completion]: ...
    @overload
    def chat(
        self,
        messages: list[Message] | list[list[Message]],
        params: Params | Sequence[SamplingParams] = ...,
        *,
        stream: Literal[True],
        tools: list[dict[str, Any]] | None = ...,
        template_kwargs: dict[str, Any] | None = ...,
    ) -> Iterator[Delta]: ...
    def chat(
        self,
        messages: list[Message] | list[list[Message]],
        params: Params | Sequence[SamplingParams] = None,
        *,
        stream: bool = False,
        progress: bool = False,
        tools: list[dict[str, Any]] | None = None,
        template_kwargs: dict[str, Any] | None = None,
    ) -> Completion | list[Completion] | Iterator[Delta]:
        """Answer one conversation or many, through the model's chat template; otherwise as `generate`."""
        single = not messages or isinstance(messages[0], dict)
        chats: list[list[Message]] = [messages] if single else messages  # type: ignore[list-item, assignment]
        requests = [
            self.processor.from_chat(
                chat, p, request_id=str(index), tools=tools, template_kwargs=template_kwargs
            ).request
            for index, (chat, p) in enumerate(zip(chats, self._each(params, len(chats)), strict=True))
        ]
        if stream:
            return self._stream(requests)
        completions = self._complete(requests, progress)
        return completions[0] if single else completions

    def stream(self, request: Request) -> Iterator[Delta]:
        """The deltas of a request made by `processor`; closing the iterator aborts it."""
        return self._stream([request])

    def close(self) -> None:
        """End everything and let the model go."""
        for request_id in list(self._queues):
            last = self._engine.abort(request_id)
            if last is not None:
                self._queues[request_id].append(last)
        del self._engine

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        with suppress(AttributeError):
            self.close()

    # -- inside -----------------------------------------------------------------------------------

    def _prompt(self, prompt: Prompt, params: Params, request_id: str) -> Request:
        if isinstance(prompt, str):
            return self.processor.from_text(prompt, params, request_id=request_id)
        return self.processor.from_ids(prompt, params, request_id=request_id)

    @staticmethod
    def _each(params: Params | Sequence[SamplingParams], count: int) -> Sequence[Params]:
        if params is None or isinstance(params, SamplingParams):
            return [params] * count
        if len(params) != count:
            raise RequestError(f"{len(params)} sampling parameters were given for {count} prompts")
        return params

    def _stream(self, requests: list[Request]) -> Iterator[Delta]:
        engine = self._engine
        # Several iterators may be half way through their requests, and may use the same ids: the engine's
        # ids are unique, and whoever makes a step puts what it brings into the queue of whom it concerns.
        names: dict[str, str] = {}
        mine: deque[Delta] = deque()
        try:
            for request in requests:
                unique = f"{next(self._numbers)}.{request.id}"
                engine.add(replace(request, id=unique))
                names[unique] = request.id
                self._queues[unique] = mine
            while names:
                while not mine:
                    for delta in engine.step():
                        self._queues[delta.request_id].append(delta)
                delta = mine.popleft()
                name = names[delta.request_id]
                if delta.finish_reason is not None:
                    del names[delta.request_id], self._queues[delta.request_id]
                if delta.error is not None:
                    raise EngineError(delta.error)
                yield delta._replace(request_id=name)
        finally:
            for unique in names:
                del self._queues[unique]
                engine.abort(unique)

    def _complete(self, requests: list[Request], progress: bool) -> list[Completion]:
        parts: dict[str, list[Delta]] = {request.id: [] for request in requests}
        advance, done = _bar(len(requests)) if progress else (_nothing, _nothing)
        try:
            for delta in self._stream([replace(request, stream=False) for request in requests]):
                parts[delta.request_id].append(delta)
                if delta.finish_reason is not None:
                    advance()
        finally:
            done()
        return [Completion.join(parts[request.id]) for request in requests]


def _nothing() -> None:
    pass


def _bar(total: int) -> tuple[Callable[[], None], Callable[[], None]]:
    """A progress bar over finished prompts: (advance, close)."""
    from rich import console, progress

    screen = console.Console(stderr=True)
    bar = progress.Progress(console=screen, transient=True, disable=not screen.is_terminal)
    task = bar.add_task("generating", total=total)
    bar.start()
    return (lambda: bar.advance(task)), bar.stop
