"""Compares an optimizer step of humanline with one of torchtune and one of TRL, in one run on this machine.

    python benchmarks/compare.py GROUPS.jsonl                    # DPO, at most 512 tokens, one thread
    python benchmarks/compare.py GROUPS.jsonl --objectives dpo kto grpo --max-tokens 512 1250 --threads 1 2
    python benchmarks/compare.py GROUPS.jsonl --against trl      # 13 GB; all three need 23

GROUPS.jsonl has scored groups, such as UltraFeedback-ArmoRM's rows (docs/data.md). A step takes 8 of them: for DPO the
best and the worst response of each, for KTO both as examples of their own, for GRPO five. All contestants train
SmolLM2-135M-Instruct's real weights on the same token ids, with bf16 compute, activation checkpointing and the same
AdamW. Each runs in a process of its own, so that its peak memory is its own. They take turns, step by step.

- humanline: the recipe itself, with float32 master weights, and a `WindowedReference` that is synced at every step, so
that each step does the same work. `--reference ModelReference` uses a second model.
- torchtune: the step of torchtune 0.6.1's `full_dpo_distributed` (that recipe does not start on a CPU). bf16 weights,
chosen and rejected padded to the longest of the batch, full logits, a frozen second model. For DPO only.
- trl: its newest trainers, in an environment that this program makes in the output folder. Float32 weights under
autocast, a frozen second model, KTO and GRPO in microbatches of 8 sequences; GRPO without its sampling.

The table has for each contestant the seconds per step and the tokens per second, medians over the steps after the
first, and the peak of the resident memory; the ratios are medians over the steps of humanline's time to the other's.
"""

import argparse
import itertools
import json
import os
import resource
import runpy
import statistics
import subprocess
import sys
import tempfile
import time
import venv
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).parent.parent
MODEL = ROOT / "models" / "SmolLM2-135M-Instruct"
GROUPS_PER_STEP, LR, BETA = 8, 1e-6, 0.1
CONTESTANTS = {"dpo": ("humanline", "torchtune", "trl"), "kto": ("humanline", "trl"), "grpo": ("humanline", "trl")}

Groups = list[dict[str, Any]]


# ------------------------------------------------------------------------------------------------------ the turns


def report(seconds: float, groups: Groups, step: int) -> None:
    batch = groups[step * GROUPS_PER_STEP : (step + 1) * GROUPS_PER_STEP]
    tokens = sum(len(group["prompt"]) + len(response) for group in batch for response in group["responses"])
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6
    print(json.dumps({"seconds": seconds, "tokens": tokens, "peak_gb": peak}), flush=True)


class TurnLogger:
    """A metric logger of torchtune's interface that waits for its turn after each step."""

    def __init__(self, data: str) -> None:
        self.groups, self.step, self.start = read(Path(data)), 0, 0.0
        self.wait()

    def wait(self) -> None:
        if not sys.stdin.readline():
            os._exit(0)
        self.start = time.perf_counter()

    def log_dict(self, payload: Any, step: int) -> None:
        report(time.perf_counter() - self.start, self.groups, self.step)
        self.step += 1
        self.wait()

    def log(self, name: str, data: float, step: int) -> None:
        raise NotImplementedError

    def log_config(self, config: Any) -> None: ...

    def close(self) -> None: ...


# ------------------------------------------------------------------------------------------------------ the contestants


