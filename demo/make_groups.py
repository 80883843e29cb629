"""Makes the demo's data: samples SmolLM2 on sums, checks the answers, and keeps groups with right and wrong answers.

    python demo/make_groups.py          # about 15 minutes on 2 cores; the result is in the repository

1. Samples every training prompt and every held-out prompt 16 times at temperature 1.
2. Scores a response 1 if its last number is the answer, else 0. Drops responses cut at 48 tokens (they have no end of
   turn) and repeated responses.
3. Deals a prompt's responses into groups of up to 4. Each group has at least one right and one wrong response.
"""

import subprocess
import sys
from pathlib import Path

from arithmetic import (
    HELD_OUT_GROUPS,
    HELD_OUT_PROMPTS,
    TRAIN_GROUPS,
    TRAIN_PROMPTS,
    is_right,
    problems,
    read_jsonl,
    write_jsonl,
)

ROOT = Path(__file__).parent.parent
WORK = ROOT / "outputs" / "demo_groups"
SAMPLES = 16
GROUP_SIZE = 4


def sample(prompts: list[dict], name: str) -> list[dict]:
    """Samples SmolLM2's responses to the prompts with the sampling recipe."""
    WORK.mkdir(parents=True, exist_ok=True)
    source, output = WORK / f"{name}_prompts.jsonl", WORK / f"{name}_samples.jsonl"
    write_jsonl(source, prompts)
    overrides = [
        f"prompts={source}",
        f"output={output}",
        f"samples_per_prompt={SAMPLES}",
        "temperature=1.0",
        "max_new_tokens=48",
        "batch_size=256",
    ]
    recipe = ["recipes/humanline_sample", "--config", "configs/smollm2_135m_sample.yaml"]
    subprocess.run([Path(sys.executable).with_name("tune"), "run", *recipe, *overrides], cwd=ROOT, check=True)
    return read_jsonl(output)


def groups(row: dict) -> list[dict]:
    """Returns the groups of one prompt's samples."""
    finished = {
        response: float(is_right(response, row["answer"]))
        for response, reason in zip(row["all_generated_responses"], row["finish_reasons"], strict=True)
        if reason == "stop" and response.strip()
    }
    right = [response for response, score in finished.items() if score]
    wrong = [response for response, score in finished.items() if not score]
    count = min(len(right), len(wrong))
    # Each group first gets one right and one wrong response, then the others in turn.
    dealt = [
        [right[i], wrong[i], *right[count + i :: count], *wrong[count + i :: count]][:GROUP_SIZE] for i in range(count)
    ]
    return [
        {
            "prompt": row["prompt"][-1]["content"],
            "all_generated_responses": group,
            "all_rm_scores": [finished[response] for response in group],
        }
        for group in dealt
    ]


def main() -> None:
    train, held_out = problems()
    write_jsonl(HELD_OUT_PROMPTS, held_out)
    write_jsonl(TRAIN_PROMPTS, train)
    write_jsonl(TRAIN_GROUPS, [group for row in sample(train, "train") for group in groups(row)])
    write_jsonl(HELD_OUT_GROUPS, [group for row in sample(held_out, "held_out") for group in groups(row)[:1]])
    for path in (TRAIN_GROUPS, HELD_OUT_GROUPS):
        print(f"{path}: {len(read_jsonl(path))} groups, {path.stat().st_size / 1e3:.0f} kB")


if __name__ == "__main__":
    main()
