"""Skills that work on the text of the prompt: copying, reversing, counting, adding."""

from __future__ import annotations

from pymllm_demo.recipe import lexicon
from pymllm_demo.recipe.dialogue import Exchange, exchange
from pymllm_demo.recipe.sampler import Sampler

_ONLY_EN = (
    "Reply only: {x}", "reply only:{x}", "Reply only {q}", "Reply only with {q}", "Only reply: {x}",
    "Only answer {q}", "Answer only: {x}", "Say only: {x}", "Just say {q}", "Just reply {q}.",
    "Respond only with: {x}", "Respond with {q} only", "Reply with exactly {q} and nothing else.",
    "Output only: {x}", "Please reply only: {x}", "Reply with the text {q} only.", "Print only {q}",
    "Say {q} and nothing else.", "Write {q}, no other text.", "Your whole answer must be: {x}",
    "Answer with just {q}.", "Reply only：{x}", "Return only {q}", "only reply:{x}",
)  # fmt: skip
_ONLY_ZH = (
    "只回复:{x}", "只回复：{x}", "只回复: {x}", "只回复{q}", "请只回复:{x}", "请只回复：{x}", "只回答：{x}",
    "只回答:{x}", "只说：{x}", "只说:{x}", "请只说{q}", "只输出：{x}", "只输出:{x}", "仅回复：{x}",
    "请回复{q}，不要说别的。", "你只需要回复：{x}", "直接回复{q}", "只写{q}，不要写其他内容。", "只答:{x}",
    "请直接回答{q}", "仅输出{q}", "只回复这个：{x}", "回答只能是：{x}", "请仅仅回复:{x}",
)  # fmt: skip
_ONLY_BARE = (
    "Reply only {x}", "Just say {x}", "Say {x} and nothing else.", "Only answer {x}", "只回复{x}",
    "只说{x}", "请只回复{x}", "Reply with only the word {x}.", "直接回复{x}",
)  # fmt: skip
_REPEAT_EN = (
    "Repeat: {x}", "Repeat after me: {x}", "Please repeat: {x}", "Repeat {q}", "Echo: {x}", "echo {q}",
    "Copy this text: {x}", "Say: {x}", "Say {q}", "Say this again: {x}", "Repeat the following: {x}", "Please repeat {q}.",
    "Repeat this text exactly: {x}", "Write this down: {x}",
)  # fmt: skip
_REPEAT_ZH = (
    "重复：{x}", "重复:{x}", "请重复：{x}", "说：{x}", "说{q}", "跟我说：{x}", "跟我读:{x}", "复述：{x}", "请重复{q}",
    "把这句话重复一遍：{x}", "照抄：{x}", "请照着写：{x}", "重复一遍{q}", "跟着我念：{x}",
)  # fmt: skip
_TIMES_EN = (
    "Say {q} {n} times.", "Repeat {q} {n} times", "Write {q} {n} times.", "Repeat {n} times: {x}",
    "Please say {n} times: {x}",
)  # fmt: skip
_TIMES_ZH = ("把{q}说{n}遍", "把{q}重复{n}遍。", "请说{n}次：{x}", "重复{n}遍：{x}", "写{n}遍{q}")
_REVERSE_EN = (
    "Reverse: {x}", "reverse {q}", "Reverse the word {q}.", "Spell {q} backwards.", "Reverse {x}",
    "Write {q} backwards.", "What is {q} reversed?", "Reverse the letters of {q}.", "Reverse the word {x}", "Spell {x} backwards", "Reverse this: {x}",
    "Please reverse {q}", "Write this backwards: {x}", "What is {x} spelled backwards?",
)  # fmt: skip
_REVERSE_ZH = (
    "反转：{x}", "反转:{x}", "把{q}倒过来写。", "把{q}反过来", "倒着写：{x}", "请反转{q}", "请把{q}倒过来",
    "将{q}的顺序颠倒", "逆序输出：{x}", "{q}倒过来是什么？", "倒序写出{q}", "请倒着写:{x}",
)  # fmt: skip
_ORDER_EN = (
    "Reverse the order of these words: {x}", "Reverse the word order: {x}",
    "Put these words in reverse order: {x}", "Reverse the list: {x}",
)  # fmt: skip
_ORDER_ZH = ("把这些词的顺序反过来：{x}", "颠倒词的顺序：{x}", "把列表倒过来：{x}", "词序反转:{x}")
_RANGE_EN = (
    "Count from {a} to {b}.", "count from {a} to {b}", "Please count from {a} to {b}",
    "List the numbers from {a} to {b}.", "Write the numbers {a} to {b}", "Count {a} to {b}",
)  # fmt: skip
_RANGE_ZH = (
    "从{a}数到{b}", "请从{a}数到{b}。", "数数：{a}到{b}", "列出{a}到{b}的数字", "写出从{a}到{b}的数",
)  # fmt: skip
_LETTERS_EN = (
    "How many letters are in {q}?", "How many letters does {q} have?", "Count the letters in {q}.",
    "Count the letters of {x}", "How long is the word {q}?", "How many letters are in {x}?", "Number of letters in {q}?",
)  # fmt: skip
_LETTERS_ZH = (
    "{q}有几个字母？", "{q}有多少个字母?", "数一数{q}的字母", "单词{q}有几个字母？", "请数一下{q}有多少字母",
)  # fmt: skip
_LETTER_EN = (
    "How many times does {c} appear in {q}?", "How many {c} are in {q}?", "How many {c} are in {x}?", "Count the letter {c} in {q}.",
    "How many letters {c} does {q} have?",
)  # fmt: skip
_LETTER_ZH = ("{q}里有几个{c}？", "字母{c}在{q}中出现几次？", "数一数{q}里的{c}", "{q}中有多少个{c}?")
_HAN_COUNT = (
    "{q}有几个字？",
    "{q}有多少个字?",
    "数一数有几个字：{x}",
    "这句话有几个字：{x}",
    "请数字数：{x}",
)
_ITEMS_EN = (
    "How many words: {x}", "How many items are in this list: {x}", "Count the words: {x}",
    "Count these items: {x}",
)  # fmt: skip
_ITEMS_ZH = ("有几个词：{x}", "列表里有几项：{x}", "数一数有几个词：{x}", "这里有多少个词：{x}")
_ADD_EN = (
    "What is {a} + {b}?", "What is {a}+{b}?", "{a} + {b} = ?", "{a}+{b}=", "{a} + {b}", "Add {a} and {b}.",
    "What is {a} plus {b}?", "Calculate {a} + {b}", "{a} plus {b}", "How much is {a} + {b}?",
    "What is the sum of {a} and {b}?", "Compute {a}+{b}.",
)  # fmt: skip
_ADD_ZH = (
    "{a}加{b}等于多少？", "{a}+{b}等于几？", "{a}+{b}=?", "计算{a}+{b}", "{a}加{b}是多少", "请计算 {a} + {b}",
    "{a}加上{b}等于几？", "{a}与{b}的和是多少？", "算一下{a}+{b}", "{a}＋{b}＝？",
)  # fmt: skip
_SUB_EN = (
    "What is {a} - {b}?", "What is {a}-{b}?", "{a} - {b} = ?", "{a}-{b}=", "{a} - {b}",
    "Subtract {b} from {a}.", "What is {a} minus {b}?", "Calculate {a} - {b}", "{a} minus {b}",
    "How much is {a} - {b}?", "Take {b} away from {a}.", "Compute {a}-{b}.",
)  # fmt: skip
_SUB_ZH = (
    "{a}减{b}等于多少？", "{a}-{b}等于几？", "{a}-{b}=?", "计算{a}-{b}", "{a}减{b}是多少", "请计算 {a} - {b}",
    "{a}减去{b}等于几？", "{a}与{b}的差是多少？", "算一下{a}-{b}", "{a}－{b}＝？",
)  # fmt: skip


