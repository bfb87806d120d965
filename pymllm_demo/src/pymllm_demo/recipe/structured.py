"""JSON on request: keys and values from the prompt, in the types that they look like."""

from __future__ import annotations

import json

from pymllm_demo.recipe.dialogue import Exchange, same_json
from pymllm_demo.recipe.sampler import Sampler

_JSON_EN = (
    "Give me JSON with {pairs}.", "Return a JSON object with {pairs}", "JSON: {pairs}",
    "Write a JSON object: {pairs}", "Output JSON with {pairs}", "Answer in JSON: {pairs}",
    "Make JSON from {pairs}", "Convert to JSON: {pairs}",
)  # fmt: skip
_JSON_ZH = (
    "用JSON返回：{pairs}", "请输出JSON：{pairs}", "返回一个JSON对象，{pairs}", "转换成JSON：{pairs}",
    "生成JSON：{pairs}", "用JSON表示:{pairs}", "给我JSON，{pairs}", "写成JSON格式：{pairs}",
)  # fmt: skip
_KEYS_EN = (
    "Give me JSON with keys {keys} for {values}", "Return JSON with the keys {keys} for {values}.",
    "JSON with keys {keys}: {values}", "Write a JSON object with keys {keys} and values {values}",
)  # fmt: skip
_KEYS_ZH = (
    "用JSON返回，键是{keys}，值是{values}", "输出JSON，键为{keys}：{values}", "用键{keys}生成JSON：{values}",
)  # fmt: skip
_LIST_EN = ("Make a JSON list of {items}", "Return a JSON array of {items}", "JSON list: {items}")
_LIST_ZH = ("输出JSON数组：{items}", "用JSON列表表示：{items}", "转换成JSON列表：{items}")


def json_value(s: Sampler) -> str | int | float | bool:
    kind = s.rng.random()
    if kind < 0.35:
        return s.name()
    if kind < 0.55:
        return s.han(2, 4) if s.zh else s.word()
    if kind < 0.85:
        return s.integer(0, 999 if s.chance(0.3) else 99)
    if kind < 0.92:
        return s.choose(lambda: s.between(1, 999) / 10, lambda value: f"float:{value}")
    return s.chance(0.5)


def as_words(value: object) -> str:
    """How a request spells a value; JSON's own spelling for everything but strings."""
    return value if isinstance(value, str) else json.dumps(value)


def json_key(s: Sampler) -> str:
    if s.split == "train" and s.chance(0.25):
        common = "name age city id color price 名字 年龄 城市 颜色 email phone country job 价格 电话"
        return s.pick(common.split())
    if s.zh and s.chance(0.6):
        return s.han(2, 3)
    return s.word() + ("_" + s.word() if s.chance(0.15) else "")


def as_json(s: Sampler) -> Exchange:
    thought = "写成 JSON" if s.zh else "Write it as JSON"
    if s.chance(0.15):
        items = [s.han(2, 3) if s.zh and s.chance(0.6) else s.word() for _ in range(s.between(2, 5))]
        joined = s.pick(("、", ", ", "，") if s.zh else (", ",)).join(items)
        user = s.pick(_LIST_ZH if s.zh else _LIST_EN).format(items=joined)
        answer = json.dumps(items, ensure_ascii=False)
        return Exchange(user, answer, thought, same_json(items))
    value = {json_key(s): json_value(s) for _ in range(s.pick((1, 2, 2, 2, 3, 3, 4)))}
    if s.chance(0.35):
        keys = _joined(s, list(value))
        values = ("，" if s.zh else ", ").join(as_words(item) for item in value.values())
        user = s.pick(_KEYS_ZH if s.zh else _KEYS_EN).format(keys=keys, values=values)
    else:
        link = s.pick(("是", "=", "：", "为", ":") if s.zh else (" = ", "=", ": ", " "))
        pairs = [f"{key}{link}{as_words(item)}" for key, item in value.items()]
        joined = "，".join(pairs) if s.zh else s.pick((", ", " and ")).join(pairs)
        user = s.pick(_JSON_ZH if s.zh else _JSON_EN).format(pairs=joined)
    answer = json.dumps(value, ensure_ascii=False)
    return Exchange(user, answer, f"{thought}: {', '.join(value)}", same_json(value))


def _joined(s: Sampler, items: list[str]) -> str:
    if len(items) == 1:
        return items[0]
    last = s.pick(("和", "、")) if s.zh else s.pick((" and ", ", "))
    return ("、" if s.zh else ", ").join(items[:-1]) + last + items[-1]
