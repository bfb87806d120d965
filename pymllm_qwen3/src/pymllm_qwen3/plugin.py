"""Registers the Qwen3 family."""

from __future__ import annotations

from pymllm_core.hookspecs import hookimpl
from pymllm_core.specs import ModelSpec, OutputParserSpec

CONTRACT = "1.0"


@hookimpl
def pymllm_models() -> list[ModelSpec]:
    return [
        ModelSpec(
            name=name,
            implementation=f"pymllm_qwen3.{module}:{name}",
            reasoning_parser="qwen3",
            tool_call_parser="hermes",
            tokenizer="Qwen2Tokenizer",
        )
        for name, module in (("Qwen3ForCausalLM", "text"), ("Qwen3MoeForCausalLM", "moe"))
    ]


@hookimpl
def pymllm_output_parsers() -> list[OutputParserSpec]:
    reasoning = {
        "qwen3": "Qwen3Reasoning",
        "qwen3-thinking": "Qwen3ThinkingReasoning",
        "deepseek-r1": "DeepseekR1Reasoning",
        "glm45": "Glm45Reasoning",
        "kimi": "KimiReasoning",
    }
    tool_calls = {
        "hermes": "HermesToolCallParser",
        "qwen25": "HermesToolCallParser",
        "qwen3_coder": "Qwen3CoderToolCallParser",
        "llama3": "Llama3ToolCallParser",
    }
    return [
        *(_parser("reasoning", "parsers", name, attribute) for name, attribute in reasoning.items()),
        *(_parser("tool_calls", "tool_parsers", name, attribute) for name, attribute in tool_calls.items()),
    ]


def _parser(kind: str, module: str, name: str, attribute: str) -> OutputParserSpec:
    return OutputParserSpec(kind=kind, name=name, implementation=f"pymllm_qwen3.{module}:{attribute}")
