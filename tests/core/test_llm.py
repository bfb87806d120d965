"""The offline API: one prompt, many, chats, streams side by side, and what it says about bad input."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from pymllm_core import LLM, SamplingParams, plugins
from pymllm_core.errors import CheckpointError, ConfigError, RequestError
from pymllm_core.request import Request
from pymllm_core.testing.checkpoints import write_toy
from pymllm_core.testing.engines import TOY, check_idle, registry_of

FIVE = SamplingParams(max_tokens=5, temperature=0, ignore_eos=True)


@pytest.fixture(scope="module", autouse=True)
def only_the_toy() -> Iterator[None]:
    """The registry of this module's tests, whatever else is installed."""
    registry = registry_of(TOY)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(plugins, "registry", lambda: registry)
        yield


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("toy")
    write_toy(made, tokenizer=True)
    return made


@pytest.fixture(scope="module")
def shared(folder: Path) -> LLM:
    return LLM(str(folder), device="cpu", dtype="float32", radix_cache_page_size=4)


@pytest.fixture
def llm(shared: LLM) -> Iterator[LLM]:
    """The model; afterwards nothing may be left over."""
    yield shared
    check_idle(shared._engine)
    assert not shared._engine.has_work
    assert not shared._queues


def tokenizer_of(llm: LLM) -> Any:
    return llm.processor.tokenizer


def test_one_prompt_and_many(llm: LLM) -> None:
    one = llm.generate("the quick brown", FIVE)
    assert one.finish_reason == "length"
    assert len(one.token_ids) == one.usage.completion_tokens == 5
    assert one.text == tokenizer_of(llm).decode(list(one.token_ids), skip_special_tokens=True).rstrip(
        "\ufffd"
    )
    ids = tokenizer_of(llm)("the quick brown")["input_ids"]
    assert one.usage.prompt_tokens == len(ids)
    many = llm.generate(["the end", ids, "dog"], FIVE)
    assert [c.request_id for c in many] == ["0", "1", "2"]
    assert many[1].token_ids == one.token_ids
    assert llm.generate([], FIVE) == []
    assert llm.generate(["the end"], FIVE)[0].token_ids == many[0].token_ids


def test_parameters_for_each_prompt(llm: LLM) -> None:
    lengths = [3, 1, 7]
    each = [SamplingParams(max_tokens=n, temperature=0, ignore_eos=True) for n in lengths]
    assert [len(c.token_ids) for c in llm.generate(["a", "b", "c"], each)] == lengths


def test_chat_renders_the_template(llm: LLM) -> None:
    messages = [{"role": "user", "content": "the end"}]
    text = "<|user|>the end<|end|><|assistant|>"
    ids = tokenizer_of(llm)(text, add_special_tokens=False)["input_ids"]
    expected = llm.generate([ids], FIVE)[0].token_ids
    assert llm.chat(messages, FIVE).token_ids == expected
    parts = [{"role": "user", "content": [{"type": "text", "text": "the "}, {"type": "text", "text": "end"}]}]
    both = llm.chat([messages, parts], FIVE)
    assert [c.token_ids for c in both] == [expected, expected]
    thinking = llm.processor.from_chat(messages, template_kwargs={"thinking": True})
    assert thinking.prompt_tail == text + "<think>"
    tools = llm.processor.from_chat(messages, tools=[{"type": "function"}])
    assert "[1 tools]" in thinking.prompt_tail.replace("<|assistant|><think>", "[1 tools]")
    assert tools.prompt_tail == "<|user|>the end<|end|>[1 tools]<|assistant|>"


def test_a_stream_says_what_generate_says(llm: LLM) -> None:
    whole = llm.generate(["the quick", "brown fox jumps"], FIVE)
    deltas = list(llm.generate(["the quick", "brown fox jumps"], FIVE, stream=True))
    for index, completion in enumerate(whole):
        mine = [d for d in deltas if d.request_id == str(index)]
        assert len(mine) == 5
        assert "".join(d.text for d in mine) == completion.text
        assert tuple(t for d in mine for t in d.token_ids) == completion.token_ids
        assert [d.finish_reason for d in mine] == [None] * 4 + ["length"]
    chat = [{"role": "user", "content": "dog"}]
    streamed = "".join(d.text for d in llm.chat(chat, FIVE, stream=True))
    assert streamed == llm.chat(chat, FIVE).text


def test_two_streams_side_by_side(llm: LLM) -> None:
    """Both use the id "0", and each makes steps in which the other's request advances, too."""
    first = llm.generate("the quick", FIVE, stream=True)
    second = llm.generate(
        "brown fox jumps over", SamplingParams(max_tokens=9, temperature=0, ignore_eos=True), stream=True
    )
    texts: list[str] = ["", ""]
    streams = {0: first, 1: second}
    while streams:
        for index, stream in list(streams.items()):
            delta = next(stream, None)
            if delta is None:
                del streams[index]
            else:
                assert delta.request_id == "0"
                texts[index] += delta.text
    assert texts[0] == llm.generate("the quick", FIVE).text
    assert len(texts[1]) > 0
    # A whole call in the middle of a stream.
    third = llm.generate("the quick", FIVE, stream=True)
    begun = next(third).text
    llm.generate(["dog", "fox"], FIVE)
    assert begun + "".join(d.text for d in third) == texts[0]


def test_closing_a_stream_early_frees_everything(llm: LLM) -> None:
    stream = llm.generate(["the quick", "brown fox"], FIVE, stream=True)
    next(stream)
    assert llm.stats().running == 2
    stream.close()  # type: ignore[attr-defined]
    check_idle(llm._engine)
    for delta in llm.stream(Request("mine", (5, 6, 7), FIVE)):
        assert delta.request_id == "mine"
        break
    # The iterator is gone with the loop, and its request with it.
    check_idle(llm._engine)


