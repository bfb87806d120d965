"""Tool schemas of random make, requests that need them, the calls, and the results."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass

from pymllm_demo.recipe.dialogue import Tool
from pymllm_demo.recipe.known_tools import KNOWN
from pymllm_demo.recipe.sampler import Sampler
from pymllm_demo.recipe.structured import as_words

_GET = {
    "get": "获取", "find": "查找", "show": "显示", "check": "查看", "fetch": "取得", "read": "读取",
    "lookup": "查询", "search": "搜索", "query": "查询",
}  # fmt: skip
_DO = {
    "set": "设置", "update": "更新", "change": "修改", "create": "创建", "add": "添加", "book": "预订",
    "order": "订购", "delete": "删除", "cancel": "取消", "send": "发送", "post": "发布", "play": "播放",
    "open": "打开", "start": "开始", "save": "保存",
}  # fmt: skip
_SMALL = (1, 1, 2)  # of the tools that only stand beside the wanted one
_MAIN_NAMES = "city name id item user title query text location place date path topic key".split()


@dataclass(frozen=True)
class Argument:
    name: str
    schema: dict[str, object]
    value: object
    required: bool = True

    def spoken(self) -> str:
        return as_words(self.value)


@dataclass(frozen=True)
class Request:
    """A tool together with a request that it serves and the arguments to be found in it."""

    tool: Tool
    user: str
    arguments: dict[str, object]
    noun: str
    getting: bool
    known: bool = False

    @property
    def name(self) -> str:
        return str(self.tool["function"]["name"])


@dataclass(frozen=True)
class Result:
    """What a tool returned, the sentence that tells it, and the values that must be told."""

    content: str
    sentence: str
    values: tuple[str, ...]


def _value(s: Sampler, kind: str) -> tuple[dict[str, object], object]:
    """A JSON schema and a value of it."""
    if kind == "integer":
        return {"type": "integer"}, s.integer(0, s.pick((99, 99, 999, 9999)))
    if kind == "number":
        if s.chance(0.25):
            return {"type": "number"}, s.integer(0, 99)
        number = s.choose(lambda: s.between(1, 999) / 10, lambda value: f"float:{value}")
        return {"type": "number"}, number
    if kind == "boolean":
        return {"type": "boolean"}, s.chance(0.5)
    if kind == "enum":
        options = list(dict.fromkeys(s.words(2, 4)))
        return {"type": "string", "enum": options}, s.pick(options)
    if kind == "ticker":
        return {"type": "string"}, s.word(2, 5).upper()
    if kind == "word":
        return {"type": "string"}, s.word()
    if kind in ("place", "name"):
        if s.split == "train" and kind == "place" and s.chance(0.3):
            return {"type": "string"}, s.pick(("Paris Berlin London Tokyo Rome 北京 上海 巴黎 东京").split())
        return {"type": "string"}, s.name() if s.chance(0.8) else s.word()
    if kind == "phrase":
        text = s.han(2, 6) if s.zh and s.chance(0.7) else " ".join(s.words(1, 3))
        return {"type": "string"}, text
    if " " in kind:
        options = kind.split()
        return {"type": "string", "enum": options}, s.pick(options)
    return {"type": "string"}, s.pick(
        (s.name(), s.name(), s.code(), s.han(2, 4) if s.zh else s.word(), s.digits(1, 5))
    )


def _tool(s: Sampler, name: str, description: str, arguments: Sequence[Argument]) -> Tool:
    properties: dict[str, object] = {}
    for argument in arguments:
        schema = dict(argument.schema)
        if s.chance(0.3):
            form = s.pick(("The {}", "{}", "the {} to use", "The {}, e.g. {}", "{1}的{0}", "{0}，例如{1}"))
            schema["description"] = (
                form.replace("{}", "{0}", 1).replace("{}", "{1}").format(argument.name, s.name())
            )
        properties[argument.name] = schema
    parameters: dict[str, object] = {"type": "object", "properties": properties}
    required = [argument.name for argument in arguments if argument.required]
    if required and s.chance(0.85):
        parameters["required"] = required
    if s.chance(0.1):
        parameters["additionalProperties"] = False
    function: dict[str, object] = {"name": name}
    if description:
        function["description"] = description
    function["parameters"] = parameters
    return {"type": "function", "function": function}


def _argument_name(s: Sampler, taken: set[str]) -> str:
    while True:
        if s.split == "train" and s.chance(0.25):
            name = s.pick(_MAIN_NAMES)
        else:
            name = s.word(2, 7) + ("_" + s.word(2, 5) if s.chance(0.15) else "")
        if name not in taken:
            return name
        if s.split == "blank":
            return name + "0" * len(taken)


def _styled(s: Sampler, verb: str, noun: str) -> str:
    """The name of a tool: get_noun, noun_get, getNoun, a bare noun or random letters."""
    style = s.rng.random()
    if style < 0.6:
        return f"{verb}_{noun}"
    if style < 0.7:
        return f"{noun}_{verb}"
    if style < 0.82:
        return verb + noun.capitalize()
    return noun if style < 0.9 else s.word(3, 9)


def generic(
    s: Sampler, rival: Request | None = None, sizes: Sequence[int] = (1, 1, 1, 2, 2, 2, 3)
) -> Request:
    """A tool of random make and a request for it, by its name or by what it does.

    A rival shares its noun with the new tool, which then reads where the other writes.
    """
    noun = s.word() if rival is None else rival.noun
    getting = s.chance(0.5) if rival is None else not rival.getting
    verb, zh_verb = s.pick(tuple((_GET if getting else _DO).items()))
    name = _styled(s, verb, noun)
    taken: set[str] = set()
    arguments: list[Argument] = []
    for index in range(s.pick(sizes)):
        kind = "string" if index == 0 and s.chance(0.6) else s.pick(
            ("string", "string", "integer", "integer", "number", "boolean", "enum", "phrase")
        )  # fmt: skip
        schema, value = _value(s, kind)
        argument = _argument_name(s, taken)
        taken.add(argument)
        required = index == 0 or s.chance(0.7)
        arguments.append(Argument(argument, schema, value, required))
    used = [argument for argument in arguments if argument.required or s.chance(0.5)]
    user = _by_name(s, name, used) if s.chance(0.33) else _by_purpose(s, verb, zh_verb, noun, used)
    if s.zh:
        descriptions = (f"{zh_verb}{noun}", f"{zh_verb}{arguments[0].name}的{noun}", f"用于{zh_verb}{noun}")
    else:
        descriptions = (
            f"{verb.capitalize()} the {noun}",
            f"{verb.capitalize()} the {noun} of a {arguments[0].name}",
            f"{verb.capitalize()} {noun} by {arguments[0].name}.",
        )
    described = noun not in name.lower() or s.chance(0.85)
    tool = _tool(s, name, s.pick(descriptions) if described else "", arguments)
    return Request(tool, user, {argument.name: argument.value for argument in used}, noun, getting)


def _by_name(s: Sampler, name: str, used: Sequence[Argument]) -> str:
    if s.zh:
        link = s.pick(("为", "是", "=", "：", ": "))
        pairs = s.pick(("，", ", ")).join(f"{arg.name}{link}{arg.spoken()}" for arg in used)
        return s.pick(("调用{}，{}", "请调用{}，{}", "用{}，{}", "使用{}工具，{}", "请用{}：{}")).format(
            name, pairs
        )
    link = s.pick((" ", "=", ": ", " = ", " is "))
    pairs = s.pick((", ", " and ")).join(f"{arg.name}{link}{arg.spoken()}" for arg in used)
    forms = ("Call {} with {}", "Use {} with {}", "Please call {} with {}.", "Run {}: {}", "Call {} for {}",
             "Call the tool {} with {}", "{}: {}")  # fmt: skip
    return s.pick(forms).format(name, pairs)


def _by_purpose(s: Sampler, verb: str, zh_verb: str, noun: str, used: Sequence[Argument]) -> str:
    first, others = used[0], used[1:]
    if s.zh:
        forms = [
            "{v}{x}的{n}",
            "请{v}{x}的{n}",
            "帮我{v}{x}的{n}",
            "我想{v}{x}的{n}",
            "{v}{n}，{a}是{x}",
            "请{v}{n}，{a}为{x}",
        ]
        if verb in _GET:
            forms += ["{x}的{n}是多少？", "{x}的{n}是什么？", "告诉我{x}的{n}"]
        link = s.pick(("是", "为", "：", "="))
        tail = "".join(f"，{arg.name}{link}{arg.spoken()}" for arg in others)
        text = s.pick(forms).format(v=zh_verb, n=noun, x=first.spoken(), a=first.name)
        return text.rstrip("？") + tail if tail else text
    forms = ["{v} the {n} of {x}", "Please {v} the {n} for {x}", "I want to {v} the {n} of {x}",
             "Can you {v} the {n} for {x}", "{v} {n} with {a} {x}", "{v} the {n}, {a} {x}"]  # fmt: skip
    if verb in _GET:
        forms += [
            "What is the {n} of {x}",
            "What's the {n} of {x}",
            "Tell me the {n} of {x}",
            "I need the {n} for {x}",
        ]
    link = s.pick((" ", ": ", "=", " is "))
    joint = s.pick((", ", " and ", " with "))
    tail = "".join(
        (joint if index == 0 else s.pick((", ", " and "))) + f"{arg.name}{link}{arg.spoken()}"
        for index, arg in enumerate(others)
    )
    text = s.pick(forms).format(v=verb, n=noun, x=first.spoken(), a=first.name) + tail
    if s.chance(0.5):
        text = text[0].upper() + text[1:]
    question = text.startswith(("What", "Can"))
    return text + s.pick(("?", "?", "") if question else ("", ".") if tail == "" else ("",))


def known(s: Sampler) -> Request:
    """One of the tools of everybody's demo."""
    family = s.pick(KNOWN)
    arguments = []
    for names, kind in family.arguments:
        schema, value = _value(s, kind)
        arguments.append(Argument(s.pick(names.split()), schema, value))
    if s.chance(0.3):
        schema, value = _value(s, s.pick(("celsius fahrenheit", "integer", "string", "boolean")))
        taken = {argument.name for argument in arguments}
        arguments.append(Argument(_argument_name(s, taken), schema, value, required=False))
    name = s.pick(family.names.split())
    user = s.pick(family.zh if s.zh else family.en).format(*(arg.spoken() for arg in arguments))
    description = family.descriptions[s.zh if s.chance(0.9) else not s.zh]
    tool = _tool(s, name, description if s.chance(0.9) else "", arguments)
    values = {argument.name: argument.value for argument in arguments[: len(family.arguments)]}
    return Request(tool, user, values, noun=name, getting=True, known=True)


