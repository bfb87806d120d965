"""Seeded draws of open content, divided into a training and a held-out side by a hash."""

from __future__ import annotations

import random
import string
import zlib
from collections.abc import Callable, Sequence
from typing import Literal, TypeVar

from pymllm_demo.recipe import lexicon

T = TypeVar("T")
Split = Literal["train", "held_out", "blank"]

_HAN = sorted(set(lexicon.COMMON_HAN))
_CONSONANTS = "bcdfghjklmnpqrstvwxyz"
_VOWELS = "aeiou"
# What people really ask for in a smoke test; always on the training side.
_EVERYDAY = (
    "ok OK Ok yes no hello hi done test ping pong fine good 好 好的 是 不 是的 可以 收到 你好 1 2 42 a b"
).split()
_RARE = (
    *[(0x4E00, 0x9FA5)] * 5, (0xC0, 0x17F), (0x391, 0x44F), (0x3041, 0x30F6), (0xAC00, 0xD7A3),
    (0x1F300, 0x1F64F),
)  # fmt: skip
_FAMILIAR = frozenset((*_EVERYDAY, *lexicon.PHRASE_WORDS))


def held_out(key: str) -> bool:
    """Whether content belongs to the evaluation: one key in eight, forever the same ones."""
    return zlib.crc32(key.encode()) % 97 < 12 and key not in _FAMILIAR


