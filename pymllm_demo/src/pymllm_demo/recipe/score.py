"""Held-out evaluation by pymllm's own engine: ``python -m pymllm_demo.recipe.score DIR [--limit N]``.

Scores the demo model and its quantised variants beside what transformers answered (``evaluation.jsonl``,
written by `evaluate`).
"""

from __future__ import annotations

import argparse
import json
from collections import Counter
from collections.abc import Mapping
from pathlib import Path

from pymllm_demo.recipe import data
from pymllm_demo.recipe.evaluate import Case, Outcome, build_cases, judge

MODELS = {"demo": "bf16", "demo-w4a16": "W4A16", "demo-w8a8": "W8A8"}
"""Names of the models, with the headings of their columns."""
PER_CATEGORY = 320
TABLE, WRONG, REFERENCE = "evaluation.md", "evaluation-pymllm.jsonl", "evaluation.jsonl"
_LONGEST = 300
_HEADING = """\
# Evaluation of the demo model

Greedy answers to held-out prompts, and how many of them are right. The first column is transformers in bf16 on a
GPU, the others are pymllm on a CPU.

"""


def answer(model: str, cases: list[Case]) -> list[Outcome]:
    """Greedy answers of the model `model`, by pymllm on a CPU, judged."""
    from pymllm_core import LLM

    with LLM(model, device="cpu") as llm:
        params = llm.processor.sampling(temperature=0.0, max_tokens=_LONGEST)
        requests = [
            llm.processor.from_chat(
                list(case.messages),
                params,
                request_id=str(index),
                tools=list(case.tools),
                template_kwargs={"enable_thinking": case.enable_thinking},
            ).request.token_ids
            for index, case in enumerate(cases)
        ]
        return judge(cases, [found.text for found in llm.generate(requests, params)])


def right(outcomes: list[Outcome]) -> Counter[str]:
    """How many answers of each category are right."""
    found = Counter(dict.fromkeys(data.CATEGORIES, 0))
    found.update(item.case.category for item in outcomes if item.right)
    return found


def committed(folder: Path, limit: int = PER_CATEGORY) -> dict[str, Counter[str]]:
    """Right answers by category, of each column, among the first `limit` prompts of each, from DIR's files."""
    found = {
        "transformers": Counter[str](),
        **{name: Counter(dict.fromkeys(data.CATEGORIES, limit)) for name in MODELS},
    }
    seen: Counter[str] = Counter()
    for line in (folder / REFERENCE).read_text(encoding="utf-8").splitlines():
        row = json.loads(line)
        if seen[row["category"]] < limit:
            found["transformers"][row["category"]] += row["right"]
        seen[row["category"]] += 1
    for line in (folder / WRONG).read_text(encoding="utf-8").splitlines():
        row = json.loads(line)
        found[row["model"]][row["category"]] -= row["index"] < limit
    return found


def table(counts: Mapping[str, Mapping[str, int]], per_category: int) -> str:
    """A Markdown table: categories by columns, as counts and percentages."""
    headings = ["bf16, transformers", *MODELS.values()]
    lines = [
        f"| category | prompts | {' | '.join(headings)} |",
        f"| --- | ---: |{' ---: |' * len(headings)}",
    ]
    for category in [*data.CATEGORIES, "all"]:
        prompts = per_category * (len(data.CATEGORIES) if category == "all" else 1)
        cells = []
        for found in counts.values():
            number = sum(found.values()) if category == "all" else found[category]
            cells.append(f"{number} ({100 * number / prompts:.1f} %)")
        lines.append(f"| {category} | {prompts} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def report(folder: Path, per_category: int) -> None:
    """Score all models; write the wrong answers and the table into `folder`, which holds transformers' answers."""
    cases = build_cases(per_category=per_category)
    with (folder / WRONG).open("w", encoding="utf-8") as file:
        for name in MODELS:
            for number, item in enumerate(answer(name, cases)):
                if item.right:
                    continue
                row = {
                    "model": name,
                    "category": item.case.category,
                    "index": number % per_category,
                    "last_message": item.case.messages[-1]["content"],
                    "wanted": item.case.wanted,
                    "answer": item.text,
                }
                file.write(json.dumps(row, ensure_ascii=False) + "\n")
    text = table(committed(folder, per_category), per_category)
    (folder / TABLE).write_text(_HEADING + text, encoding="utf-8")
    print(text, flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "folder", type=Path, help=f"holds {REFERENCE}; {TABLE} and {WRONG} are written into it"
    )
    parser.add_argument("--limit", type=int, default=PER_CATEGORY, help="prompts per category")
    options = parser.parse_args()
    report(options.folder, options.limit)


if __name__ == "__main__":
    main()
