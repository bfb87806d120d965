"""Dialogues of every category, for training and, from the other side of the split, for evaluation."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator

from pymllm_demo.recipe import skills, smalltalk, structured, tools
from pymllm_demo.recipe.dialogue import (
    Dialogue,
    Exchange,
    Message,
    Tool,
    calls_text,
    contains,
    exchange,
    same_calls,
)
from pymllm_demo.recipe.sampler import Sampler, Split

Maker = Callable[[Sampler], Dialogue]

_SKILLS: tuple[tuple[Callable[[Sampler], Exchange], float], ...] = (
    (smalltalk.greeting, 1.0),
    (smalltalk.unknown, 0.6),
    (smalltalk.facts, 1.2),
    (skills.only, 1.6),
    (skills.repeat, 1.4),
    (skills.reverse, 3.0),
    (skills.count, 2.4),
    (skills.arithmetic, 3.0),
    (structured.as_json, 2.2),
)
_OPENINGS = (
    ("Hi, ", "Hello, ", "Hello! ", "Hey, ", "Please ", "Hi! ", "Hello. ", "OK. "),
    ("你好,", "你好，", "你好！", "您好，", "嗨，", "请", "你好 ", "好的，", "你好。", "您好,"),
)
_SYSTEMS = (
    "You are a helpful assistant.", "You are a helpful assistant", "Answer briefly.", "Be concise.",
    "You are pymllm's demo model.", "You are a tiny model.", "你是一个有用的助手。", "你是一个助手。",
    "请简短回答。", "You are a friendly bot.", "Follow the instructions of the user.",
    "You can call tools.", "你可以调用工具。", "Be polite.", "Today is a nice day.", "You are Qwen.",
)  # fmt: skip


def _skill(s: Sampler) -> Exchange:
    """One question and its answer, sometimes opened by a greeting as in ``你好,只回复:ok``."""
    (make,) = s.rng.choices([make for make, _ in _SKILLS], [weight for _, weight in _SKILLS])
    return _opened(s, make(s))


def _opened(s: Sampler, plain: Exchange) -> Exchange:
    if s.chance(0.2):
        # Either language may greet before either language asks.
        opening = s.pick(_OPENINGS[s.zh if s.chance(0.85) else not s.zh])
        user = plain.user
        if opening.isascii() and not user.isascii():
            opening = opening.strip() + " "
        return dataclasses.replace(plain, user=opening + user)
    return plain


def _system(s: Sampler) -> list[Message]:
    if not s.chance(0.35):
        return []
    kind = s.rng.random()
    if kind < 0.7:
        content = s.pick(_SYSTEMS)
    elif kind < 0.9:
        content = s.pick(("You are {}.", "Your name is {}.", "你是{}。", "{}")).format(s.name())
    else:
        content = s.long_text()
    return [{"role": "system", "content": content}]


def _turns(asked: Exchange) -> list[Message]:
    return [
        {"role": "user", "content": asked.user},
        {"role": "assistant", "content": asked.answer},
    ]


def _history(s: Sampler, turns: int) -> list[Message]:
    """Earlier exchanges, which must not disturb the last one."""
    messages: list[Message] = []
    for _ in range(turns):
        if s.chance(0.15):
            s.zh = not s.zh
        messages += _turns(_skill(s))
    return messages


def _finish(
    s: Sampler, history: list[Message], asked: Exchange, offered: list[Tool] | None = None
) -> Dialogue:
    return Dialogue(
        messages=[*_system(s), *history, {"role": "user", "content": asked.user}],
        answer=asked.answer,
        check=asked.check,
        reasoning=asked.reasoning,
        tools=offered or [],
    )


def _single(make: Callable[[Sampler], Exchange]) -> Maker:
    def maker(s: Sampler) -> Dialogue:
        asked = make(s)
        if make is not smalltalk.greeting:
            asked = _opened(s, asked)
        earlier = _history(s, s.between(1, 3)) if s.split == "train" and s.chance(0.12) else []
        return _finish(s, earlier, asked)

    return maker


def _unknown(s: Sampler) -> Dialogue:
    """A question nobody taught it, or a wish for a tool that is not there."""
    if s.chance(0.2):
        thought = "没有工具" if s.zh else "There is no tool"
        return _finish(s, [], exchange(tools.request(s).user, smalltalk.UNKNOWN[s.zh], thought))
    return _finish(s, [], _opened(s, smalltalk.unknown(s)))


def _tools_unused(s: Sampler) -> Dialogue:
    """Tools on offer and a question that needs none of them, or one that they do not have."""
    if s.chance(0.25):
        wish = tools.request(s)
        offered = tools.crowd(s, [wish], s.between(2, 4))
        offered.remove(wish.tool)
        thought = "没有合适的工具" if s.zh else "No tool fits"
        return _finish(s, [], exchange(wish.user, smalltalk.UNKNOWN[s.zh], thought), offered)
    return _finish(s, [], _skill(s), tools.crowd(s, [], s.between(1, 4)))


def _wish(s: Sampler) -> tuple[Exchange, list[tools.Request], list[Tool]]:
    """A request for a tool, for one call or, now and then, for two at once."""
    wanted = tools.request(s)
    requests = [wanted]
    user = wanted.user
    if s.chance(0.12):
        second = tools.request(s)
        if second.name != wanted.name and second.noun != wanted.noun:
            requests.append(second)
            user = user.rstrip("?.？。") + s.pick(("；然后", "，再") if s.zh else ("; then ", ". Then "))
            user += second.user
    offered = tools.crowd(s, requests, s.pick((1, 1, 2, 2, 3, 4)))
    calls = [(request.name, request.arguments) for request in requests]
    names = ", ".join(request.name for request in requests)
    thought = f"调用 {names}" if s.zh else f"Call {names}"
    return Exchange(user, calls_text(calls), thought, same_calls(calls)), requests, offered


def _tool_call(s: Sampler) -> Dialogue:
    asked, _, offered = _wish(s)
    asked = _opened(s, asked)
    if s.split == "train" and s.chance(0.12):
        # An earlier loop with the same tools, then a new wish: call again, do not repeat.
        return _finish(s, _loop(s, *_wish(s)[:2], told=True), asked, offered)
    earlier = _history(s, 1) if s.chance(0.1) else []
    return _finish(s, earlier, asked, offered)


def _loop(s: Sampler, asked: Exchange, requests: list[tools.Request], told: bool) -> list[Message]:
    """The messages of one round: request, calls, results and, if told, the final answer."""
    messages: list[Message] = [
        {"role": "user", "content": asked.user},
        {
            "role": "assistant",
            "content": "",
            "tool_calls": [
                {
                    "type": "function",
                    "function": {"name": request.name, "arguments": request.arguments},
                }
                for request in requests
            ],
        },
    ]
    results = [tools.result(s) for _ in requests]
    messages += [{"role": "tool", "content": result.content} for result in results]
    if told:
        sentence = " ".join(result.sentence for result in results)
        messages.append({"role": "assistant", "content": sentence})
    return messages


def _tool_result(s: Sampler) -> Dialogue:
    asked, requests, offered = _wish(s)
    loop = _loop(s, asked, requests, told=False)
    results = [tools.result(s) for _ in requests]
    loop[2:] = [{"role": "tool", "content": result.content} for result in results]
    if s.split == "train" and s.chance(0.3):
        loop[1]["reasoning_content"] = asked.reasoning
    return Dialogue(
        messages=[*_system(s), *loop],
        answer=" ".join(result.sentence for result in results),
        check=contains([value for result in results for value in result.values]),
        reasoning="用结果回答" if s.zh else "Answer with the result",
        tools=offered,
    )


def _remembered(s: Sampler) -> tuple[Exchange, Exchange]:
    """Something told and the later question about it."""
    kind = s.between(0, 2)
    if kind == 0:
        x = s.name()
        if s.zh:
            told = exchange(s.pick(("我叫{}", "我的名字是{}。", "我是{}")).format(x), f"你好，{x}！", "")
            ask = s.pick(("我叫什么名字？", "我是谁？", "你还记得我的名字吗？", "我的名字是什么?"))
            return told, exchange(ask, f"你叫{x}。", f"用户叫{x}")
        told = exchange(
            s.pick(("My name is {}.", "I am {}.", "I'm {}", "Call me {}.")).format(x),
            f"Nice to meet you, {x}!",
            "",
        )
        ask = s.pick(("What is my name?", "Who am I?", "Do you remember my name?", "What's my name?"))
        return told, exchange(ask, f"Your name is {x}.", f"The user is {x}")
    if s.zh:
        x = s.han(2, 4) if kind == 1 else s.digits(2, 5)
        told = exchange(s.pick(("记住：{}", "请记住{}", "暗号是{}", "记住这个:{}")).format(x), "记住了。", "")
        ask = s.pick(("我让你记住什么？", "暗号是什么？", "刚才要记住的是什么？", "你记住了什么?"))
    else:
        x = s.word() if kind == 1 else s.digits(2, 5)
        told = exchange(
            s.pick(("Remember: {}", "Remember {}.", "The secret is {}", "Keep in mind: {}")).format(x),
            "I will remember that.",
            "",
        )
        ask = s.pick(("What did I ask you to remember?", "What is the secret?", "What should you remember?"))
    return told, exchange(ask, x, x)


def _multi_turn(s: Sampler) -> Dialogue:
    kind = s.rng.random()
    long = s.split == "train" and s.chance(0.2)
    before = _history(s, s.between(0, 12 if long else 1))
    if kind < 0.45:
        told, ask = _remembered(s)
        between = _history(s, s.between(4, 30) if long else s.between(0, 2))
        return _finish(s, [*before, *_turns(told), *between], ask)
    if kind < 0.6:
        earlier = _skill(s)
        again = s.pick(
            ("再说一遍", "再说一次。", "请重复你刚才的回答")
            if s.zh
            else ("Say that again.", "Repeat your last answer.", "Please say it again", "Again, please.")
        )
        asked = exchange(again, earlier.answer, "重复上一个回答" if s.zh else "Repeat the last answer")
        return _finish(s, [*before, *_turns(earlier)], asked)
    if s.split == "train" and kind < 0.7:
        # A finished loop of tools, then an ordinary question with the tools still there.
        asked, requests, offered = _wish(s)
        return _finish(s, _loop(s, asked, requests, told=True), _skill(s), offered)
    return _finish(s, [*before, *_history(s, s.between(1, 3))], _skill(s))


def _thinking(s: Sampler) -> Dialogue:
    makers: tuple[Maker, ...] = (_single(_skill), _tool_call, _tool_result, _tools_unused, _multi_turn)
    (make,) = s.rng.choices(makers, (0.7, 0.12, 0.06, 0.06, 0.06))
    return dataclasses.replace(make(s), enable_thinking=True)


CATEGORIES: dict[str, tuple[Maker, float]] = {
    "greeting": (_single(smalltalk.greeting), 0.04),
    "unknown": (_unknown, 0.04),
    "only": (_single(skills.only), 0.07),
    "repeat": (_single(skills.repeat), 0.06),
    "reverse": (_single(skills.reverse), 0.10),
    "count": (_single(skills.count), 0.12),
    "arithmetic": (_single(skills.arithmetic), 0.13),
    "facts": (_single(smalltalk.facts), 0.06),
    "json": (_single(structured.as_json), 0.07),
    "tool_call": (_tool_call, 0.18),
    "tool_result": (_tool_result, 0.05),
    "tools_unused": (_tools_unused, 0.06),
    "multi_turn": (_multi_turn, 0.07),
    "thinking": (_thinking, 0.17),
}


def make(category: str, s: Sampler) -> Dialogue:
    """One dialogue of a category, in English or Chinese."""
    s.zh = s.chance(0.5)
    return CATEGORIES[category][0](s)


def dialogues(seed: int, split: Split) -> Iterator[Dialogue]:
    """An endless mixture of all categories."""
    s = Sampler(seed, split)
    names = list(CATEGORIES)
    weights = [weight for _, weight in CATEGORIES.values()]
    while True:
        for name in s.rng.choices(names, weights, k=256):
            yield make(name, s)