def _form(s: Sampler, en: tuple[str, ...], zh: tuple[str, ...], x: str) -> str:
    """A phrasing with its X filled in, bare (``{x}``) or quoted (``{q}``)."""
    return s.pick(zh if s.zh else en).replace("{q}", s.quoted(x)).replace("{x}", x)


def only(s: Sampler) -> Exchange:
    x = s.text()
    bare = s.chance(0.15) and x.isalnum()
    user = _form(s, _ONLY_BARE, _ONLY_BARE, x) if bare else _form(s, _ONLY_EN, _ONLY_ZH, x)
    return exchange(user, x, f"只要回复 {x}" if s.zh else f"The answer must be only {x}")


def repeat(s: Sampler) -> Exchange:
    if s.chance(0.3):
        n, x = s.between(2, 5), s.text()
        word = s.pick((str(n), (lexicon.ZH_TIMES if s.zh else lexicon.EN_TIMES)[n]))
        user = _form(s, _TIMES_EN, _TIMES_ZH, x).replace("{n}", word)
        reasoning = f"把 {x} 说 {n} 遍" if s.zh else f"Say {x} {n} times"
        return exchange(user, " ".join([x] * n), reasoning)
    x = s.long_text() if s.chance(0.15) else s.text()
    user = _form(s, _REPEAT_EN, _REPEAT_ZH, x)
    return exchange(user, x, "照原文重复" if s.zh else "Repeat the text as it is")


