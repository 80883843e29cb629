"""The demo's task: sums of two numbers up to 30. SmolLM2-135M solves them sometimes, and could nearly always."""

import json
import random
import re
from pathlib import Path

HERE = Path(__file__).parent
TRAIN_GROUPS = HERE / "train_groups.jsonl"
HELD_OUT_GROUPS = HERE / "held_out_groups.jsonl"
HELD_OUT_PROMPTS = HERE / "held_out_prompts.jsonl"
TRAIN_PROMPTS = HERE / "train_prompts.jsonl"

LARGEST = 30
NUM_HELD_OUT = 240


def problems() -> tuple[list[dict], list[dict]]:
    """Returns the training and the held-out sums, in a fixed random order, as ``{"prompt", "answer"}``."""
    sums = [(a, b) for a in range(1, LARGEST + 1) for b in range(1, LARGEST + 1)]
    random.Random(0).shuffle(sums)
    rows = [{"prompt": f"What is {a} + {b}?", "answer": a + b} for a, b in sums]
    return rows[NUM_HELD_OUT:], rows[:NUM_HELD_OUT]


def is_right(response: str, answer: int) -> bool:
    """Returns whether the last whole number of a response is the answer."""
    numbers = re.findall(r"\d+", response)
    return bool(numbers) and int(numbers[-1]) == answer


def read_jsonl(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def write_jsonl(path: Path, rows: list[dict]) -> None:
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
