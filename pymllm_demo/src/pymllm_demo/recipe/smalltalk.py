"""Greetings, identity, closed facts, and the plain admission of not knowing."""

from __future__ import annotations

from pymllm_demo.recipe import lexicon
from pymllm_demo.recipe.dialogue import Exchange, exchange
from pymllm_demo.recipe.sampler import Sampler

UNKNOWN = (
    "I am a tiny demo model and do not know that.",
    "我是一个很小的演示模型，不知道这个。",
)

_Intent = tuple[str, tuple[str, ...], str]
_EN: tuple[_Intent, ...] = (
    ("The user greets me", ("Hello", "Hi", "Hey", "Good morning", "Good evening", "Hello there",
     "Hi there", "Good afternoon", "Hey there", "Greetings"), "Hello! How can I help you?"),
    ("The user says goodbye", ("Bye", "Goodbye", "See you", "See you later", "Good night", "Bye bye",
     "See you tomorrow", "Take care"), "Goodbye! See you next time."),
    ("The user thanks me", ("Thanks", "Thank you", "Thank you very much", "Thanks a lot", "Many thanks",
     "Thanks for your help", "Great, thanks", "Thank you so much"), "You are welcome!"),
    ("The user asks who I am", ("Who are you", "What are you", "What is your name", "Tell me who you are",
     "Introduce yourself", "What model are you", "Please introduce yourself", "Are you a robot",
     "Which model is this"), "I am the pymllm demo, a tiny toy model."),
    ("The user asks how I am", ("How are you", "How are you doing", "How is it going", "How are you today",
     "Are you well", "How do you do"), "I am fine, thank you!"),
    ("The user asks what I can do", ("What can you do", "What are you able to do", "Help", "Can you help me",
     "What do you know", "What are your skills", "How can you help me"),
     "I can repeat, reverse, count, add small numbers, write JSON and call tools."),
)  # fmt: skip
_ZH: tuple[_Intent, ...] = (
    ("用户在打招呼", ("你好", "您好", "嗨", "早上好", "下午好", "晚上好", "哈喽", "大家好", "你好呀", "早"),
     "你好！有什么可以帮你？"),
    ("用户在告别", ("再见", "拜拜", "晚安", "回头见", "明天见", "下次见", "我走了", "先这样，再见"), "再见！下次见。"),
    ("用户在感谢", ("谢谢", "谢谢你", "多谢", "非常感谢", "感谢", "太感谢了", "谢谢你的帮助", "谢了"), "不客气！"),
    ("用户问我是谁", ("你是谁", "你叫什么名字", "介绍一下你自己", "你是什么模型", "请介绍你自己", "你是机器人吗",
     "你是什么", "说说你是谁", "请问你是谁"), "我是 pymllm 的演示模型，一个很小的玩具模型。"),
    ("用户问我好不好", ("你好吗", "最近怎么样", "你怎么样", "今天过得好吗", "你还好吗", "近来可好"), "我很好，谢谢！"),
    ("用户问我会什么", ("你会什么", "你能做什么", "你有什么功能", "你可以帮我什么", "能帮帮我吗", "帮助",
     "你会做什么"), "我会重复、反转、数数、算小数目的加减、写 JSON 和调用工具。"),
)  # fmt: skip
_EN_TAILS = ("", "", ".", "!", "?", " please?", ", my friend", ", my friend!", ", dear model.", " :)", "!!",
             ", demo", ", demo!", " then?", " now", "...", " ;)", ", buddy!", ", assistant")  # fmt: skip
_ZH_TAILS = ("", "", "。", "！", "？", "!", "?", "呀", "啊！", "呢", "，朋友", "，朋友！", "~", "，小模型", "，小模型！",
             "。。。", "，助手", "，助手！", ":)", "哦")  # fmt: skip
_EN_HEADS = ("", "", "", "Hey, ", "Oh, ", "Well, ", "So, ", "OK, ", "Um, ")
_ZH_HEADS = ("", "", "", "嘿，", "那个，", "嗯，", "好，", "喂，", "请问，")

_CAPITAL_EN = (
    "What is the capital of {}?", "Capital of {}?", "Tell me the capital of {}.", "the capital of {}",
    "Which city is the capital of {}?", "Name the capital of {}.", "What's the capital city of {}?",
    "I want to know the capital of {}", "Do you know the capital of {}?", "What city is the capital of {}?",
)  # fmt: skip
_CAPITAL_ZH = (
    "{}的首都是哪里？", "{}的首都是什么？", "{}首都是哪个城市？", "请告诉我{}的首都", "{}的首都?", "说出{}的首都。",
    "{}的首都叫什么？", "你知道{}的首都吗？", "哪个城市是{}的首都？", "我想知道{}的首都",
)  # fmt: skip
_NEXT_EN = (
    "What comes after {}?", "Which {k} comes after {}?", "What {k} follows {}?", "Next {k} after {}?",
    "Tell me the {k} after {}.", "What is the {k} after {}?", "The {k} right after {}?",
)  # fmt: skip
_PREVIOUS_EN = (
    "What comes before {}?", "Which {k} comes before {}?", "What {k} is before {}?",
    "Tell me the {k} before {}.", "What is the {k} before {}?", "The {k} right before {}?",
)  # fmt: skip
_NEXT_ZH = (
    "{}后面是什么？",
    "{}之后是{k}几？",
    "{}的后一个是什么？",
    "{}后面是{k}几？",
    "哪个在{}后面？",
    "{}之后呢？",
)
_PREVIOUS_ZH = (
    "{}前面是什么？",
    "{}之前是{k}几？",
    "{}的前一个是什么？",
    "{}前面是{k}几？",
    "哪个在{}前面？",
    "{}之前呢？",
)
_ORDINAL_EN = (
    "What is the {o} {k} of the {w}?", "Which {k} is the {o} of the {w}?", "Name the {o} {k} of the {w}.",
    "The {o} {k} of the {w}?", "Tell me the {o} {k} of the {w}", "{o} {k} of the {w}?",
)  # fmt: skip

