"""/v1/chat/completions, mostly through the official client."""

from __future__ import annotations

import asyncio
import json

import openai
import pytest
from server_fakes import FakeEngine

THOUGHT = "<think>first</think>Hello world"
CALL = 'Sure.<tool_call>{"name": "add", "arguments": {"a": 1}}</tool_call>'
TOOLS = [{"type": "function", "function": {"name": "add", "parameters": {"type": "object"}, "strict": True}}]
HI = [{"role": "user", "content": "hi"}]


def client_of(server):
    return openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0)


def events_of(text):
    assert text.endswith("data: [DONE]\n\n")
    return [json.loads(line[6:]) for line in text.split("\n\n")[:-2]]


def test_whole_answer(serve):
    server = serve(FakeEngine("<think>first</think>Hello world"))
    with client_of(server) as client:
        answer = client.chat.completions.create(model="default", messages=HI)
    assert answer.id.startswith("chatcmpl-")
    assert len(answer.id) == len("chatcmpl-") + 24
    assert answer.model == "default"
    choice = answer.choices[0]
    assert choice.message.content == "Hello world"
    assert choice.message.reasoning_content == choice.message.reasoning == "first"
    assert choice.finish_reason == "stop"
    prompt = len("user:hi\n<assistant>")
    assert answer.usage.prompt_tokens == prompt
    assert answer.usage.completion_tokens == len(THOUGHT)
    assert answer.usage.total_tokens == prompt + len(THOUGHT)
    assert answer.usage.prompt_tokens_details.cached_tokens == 2
    # Tokens that complete a tag belong to one side or the other; all letters of "first" are reasoning.
    assert 5 <= answer.usage.completion_tokens_details.reasoning_tokens <= len("first</think>")


@pytest.mark.parametrize("step", [1, 3, 100])
def test_streamed_answer(serve, step):
    server = serve(FakeEngine(THOUGHT, step=step))
    with client_of(server) as client:
        chunks = list(
            client.chat.completions.create(
                model="fake", messages=HI, stream=True, stream_options={"include_usage": True}
            )
        )
    assert chunks[0].choices[0].delta.role == "assistant"
    deltas = [chunk.choices[0].delta for chunk in chunks if chunk.choices]
    assert "".join(delta.content or "" for delta in deltas) == "Hello world"
    assert "".join(getattr(delta, "reasoning_content", "") or "" for delta in deltas) == "first"
    assert [chunk.choices[0].finish_reason for chunk in chunks if chunk.choices][-1] == "stop"
    assert chunks[-1].choices == []
    assert chunks[-1].usage.completion_tokens == len(THOUGHT)
    assert all(chunk.usage is None for chunk in chunks[:-1])
    assert len({chunk.id for chunk in chunks}) == 1


def test_stream_order_on_the_wire(serve):
    server = serve(FakeEngine(THOUGHT, step=5))
    response = server.chat(stream=True)
    assert response.headers["content-type"].startswith("text/event-stream")
    kinds = []
    for event in events_of(response.text):
        (choice,) = event["choices"]
        kinds.append(next(iter(choice["delta"]), choice["finish_reason"]))
    assert [kind for i, kind in enumerate(kinds) if kinds[i - 1 : i] != [kind]] == [
        "role",
        "reasoning_content",
        "content",
        "stop",
    ]


def test_async_client(serve):
    server = serve(FakeEngine("ok"))

    async def main():
        async with openai.AsyncOpenAI(base_url=f"{server.url}/v1", api_key="x", max_retries=0) as client:
            whole = await client.chat.completions.create(model="default", messages=HI)
            stream = await client.chat.completions.create(model="default", messages=HI, stream=True)
            return whole, [chunk async for chunk in stream]

    whole, chunks = asyncio.run(main())
    assert whole.choices[0].message.content == "ok"
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == "ok"


def test_continuous_usage(serve):
    server = serve(FakeEngine("abc"))
    events = events_of(server.chat(stream=True, stream_options={"continuous_usage_stats": True}).text)
    counts = [event["usage"]["completion_tokens"] for event in events]
    assert counts == sorted(counts)
    assert counts[-1] == 3


def test_reasoning_switches(serve):
    server = serve(FakeEngine(THOUGHT))
    joined = server.chat(separate_reasoning=False).json()["choices"][0]["message"]
    assert joined["content"] == THOUGHT
    assert joined["reasoning_content"] is None
    events = events_of(server.chat(stream=True, stream_reasoning=False).text)
    reasoning = [e for e in events if "reasoning" in e["choices"][0]["delta"]]
    assert [e["choices"][0]["delta"]["reasoning"] for e in reasoning] == ["first"]


def test_prompt_tail_opens_the_reasoning(serve):
    engine = FakeEngine("first</think>Hello")
    engine.processor.tail = "<think>"
    message = (
        serve(engine).chat(chat_template_kwargs={"enable_thinking": True}).json()["choices"][0]["message"]
    )
    assert (message["reasoning"], message["content"]) == ("first", "Hello")
    assert engine.processor.seen[-1]["template_kwargs"] == {"enable_thinking": True}


