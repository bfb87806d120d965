"""Tools that everybody's demo has; practice only, the evaluation never asks for them."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class KnownTool:
    """A tool everybody's demo has; its requests are worded for it and never evaluated."""

    names: str
    descriptions: tuple[str, str]
    arguments: tuple[tuple[str, str], ...]
    en: tuple[str, ...]
    zh: tuple[str, ...]


KNOWN = (
    KnownTool("get_weather weather get_current_weather getWeather", ("Get the weather of a city", "查询城市的天气"),
           (("city location place", "place"),),
           ("What's the weather in {0}?", "What is the weather like in {0}?", "Weather in {0}", "How is the weather in {0}?",
            "What's the weather in {0} today?", "Get the weather of {0}", "Is it raining in {0}?", "Tell me the weather for {0}."),
           ("{0}的天气怎么样？", "{0}今天天气如何？", "查一下{0}的天气", "{0}天气", "{0}现在天气怎么样?", "请问{0}天气如何？")),
    KnownTool("get_weather get_current_weather weather_lookup", ("Get the current weather", "获取当前天气"),
           (("location city", "place"), ("unit units", "celsius fahrenheit")),
           ("What's the weather in {0} in {1}?", "Weather in {0}, unit {1}", "Tell me the weather of {0} in {1}"),
           ("{0}的天气，单位{1}", "用{1}告诉我{0}的天气", "查询{0}的天气，单位是{1}")),
    KnownTool("get_time get_current_time time_in", ("Get the current time in a city", "查询城市的当前时间"),
           (("city timezone location", "place"),),
           ("What time is it in {0}?", "Tell me the time in {0}.", "Current time in {0}?"),
           ("{0}现在几点？", "{0}的时间是多少？", "查一下{0}的时间")),
    KnownTool("search web_search search_web", ("Search the web", "搜索网页"), (("query q text", "phrase"),),
           ("Search for {0}", "Search the web for {0}.", "Please search {0}", "Look up {0} on the web"),
           ("搜索{0}", "搜一下{0}", "在网上搜索{0}", "请搜索：{0}")),
    KnownTool("send_email send_message send_mail email", ("Send a message to a person", "给人发消息"),
           (("to recipient", "name"), ("text body message content", "phrase")),
           ("Send {0} the message: {1}", "Send an email to {0}: {1}", "Write to {0} saying {1}", "Tell {0}: {1}"),
           ("给{0}发消息：{1}", "告诉{0}：{1}", "发邮件给{0}，内容是{1}")),
    KnownTool("get_stock_price stock_price get_price", ("Get the price of a stock", "查询股票价格"),
           (("symbol ticker stock", "ticker"),),
           ("What is the stock price of {0}?", "Price of {0}?", "How much is {0} stock?"),
           ("{0}的股价是多少？", "查一下{0}的股价", "{0}股票价格")),
    KnownTool("set_timer start_timer timer", ("Set a timer in minutes", "设置分钟计时器"), (("minutes duration", "integer"),),
           ("Set a timer for {0} minutes", "Start a {0} minute timer.", "Timer: {0} minutes"),
           ("设置{0}分钟的计时器", "定时{0}分钟", "{0}分钟后提醒我")),
    KnownTool("add add_numbers sum calculate_sum", ("Add two numbers", "计算两个数的和"), (("a x", "integer"), ("b y", "integer")),
           ("Use the tool to add {0} and {1}", "Add {0} and {1} with the tool.", "Call the tool for {0} + {1}"),
           ("用工具计算{0}加{1}", "调用工具算{0}+{1}", "请用工具把{0}和{1}相加")),
    KnownTool("play_music play_song play", ("Play a song", "播放歌曲"), (("song title", "phrase"),),
           ("Play {0}", "Play the song {0}.", "I want to hear {0}"), ("播放{0}", "放一首{0}", "我想听{0}")),
    KnownTool("translate translate_text", ("Translate text into a language", "翻译文本"),
           (("text", "phrase"), ("target_language language to", "French German Japanese Spanish")),
           ("Translate {0} into {1}", "Translate to {1}: {0}", "How do you say {0} in {1}?"),
           ("把{0}翻译成{1}", "翻译成{1}：{0}")),
    KnownTool("turn_light set_light switch_light", ("Switch the light of a room", "开关房间的灯"),
           (("room", "word"), ("on", "boolean")),
           ("Set the light in the {0}, on {1}", "Light of {0}: {1}"), ("{0}的灯设为{1}", "灯：{0}，{1}")),
)  # fmt: skip
