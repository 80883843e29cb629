"""Measures how a step and a start grow: with the pairs of a step, the responses of a group, ranks, and rows of data.

    python benchmarks/scale.py [--plot docs/figures/scale.svg]

The recipes themselves train a Llama of two small layers and SmolLM2's vocabulary on made-up answers of 5 to 70 tokens
to sums, so that what does not belong to the model weighs as much as it can. Each point is a process of its own, with
one thread a rank. The tables have the median time of the steps after the first, in all and for each pair or response,
the largest resident set of rank 0, and for rows of data the time until the first step begins, at a first and a second
start.
"""

import argparse
import json
import os
import random
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import humanline  # noqa: F401, hides notices of other packages

ROOT = Path(__file__).parent.parent
SMOLLM2 = ROOT / "models" / "SmolLM2-135M-Instruct"
VOCABULARY, DIM, LAYERS, HEADS, HIDDEN = 49152, 64, 2, 2, 128
STEPS = 4

PAIRS, RESPONSES, ROWS = (64, 128, 256, 512, 1024), (2, 4, 8, 16), (1_000, 4_000, 16_000, 60_000)
RESPONSES_A_STEP = 256

Point = dict[str, float]


class StepLogger:
    """A metric logger of torchtune's interface that prints when each step ended, and the process's memory."""

    def log_dict(self, payload: Any, step: int) -> None:
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6
        print(json.dumps({"at": time.time(), "peak": peak}), flush=True)

    def log(self, name: str, data: float, step: int) -> None:
        raise NotImplementedError

    def log_config(self, config: Any) -> None: ...

    def close(self) -> None: ...


def write_model(folder: Path) -> None:
    """Writes random weights of the small model in Hugging Face's names."""
    from transformers import LlamaConfig, LlamaForCausalLM

    shape = {"vocab_size": VOCABULARY, "hidden_size": DIM, "intermediate_size": HIDDEN, "num_hidden_layers": LAYERS}
    heads = {"num_attention_heads": HEADS, "num_key_value_heads": HEADS, "head_dim": DIM // HEADS}
    config = LlamaConfig(**shape, **heads, max_position_embeddings=2048, rms_norm_eps=1e-5, tie_word_embeddings=False)
    LlamaForCausalLM(config).save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"):
        if (SMOLLM2 / name).is_file():
            (folder / name).write_bytes((SMOLLM2 / name).read_bytes())


def write_groups(file: Path, groups: int, responses: int) -> None:
    draw = random.Random(0)
    with file.open("w") as out:
        for i in range(groups):
            answers = [
                " ".join(str(draw.randrange(1000)) for _ in range(draw.randint(1, 17))) for _ in range(responses)
            ]
            group = {
                "prompt": f"What is {draw.randrange(10**6)} + {i}?",
                "all_generated_responses": [f"{place}: {answer}" for place, answer in enumerate(answers)],
                "all_rm_scores": [draw.random() for _ in answers],
            }
            out.write(json.dumps(group) + "\n")


def train(folder: Path, objective: str, data: Path, groups: int, ranks: int = 1, steps: int = STEPS) -> Point:
    """Runs a recipe, and returns the seconds of a step, of the start, and the peak of memory in GB."""
    architecture = {"embed_dim": DIM, "intermediate_dim": HIDDEN, "num_layers": LAYERS, "num_heads": HEADS}
    model = architecture | {"num_kv_heads": HEADS, "vocab_size": VOCABULARY, "max_seq_len": 2048, "rope_base": 10_000}
    changes: dict[str, Any] = {
        "output_dir": folder / "run",
        "model._component_": "torchtune.models.llama3.llama3",
        **{f"model.{key}": value for key, value in model.items()},
        "checkpointer.checkpoint_dir": folder / "model",
        "checkpointer.model_type": "LLAMA3",
        "dataset.source": data,
        "dataset_val": "null",
        "run_val_every_n_steps": "null",
        "batch_size": groups // ranks,
        "max_steps_per_epoch": steps,
        "save_every_n_steps": "null",
        "tokens_per_row": 1024,
        "rows_per_pass": 4,
        "metric_logger._component_": "scale.StepLogger",
    }
    removed = ["~metric_logger.log_dir", "~metric_logger.filename"]
    tune = [Path(sys.executable).with_name("tune"), "run", *([f"--nproc_per_node={ranks}"] if ranks > 1 else [])]
    recipe = [f"recipes/humanline_{objective}_distributed", "--config", f"configs/smollm2_135m_{objective}.yaml"]
    environment = os.environ | {
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": str(ROOT / "benchmarks"),
        "HUMANLINE_CACHE": str(folder / "cache"),
    }
    command = [*map(str, tune), *recipe, *removed, *(f"{key}={value}" for key, value in changes.items())]
    start = time.time()
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"error: {' '.join(command)}\n{done.stderr[-3000:]}")
    logged = [json.loads(line) for line in done.stdout.splitlines() if line.startswith('{"at"')]
    ends = [each["at"] for each in logged]
    seconds = statistics.median(b - a for a, b in zip(ends, ends[1:], strict=False))
    return {"step": seconds, "start": ends[0] - seconds - start, "peak": logged[-1]["peak"]}