class Sampler:
    """Draws content of one side of the split.

    The side ``blank`` replaces all open content by a zero: the words left are those of the
    phrasings, which is what the tokenizer's vocabulary is made of.
    """

    def __init__(self, seed: int, split: Split) -> None:
        self.rng = random.Random(seed)
        self.split = split
        self.zh = False

    def pick(self, options: Sequence[T]) -> T:
        return options[int(self.rng.random() * len(options))]

    def chance(self, probability: float) -> bool:
        return self.rng.random() < probability

    def between(self, low: int, high: int) -> int:
        return low + int(self.rng.random() * (high - low + 1))

    def accepts(self, key: str) -> bool:
        return self.split == "blank" or held_out(key) == (self.split == "held_out")

    def choose(self, draw: Callable[[], T], key: Callable[[T], str]) -> T:
        """Draw until the key falls on this sampler's side."""
        while True:
            value = draw()
            if self.accepts(key(value)):
                return value

    def _open(self, draw: Callable[[], str]) -> str:
        if self.split == "blank":
            return "0"
        return self.choose(draw, str.lower)

    def _raw_word(self, low: int, high: int) -> str:
        kind = self.rng.random()
        if kind < 0.35:
            word = self.pick(lexicon.EN_WORDS)
            if low <= len(word) <= high:
                return word
        length = self.between(low, high)
        if kind < 0.75:
            return "".join(self.pick(_VOWELS if index % 2 else _CONSONANTS) for index in range(length))
        return "".join(self.pick(string.ascii_lowercase) for _ in range(length))

    def word(self, low: int = 3, high: int = 8) -> str:
        """A lower-case word: English, pronounceable, or random letters."""
        return self._open(lambda: self._raw_word(low, high))

    def any_word(self) -> str:
        """A word to copy or to take apart; now and then one that is a single token."""
        if self.split == "train" and self.chance(0.1):
            return self.pick(lexicon.PHRASE_WORDS)
        return self.word(2, 10)

    def prose(self, low: int, high: int) -> list[str]:
        """Words of which some are single tokens, as in real sentences; the first is always open."""
        familiar = 0.0 if self.split == "blank" else 0.3
        rest = range(self.between(low, high) - 1)
        return [
            self.word(),
            *(self.pick(lexicon.PHRASE_WORDS) if self.chance(familiar) else self.word() for _ in rest),
        ]

    def words(self, low: int, high: int) -> list[str]:
        words = [self.word() for _ in range(self.between(low, high))]
        if self.chance(0.1):
            words[-1] = self.pick(words)  # a word may come twice
        return words

    def cased(self, word: str) -> str:
        kind = self.rng.random()
        if kind < 0.6:
            return word
        if kind < 0.8:
            return word.capitalize()
        if kind < 0.9:
            return word.upper()
        return "".join(self.pick((letter, letter.upper())) for letter in word)

    def name(self) -> str:
        """A person or place name in the language of the dialogue."""
        if self.zh and self.chance(0.7):
            return self._open(
                lambda: (
                    self.pick(lexicon.ZH_SURNAMES)
                    + "".join(self.pick(lexicon.ZH_GIVEN) for _ in range(self.between(1, 2)))
                )
            )
        if self.chance(0.4):
            return self._open(lambda: self.pick(lexicon.NAMES))
        return self.word(3, 8).capitalize()

    def _raw_han(self, low: int, high: int) -> str:
        if self.chance(0.4):
            text = self.pick(lexicon.ZH_PHRASES)
            if len(text) < high and self.chance(0.4):
                text += self.pick(lexicon.ZH_PHRASES)
            if low <= len(text) <= high:
                return text
        return "".join(self.pick(_HAN) for _ in range(self.between(low, high)))

    def han(self, low: int = 2, high: int = 6) -> str:
        """Chinese characters, each of them one token; the whole string decides the side."""
        return self._open(lambda: self._raw_han(low, high))

    def integer(self, low: int, high: int) -> int:
        if self.split == "blank":
            return low
        return self.choose(lambda: self.between(low, high), lambda value: f"int:{value}")

    def digits(self, low: int, high: int) -> str:
        return self._open(lambda: "".join(self.pick("0123456789") for _ in range(self.between(low, high))))

    def code(self) -> str:
        """An identifier such as ``aB3-x9``, never one that could be a number."""
        alphabet = self.pick((string.ascii_letters + string.digits, "abcdef0123456789-", "XYZ-_.019"))

        def draw() -> str:
            tail = "".join(self.pick(alphabet) for _ in range(self.between(1, 8)))
            return (self.pick(string.ascii_letters) + tail).rstrip("-_.")

        return self._open(draw)

    def sentence(self) -> str:
        if self.zh:
            return self.han(3, 8) + self.pick(("，", "、", " ")) + self.han(2, 8) + self.pick("。！？")
        words = self.prose(2, 9)
        self.rng.shuffle(words)
        text = " ".join(words)
        form = self.pick(("The {}.", "{}!", "A {}?", "{}, ok.", "Is it {}?", "{}", "the {}", "This is {}"))
        return form.format(text)

    def _rare(self) -> str:
        """Characters that the vocabulary spells in bytes: rare Chinese and other scripts."""
        low, high = self.pick(_RARE)
        return "".join(chr(self.between(low, high)) for _ in range(self.between(1, 4)))

    def _symbols(self) -> str:
        kind = self.rng.random()
        if kind < 0.3:
            return self._open(lambda: "".join(self.pick(lexicon.EMOJI) for _ in range(self.between(1, 3))))
        if kind < 0.8:
            return self._open(self._rare)
        return self._open(lambda: "".join(self.pick("!?#$%&*+-=@~^/;._") for _ in range(3)))

    def text(self) -> str:
        """An arbitrary short X."""
        kind = self.rng.random()
        if kind < 0.08 and self.split == "train":
            return self.pick(_EVERYDAY)
        if kind < 0.40:
            return self.cased(self.any_word())
        if kind < 0.52:
            return " ".join(self.cased(word) for word in self.prose(2, 5))
        if kind < 0.60:
            return self.digits(2, 6)
        if kind < 0.68:
            return self.code()
        if kind < 0.76:
            return self.sentence()
        if kind < 0.91:
            return self.han(1, 8)
        if kind < 0.97:
            return self._symbols()
        return self.word() + self.pick((" ", "", ", ", "，", "-")) + self.han(2, 4)

    def long_text(self) -> str:
        return self.pick((" ", " ", ", ")).join(self.text() for _ in range(self.between(3, 12)))

    def quoted(self, text: str) -> str:
        marks = self.pick(('""', '""', "''", "“”", "「」", "``"))
        return marks[0] + text + marks[1]