def humanline(objective: str, data: Path, reference: str) -> None:
    groups = len(read(data))
    config = {"dpo": "smollm2_135m_dpo", "kto": "smollm2_135m_kto", "grpo": "smollm2_135m_grpo"}[objective]
    changes: dict[str, Any] = {
        "output_dir": data.parent / f"humanline-{objective}-{os.getpid()}",
        "dataset._component_": "humanline.data.encoded_groups",
        "dataset.source": data,
        "dataset.max_tokens": None,
        "dataset.max_prompt_tokens": None,
        "dataset_val": "null",
        "run_val_every_n_steps": "null",
        "batch_size": GROUPS_PER_STEP,
        "max_steps_per_epoch": groups // GROUPS_PER_STEP,
        "shuffle": False,
        "reference._component_": f"humanline.reference.{reference}",
        "reference.sync_every": 1,
        "optimizer.lr": LR,
        "loss.beta": BETA,
        "lr_scheduler": "null",
        "tokens_per_row": 2560,
        "rows_per_pass": 1,
        "enable_activation_checkpointing": True,
        "metric_logger._component_": "compare.TurnLogger",
        "metric_logger.data": data,
        "metric_logger.log_dir": None,
        "metric_logger.filename": None,
    }
    removed = [f"~{key}" for key, value in changes.items() if value is None]
    sys.argv = ["humanline", "--config", str(ROOT / "configs" / f"{config}.yaml"), *removed]
    sys.argv += [f"{key}={value}" for key, value in changes.items() if value is not None]
    os.chdir(ROOT)
    runpy.run_path(str(ROOT / "recipes" / f"humanline_{objective}_single_device.py"), run_name="__main__")


def torchtune(objective: str, data: Path, reference: str) -> None:
    steps = _torchtune_steps(read(data))
    next(steps)  # loads the models
    logger = TurnLogger(str(data))
    for _ in steps:
        logger.log_dict({}, 0)


