"""Tests the paper's claims at a small scale: which data, which clip, which syncing, how long, on which model.

    python benchmarks/replicate.py                        # every experiment, three seeds; many hours on a CPU
    python benchmarks/replicate.py ablation clip --seeds 1
    python benchmarks/replicate.py --list                 # the experiments, with their arms and what is finished

The task is sums of two numbers after a solved example, up to 99 for SmolLM2, up to 30 after three examples for Gemma 3
270M, a pretrained model. From them the model knows when to stop, so what it learns is to add. The result is pass@1 on
held-out sums. All arms of an experiment start from the same model and take the same number of optimizer steps, unless
the number of steps is what the experiment varies.

Finished runs are kept in docs/replication.json, from which `python docs/make_results.py` makes the figures and tables
of docs/results.md, and the offline datasets in benchmarks/replication. A run that is in this file is not repeated, and
an unfinished one resumes from its last checkpoint if it takes more than 64 steps. The program may be started several
times at once: a run belongs to the process that locks its folder. The cost of a run is counted in seconds of CPU time,
which other work on the machine hardly changes; with OMP_NUM_THREADS=1 this is the time on one core. The cost of a
killed attempt is not counted.
"""

import argparse
import fcntl
import gzip
import json
import os
import platform
import random
import resource
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from statistics import fmean
from typing import Any

from omegaconf import OmegaConf

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "docs" / "replication.json"
DATASETS = ROOT / "benchmarks" / "replication"
HELD_OUT = 240  # sums
STEPS, GROUPS, GENERATIONS, NEW_TOKENS, SYNC, CLIP = 64, 4, 8, 16, 4, (-1.5, 1.5)
DATASET = 256  # groups with a right and a wrong answer in an offline dataset

Bounds = tuple[float, float]


@dataclass(frozen=True)
class Model:
    """A model, how to get it, and sums that it sometimes solves: of numbers up to ``largest``, after examples."""

    folder: Path
    fetch: tuple[str, ...]  # a Python program, which takes --output-dir
    config: dict[str, Any]
    largest: int
    examples: tuple[tuple[int, int], ...]
    system: str | None
    initial: str  # the offline dataset whose first groups are the dataset "initial"
    lr: dict[str, float]  # by objective


MODELS = {
    "smollm2": Model(
        folder=ROOT / "models" / "SmolLM2-135M-Instruct",
        fetch=("-m", "humanline.tools.fetch_smollm2"),
        config={},
        largest=99,
        examples=((46, 31),),
        system="Add.",
        initial="initial_x4",
        lr={"dpo": 1e-5, "kto": 1e-5, "grpo": 2e-5},
    ),
    "gemma3_270m": Model(
        folder=ROOT / "models" / "gemma-3-270m",
        fetch=("benchmarks/gemma3_270m.py",),
        config={
            "model._component_": "humanline.models.gemma3.gemma3_270m",
            "checkpointer._component_": "humanline.checkpoint.FullModelHFCheckpointer",
            "checkpointer.model_type": "GEMMA3",
        },
        largest=30,
        examples=((14, 3), (8, 22), (19, 25)),
        system=None,
        initial="initial_half",
        lr={"grpo": 3e-6},  # at 5e-6 the reward of an online round falls to 0.01 after 50 steps, and at 2e-5 after 8
    ),
}


