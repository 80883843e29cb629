"""Repeats the paper's table at a small scale: online, sparse and offline GRPO, with and without humanline.

    python benchmarks/replicate.py                  # three seeds, one run after the other; hours on a CPU
    python benchmarks/replicate.py --seeds 1        # one seed; other seeds may run at the same time

The task is the demo's sums. Every run starts from the same model and takes the same number of optimizer steps. The
config is that of the online demo (configs/smollm2_135m_grpo_online.yaml) with the changes below. The result is pass@1
on the held-out sums. The offline runs share a dataset: one round of the initial policy over nearly all training
prompts.

If the program is started again, it keeps finished runs and resumes an unfinished one from its last checkpoint. The cost
of a run is counted in seconds of CPU time, which other work on the machine does not change. With OMP_NUM_THREADS=1 this
is the time on one core. The cost of a killed attempt is not counted. Sampling is counted in wall-clock time.
Results are written to results.json, and to results.png if matplotlib is installed.
"""

import argparse
import fcntl
import json
import os
import resource
import shutil
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

ROOT = Path(__file__).parent.parent
MODEL = ROOT / "models" / "SmolLM2-135M-Instruct"
STEPS, GROUPS, GENERATIONS, TOKENS, SPARSE, DATASET = 128, 8, 8, 32, 64, 640

PLAIN = {"loss.perception": "none"}
DATA = {"source": None, "engine": None, "reward": None, "dataset._component_": "humanline.data.encoded_groups"}
METHODS: dict[str, dict[str, Any]] = {
    "online": {"source.every": 1, "reference.sync_every": 1, **PLAIN},
    "sparse": {"source.every": SPARSE, "reference.sync_every": SPARSE, **PLAIN},
    "sparse + humanline": {"source.every": SPARSE, "reference.sync_every": 4},
    "offline": {"reference.sync_every": None, **PLAIN, **DATA},
    "offline + humanline": {"reference.sync_every": 4, **DATA},
}


def tune(recipe: str, config: Path, *overrides: str) -> None:
    command = [str(Path(sys.executable).with_name("tune")), "run", f"recipes/{recipe}", "--config", str(config)]
    subprocess.run([*command, *overrides], cwd=ROOT, check=True)


def train(folder: Path, seed: int, changes: dict[str, Any]) -> dict[str, float]:
    """Trains one run, or resumes it, and returns the cost."""
    config = OmegaConf.load(ROOT / "configs" / "smollm2_135m_grpo_online.yaml")
    shared: dict[str, Any] = {
        "output_dir": str(folder),
        "seed": seed,
        "batch_size": GROUPS,
        "epochs": 8,
        "max_steps_per_epoch": STEPS // 8,
        "source.generations": GENERATIONS,
        "source.max_new_tokens": TOKENS,
        "source.temperature": 1.0,
        "dataset_val": None,  # only training is timed
        "run_val_every_n_steps": None,
        "save_every_n_steps": 32,
        "resume_from_checkpoint": "latest" if any((folder / "checkpoints").glob("step_*[0-9]")) else False,
    }
    for key, value in (shared | changes).items():
        OmegaConf.update(config, key, value)
    OmegaConf.save(config, folder / "config.yaml")
    start, before = time.perf_counter(), _cpu_seconds()
    tune("humanline_grpo_single_device", folder / "config.yaml")
    return {"seconds": time.perf_counter() - start, "cpu_seconds": _cpu_seconds() - before}


def _cpu_seconds() -> float:
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def measure(weights: Path, output: Path, seed: int) -> dict[str, Any]:
    """Returns the result of humanline_eval, with pass@1."""
    files = sorted(path.name for path in weights.glob("*.safetensors"))
    tune(
        "humanline_eval",
        ROOT / "configs" / "smollm2_135m_eval.yaml",
        f"checkpointer.checkpoint_dir={weights}",
        f"checkpointer.checkpoint_files=[{','.join(files)}]",
        f"max_new_tokens={TOKENS}",
        f"output={output}",
        f"seed={seed}",
        "k=[1]",
    )
    return json.loads(output.read_text())


def sampling(folder: Path) -> dict[str, float]:
    """Reads from a run's log the number of sampled tokens and the seconds of sampling and scoring."""
    costs: dict[str, tuple[float, float]] = {}  # by step, since a resumed run logs some steps again
    for line in (folder / "logs" / "metrics.txt").read_text().splitlines():
        step, _, metrics = line.partition(" | ")
        logged = dict(item.split(":") for item in metrics.split())
        if "rounds/tokens" in logged:
            costs[step] = float(logged["rounds/tokens"]), float(logged["rounds/seconds"])
    tokens, seconds = (sum(column) for column in zip((0.0, 0.0), *costs.values(), strict=True))
    return {"tokens_sampled": tokens, "sampling_seconds": seconds}


