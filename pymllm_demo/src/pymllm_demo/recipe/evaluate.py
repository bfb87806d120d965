"""Held-out evaluation: ``python -m pymllm_demo.recipe.evaluate MODEL_DIR [--limit N]``.

`build_cases` and `Case.check` need neither torch nor transformers, so that any engine can be scored.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pymllm_demo.recipe import chat, data
from pymllm_demo.recipe.dialogue import Message, Tool
from pymllm_demo.recipe.sampler import Sampler

SEED = 20_000


@dataclass(frozen=True)
class Case:
    """One prompt and the judge of its raw completion (think block and tool calls included)."""

    category: str
    messages: list[Message]
    tools: list[Tool]
    enable_thinking: bool
    check: Callable[[str], bool]
    wanted: str


@dataclass(frozen=True)
class Outcome:
    case: Case
    text: str
    right: bool


def build_cases(seed: int = SEED, per_category: int = 320) -> list[Case]:
    """The same distinct held-out prompts for the same arguments, category by category."""
    cases: list[Case] = []
    for number, category in enumerate(data.CATEGORIES):
        sampler = Sampler(seed + number, "held_out")
        prompts: set[str] = set()
        while len(prompts) < per_category:
            dialogue = data.make(category, sampler)
            prompt = chat.prompt(dialogue)
            if prompt in prompts:
                continue
            prompts.add(prompt)
            cases.append(
                Case(
                    category=category,
                    messages=dialogue.messages,
                    tools=dialogue.tools,
                    enable_thinking=dialogue.enable_thinking,
                    check=dialogue.judge,
                    wanted=dialogue.completion(),
                )
            )
    return cases


def generate(folder: Path, cases: list[Case]) -> list[str]:
    """Greedy completions of transformers: bf16 on a GPU, the same weights in fp32 on a CPU.

    Most completions are the wanted ones. One forward pass over prompt and wanted text shows whether
    greedy decoding would write exactly that; only the other cases are decoded token by token.
    """
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    on_gpu = torch.cuda.is_available()
    dtype, batch_size = (torch.bfloat16, 256) if on_gpu else (torch.float32, 16)
    tokenizer: Any = AutoTokenizer.from_pretrained(folder, padding_side="left")
    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)
    model.to("cuda" if on_gpu else "cpu").eval()
    prompts = [chat.render(case.messages, case.tools, case.enable_thinking) for case in cases]
    wanted = [case.wanted + tokenizer.eos_token for case in cases]
    sizes = [len(ids) for ids in tokenizer(wanted).input_ids]
    texts = [case.wanted for case in cases]
    others: list[int] = []
    with torch.inference_mode():
        for part in _batches(sorted(range(len(cases)), key=lambda i: len(prompts[i])), batch_size):
            whole = [prompts[i] + wanted[i] for i in part]
            inputs = tokenizer(whole, return_tensors="pt", padding=True).to(model.device)
            ids, longest = inputs["input_ids"], max(sizes[i] for i in part)
            guesses = model(**inputs, logits_to_keep=longest + 1).logits[:, :-1].argmax(-1)
            for row, i in enumerate(part):
                if not torch.equal(guesses[row, -sizes[i] :], ids[row, -sizes[i] :]):
                    others.append(i)
        for part in _batches(sorted(others, key=lambda i: len(prompts[i])), batch_size):
            inputs = tokenizer([prompts[i] for i in part], return_tensors="pt", padding=True)
            limit = max(sizes[i] for i in part) + 16
            output = model.generate(**inputs.to(model.device), do_sample=False, max_new_tokens=limit)
            answers = output[:, inputs["input_ids"].shape[1] :]
            for i, text in zip(part, tokenizer.batch_decode(answers, skip_special_tokens=True), strict=True):
                texts[i] = text
    return texts


def _batches(order: list[int], size: int) -> Iterator[list[int]]:
    for start in range(0, len(order), size):
        yield order[start : start + size]


def judge(cases: Iterable[Case], texts: Iterable[str]) -> list[Outcome]:
    pairs = zip(cases, texts, strict=True)
    return [Outcome(case, text, case.check(text)) for case, text in pairs]


def table(outcomes: list[Outcome]) -> str:
    """A Markdown table of the accuracy in each category."""
    lines = ["| category | prompts | right | accuracy |", "| --- | ---: | ---: | ---: |"]
    for category in [*data.CATEGORIES, "all"]:
        mine = [item.right for item in outcomes if category in (item.case.category, "all")]
        if mine:
            share = 100 * sum(mine) / len(mine)
            lines.append(f"| {category} | {len(mine)} | {sum(mine)} | {share:.1f} % |")
    return "\n".join(lines) + "\n"


def _write(outcomes: list[Outcome], folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    heading = "# Evaluation of the demo model\n\nGreedy answers to held-out prompts.\n\n"
    (folder / "evaluation.md").write_text(heading + table(outcomes), encoding="utf-8")
    with (folder / "evaluation.jsonl").open("w", encoding="utf-8") as file:
        for item in outcomes:
            record = {
                "category": item.case.category,
                "last_message": item.case.messages[-1]["content"],
                "wanted": item.case.wanted,
                "answer": item.text,
                "right": item.right,
            }
            file.write(json.dumps(record, ensure_ascii=False) + "\n")


def report(folder: Path, per_category: int, out: Path | None = None) -> list[Outcome]:
    """Evaluate a model folder, print the table and write the results."""
    cases = build_cases(per_category=per_category)
    outcomes = judge(cases, generate(folder, cases))
    print(table(outcomes), flush=True)
    if out is not None:
        _write(outcomes, out)
    return outcomes


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", type=Path)
    parser.add_argument("--limit", type=int, default=320, help="prompts per category")
    parser.add_argument("--out", type=Path, help="folder for evaluation.md and evaluation.jsonl")
    options = parser.parse_args()
    report(options.model, options.limit, options.out)


if __name__ == "__main__":
    main()
