"""What ends an answer, and what of it is shown before: stop tokens, stop strings, max_tokens."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pymllm_core.request import Request, SamplingParams
from pymllm_core.testing.engines import check_idle, complete, greedy, make_engine, prompts_of, run


def test_stop_token_ids_eos_and_max_tokens(toy: tuple[Any, Path]) -> None:
    _, folder = toy
    engine = make_engine(folder)
    (prompt,) = prompts_of([9], seed=4)
    free = complete(engine, [prompt], greedy(50))[0].token_ids
    token = free[10]
    end = free.index(token) + 1
    answers = complete(
        engine,
        [prompt] * 4,
        [
            greedy(50, stop_token_ids=(token, 299)),
            greedy(50, stop_token_ids=(token,), ignore_eos=False),
            greedy(end),
            greedy(end - 1, stop_token_ids=(token,)),
        ],
    )
    assert [(a.token_ids, a.finish_reason, a.matched_stop) for a in answers] == [
        (free[:end], "stop", token),
        (free[:end], "stop", token),
        (free[:end], "length", None),
        (free[: end - 1], "length", None),
    ]
    # The same token as the config's eos: ended by it, unless it is ignored.
    engine.processor.eos_token_ids = frozenset({token})
    ended, ignored = complete(engine, [prompt] * 2, [greedy(50, ignore_eos=False), greedy(50)])
    assert (ended.token_ids, ended.finish_reason, ended.matched_stop) == (free[:end], "stop", None)
    assert ignored.token_ids == free


def test_stop_strings_are_found_across_tokens_and_not_shown(texty: tuple[Any, Path]) -> None:
    _, folder = texty
    engine = make_engine(folder)
    ids = engine.processor.from_text("the end of the story")
    params = [SamplingParams(max_tokens=60, temperature=1.5, seed=s, ignore_eos=True) for s in range(8)]
    tokenizer: Any = engine.processor.tokenizer
    crossing = 0
    for index, answer in enumerate(complete(engine, [ids.token_ids] * 8, params)):
        assert answer.text == tokenizer.decode(list(answer.token_ids), skip_special_tokens=True).rstrip(
            "\ufffd"
        )
        clean = [i for i in range(5, len(answer.text) - 6) if "\ufffd" not in answer.text[i : i + 3]]
        for at in clean[:: max(len(clean) // 3, 1)]:
            stop = answer.text[at : at + 3]
            again = complete(
                engine,
                [ids.token_ids],
                SamplingParams(
                    max_tokens=60, temperature=1.5, seed=index, ignore_eos=True, stop=(stop, "never this")
                ),
            )[0]
            assert (again.finish_reason, again.matched_stop) == ("stop", stop)
            assert again.text == answer.text[: answer.text.index(stop)]
            assert again.token_ids == answer.token_ids[: len(again.token_ids)]
            # Not one token more than needed.
            assert stop not in tokenizer.decode(list(again.token_ids[:-1]), skip_special_tokens=True)
            crossing += stop not in (tokenizer.decode([t]) for t in again.token_ids)
    assert crossing > 5
    check_idle(engine)


def test_deltas_never_hold_what_turns_out_to_be_a_stop(texty: tuple[Any, Path]) -> None:
    engine = make_engine(texty[1])
    request = engine.processor.from_text("the quick brown fox")
    params = SamplingParams(max_tokens=80, temperature=1.2, seed=3, ignore_eos=True)
    free = run(engine, [Request("free", request.token_ids, params)])["free"]
    usable = free.text.partition("\ufffd")[0] if len(free.text.partition("\ufffd")[0]) > 20 else free.text
    stop = usable[10:16]
    engine.add(
        Request(
            "r",
            request.token_ids,
            SamplingParams(max_tokens=80, temperature=1.2, seed=3, stop=(stop,), ignore_eos=True),
        )
    )
    shown = ""
    while engine.has_work:
        for delta in engine.step():
            shown += delta.text
            assert not any(shown.endswith(stop[:n]) and delta.finish_reason is None for n in range(1, 7))
    assert shown == free.text[: free.text.index(stop)]


def test_what_was_held_back_comes_out_at_the_end(texty: tuple[Any, Path]) -> None:
    """The last characters could begin a stop string; the answer ends, so they do not."""
    engine = make_engine(texty[1])
    ids = engine.processor.from_text("the quick brown fox").token_ids
    for seed in range(6):
        fields: dict[str, Any] = {"max_tokens": 12, "temperature": 1.2, "seed": seed, "ignore_eos": True}
        (free,) = complete(engine, [ids], SamplingParams(**fields))
        stop = free.text[-3:] + "never"
        (same,) = complete(engine, [ids], SamplingParams(stop=(stop,), **fields))
        assert free.text
        assert (same.text, same.finish_reason) == (free.text, "length")
        # Also where a stop token ends it: the token itself is not shown.
        (ended,) = complete(
            engine, [ids], SamplingParams(stop=(stop,), stop_token_ids=free.token_ids[-1:], **fields)
        )
        whole = engine.processor.decode(ended.token_ids[:-1])
        assert ended.finish_reason == "stop"
        assert ended.text in {whole, *(whole[:-n] for n in (1, 2, 3) if whole.endswith("\ufffd" * n))}


def test_stream_interval(toy: tuple[Any, Path]) -> None:
    engine = make_engine(toy[1], stream_interval=4)
    engine.add(Request("r", (5, 6), greedy(10)))
    sizes = []
    while engine.has_work:
        sizes += [len(delta.token_ids) for delta in engine.step()]
    assert sizes == [4, 4, 2]
