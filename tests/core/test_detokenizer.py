"""Incremental decoding: valid UTF-8 always, nothing lost, constant cost, stop strings never shown."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer

from pymllm_core.engine.detokenizer import Detokenizer
from pymllm_core.testing.checkpoints import write_tokenizer

TEXTS = (
    "",
    "the end",
    "héllo 你好吗？ 🚀👩‍🚀 e\u0301 Привет",
    " \n\t x",
    "\ufffd real one",
    "<think>你<think>",
)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return write_tokenizer(tmp_path_factory.mktemp("tokenizer"))


@pytest.fixture(scope="module")
def qwen(shared_qwen: Path) -> Any:
    return AutoTokenizer.from_pretrained(str(shared_qwen / "tokenizer"), local_files_only=True)


class Counting:
    """Counts the tokens that are decoded."""

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self.most = self.calls = 0

    def decode(self, tokens: list[int], **options: Any) -> str:
        self.most = max(self.most, len(tokens))
        self.calls += 1
        text: str = self._tokenizer.decode(tokens, **options)
        return text


def pieces(tokenizer: Any, tokens: list[int], *, skip: bool = False, **options: Any) -> list[str]:
    """What `add` gives for each token, and `flush` at the end."""
    detokenizer = Detokenizer(tokenizer, stop=(), skip_special_tokens=skip, **options)
    return [*(detokenizer.add(token)[0] for token in tokens), detokenizer.flush()]


def at_once(tokenizer: Any, tokens: list[int], *, skip: bool = False) -> str:
    """What a detokenizer says that is asked at the end only."""
    detokenizer = Detokenizer(tokenizer, stop=(), skip_special_tokens=skip, at_once=True)
    assert all(detokenizer.add(token) == ("", None) for token in tokens)
    return detokenizer.flush()


def full(tokenizer: Any, tokens: list[int], *, skip: bool = False) -> str:
    text: str = tokenizer.decode(tokens, skip_special_tokens=skip, clean_up_tokenization_spaces=False)
    return text


def check(tokenizer: Any, tokens: list[int], *, skip: bool = False) -> None:
    found = pieces(tokenizer, tokens, skip=skip)
    whole = full(tokenizer, tokens, skip=skip)
    # An incomplete character at the end, 3 bytes at most, is the only thing that may be dropped.
    assert "".join(found) in {whole, *(whole[:-n] for n in (1, 2, 3) if whole.endswith("\ufffd" * n))}
    # Bytes that are no text arrive with a bounded delay; real text is never behind by more than 4 tokens.
    for count in range(4, len(tokens) + 1):
        before = full(tokenizer, tokens[: count - 3], skip=skip).rstrip("\ufffd")
        assert "".join(found[:count]).startswith(before)
    assert at_once(tokenizer, tokens, skip=skip) == "".join(found)
    # A character is given whole or not at all: no piece holds a U+FFFD that the whole text does not.
    assert "".join(found).count("\ufffd") <= whole.count("\ufffd")


@settings(max_examples=400, deadline=None, derandomize=True)
@given(data=st.data())
def test_any_tokens_give_the_full_decoding(tokenizer: Any, data: st.DataObject) -> None:
    check(tokenizer, data.draw(st.lists(st.integers(3, len(tokenizer) - 1), max_size=40)))


@settings(max_examples=200, deadline=None, derandomize=True)
@given(data=st.data())
def test_bytes_around_the_limits_of_utf8(tokenizer: Any, data: st.DataObject) -> None:
    """Mostly lead and continuation bytes, which random tokens seldom put together."""
    alphabet = byte_ids(tokenizer)
    chosen = st.sampled_from([0x41, 0x80, 0x9F, 0xA0, 0xBD, 0xBF, 0xC3, 0xE4, 0xED, 0xF0, 0xF4, 0xFF])
    check(tokenizer, [alphabet[b] for b in data.draw(st.lists(chosen, max_size=24))])


def byte_ids(tokenizer: Any) -> dict[int, int]:
    """The token of each single byte; the reference is the byte-level alphabet of GPT-2."""
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    vocabulary = tokenizer.get_vocab()
    characters = bytes_to_unicode()  # type: ignore[no-untyped-call, unused-ignore]
    return {byte: vocabulary[character] for byte, character in characters.items()}


def in_groups(tokenizer: Any, tokens: list[int], sizes: list[int], **options: Any) -> str:
    """What `extend` says when it gets the tokens in groups of these sizes, and the rest at the end."""
    detokenizer = Detokenizer(tokenizer, stop=(), skip_special_tokens=False, **options)
    said, at = [], 0
    for size in sizes:
        said.append(detokenizer.extend(tokens[at : at + size]))
        at += size
    return "".join([*said, detokenizer.extend(tokens[at:]), detokenizer.flush()])


@settings(max_examples=400, deadline=None, derandomize=True)
@given(data=st.data())
def test_groups_of_tokens_say_what_single_ones_do(tokenizer: Any, data: st.DataObject) -> None:
    """Any tokens, and bytes that begin, go on and break off characters."""
    ids = list(byte_ids(tokenizer).values())
    broken = [byte_ids(tokenizer)[byte] for byte in (0x41, 0x80, 0xBF, 0xC3, 0xE4, 0xBD, 0xF0, 0x9F, 0xFF)]
    some = st.one_of(
        st.integers(3, len(tokenizer) - 1),
        st.sampled_from(ids),
        st.sampled_from(broken),
        st.sampled_from(broken),
    )
    tokens = data.draw(st.lists(some, max_size=30))
    sizes = data.draw(st.lists(st.integers(0, 6), max_size=12))
    expected = "".join(pieces(tokenizer, tokens))
    assert in_groups(tokenizer, tokens, sizes) == expected
    assert in_groups(tokenizer, tokens, sizes, at_once=True) == expected


def test_a_group_costs_hardly_more_than_a_token(tokenizer: Any) -> None:
    counting = Counting(tokenizer)
    detokenizer = Detokenizer(counting, stop=(), skip_special_tokens=False)  # type: ignore[arg-type]
    tokens = tokenizer("the quick brown fox jumps over the lazy dog. " * 20)["input_ids"]
    for at in range(0, len(tokens), 8):
        detokenizer.extend(tokens[at : at + 8])
    assert counting.calls == 2 * -(-len(tokens) // 8)
    assert counting.most <= 9


@pytest.mark.parametrize("text", TEXTS)
def test_text_comes_back(tokenizer: Any, text: str) -> None:
    tokens = tokenizer(text)["input_ids"]
    assert "".join(pieces(tokenizer, tokens)) == text
    singles = [byte_ids(tokenizer)[byte] for byte in text.replace("<think>", "").encode()]
    assert "".join(pieces(tokenizer, singles)) == text.replace("<think>", "")


def test_a_character_of_four_tokens_comes_with_the_last(tokenizer: Any) -> None:
    ids = byte_ids(tokenizer)
    tokens = [ids[byte] for byte in "a🚀b".encode()]
    assert pieces(tokenizer, tokens) == ["a", "", "", "", "🚀", "b", ""]


def test_bytes_that_are_no_text_hold_nothing_up(tokenizer: Any) -> None:
    ids = byte_ids(tokenizer)
    detokenizer = Detokenizer(tokenizer, stop=(), skip_special_tokens=False)
    given = ""
    for count in range(1, 200):
        given += detokenizer.add(ids[0xFF])[0]
        assert len(given) >= count - 3
    # What comes after is read as ever, although no clean end came before it.
    for byte in "你":
        given += "".join(detokenizer.add(ids[b])[0] for b in byte.encode())
    assert given == "\ufffd" * 199 + "你"


def test_an_incomplete_end_is_dropped(tokenizer: Any) -> None:
    ids = byte_ids(tokenizer)
    assert "".join(pieces(tokenizer, [ids[b] for b in b"ok \xf0\x9f"])) == "ok "


def test_special_tokens_are_skipped_or_shown(tokenizer: Any) -> None:
    tokens = [*tokenizer("the end")["input_ids"], 0, *tokenizer(" 你<think>")["input_ids"]]
    assert "".join(pieces(tokenizer, tokens, skip=True)) == "the end 你<think>"
    assert "".join(pieces(tokenizer, tokens)) == "the end<|end|> 你<think>"


def test_cost_of_a_token_does_not_depend_on_the_length(tokenizer: Any) -> None:
    ids = byte_ids(tokenizer)
    text = [ids[b] for b in ("the 你🚀 " * 200).encode()]
    for tokens in (text, [ids[0xFF]] * 1000, [ids[0xE4], ids[0x41]] * 500):
        counting = Counting(tokenizer)
        pieces(counting, tokens)
        assert counting.most <= 8
        assert counting.calls <= 2 * len(tokens) + 1


# -- stop strings -------------------------------------------------------------------------------------


def until_stop(tokenizer: Any, tokens: list[int], stop: tuple[str, ...]) -> tuple[str, str | None, int]:
    """Text, matched stop string, and tokens read; nothing given out may turn out to belong to a stop."""
    detokenizer = Detokenizer(tokenizer, stop=stop, skip_special_tokens=False)
    given = ""
    for count, token in enumerate(tokens, 1):
        text, matched = detokenizer.add(token)
        given += text
        if matched is not None:
            return given, matched, count
    return given + detokenizer.flush(), None, len(tokens)


@pytest.mark.parametrize(
    ("text", "stop", "shown", "matched"),
    [
        ("the end of", ("end",), "the ", "end"),
        ("the end of", ("e end o",), "th", "e end o"),
        ("the quick", ("xyz", "quicker"), "the quick", None),
        ("the quick", ("quicker", "ick"), "the qu", "ick"),
        ("aabaac", ("aac",), "aab", "aac"),
        ("aabaaabaac", ("aabaac",), "aaba", "aabaac"),
        ("ababac", ("abac", "babb"), "ab", "abac"),
        ("abcd", ("bcd", "bc"), "a", "bc"),
        ("abcd", ("cd", "abcd"), "", "abcd"),
        ("你好吗", ("好",), "你", "好"),
        ("x🚀y", ("🚀",), "x", "🚀"),
        ("line\n\nnext", ("\n\n",), "line", "\n\n"),
        ("almost en", ("end",), "almost en", None),
        ("the end", ("t",), "", "t"),
    ],
)
def test_stop_strings(
    tokenizer: Any, text: str, stop: tuple[str, ...], shown: str, matched: str | None
) -> None:
    ids = byte_ids(tokenizer)
    singles = [ids[byte] for byte in text.encode()]
    found, by, count = until_stop(tokenizer, singles, stop)
    assert (found, by) == (shown, matched)
    # It ends with the very byte that completes the stop string.
    assert count == len(singles) or (found + (by or "")).encode() == text.encode()[:count]
    assert until_stop(tokenizer, tokenizer(text)["input_ids"], stop)[1] in (
        (matched,) if matched is None else stop
    )


@settings(max_examples=300, deadline=None, derandomize=True)
@given(
    text=st.text("ab你", max_size=24),
    stop=st.lists(st.text("ab你", min_size=1, max_size=4), min_size=1, max_size=4).map(tuple),
)
def test_stop_strings_against_a_search_in_the_whole_text(
    tokenizer: Any, text: str, stop: tuple[str, ...]
) -> None:
    ids = byte_ids(tokenizer)
    found, matched, _ = until_stop(tokenizer, [ids[b] for b in text.encode()], stop)
    # The reference: after each character, does the text so far hold a stop string?
    for end in range(len(text) + 1):
        hits = [(text[:end].find(s), s) for s in stop if s in text[:end]]
        if hits:
            at, by = min(hits)
            assert (found, matched) == (text[:at], by)
            return
    assert (found, matched) == (text, None)


# -- Qwen's own tokenizer -----------------------------------------------------------------------------


@settings(max_examples=150, deadline=None, derandomize=True)
@given(data=st.data())
def test_any_tokens_of_qwen(qwen: Any, data: st.DataObject) -> None:
    check(qwen, data.draw(st.lists(st.integers(0, 151_642), max_size=24)))


@settings(max_examples=100, deadline=None, derandomize=True)
@given(text=st.text(max_size=30))
def test_any_text_of_qwen(qwen: Any, text: str) -> None:
    tokens = qwen(text)["input_ids"]
    # The tokenizer normalises to NFC first.
    assert "".join(pieces(qwen, tokens)) == full(qwen, tokens)


def test_qwen_thinking_and_special_tokens(qwen: Any) -> None:
    tokens = qwen("🚀 <|im_start|>user\n<think>x</think>")["input_ids"]
    assert "".join(pieces(qwen, tokens, skip=True)) == "🚀 user\n<think>x</think>"