def dataset(output: Path) -> Path:
    """Makes the offline runs' groups with a run of one step, and returns their file."""
    folder = output / "dataset"
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / ".replicate.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # another process, with other seeds, may be making it
        if not (folder / "result.json").is_file():
            for half_done in ("checkpoints", "rounds", "logs"):
                shutil.rmtree(folder / half_done, ignore_errors=True)
            one_step: dict[str, int | None] = {"epochs": 1, "max_steps_per_epoch": 1, "source.every": STEPS}
            one_step |= {"source.groups_per_round": DATASET, "save_every_n_steps": None}
            train(folder, 0, one_step)
            _write(folder / "result.json", {"method": "dataset", **sampling(folder)})
            _remove_weights(folder)
    return folder / "rounds" / "round_0.jsonl"


def _write(file: Path, value: Any) -> None:
    """Writes a file so that it is complete or absent, for other processes too."""
    partial = file.with_suffix(f".{os.getpid()}")
    partial.write_text(json.dumps(value, indent=2) + "\n")
    os.replace(partial, file)


def run(folder: Path, method: str, seed: int, data: Path) -> None:
    """Trains and measures one run, and skips the parts that are done."""
    result, costs = folder / "result.json", folder / "costs.json"
    if result.is_file():
        return
    folder.mkdir(parents=True, exist_ok=True)
    if not (costs.is_file() and (folder / "epoch_7").is_dir()):
        changes = METHODS[method] | ({"dataset.source": str(data)} if "dataset._component_" in METHODS[method] else {})
        spent = json.loads(costs.read_text()) if costs.is_file() else {}
        new = train(folder, seed, changes)
        costs.write_text(json.dumps({key: spent.get(key, 0) + value for key, value in new.items()}))
    evaluated = measure(folder / "epoch_7", folder / "eval.json", seed)
    found = {"method": method, "seed": seed, **json.loads(costs.read_text()), **sampling(folder), **evaluated}
    _write(result, found)
    _remove_weights(folder)


def _remove_weights(folder: Path) -> None:
    for weights in [*folder.glob("epoch_*"), folder / "checkpoints"]:
        shutil.rmtree(weights, ignore_errors=True)


def results(output: Path) -> list[dict[str, Any]]:
    """Returns the finished results, by method and seed."""
    found = [json.loads(file.read_text()) for file in output.glob("*/result.json")]
    return sorted(found, key=lambda result: (["dataset", *METHODS].index(result["method"]), result.get("seed", 0)))


def table(found: list[dict[str, Any]]) -> str:
    lines = [
        "| | pass@1 of each seed, with its 95% interval | mean | CPU s of training | s of sampling, by the clock | "
        "tokens sampled |",
        "|---|---|---|---|---|---|",
    ]
    for method in METHODS:
        mine = [result for result in found if result["method"] == method]
        if mine:
            each = "; ".join(f"{mean:.1%} [{low:.1%}, {high:.1%}]" for mean, low, high in map(pass_at_1, mine))
            mean = statistics.mean(pass_at_1(result)[0] for result in mine)
            costs = (
                statistics.mean(result[key] for result in mine)
                for key in ("cpu_seconds", "sampling_seconds", "tokens_sampled")
            )
            lines.append(f"| {method} | {each} | {mean:.1%} | " + " | ".join(f"{cost:,.0f}" for cost in costs) + " |")
    return "\n".join(lines)


def pass_at_1(result: dict[str, Any]) -> tuple[float, float, float]:
    figure = result["figures"]["pass@1"]
    return figure["mean"], figure["low"], figure["high"]


def draw(found: list[dict[str, Any]], file: Path) -> None:
    try:
        import matplotlib.pyplot as plt
    except ImportError:
        print("no figure: matplotlib is not installed (pip install -e '.[plots]')")
        return
    figure, axes = plt.subplots(figsize=(7, 4))
    for method in METHODS:
        mine = [result for result in found if result["method"] == method]
        if mine:
            minutes = [result["cpu_seconds"] / 60 for result in mine]
            axes.scatter(minutes, [100 * pass_at_1(result)[0] for result in mine], label=method)
    axes.set(
        xlabel="CPU minutes of training", ylabel="pass@1 on held-out sums, %", title=f"{STEPS} steps, a dot each seed"
    )
    axes.set_xlim(left=0)
    axes.set_ylim(bottom=0)
    axes.legend()
    figure.savefig(file, dpi=150, bbox_inches="tight")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--output", type=Path, default=ROOT / "outputs" / "replicate")
    arguments = parser.parse_args()
    fetch = [sys.executable, "-m", "humanline.tools.fetch_smollm2", "--output-dir", str(MODEL)]
    subprocess.run(fetch, cwd=ROOT, check=True)
    output = arguments.output.absolute()
    data = dataset(output)
    for seed in arguments.seeds:
        for method in METHODS:
            run(output / f"{method.replace(' + ', '_')}_{seed}", method, seed, data)
            found = results(output)
            _write(output / "results.json", found)
            print(table(found), flush=True)
    draw(results(output), output / "results.png")


if __name__ == "__main__":
    main()