@dataclass(frozen=True)
class Arm:
    """A run, but for its seed.

    ``data`` is ``online`` (a round of answers for every step), ``sparse`` (for half of the steps), ``fresh`` (for 64),
    or the name of an offline dataset. ``sync`` is None for a frozen reference, ``clip`` for an unclipped log-ratio.
    """

    data: str = "initial"
    sync: int | None = SYNC
    clip: Bounds | None = CLIP
    objective: str = "grpo"
    steps: int = STEPS
    model: str = "smollm2"
    lr: float | None = None  # None is the model's, for the objective

    @property
    def every(self) -> int | None:
        """The steps that a round of answers is for; None offline."""
        return {"online": 1, "sparse": self.steps // 2, "fresh": STEPS}.get(self.data)

    @property
    def name(self) -> str:
        clip = f"clip_{self.clip[0]:g}_{self.clip[1]:g}" if self.clip else "plain"
        lr = "" if self.lr is None else f"-lr_{self.lr:g}"
        return f"{self.model}-{self.objective}-{self.data}-{clip}-sync_{self.sync}-{self.steps}{lr}"


HUMANLINE, OFFLINE = Arm(), Arm(sync=None, clip=None)
UNTRAINED = Arm("none", sync=None, clip=None, steps=0)
ONLINE = Arm("online", sync=1, clip=None)


def five(model: str = "smollm2", steps: int = STEPS) -> tuple[Arm, ...]:
    """Returns the untrained model and the five ways to train one."""
    arms = (ONLINE, Arm("sparse", sync=steps // 2, clip=None), Arm("sparse"), OFFLINE, HUMANLINE)
    return (replace(UNTRAINED, model=model), *(replace(arm, model=model, steps=steps) for arm in arms))


EXPERIMENTS: dict[str, tuple[Arm, ...]] = {
    "five": five(),
    "ablation": tuple(
        replace(HUMANLINE, objective=objective, sync=sync, clip=clip)
        for objective in ("dpo", "kto", "grpo")
        for sync, clip in ((None, None), (None, CLIP), (SYNC, None), (SYNC, CLIP))
    ),
    "rate": tuple(
        replace(arm, objective=objective, lr=lr)
        for objective, lr in (("dpo", 2.5e-6), ("dpo", 5e-6), ("dpo", None), ("kto", 5e-6), ("kto", None))
        for arm in (OFFLINE, HUMANLINE)
    ),
    "clip": tuple(replace(HUMANLINE, clip=clip) for clip in (None, CLIP, (-0.1, 1.0), (-0.1, 0.5))),
    "sync": tuple(replace(HUMANLINE, sync=sync) for sync in (1, 4, 12, 24, None)),
    "longer": (
        ONLINE,
        *(replace(HUMANLINE, steps=4 * STEPS, data=data) for data in ("initial", "initial_x4", "fresh")),
    ),
    "better": tuple(replace(HUMANLINE, data=data) for data in ("hot", "initial", "online_16", "online_48")),
    "quality": tuple(replace(HUMANLINE, data=f"quartile_{i}") for i in (1, 2, 3, 4)),
    "gemma": five("gemma3_270m", STEPS // 2),
}

# Where offline datasets come from: the step of an online run whose policy answers, the temperature, and the size. The
# dataset "initial" is the model's initial one, of that at most DATASET groups, and "quartile_N" is a quarter of
# initial_x4 by mean log-prob.
SOURCES: dict[str, dict[str, Any]] = {
    "initial_half": {"groups": DATASET // 2},
    "initial_x4": {"groups": 4 * DATASET},
    "hot": {"temperature": 1.5, "prompts_per_group": 3},
    "online_16": {"after": 16},
    "online_48": {"after": 48},
}


# ------------------------------------------------------------------------------------------------------------- the task


def write_prompts(folder: Path, name: str) -> tuple[Path, Path]:
    """Writes a model's prompts of training and of evaluation, and returns their files."""
    model, numbers = MODELS[name], range(1, MODELS[name].largest + 1)
    begin = [{"role": "system", "content": model.system}] if model.system else []
    begin += [turn for example in model.examples for turn in _turns(*example)]
    pairs = [(a, b) for a in numbers for b in numbers]
    random.Random(0).shuffle(pairs)
    rows = [json.dumps({"prompt": [*begin, _turns(a, b)[0]], "answer": a + b}) + "\n" for a, b in pairs]
    files = folder / f"{name}-train_prompts.jsonl", folder / f"{name}-held_out_prompts.jsonl"
    for file, part in zip(files, (rows[HELD_OUT:], rows[:HELD_OUT]), strict=True):
        write(file, "".join(part))
    return files


def _turns(a: int, b: int) -> list[dict[str, str]]:
    question = {"role": "user", "content": f"{a} + {b}?"}
    return [question, {"role": "assistant", "content": f"{a} + {b} = {a + b}"}]


def dataset(folder: Path, arm: Arm) -> Path:
    """Makes the offline dataset of an arm, if it is not there, and returns its file.

    GRPO and KTO learn from all answers of a group, DPO from a right and a wrong one.
    """
    source = arm.data if arm.data in SOURCES and arm.data != "initial" else MODELS[arm.model].initial
    groups = sampled_groups(folder / f"data-{arm.model}-{source}", arm.model, **SOURCES[source])
    if arm.data == "initial":
        groups = groups[:DATASET]
    elif arm.data.startswith("quartile_"):
        quartile = int(arm.data[-1])
        groups = sorted(groups, key=mean_log_prob)[(quartile - 1) * DATASET : quartile * DATASET]
    file = folder / f"{arm.model}-{arm.data}.jsonl"
    write(file, "".join(json.dumps(group) + "\n" for group in groups))
    return file


def sampled_groups(
    folder: Path,
    model: str,
    after: int = 0,
    temperature: float = 1.0,
    groups: int = DATASET,
    prompts_per_group: float = 2.5,
) -> list[dict[str, Any]]:
    """Returns groups of a policy's answers, each with a right and a wrong one; samples them if they are not there.

    They are kept in the repository, since another machine would round otherwise and sample other answers.
    """
    kept = DATASETS / f"{folder.name.removeprefix('data-')}.jsonl.gz"
    with locked(folder):
        if not kept.is_file():
            for half_done in ("checkpoints", "rounds", "logs"):
                shutil.rmtree(folder / half_done, ignore_errors=True)
            changes: dict[str, Any] = {
                "max_steps_per_epoch": 1,
                "source.every": STEPS,
                "source.groups_per_round": int(prompts_per_group * groups),
                "source.temperature": temperature,
                "save_every_n_steps": None,
            }
            if after:
                policy = replace(ONLINE, model=model, steps=after)
                run(folder.parent, policy, 0, keep_weights=True)
                changes |= weights_of(folder.parent / f"{policy.name}-0" / "epoch_0")
            train(folder, replace(ONLINE, model=model), 0, changes)
            remove_weights(folder)
            keep_groups(kept, read(folder / "rounds" / "round_0.jsonl"), groups)
        return [json.loads(line) for line in gzip.decompress(kept.read_bytes()).splitlines()]


def keep_groups(kept: Path, sampled: list[dict[str, Any]], groups: int) -> None:
    """Writes the first groups that have a right and a wrong answer, without what the runs do not read."""
    mixed = [group for group in sampled if len(set(group["scores"])) > 1]
    if len(mixed) < groups:
        raise SystemExit(f"{kept}: {len(mixed)} groups have a right and a wrong answer, {groups} are needed")
    fields = ("prompt", "responses", "scores", "logps")
    lines = "".join(json.dumps({name: group[name] for name in fields}) + "\n" for group in mixed[:groups])
    kept.parent.mkdir(exist_ok=True)
    partial = kept.with_name(f"{kept.name}.{os.getpid()}")
    partial.write_bytes(gzip.compress(lines.encode(), mtime=0))
    os.replace(partial, kept)


def mean_log_prob(group: dict[str, Any]) -> float:
    """Mean over a group's answers of the mean log-prob of their tokens, under the policy that sampled them."""
    return fmean(fmean(log_probs) for log_probs in group["logps"])


# ------------------------------------------------------------------------------------------------------------- the runs


def run(folder: Path, arm: Arm, seed: int, keep_weights: bool = False) -> dict[str, Any]:
    """Trains and measures one run, without the parts that are done, and returns its result."""
    mine = folder / f"{arm.name}-{seed}"
    if arm.steps == 0:
        mine.mkdir(parents=True, exist_ok=True)
        return {**asdict(arm), "seed": seed, **evaluate(folder, mine, MODELS[arm.model].folder, arm, seed)}
    result, costs = mine / "result.json", mine / "costs.json"
    if not result.is_file():
        mine.mkdir(parents=True, exist_ok=True)
        if not costs.is_file():
            write(costs, json.dumps(train(mine, arm, seed, objective_changes(folder, arm))))
        epochs = sorted(mine.glob("epoch_*"), key=lambda path: int(path.name.partition("_")[2]))
        measured = [
            evaluate(folder, mine, weights, arm, seed) for weights in (epochs if arm.steps > STEPS else epochs[-1:])
        ]
        from humanline.report import read_runs  # needs plotly, which drawing the results does not

        (logged,) = (log.metrics for log in read_runs([mine]))
        steps_per_epoch = arm.steps // len(epochs)
        found = {
            **asdict(arm),
            "seed": seed,
            **json.loads(costs.read_text()),
            "processor": processor(),
            # Of the tokens that moved, those outside of the bounds; mean over the steps.
            "clipped": fmean(1 - share for share in logged["unclamped"].values()) if arm.clip else None,
            "kl_to_reference": fmean([*logged["kl"].values()][-arm.steps // 8 :]),
            "tokens_sampled": sum(logged.get("rounds/tokens", {}).values()),
            "sampling_seconds": sum(logged.get("rounds/seconds", {}).values()),
            **measured[-1],
        }
        if len(measured) > 1:
            found["curve"] = {(i + 1) * steps_per_epoch: figures for i, figures in enumerate(measured)}
        write(result, json.dumps(found, indent=2))
    if not keep_weights:
        remove_weights(mine)
    return json.loads(result.read_text())


def evaluate(folder: Path, mine: Path, weights: Path, arm: Arm, seed: int) -> dict[str, Any]:
    """Returns figures of a model's answers to the held-out sums."""
    output = mine / f"{weights.name}.json"
    changes = {
        **MODELS[arm.model].config,
        **weights_of(weights),
        "prompts": write_prompts(folder, arm.model)[1],
        "output": output,
    }
    changes |= {"max_new_tokens": NEW_TOKENS, "samples_per_prompt": 4, "batch_size": 480, "seed": seed, "k": "[1]"}
    tune("humanline_eval", ROOT / "configs" / "smollm2_135m_eval.yaml", *(f"{k}={v}" for k, v in changes.items()))
    figures = json.loads(output.read_text())["figures"]
    answers = [
        score > 0.5
        for row in read(output.with_suffix(".jsonl"))
        for score, reason in zip(row["all_rm_scores"], row["finish_reasons"], strict=True)
        if reason == "stop"
    ]
    finished = sum(answers) / len(answers) if answers else None
    return {"pass@1": figures["pass@1"], "right_of_finished": finished, "cut": figures["cut"]["mean"]}


def objective_changes(folder: Path, arm: Arm) -> dict[str, Any]:
    """Returns what an arm changes in the config of online GRPO."""
    if arm.every:
        # About half of the prompts are of use: the answers to the others are all right or all wrong.
        return {"source.every": arm.every, "source.groups_per_round": 2 * GROUPS * arm.every}
    file = dataset(folder, arm)
    changes: dict[str, Any] = {"source": None, "engine": None, "reward": None}
    changes |= {"dataset._component_": "humanline.data.encoded_groups", "dataset.source": str(file)}
    if arm.objective != "grpo":
        changes["loss"] = {"_component_": f"humanline.losses.Humanline{arm.objective.upper()}Loss", "beta": 0.1}
    if arm.objective == "kto":
        scores = [score for group in read(file) for score in group["scores"]]
        right = sum(score > 0.5 for score in scores)
        changes["loss"]["desirable_weight"] = round(1.15 * (len(scores) - right) / right, 2)
    return changes


def train(folder: Path, arm: Arm, seed: int, changes: dict[str, Any]) -> dict[str, Any]:
    """Trains one run, or resumes it, and returns the CPU seconds of this attempt, and whether there was one before."""
    resumed = any((folder / "checkpoints").glob("step_*[0-9]"))
    if not resumed:
        remove_weights(folder)
    config: Any = OmegaConf.load(ROOT / "configs" / "smollm2_135m_grpo_online.yaml")
    shared: dict[str, Any] = {
        "output_dir": str(folder),
        "seed": seed,
        "batch_size": GROUPS,
        "epochs": 1,
        "max_steps_per_epoch": arm.steps,
        **MODELS[arm.model].config,
        **weights_of(MODELS[arm.model].folder),
        "source.prompts": str(write_prompts(folder.parent, arm.model)[0]),
        "source.generations": GENERATIONS,
        "source.max_new_tokens": NEW_TOKENS,
        "source.temperature": 1.0,
        "tokens_per_row": 1024,
        "rows_per_pass": 1,
        "optimizer.lr": arm.lr or MODELS[arm.model].lr[arm.objective],
        "dataset_val": None,  # only training is timed
        "run_val_every_n_steps": None,
        "save_every_n_steps": 32 if arm.steps > STEPS else None,
        "keep_last_n_checkpoints": 1,
        "resume_from_checkpoint": "latest" if resumed else False,
        "lr_scheduler.warmup_ratio": STEPS / 10 / arm.steps,  # the first steps of a longer run are those of a short one
    }
    later: dict[str, Any] = {"reference.sync_every": arm.sync}
    later |= {f"loss.log_eps_{side}": arm.clip[i] if arm.clip else None for i, side in enumerate("PR")}
    if changes.get("dataset.source"):  # epochs that are as long as the dataset, until there are enough steps
        groups = len(read(Path(changes["dataset.source"])))
        batch = changes.get("batch_size", GROUPS)
        epoch = min(arm.steps, groups // batch)
        shared |= {"epochs": -(-arm.steps // epoch), "max_steps_per_epoch": epoch}
    for key, value in (shared | changes | later).items():
        OmegaConf.update(config, key, value)
    OmegaConf.save(config, folder / "config.yaml")
    before = cpu_seconds()
    tune(f"humanline_{arm.objective}_single_device", folder / "config.yaml")
    return {"cpu_seconds": cpu_seconds() - before, "resumed": resumed}


def tune(recipe: str, config: Path, *overrides: str) -> None:
    command = [str(Path(sys.executable).with_name("tune")), "run", f"recipes/{recipe}", "--config", str(config)]
    subprocess.run([*command, *overrides], cwd=ROOT, check=True)


def weights_of(folder: Path) -> dict[str, Any]:
    """Returns the changes that make a config read the weights of a folder."""
    files = sorted(file.name for file in folder.glob("*.safetensors"))
    return {"checkpointer.checkpoint_dir": str(folder), "checkpointer.checkpoint_files": files}


def remove_weights(folder: Path) -> None:
    for weights in [*folder.glob("epoch_*[0-9]"), folder / "checkpoints"]:
        shutil.rmtree(weights, ignore_errors=True)


def processor() -> str:
    info = Path("/proc/cpuinfo")
    names = [line.partition(":")[2].strip() for line in info.read_text().splitlines() if line.startswith("model name")]
    return names[0] if names else platform.processor()


def cpu_seconds() -> float:
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


# ------------------------------------------------------------------------------------------------------------ the files


def read(file: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in file.read_text().splitlines()]


def write(file: Path, text: str) -> None:
    """Writes a file so that it is complete or absent, for other processes too."""
    partial = file.with_name(f"{file.name}.{os.getpid()}")
    partial.write_text(text)
    os.replace(partial, file)


@contextmanager
def locked(folder: Path, wait: bool = True) -> Iterator[bool]:
    """Locks a folder within the block. Without ``wait`` yields False if another process has locked it."""
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / ".replicate.lock", "w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except BlockingIOError:
            yield False
            return
        yield True


def known() -> list[dict[str, Any]]:
    return json.loads(RESULTS.read_text()) if RESULTS.is_file() else []


def keep(result: dict[str, Any]) -> None:
    """Adds a result to docs/replication.json."""
    with locked(ROOT / "outputs"):
        rest = [other for other in known() if key(other) != key(result)]
        write(RESULTS, json.dumps(sorted([*rest, result], key=key), indent=1) + "\n")


def key(result: dict[str, Any]) -> str:
    clip = result["clip"] and tuple(result["clip"])
    rest = {name: result[name] for name in ("data", "sync", "objective", "steps", "model")}
    arm = Arm(**rest, clip=clip, lr=result.get("lr"))
    return f"{arm.name}-{result['seed']}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("experiments", nargs="*", metavar="EXPERIMENT", help=", ".join(EXPERIMENTS))
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--output", type=Path, default=ROOT / "outputs" / "replicate")
    parser.add_argument("--list", action="store_true", help="list the experiments' arms and their finished seeds")
    arguments = parser.parse_args()
    if unknown := set(arguments.experiments) - EXPERIMENTS.keys():
        parser.error(f"no experiment is named {', '.join(unknown)}; there are {', '.join(EXPERIMENTS)}")
    folder = arguments.output.absolute()
    arms = {
        arm: None for name in arguments.experiments or EXPERIMENTS for arm in EXPERIMENTS[name]
    }  # each once, in order
    if arguments.list:
        for arm in arms:
            print(arm.name, *(result["seed"] for result in known() if key(result).rpartition("-")[0] == arm.name))
        return
    folder.mkdir(parents=True, exist_ok=True)
    for name in {arm.model for arm in arms}:
        fetch = [sys.executable, *MODELS[name].fetch, "--output-dir", str(MODELS[name].folder)]
        subprocess.run(fetch, cwd=ROOT, check=True)
    for seed in arguments.seeds:
        for arm in arms:
            name = f"{arm.name}-{seed}"
            with locked(folder / name, wait=False) as mine:
                if mine and name not in map(key, known()):
                    keep(run(folder, arm, seed))


if __name__ == "__main__":
    main()
