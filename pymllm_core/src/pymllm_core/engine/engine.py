"""The engine: `step` schedules, runs and commits. One thread owns it."""

from __future__ import annotations

import logging
import time

from pymllm_core.engine.processor import Processor
from pymllm_core.engine.runner import Launched, Runner, Sampled
from pymllm_core.engine.sampler import uniform
from pymllm_core.engine.scheduler import Scheduler
from pymllm_core.engine.sequence import Sequence, Status
from pymllm_core.engine.status import EngineStats
from pymllm_core.errors import RequestError
from pymllm_core.output import Delta, FinishReason, TokenLogprob
from pymllm_core.plan import Plan
from pymllm_core.request import Request

logger = logging.getLogger(__name__)


class _Output:
    """What a sequence has said since its last delta."""

    __slots__ = ("logprobs", "sequence", "text", "tokens")

    def __init__(self, sequence: Sequence) -> None:
        self.sequence = sequence
        self.text: list[str] = []
        self.tokens: list[int] = []
        self.logprobs: list[TokenLogprob] = []

    def take(self, reason: FinishReason | None, matched: str | int | None, error: str | None) -> Delta:
        sequence = self.sequence
        wanted = sequence.request.params.logprobs is not None
        delta = Delta(
            sequence.request.id,
            "".join(self.text),
            tuple(self.tokens),
            sequence.usage,
            reason,
            matched,
            tuple(self.logprobs) if wanted else None,
            error,
            sequence.timings if reason else None,
        )
        for said in (self.text, self.tokens, self.logprobs):
            said.clear()
        return delta