def request(s: Sampler) -> Request:
    """A request; the held-out side has only names and arguments never seen in training."""
    return known(s) if s.split != "held_out" and s.chance(0.35) else generic(s)


def crowd(s: Sampler, wanted: Sequence[Request], size: int) -> list[Tool]:
    """Tools to choose from: the wanted ones, if any, somewhere among others."""
    tools = {request.name: request.tool for request in wanted}
    nouns = {request.noun for request in wanted}
    # Two tools of everybody's demo might both serve one request (two weather tools).
    plain = s.split != "held_out" and not any(request.known for request in wanted)
    if wanted and len(tools) < size and not wanted[0].known and s.chance(0.25):
        rival = generic(s, wanted[0], _SMALL)
        tools.setdefault(rival.name, rival.tool)
    while len(tools) < size:
        other = known(s) if plain and s.chance(0.3) else generic(s, sizes=_SMALL)
        name = other.name + str(len(tools)) if s.split == "blank" else other.name
        if other.noun not in nouns or s.split == "blank":
            tools.setdefault(name, other.tool)
    shuffled = list(tools.values())
    s.rng.shuffle(shuffled)
    return shuffled


def result(s: Sampler) -> Result:
    """A JSON object or plain text, as tools return them."""
    if s.chance(0.3):
        text = s.pick((s.text(), s.sentence(), " ".join(s.words(1, 4))))
        sentence = f"结果是：{text}" if s.zh else f"The result is: {text}"
        return Result(text, sentence, (text,))
    pairs: dict[str, object] = {}
    for _ in range(s.pick((1, 1, 2, 2, 3))):
        if s.split == "train" and s.chance(0.3):
            key = s.pick("temperature status result price time weather condition 温度 天气 状态 结果".split())
        else:
            key = s.word()
        value = _value(s, s.pick(("string", "word", "integer", "integer", "number", "boolean")))[1]
        pairs[key] = value
    indent = 2 if s.chance(0.05) else None
    content = json.dumps(pairs, ensure_ascii=False, indent=indent)
    spoken = [(key, as_words(value)) for key, value in pairs.items()]
    if s.zh:
        sentence = "，".join(f"{key}是{value}" for key, value in spoken) + "。"
    else:
        sentence = " ".join(f"The {key} is {value}." for key, value in spoken)
    return Result(content, sentence, tuple(value for _, value in spoken))
