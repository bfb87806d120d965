"""Token ids to text, a token at a time, in constant time each and never with part of a character."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# A character's UTF-8 form has at most 4 bytes and a byte-level token at least one, so that a text which is
# still incomplete after this many tokens holds bytes that are no UTF-8 at all.
_LONGEST_CHARACTER = 4


class Detokenizer:
    """Incremental decoding for one sequence, with stop strings held back until they are decided.

    A token's text can depend on the token before it (spaces, byte-level pieces), so that the last decoded
    run is decoded again together with the new tokens, and the difference is the news.
    """

    __slots__ = ("_held", "_longest_stop", "_prefix", "_skip", "_stops", "_tokenizer", "_window")

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase, *, stop: tuple[str, ...], skip_special_tokens: bool
    ) -> None:
        self._tokenizer = tokenizer
        self._skip = skip_special_tokens
        self._stops = stop
        self._longest_stop = max(map(len, stop), default=0)
        self._window: list[int] = []
        self._prefix = 0
        self._held = ""

    def add(self, token: int) -> tuple[str, str | None]:
        """Text that is now certain, and the stop string that it ended at (not part of the text)."""
        return self._until_stop(self._decode(token))

    def flush(self) -> str:
        """What was held back, at the end; the rest of an incomplete character is dropped."""
        rest, self._held = self._held + self._pending_text().rstrip("\ufffd"), ""
        return rest

    def _text(self, tokens: list[int]) -> str:
        text = self._tokenizer.decode(
            tokens, skip_special_tokens=self._skip, clean_up_tokenization_spaces=False
        )
        assert isinstance(text, str)
        return text

    def _pending_text(self) -> str:
        return self._text(self._window)[len(self._text(self._window[: self._prefix])) :]

    def _decode(self, token: int) -> str:
        self._window.append(token)
        text = self._pending_text()
        undecided = len(self._window) - self._prefix
        if text.endswith("\ufffd") and undecided < _LONGEST_CHARACTER:
            return ""
        self._window = self._window[self._prefix :]
        self._prefix = len(self._window)
        return text

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