class Engine:
    """Continuous batching over one model. With `overlap`, a step is launched before the last is read."""

    def __init__(
        self, plan: Plan, processor: Processor, scheduler: Scheduler, runner: Runner, *, overlap: bool
    ) -> None:
        self.plan = plan
        self.processor = processor
        self.scheduler = scheduler
        self._runner = runner
        self._overlap = overlap
        self._in_flight: Launched | None = None
        self._outputs: dict[str, _Output] = {}
        self._steps = self._prompt_tokens = self._generated_tokens = self._cache_hits = 0
        self._last_step = time.monotonic()
        self._log_mark = (self._last_step, 0)
        self._seed_counter = 0

    @property
    def runner(self) -> Runner:
        """What computes batches. A benchmark may give it batches of its own while the engine has no work."""
        return self._runner

    @property
    def has_work(self) -> bool:
        return self.scheduler.has_work or self._in_flight is not None

    def add(self, request: Request) -> None:
        """Queue a request. Raises RequestError, or QueueFullError where the queue has a limit."""
        if request.id in self._outputs:
            raise RequestError(f"a request with id {request.id!r} is running already", param="rid")
        max_tokens = self.plan.check(request)
        sequence = Sequence(
            request,
            max_tokens=max_tokens,
            seed=self._seed(request),
            detokenizer=self.processor.detokenizer(request) if request.detokenize else None,
        )
        if not self.has_work:
            # An idle engine has not stalled: its next step is due from now on.
            self._last_step = time.monotonic()
        self.scheduler.add(sequence)
        self._outputs[request.id] = _Output(sequence)

    def abort(self, request_id: str) -> Delta | None:
        """End a request and free all it holds; its last delta, None where there is no such request."""
        output = self._outputs.get(request_id)
        return None if output is None else self._finish(output, "abort")

    def fail(self, error: BaseException) -> list[Delta]:
        """End every request that runs because a step failed; those that wait are untouched."""
        self._in_flight = None
        message = f"{type(error).__name__}: {error}"
        failed = [
            o for o in self._outputs.values() if o.sequence.status is Status.RUNNING or o.sequence.pending
        ]
        return [self._finish(output, "error", error=message) for output in failed]

    def step(self) -> list[Delta]:
        """Advance by one step: schedule, run, commit."""
        batch = self.scheduler.schedule()
        launched = None
        if batch is not None:
            try:
                launched = self._runner.launch(batch)
            except BaseException:
                # Also on KeyboardInterrupt: pages without their K and V must not get into the cache.
                self.scheduler.roll_back(batch)
                raise
            self._steps += 1
        if self._overlap:
            launched, self._in_flight = self._in_flight, launched
        deltas = [] if launched is None else self._commit(launched.read())
        self._last_step = time.monotonic()
        self._log_progress()
        return deltas

    def warm_up(self) -> bool:
        """Do some of what later steps would wait for, a tenth of a second; False where none is left, or there is work.

        A server does so while it has no requests: else the first steps with prompts take ten times as long.
        """
        return not self.has_work and self._runner.capture_next_piece()

    def flush_cache(self) -> bool:
        """Forget cached prefixes; False (and nothing done) while requests run."""
        if self.has_work:
            return False
        self.scheduler.cache.clear()
        return True

    def stats(self) -> EngineStats:
        """May be called from any thread."""
        scheduler = self.scheduler
        return EngineStats(
            running=len(scheduler.running),
            waiting=len(scheduler.waiting),
            pages_used=scheduler.pool.num_pages - scheduler.pool.free_pages,
            pages_total=scheduler.pool.num_pages,
            steps=self._steps,
            prompt_tokens=self._prompt_tokens,
            generated_tokens=self._generated_tokens,
            cache_hit_tokens=self._cache_hits,
            preemptions=scheduler.num_preemptions,
            last_step_age_s=time.monotonic() - self._last_step,
        )

    # -- commit -------------------------------------------------------------------------------------

    def _commit(self, sampled: list[Sampled]) -> list[Delta]:
        deltas = []
        interval = self.plan.settings.server.stream_interval
        for one in sampled:
            sequence, token, logprob = one.sequence, one.token, one.logprob
            if not self.scheduler.commit(sequence, token):
                continue
            self._generated_tokens += 1
            if sequence.num_generated == 1:
                self._prompt_tokens += sequence.prompt_len
                self._cache_hits += sequence.cached_tokens
            output = self._outputs[sequence.request.id]
            output.tokens.append(token)
            if logprob is not None:
                output.logprobs.append(logprob)
            try:
                reason, matched = self._advance(output, token)
            except Exception as error:
                # One sequence's fault (a tokenizer can raise) must not lose what the others have to say.
                logger.exception("request %s ends with an error", sequence.request.id)
                sequence.detokenizer = None
                deltas.append(self._finish(output, "error", error=f"{type(error).__name__}: {error}"))
                continue
            if reason is not None:
                deltas.append(self._finish(output, reason, matched))
            elif sequence.request.stream and len(output.tokens) >= interval:
                deltas.append(output.take(None, None, None))
        return deltas

    def _advance(self, output: _Output, token: int) -> tuple[FinishReason | None, str | int | None]:
        """Whether the sequence ends with this token, and on what; collects its text."""
        sequence = output.sequence
        params = sequence.request.params
        if token in params.stop_token_ids:
            return "stop", token
        if not params.ignore_eos and token in self.processor.eos_token_ids:
            return "stop", None
        if sequence.detokenizer is not None:
            text, stop = sequence.detokenizer.add(token)
            output.text.append(text)
            if stop is not None:
                # What follows the stop string is no part of the answer.
                sequence.detokenizer = None
                return "stop", stop
        if sequence.num_generated >= sequence.max_tokens:
            return "length", None
        return None, None

    def _finish(
        self,
        output: _Output,
        reason: FinishReason,
        matched: str | int | None = None,
        error: str | None = None,
    ) -> Delta:
        sequence = output.sequence
        self.scheduler.finish(sequence)
        if sequence.detokenizer is not None:
            output.text.append(sequence.detokenizer.flush())
        del self._outputs[sequence.request.id]
        return output.take(reason, matched, error)

    def _seed(self, request: Request) -> int:
        """The request's own seed, or the next of a series that starts with random_seed."""
        if request.params.seed is not None:
            return request.params.seed
        self._seed_counter += 1
        return int(uniform(self.plan.settings.server.random_seed, self._seed_counter) * 2**53)

    def _log_progress(self) -> None:
        if self._steps % self.plan.settings.server.decode_log_interval or not logger.isEnabledFor(
            logging.INFO
        ):
            return
        now, tokens = time.monotonic(), self._generated_tokens
        since, before = self._log_mark
        self._log_mark = (now, tokens)
        if tokens == before:
            return
        stats = self.stats()
        logger.info(
            "%d running, %d waiting, %.0f tokens/s, pages %d of %d",
            stats.running,
            stats.waiting,
            (tokens - before) / max(now - since, 1e-9),
            stats.pages_used,
            stats.pages_total,
        )