def test_tool_calls(serve):
    server = serve(FakeEngine(CALL))
    with client_of(server) as client:
        answer = client.chat.completions.create(model="default", messages=HI, tools=TOOLS)
        choice = answer.choices[0]
        assert choice.finish_reason == "tool_calls"
        call = choice.message.tool_calls[0]
        assert call.id.startswith("call_")
        assert (call.function.name, json.loads(call.function.arguments)) == ("add", {"a": 1})
        with client.chat.completions.stream(model="default", messages=HI, tools=TOOLS) as stream:
            final = stream.get_final_completion()
        call = final.choices[0].message.tool_calls[0]
        assert (call.function.name, json.loads(call.function.arguments)) == ("add", {"a": 1})
        assert final.choices[0].message.content == "Sure."
    assert server.engine.processor.seen[0]["tools"][0]["function"] == {
        "name": "add",
        "parameters": {"type": "object"},
    }
    response = server.chat(tools=TOOLS)
    assert response.headers["x-pymllm-ignored-fields"] == "tools.0.function.strict"


def test_tool_choice(serve):
    server = serve(FakeEngine(CALL))
    answer = server.chat(tools=TOOLS, tool_choice="none").json()
    assert server.engine.processor.seen[-1]["tools"] is None
    assert answer["choices"][0]["message"]["content"] == CALL
    for choice in ("required", {"type": "function", "function": {"name": "add"}}, "sometimes"):
        response = server.chat(tools=TOOLS, tool_choice=choice)
        assert response.status_code == 400
        assert response.json()["error"]["param"] == "tool_choice"


def test_history_reaches_the_template(serve):
    server = serve()
    messages = [
        {"role": "developer", "content": "be brief"},
        {"role": "user", "content": [{"type": "text", "text": "one"}, {"type": "text", "text": "two"}]},
        {
            "role": "assistant",
            "content": None,
            "reasoning": "hm",
            "refusal": None,
            "tool_calls": [
                {"id": "call_1", "type": "function", "function": {"name": "add", "arguments": '{"a": 1}'}},
                {"id": "call_2", "type": "function", "function": {"name": "add", "arguments": "{broken"}},
            ],
        },
        {"role": "tool", "tool_call_id": "call_1", "content": "2"},
    ]
    assert server.client.post("/v1/chat/completions", json={"messages": messages}).status_code == 200
    system, user, assistant, tool = server.engine.processor.seen[-1]["messages"]
    assert system == {"role": "system", "content": "be brief"}
    assert user["content"] == "onetwo"
    assert assistant["content"] == ""
    assert assistant["reasoning_content"] == "hm"
    assert [call["function"]["arguments"] for call in assistant["tool_calls"]] == [{"a": 1}, "{broken"]
    assert tool == {"role": "tool", "content": "2", "tool_call_id": "call_1"}


def test_sampling_fields_reach_the_engine(serve):
    server = serve()
    fields = {
        "temperature": 0.5,
        "top_p": 0.9,
        "top_k": 5,
        "min_p": 0.1,
        "repetition_penalty": 1.1,
        "frequency_penalty": 0.2,
        "presence_penalty": -0.2,
        "seed": 7,
        "stop_token_ids": [1, 2],
        "ignore_eos": True,
        "skip_special_tokens": False,
    }
    server.chat(**fields, stop="x", logit_bias={"5": 2}, max_tokens=9, max_completion_tokens=4)
    params = server.engine.submitted[-1].params
    for name, value in fields.items():
        found = getattr(params, name)
        assert (list(found) if isinstance(value, list) else found) == value
    assert params.stop == ("x",)
    assert params.logit_bias == {5: 2.0}
    assert params.max_tokens == 4


def test_stop_and_length(serve):
    server = serve(FakeEngine("abcdef"))
    choice = server.chat(stop=["d"]).json()["choices"][0]
    assert (choice["message"]["content"], choice["finish_reason"]) == ("abc", "stop")
    choice = server.chat(max_tokens=2).json()["choices"][0]
    assert (choice["message"]["content"], choice["finish_reason"]) == ("ab", "length")


@pytest.mark.parametrize("stream", [False, True])
def test_n_choices(serve, stream):
    server = serve(FakeEngine(lambda request: f"seed {request.params.seed}"))
    response = server.chat(
        n=3, seed=5, stream=stream, stream_options={"include_usage": True} if stream else None
    )
    texts = {0: "", 1: "", 2: ""}
    if stream:
        events = events_of(response.text)
        for event in events:
            for choice in event["choices"]:
                texts[choice["index"]] += choice["delta"].get("content", "")
        usage = events[-1]["usage"]
    else:
        usage = response.json()["usage"]
        for choice in response.json()["choices"]:
            texts[choice["index"]] = choice["message"]["content"]
    assert texts == {0: "seed 5", 1: "seed 6", 2: "seed 7"}
    assert usage["prompt_tokens"] == len("user:hi\n<assistant>")
    assert usage["completion_tokens"] == 18


@pytest.mark.parametrize("stream", [False, True])
def test_logprobs(serve, stream):
    server = serve(FakeEngine("héy"))
    response = server.chat(logprobs=True, top_logprobs=2, stream=stream)
    if stream:
        items = [
            item
            for event in events_of(response.text)
            for item in (event["choices"][0]["logprobs"] or {"content": []})["content"]
        ]
    else:
        items = response.json()["choices"][0]["logprobs"]["content"]
    assert [item["token"] for item in items] == list("héy")
    assert items[1]["bytes"] == list("é".encode())
    assert items[0]["logprob"] == -0.5
    assert [top["token"] for top in items[0]["top_logprobs"]] == ["a", "b"]


def test_debug_timing(serve):
    timing = serve(FakeEngine("abc"), enable_debug_timing=True).chat().json()["debug_timing"]
    assert timing["experimental_llm_prefill_ms"] == 20.0
    assert timing["decode_phase_wall_ms"] == 500.0
    assert timing["decode_phase_output_tps"] == 4.0
    assert timing["completion_tokens"] == 3
    assert "debug_timing" not in serve().chat().json()