_ASK_EN = (
    "Who invented the {}?", "Why is the {} so {}?", "When was {} born?", "Explain {} to me.", "What is {}?",
    "Who wrote {}?", "How does a {} work?", "Where is {}?", "Tell me about {}.", "What do you think of {}?",
    "How old is {}?", "Write a story about a {}", "What does {} mean?", "Who is {}?", "How do I build a {}?",
    "Translate {} into Latin.", "What is the history of {}?", "Is {} better than {}?",
)  # fmt: skip
_ASK_ZH = (
    "谁发明了{}？", "为什么{}这么{}？", "{}是谁？", "解释一下{}", "{}是什么？", "谁写了{}？", "{}怎么用？", "{}在哪里？",
    "介绍一下{}", "你觉得{}怎么样？", "{}多大了？", "写一个关于{}的故事", "{}是什么意思？", "怎么做{}？",
    "{}的历史是什么？", "{}和{}哪个好？", "讲讲{}", "为什么会有{}？",
)  # fmt: skip


def greeting(s: Sampler) -> Exchange:
    """Small talk; what is held out is the combination of opening, phrase and ending."""

    def draw() -> tuple[str, _Intent]:
        intent = s.pick(_ZH if s.zh else _EN)
        phrase = s.pick(intent[1])
        head = s.pick(_ZH_HEADS if s.zh else _EN_HEADS)
        if not s.zh and (head or s.chance(0.2)):
            phrase = phrase[0].lower() + phrase[1:]
        return head + phrase + s.pick(_ZH_TAILS if s.zh else _EN_TAILS), intent

    user, (thought, _, answer) = s.choose(draw, lambda drawn: drawn[0])
    return exchange(user, answer, thought)


def unknown(s: Sampler) -> Exchange:
    """A question about open vocabulary: the honest answer is always the same sentence."""
    form = s.pick(_ASK_ZH if s.zh else _ASK_EN)
    parts = [_topic(s) for _ in range(form.count("{}"))]
    thought = "我不知道这个" if s.zh else "I do not know that"
    return exchange(form.format(*parts), UNKNOWN[s.zh], thought)


def _topic(s: Sampler) -> str:
    if s.zh:
        return s.han(2, 5)
    return s.name() if s.chance(0.25) else " ".join(s.words(1, 2))


def facts(s: Sampler) -> Exchange:
    """Closed facts; what is held out is the combination of phrasing and item."""
    kind = s.rng.random()
    draw = _capital if kind < 0.4 else _neighbour if kind < 0.8 else _ordinal
    return s.choose(lambda: draw(s), lambda drawn: "fact:" + drawn.user)


def _capital(s: Sampler) -> Exchange:
    country, city, zh_country, zh_city = s.pick(lexicon.CAPITALS)
    if s.zh:
        user, answer = s.pick(_CAPITAL_ZH).format(zh_country), zh_city
        return exchange(user, answer, f"{zh_country}的首都是{zh_city}")
    user = s.pick(_CAPITAL_EN).format(country)
    return exchange(user, city, f"The capital of {country} is {city}")


def _neighbour(s: Sampler) -> Exchange:
    days = s.chance(0.5)
    step = s.pick((1, -1))
    forms: tuple[str, ...]
    if s.zh:
        names, kind = (lexicon.ZH_DAYS, "星期") if days else (lexicon.ZH_MONTHS, "")
        forms = _NEXT_ZH if step == 1 else _PREVIOUS_ZH
    else:
        names, kind = (tuple(lexicon.DAYS), "day") if days else (tuple(lexicon.MONTHS), "month")
        forms = _NEXT_EN if step == 1 else _PREVIOUS_EN
    index = s.between(0, len(names) - 1)
    answer = names[(index + step) % len(names)]
    user = s.pick(forms).format(names[index], k=kind)
    if s.zh:
        return exchange(user, answer, f"{names[index]}{'后' if step == 1 else '前'}面是{answer}")
    return exchange(user, answer, f"{'After' if step == 1 else 'Before'} {names[index]} is {answer}")


def _ordinal(s: Sampler) -> Exchange:
    if s.zh:
        index = s.between(0, 11)
        form = s.pick(
            ("一年的第{}个月是几月？", "第{}个月是什么？", "一年中第{}个月是几月", "第{}个月叫什么？")
        )
        number = s.pick((str(index + 1), lexicon.ZH_MONTHS[index].removesuffix("月")))
        answer = lexicon.ZH_MONTHS[index]
        return exchange(form.format(number), answer, f"第{index + 1}个月是{answer}")
    days = s.chance(0.4)
    names, kind, whole = (lexicon.DAYS, "day", "week") if days else (lexicon.MONTHS, "month", "year")
    index = s.between(0, len(names) - 1)
    answer = names[index]
    user = s.pick(_ORDINAL_EN).format(o=lexicon.ORDINALS[index], k=kind, w=whole)
    return exchange(user, answer, f"{kind} {index + 1} is {answer}")