def measure(folder: Path) -> Iterator[tuple[str, int, Point]]:
    """Yields the name of a table, the amount, and what was measured."""
    data = folder / "groups.jsonl"
    write_groups(data, STEPS * max(PAIRS), 2)
    for ranks in (1, 2):
        for pairs in PAIRS:
            yield f"pairs a step, ranks: {ranks}", pairs, {**train(folder, "dpo", data, pairs, ranks), "items": pairs}
    for responses in RESPONSES:
        groups = RESPONSES_A_STEP // responses
        write_groups(data, STEPS * groups, responses)
        point = train(folder, "grpo", data, groups)
        yield f"responses a group, {RESPONSES_A_STEP} a step", responses, {**point, "items": RESPONSES_A_STEP}
    for rows in ROWS:
        write_groups(data, rows, 2)
        first, second = (train(folder, "dpo", data, 16, steps=3) for _ in range(2))
        yield "rows of data", rows, {**first, "second": second["start"], "items": 16}


def tables(points: Iterable[tuple[str, int, Point]]) -> dict[str, dict[int, Point]]:
    """Prints the points as they come, and returns them by table."""
    found: dict[str, dict[int, Point]] = {}
    for name, amount, point in points:
        if name not in found:
            start = "| first start s | second start s " if name == "rows of data" else ""
            each = "response" if name.startswith("responses") else "pair"
            print(f"\n| {name} | s a step | ms a {each} | peak GB {start}|\n" + "|---" * (6 if start else 4) + "|")
        found.setdefault(name, {})[amount] = point
        start = f"| {point['start']:.1f} | {point['second']:.1f} " if "second" in point else ""
        share = 1e3 * point["step"] / point["items"]
        print(f"| {amount} | {point['step']:.2f} | {share:.1f} | {point['peak']:.2f} {start}|", flush=True)
    return found


def plot(found: dict[str, dict[int, Point]], file: Path) -> None:
    import matplotlib.pyplot as plt

    figure, places = plt.subplots(1, len(found), figsize=(4 * len(found), 3), layout="constrained")
    for place, (name, points) in zip(places, found.items(), strict=True):
        lines = {"start": "first start", "second": "second start"} if name == "rows of data" else {"step": "a step"}
        for part, label in lines.items():
            place.plot([*points], [point[part] for point in points.values()], marker="o", label=label)
        place.set(xlabel=name, ylabel="s", ylim=(0, None), xlim=(0, None))
        place.legend()
    figure.savefig(file)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--plot", type=Path, metavar="FILE", help="draws the tables, too; needs matplotlib")
    arguments = parser.parse_args()
    fetch = [sys.executable, "-m", "humanline.tools.fetch_smollm2", "--output-dir", str(SMOLLM2)]
    subprocess.run(fetch, cwd=ROOT, check=True)
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        write_model(folder / "model")
        found = tables(measure(folder))
    if arguments.plot:
        plot(found, arguments.plot)


if __name__ == "__main__":
    main()