def _torchtune_steps(groups: Groups) -> Iterator[None]:
    from humanline.models import smollm2_135m
    from torchtune import modules, rlhf, training
    from torchtune.data import padded_collate_dpo
    from torchtune.rlhf.loss import DPOLoss
    from torchtune.training import FullModelHFCheckpointer

    checkpointer = FullModelHFCheckpointer(str(MODEL), ["model.safetensors"], "LLAMA3_2", tempfile.mkdtemp())
    weights = checkpointer.load_checkpoint()["model"]
    with training.set_default_dtype(torch.bfloat16):
        policy, reference = smollm2_135m(), smollm2_135m().eval().requires_grad_(False)
    for model in (policy, reference):
        model.load_state_dict(weights)
    training.set_activation_checkpointing(policy, auto_wrap_policy={modules.TransformerSelfAttentionLayer})
    optimizer = torch.optim.AdamW(policy.parameters(), lr=LR, fused=True)
    loss_fn = DPOLoss(beta=BETA)
    yield

    def forward(model: torch.nn.Module, batch: tuple[torch.Tensor, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
        tokens, labels = batch
        logps = rlhf.get_batch_log_probs(model(tokens), labels)
        return logps[: len(tokens) // 2], logps[len(tokens) // 2 :]

    for start in range(0, len(groups), GROUPS_PER_STEP):
        examples = [
            {
                f"{side}_{part}": prompt + response if part == "input_ids" else [-100] * len(prompt) + response
                for side, response in zip(("chosen", "rejected"), group["responses"], strict=True)
                for part in ("input_ids", "labels")
            }
            for group in groups[start : start + GROUPS_PER_STEP]
            for prompt in [group["prompt"]]
        ]
        batch = padded_collate_dpo(examples, padding_idx=0)
        policy_logps = forward(policy, batch)
        with torch.no_grad():
            reference_logps = forward(reference, batch)
        loss, *_ = loss_fn(*policy_logps, *reference_logps)
        loss.mean().backward()
        torch.nn.utils.clip_grad_norm_(policy.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        yield


def trl(objective: str, data: Path, _: str) -> None:
    from transformers import TrainerCallback

    groups = read(data)

    class Turns(TrainerCallback):
        def on_train_begin(self, *_: Any, **__: Any) -> None:
            self.logger = TurnLogger(str(data))

        def on_step_end(self, *_: Any, **__: Any) -> None:
            self.logger.log_dict({}, 0)

    trainer = {"dpo": _trl_dpo, "kto": _trl_kto, "grpo": _trl_grpo}[objective](groups, data.parent / "trl-output")
    trainer.add_callback(Turns())
    trainer.train()


def _trl_settings(folder: Path, sequences: int, steps: int) -> dict[str, Any]:
    return {
        "output_dir": str(folder),
        "use_cpu": True,
        "bf16": True,
        "gradient_checkpointing": True,
        "per_device_train_batch_size": sequences,
        "max_steps": steps,
        "learning_rate": LR,
        "lr_scheduler_type": "constant",
        "optim": "adamw_torch_fused",
        "weight_decay": 0.01,
        "max_grad_norm": 1.0,
        "beta": BETA,
        "logging_steps": 1_000_000,
        "save_strategy": "no",
        "report_to": [],
        "disable_tqdm": True,
        "dataloader_pin_memory": False,
    }


def _load_for_trl() -> tuple[Any, Any, Any]:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    models = [AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.float32) for _ in range(2)]
    return *models, AutoTokenizer.from_pretrained(MODEL)


def _on_these_ids(trainer: Any) -> Any:
    """Returns a trainer that takes the dataset's token ids as they are, in their order."""

    class OnTheseIds(trainer):
        def _prepare_dataset(self, dataset: Any, *_: Any, **__: Any) -> Any:
            return dataset

        def _get_train_sampler(self, *_: Any) -> Any:
            return torch.utils.data.SequentialSampler(self.train_dataset)

    return OnTheseIds


def _trl_dpo(groups: Groups, folder: Path) -> Any:
    from datasets import Dataset
    from trl import DPOConfig, DPOTrainer

    rows = [
        {"prompt_ids": group["prompt"], "chosen_ids": group["responses"][0], "rejected_ids": group["responses"][1]}
        for group in groups
    ]
    model, reference, tokenizer = _load_for_trl()
    settings = _trl_settings(folder, GROUPS_PER_STEP, len(groups) // GROUPS_PER_STEP)
    config = DPOConfig(**settings, max_length=None)
    trainer = _on_these_ids(DPOTrainer)
    return trainer(model, reference, config, train_dataset=Dataset.from_list(rows), processing_class=tokenizer)


def _trl_kto(groups: Groups, folder: Path) -> Any:
    from datasets import Dataset
    from trl import KTOConfig, KTOTrainer

    rows = [
        {"prompt_ids": group["prompt"], "completion_ids": response, "label": index == 0}
        for group in groups
        for index, response in enumerate(group["responses"])
    ]
    for start in range(0, len(rows), 8):  # TRL pairs each prompt with the next response of its microbatch
        batch = rows[start : start + 8]
        for row, other in zip(batch, batch[-1:] + batch[:-1], strict=True):
            row["KL_completion_ids"] = other["completion_ids"]
    model, reference, tokenizer = _load_for_trl()
    settings = _trl_settings(folder, 8, len(groups) // GROUPS_PER_STEP)
    config = KTOConfig(**settings, gradient_accumulation_steps=2 * GROUPS_PER_STEP // 8, max_length=None)
    trainer = _on_these_ids(KTOTrainer)
    return trainer(model, reference, config, train_dataset=Dataset.from_list(rows), processing_class=tokenizer)


def _trl_grpo(groups: Groups, folder: Path) -> Any:
    from datasets import Dataset
    from trl import GRPOConfig, GRPOTrainer
    from trl.trainer.utils import pad

    size, generations = 8, len(groups[0]["responses"])
    microbatches = GROUPS_PER_STEP * generations // size
    sequences = [
        (group["prompt"], response, advantage)
        for group in groups
        for response, advantage in zip(group["responses"], advantages(group["scores"]), strict=True)
    ]

    class OnTheseIds(GRPOTrainer):
        done = 0

        def _prepare_inputs(self, _: Any) -> dict[str, Any]:
            batch = sequences[self.done * size : (self.done + 1) * size]
            self.done += 1
            inputs: dict[str, Any] = {"advantages": torch.tensor([each[2] for each in batch])}
            for place, name, side in ((0, "prompt", "left"), (1, "completion", "right")):
                ids = [torch.tensor(each[place]) for each in batch]
                inputs[f"{name}_ids"] = pad(ids, self.processing_class.pad_token_id, padding_side=side)
                inputs[f"{name}_mask"] = pad([torch.ones_like(each) for each in ids], 0, padding_side=side)
            inputs["num_items_in_batch"] = inputs["completion_mask"].sum() * microbatches
            whole = [torch.cat([inputs["prompt_" + kind], inputs["completion_" + kind]], 1) for kind in ("ids", "mask")]
            with torch.no_grad():
                found = self._get_per_token_logps_and_entropies(
                    self.ref_model, *whole, inputs["completion_ids"].size(1), batch_size=size
                )
            inputs["ref_per_token_logps"] = found[0]
            return inputs

    model, _, tokenizer = _load_for_trl()
    settings = _trl_settings(folder, size, len(groups) // GROUPS_PER_STEP)
    config = GRPOConfig(**settings, gradient_accumulation_steps=microbatches, num_generations=size)
    prompts = Dataset.from_list([{"prompt": "unused"}] * len(sequences))
    return OnTheseIds(model, lambda **_: [0.0] * size, config, train_dataset=prompts, processing_class=tokenizer)


def advantages(scores: list[float]) -> list[float]:
    mean, spread = statistics.fmean(scores), statistics.pstdev(scores)
    return [(score - mean) / (spread + 0.01) for score in scores]


# ------------------------------------------------------------------------------------------------------ the data


def read(file: Path) -> Groups:
    return [json.loads(line) for line in file.read_text().splitlines()]


def encode(source: Path, file: Path, objective: str, max_tokens: int, count: int) -> None:
    """Writes groups of token ids: best and worst response for DPO and KTO, five with different scores for GRPO.

    Raises:
        SystemExit: if the source has too few groups.
    """
    from humanline.data import ChatTokenizer, as_pairs, scored_groups

    tokenizer = ChatTokenizer(str(MODEL))
    dataset = scored_groups(tokenizer, str(source), max_tokens=max_tokens, max_prompt_tokens=max_tokens // 2)
    dataset = dataset if objective == "grpo" else as_pairs(dataset)
    lines = []
    for group in (dataset[index] for index in range(len(dataset))):
        line: dict[str, Any] = {"prompt": list(group.prompt), "responses": [list(each) for each in group.responses[:5]]}
        if objective == "grpo":
            line["scores"] = list((group.scores or ())[:5])
            if len(line["scores"]) < 5 or len(set(line["scores"])) == 1:
                continue
        lines.append(json.dumps(line) + "\n")
        if len(lines) == count:
            break
    else:
        raise SystemExit(f"error: {source}: {len(lines)} groups are of use for {objective}, {count} are needed")
    file.write_text("".join(lines))


# ------------------------------------------------------------------------------------------------------ the comparison


class Child:
    """A contestant in a process of its own, which runs a step for each line that it is sent."""

    def __init__(self, name: str, objective: str, data: Path, threads: int, reference: str) -> None:
        python = trl_python(data.parent) if name == "trl" else sys.executable
        command = [python, __file__, "--child", name, objective, str(data), reference]
        environment = os.environ | {"OMP_NUM_THREADS": str(threads), "PYTHONPATH": str(ROOT / "benchmarks")}
        log = (data.parent / f"{name}-{data.stem}-{threads}.log").open("w")
        pipe = subprocess.PIPE
        self.log, self.name = log.name, name
        self.process = subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=log, text=True, env=environment)

    def step(self) -> dict[str, float]:
        """Runs the next step, and returns its seconds, its tokens and the peak memory so far."""
        assert self.process.stdin and self.process.stdout
        print(file=self.process.stdin, flush=True)
        for line in self.process.stdout:
            if line.startswith('{"seconds"'):
                return json.loads(line)
        raise SystemExit(f"error: {self.name} failed; see {self.log}")


def trl_python(folder: Path) -> str:
    """Returns the Python of an environment with the newest TRL, which it makes if there is none."""
    environment = folder / "trl"
    python = environment / "bin" / "python"
    if not (environment / "installed").is_file():
        venv.create(environment, with_pip=True, clear=True)
        packages = [f"torch=={torch.__version__.partition('+')[0]}", "trl"]
        subprocess.run([python, "-m", "pip", "install", "--quiet", *packages], check=True)
        (environment / "installed").touch()
    return str(python)


def compare(objective: str, against: list[str], data: Path, steps: int, threads: int, reference: str) -> None:
    names = [name for name in CONTESTANTS[objective] if name in ("humanline", *against)]
    children = [Child(name, objective, data, threads, reference) for name in names]
    taken: dict[str, list[dict[str, float]]] = {child.name: [] for child in children}
    for _ in range(steps + 1):
        for child in children:
            taken[child.name].append(child.step())
    for child in children:
        assert child.process.stdin
        child.process.stdin.close()
        child.process.wait()
    print(f"\n{objective}, {data.stem}, {threads} thread{'s' * (threads > 1)}, {steps} steps after the first")
    print("| | s a step (range) | tokens/s | peak GB | of its time | of its memory |\n|---|---|---|---|---|---|")
    ours = taken["humanline"]
    for name, each in taken.items():
        seconds = [step["seconds"] for step in each[1:]]
        rate = statistics.median(step["tokens"] / step["seconds"] for step in each[1:])
        ratio = statistics.median(a["seconds"] / b["seconds"] for a, b in zip(ours[1:], each[1:], strict=True))
        memory = ours[-1]["peak_gb"] / each[-1]["peak_gb"]
        print(
            f"| {name} | {statistics.median(seconds):.1f} ({min(seconds):.1f} to {max(seconds):.1f}) | {rate:,.0f} "
            f"| {each[-1]['peak_gb']:.2f} | {ratio:.2f} | {memory:.2f} |",
            flush=True,
        )


def main() -> None:
    if sys.argv[1:2] == ["--child"]:
        name, objective, data, reference = sys.argv[2:]
        {"humanline": humanline, "torchtune": torchtune, "trl": trl}[name](objective, Path(data), reference)
        return
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", type=Path, metavar="GROUPS.jsonl", help="scored groups, as text")
    parser.add_argument("--objectives", nargs="+", choices=CONTESTANTS, default=["dpo"])
    parser.add_argument("--against", nargs="+", choices=("torchtune", "trl"), default=["torchtune", "trl"])
    parser.add_argument("--max-tokens", nargs="+", type=int, default=[512], help="of a prompt with a response")
    parser.add_argument("--threads", nargs="+", type=int, default=[1])
    parser.add_argument("--steps", type=int, default=6, help="steps after one that warms up")
    parser.add_argument("--reference", choices=("WindowedReference", "ModelReference"), default="WindowedReference")
    parser.add_argument("--output-dir", type=Path, default=ROOT / "outputs" / "compare")
    arguments = parser.parse_args()
    for objective in arguments.objectives:
        if not set(arguments.against) & set(CONTESTANTS[objective]):
            parser.error(f"--against: {' '.join(arguments.against)} has no step of {objective}; name trl")
    folder = arguments.output_dir.absolute()
    folder.mkdir(parents=True, exist_ok=True)
    fetch = [sys.executable, "-m", "humanline.tools.fetch_smollm2", "--output-dir", str(MODEL)]
    subprocess.run(fetch, cwd=ROOT, check=True)
    for objective, limit in itertools.product(arguments.objectives, arguments.max_tokens):
        data = folder / f"{objective}-{limit}.jsonl"
        encode(arguments.source, data, objective, limit, GROUPS_PER_STEP * (arguments.steps + 2))
        for threads in arguments.threads:
            compare(objective, arguments.against, data, arguments.steps, threads, arguments.reference)


if __name__ == "__main__":
    main()