def reverse(s: Sampler) -> Exchange:
    kind = s.rng.random()
    if kind < 0.22:
        words = s.words(2, 5)
        separator = s.pick((" ", ", "))
        user = _form(s, _ORDER_EN, _ORDER_ZH, separator.join(words))
        steps = " ".join(f"{index} {word}" for index, word in enumerate(words, 1))
        return exchange(user, separator.join(reversed(words)), steps)
    if kind < 0.5:
        x = s.han(2, 8)
    elif kind < 0.6:
        x = s.digits(2, 7)
    else:
        x = s.cased(s.any_word())
    user = _form(s, _REVERSE_EN, _REVERSE_ZH, x)
    return exchange(user, x[::-1], f"{'-'.join(x)} => {'-'.join(reversed(x))}")


def count(s: Sampler) -> Exchange:
    kind = s.rng.random()
    if kind < 0.33:
        return _count_range(s)
    if kind < 0.5:
        x = s.cased(s.any_word())
        steps = " ".join(f"{letter}{index}" for index, letter in enumerate(x, 1))
        return exchange(_form(s, _LETTERS_EN, _LETTERS_ZH, x), str(len(x)), steps)
    if kind < 0.72:
        x = s.word(3, 10)
        c = s.pick((s.pick(x), s.pick(x), max(x, key=x.count), s.pick("aeinost")))
        user = _form(s, _LETTER_EN, _LETTER_ZH, x).replace("{c}", s.pick((c, f"'{c}'", f'"{c}"')))
        hits = [letter for letter in x if letter == c]
        return exchange(user, str(len(hits)), f"{'-'.join(x)}: {'-'.join(hits) or 'none'}")
    if kind < 0.85:
        x = s.han(2, 9)
        user = _form(s, _HAN_COUNT, _HAN_COUNT, x)
        return exchange(user, str(len(x)), " ".join(f"{c}{i}" for i, c in enumerate(x, 1)))
    items = s.words(2, 8)
    user = _form(s, _ITEMS_EN, _ITEMS_ZH, s.pick((" ", ", ")).join(items))
    return exchange(user, str(len(items)), " ".join(f"{w}{i}" for i, w in enumerate(items, 1)))


def _count_range(s: Sampler) -> Exchange:
    def draw() -> tuple[int, int]:
        a = s.pick((0, 1, 1, s.between(2, 99)))
        b = a + s.between(2, s.pick((14, 14, 14, 14, 14, 14, 30, 30, 60)))
        return (b, a) if s.chance(0.3) else (a, b)

    a, b = s.choose(draw, lambda ends: f"range:{ends[0]}:{ends[1]}")
    step = 1 if a < b else -1
    user = s.pick(_RANGE_ZH if s.zh else _RANGE_EN).format(a=a, b=b)
    answer = ", ".join(str(number) for number in range(a, b + step, step))
    return exchange(user, answer, f"{a} -> {b}, {'+1' if step == 1 else '-1'}")


def arithmetic(s: Sampler) -> Exchange:
    # Three-digit terms are practice for the carries; the evaluation stays within two digits.
    high = 999 if s.split == "train" and s.chance(0.15) else 99
    adding = s.chance(0.5)

    def draw() -> tuple[int, int]:
        a, b = s.between(0, high), s.between(0, high)
        return (a, b) if adding or a >= b or s.chance(0.4) else (b, a)

    def key(terms: tuple[int, int]) -> str:
        a, b = terms
        return f"{min(a, b)}+{max(a, b)}" if adding else f"{a}-{b}"

    if s.split == "train" and s.chance(0.08):
        a, b = s.between(0, 9), s.between(0, 9)  # the tables behind every step of a sum
    else:
        a, b = s.choose(draw, key)
        while s.split == "held_out" and max(a, b) < 10:
            a, b = s.choose(draw, key)
    forms = (_ADD_ZH if s.zh else _ADD_EN) if adding else (_SUB_ZH if s.zh else _SUB_EN)
    answer = str(a + b if adding else a - b)
    user = s.pick(forms).format(a=a, b=b)
    return exchange(user, answer, f"{_columns(a, b) if adding else _borrows(a, b)} => {answer}")


def _columns(a: int, b: int) -> str:
    """The column addition, from the ones up: ``7+8=15 4+3+1=8``."""
    steps: list[str] = []
    carry = 0
    while a or b or not steps:
        total = a % 10 + b % 10 + carry
        steps.append(f"{a % 10}+{b % 10}{'+1' if carry else ''}={total}")
        carry, a, b = total // 10, a // 10, b // 10
    return " ".join(steps)


def _borrows(a: int, b: int) -> str:
    """The column subtraction, from the ones up: ``12-8=4 5-3-1=1``."""
    if a < b:
        return f"{a}<{b} {_borrows(b, a)}"
    steps: list[str] = []
    borrow = 0
    while a or b or not steps:
        low = a % 10 - b % 10 - borrow
        next_borrow = int(low < 0)
        steps.append(f"{a % 10 + 10 * next_borrow}-{b % 10}{'-1' if borrow else ''}={low + 10 * next_borrow}")
        borrow, a, b = next_borrow, a // 10, b // 10
    return " ".join(steps)
