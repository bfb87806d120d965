"""Token ids to text, a token at a time, in constant time each and never with part of a character."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# A character's UTF-8 form has at most 4 bytes and a byte-level token at least one, so that the beginning of
# a character lies within the last 3 tokens. What is still no text after 4 is no UTF-8 at all.
_LONGEST_CHARACTER = 4


class Detokenizer:
    """Incremental decoding for one sequence, with stop strings held back until they are decided.

    A token's text can depend on the token before it (spaces, byte-level pieces), so that the last decoded
    run is decoded again together with the new tokens, and the difference is the news. `_window` is that run,
    `_prefix` its tokens from the run before, `_shown` its characters that were given out.

    at_once: nothing is wanted before the end; `flush` then gives the whole text. There must be no stop strings.
    """

    __slots__ = (
        "_at_once",
        "_held",
        "_longest_stop",
        "_prefix",
        "_shown",
        "_skip",
        "_stops",
        "_tokenizer",
        "_window",
    )

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        *,
        stop: tuple[str, ...],
        skip_special_tokens: bool,
        at_once: bool = False,
    ) -> None:
        assert not (at_once and stop)
        # The Rust tokenizer itself where there is one: transformers' checks take three times as long as it.
        self._tokenizer = getattr(tokenizer, "backend_tokenizer", None) or tokenizer
        self._at_once = at_once
        self._skip = skip_special_tokens
        self._stops = stop
        self._longest_stop = max(map(len, stop), default=0)
        self._window: list[int] = []
        self._prefix = 0
        self._shown = 0
        self._held = ""

    def add(self, token: int) -> tuple[str, str | None]:
        """Text that is now certain, and the stop string that it ended at (not part of the text)."""
        if self._at_once:
            self._window.append(token)
            return "", None
        return self._until_stop(self._decode(token))

    def extend(self, tokens: Sequence[int]) -> str:
        """Text that is now certain after all of `tokens`, which costs hardly more than one. Not with stop strings."""
        assert not self._stops
        if self._at_once:
            self._window += tokens
            return ""
        if len(tokens) > 1:
            text = self._text([*self._window, *tokens])
            if not text.endswith("\ufffd"):
                news = text[self._shown :]
                self._window, self._prefix = [tokens[-1]], 1
                self._shown = len(self._text(self._window))
                return news
        # What of an undecided end is text, only each token tells.
        return "".join(self._decode(token) for token in tokens)

    def flush(self) -> str:
        """What was held back, at the end; the rest of an incomplete character is dropped."""
        told = ""
        if self._at_once:
            text = self._text(self._window)
            if not text.endswith("\ufffd"):
                return text
            # Which of these stand for no UTF-8, and which for the beginning of a character, only each token tells.
            tokens, self._window = self._window, []
            told = "".join(self._decode(token) for token in tokens)
        rest, self._held = told + self._held + self._text(self._window)[self._shown :].rstrip("\ufffd"), ""
        return rest

    def _text(self, tokens: list[int]) -> str:
        text = self._tokenizer.decode(tokens, skip_special_tokens=self._skip)
        assert isinstance(text, str)
        return text

    def _decode(self, token: int) -> str:
        self._window.append(token)
        text = self._text(self._window)
        # The beginning of a character reads as one U+FFFD, or as one for each byte, of which it lacks one.
        tail = text[1 - _LONGEST_CHARACTER :]
        undecided = len(tail) - len(tail.rstrip("\ufffd"))
        end = len(text) - undecided
        news = text[self._shown : end]
        self._shown = max(self._shown, end)
        if not undecided or len(self._window) - self._prefix >= _LONGEST_CHARACTER:
            # What is undecided lies within the last tokens; those before them have done their part.
            self._window = self._window[self._prefix :]
            self._prefix = len(self._window)
            self._shown = max(len(self._text(self._window)) - undecided, 0)
        return news

    def _until_stop(self, text: str) -> tuple[str, str | None]:
        if not self._stops:
            return text, None
        text = self._held + text
        found = [(text.find(stop), stop) for stop in self._stops]
        found = [(at, stop) for at, stop in found if at >= 0]
        if found:
            at, stop = min(found)
            self._held = ""
            return text[:at], stop
        keep = self._undecided(text)
        self._held = text[len(text) - keep :]
        return text[: len(text) - keep], None

    def _undecided(self, text: str) -> int:
        """Length of the longest end of `text` that could be the beginning of a stop string."""
        for length in range(min(len(text), self._longest_stop - 1), 0, -1):
            tail = text[-length:]
            if any(stop.startswith(tail) for stop in self._stops):
                return length
        return 0