def test_a_stream_that_is_never_read_starts_nothing(llm: LLM) -> None:
    stream = llm.generate("the quick", FIVE, stream=True)
    assert llm.stats().waiting == llm.stats().running == 0
    del stream


def test_a_bad_prompt_among_good_ones_leaves_nothing_behind(llm: LLM) -> None:
    with pytest.raises(RequestError, match="the prompt has 300 tokens, but context_length is 256"):
        llm.generate([[5], [5] * 300], FIVE)
    check_idle(llm._engine)


@pytest.mark.parametrize(
    ("prompt", "message"),
    [
        ([[]], "the prompt is empty"),
        ("", "the prompt is empty"),
        ([[5, 10**6]], "token id 1000000 is outside the vocabulary of"),
        ([[-1]], "token id -1 is outside the vocabulary of"),
        ("half a pair: \ud83d", "the text is no valid Unicode"),
    ],
)
def test_bad_prompts(llm: LLM, prompt: Any, message: str) -> None:
    with pytest.raises(RequestError, match=message):
        llm.generate(prompt, FIVE)


def test_bad_messages(llm: LLM) -> None:
    with pytest.raises(RequestError, match="a content part of type 'image_url' was sent"):
        llm.chat([{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}])
    with pytest.raises(RequestError, match="the chat template cannot render these messages"):
        llm.chat([{"role": 3}], template_kwargs={"chat_template": "{{ raise_exception('no') }}"})


def test_as_many_parameters_as_prompts(llm: LLM) -> None:
    with pytest.raises(RequestError, match="1 sampling parameters were given for 2 prompts"):
        llm.generate(["a", "b"], [FIVE])


def test_a_progress_bar(
    llm: LLM, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = llm.generate(["the quick", "dog"], FIVE)
    for terminal in (False, True):
        if terminal:
            monkeypatch.setenv("FORCE_COLOR", "1")
            monkeypatch.setenv("TERM", "xterm")
        shown = llm.generate(["the quick", "dog"], FIVE, progress=True)
        assert [c.token_ids for c in shown] == [c.token_ids for c in plain]
        captured = capsys.readouterr()
        assert captured.out == "", "standard output is for the answers"
        assert ("generating" in captured.err) == terminal


def test_defaults_of_the_checkpoint(tmp_path: Path) -> None:
    write_toy(tmp_path, tokenizer=True)
    (tmp_path / "generation_config.json").write_text(
        '{"temperature": 0.6, "top_k": 20, "top_p": 0.95, "eos_token_id": [7]}'
    )
    with LLM(str(tmp_path), device="cpu", dtype="float32") as llm:
        assert llm.processor.sampling() == SamplingParams(temperature=0.6, top_k=20, top_p=0.95)
        assert llm.processor.sampling(temperature=0.0, top_k=None) == SamplingParams(
            temperature=0.0, top_k=20, top_p=0.95
        )
        # Those of the generation config, of the config and of the tokenizer.
        assert llm.processor.eos_token_ids == {7, 0}
    (tmp_path / "generation_config.json").write_text('{"do_sample": false, "top_k": 20}')
    with LLM(str(tmp_path), device="cpu", dtype="float32") as llm:
        assert llm.processor.sampling() == SamplingParams(temperature=0.0)


def test_a_closed_model(folder: Path) -> None:
    llm = LLM(str(folder), device="cpu", dtype="float32")
    stream = llm.generate("the quick", FIVE, stream=True)
    next(stream)
    llm.close()
    # An iterator that is still held ends, and says why.
    assert [d.finish_reason for d in stream] == ["abort"]


def test_a_model_without_a_tokenizer(tmp_path: Path) -> None:
    write_toy(tmp_path)
    with LLM(str(tmp_path), device="cpu", dtype="float32") as llm:
        (answer,) = llm.generate([[5, 6]], FIVE)
        assert (answer.text, len(answer.token_ids)) == ("", 5)
        with pytest.raises(
            RequestError, match="has no tokenizer, so that text cannot be read; send token ids"
        ):
            llm.generate("text", FIVE)
        with pytest.raises(RequestError, match="has no tokenizer"):
            llm.chat([{"role": "user", "content": "Hi"}])


def test_a_tokenizer_from_elsewhere(tmp_path: Path, folder: Path) -> None:
    write_toy(tmp_path, vocab_size=400)
    with LLM(str(tmp_path), device="cpu", dtype="float32", tokenizer_path=str(folder)) as llm:
        vocabulary = len(tokenizer_of(llm))
        answers = llm.generate(
            ["dog"] * 50, SamplingParams(max_tokens=20, temperature=100.0, ignore_eos=True)
        )
        # Ids that the model has and the tokenizer has not are never sampled.
        assert max(t for a in answers for t in a.token_ids) < vocabulary < 400
    empty = tmp_path / "empty"
    empty.mkdir()
    (empty / "config.json").write_text("{}")
    with pytest.raises(CheckpointError, match=r"holds no tokenizer .*; correct --server\.tokenizer_path"):
        LLM(str(tmp_path), device="cpu", dtype="float32", tokenizer_path=str(empty))


def test_a_broken_tokenizer(tmp_path: Path) -> None:
    write_toy(tmp_path, tokenizer=True)
    (tmp_path / "tokenizer.json").write_text("{")
    with pytest.raises(CheckpointError, match=f"the tokenizer in {tmp_path} cannot be loaded"):
        LLM(str(tmp_path), device="cpu", dtype="float32")


def test_settings_that_do_not_exist(folder: Path) -> None:
    with pytest.raises((ConfigError, ValueError), match="no_such_setting"):
        LLM(str(folder), no_such_setting=1)
