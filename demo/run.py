"""The demo: trains SmolLM2 with humanline DPO, KTO, GRPO or DPO with LoRA, and measures it before and after.

    make demo                    # or, with the package installed: python demo/run.py
    make demo OBJECTIVE=kto      # or grpo, dpo_lora; python demo/run.py kto

1. Fetches SmolLM2-135M-Instruct.
2. Measures pass@1: one sampled response to each of 240 held-out sums.
3. Trains with `tune run recipes/humanline_dpo_distributed --config configs/smollm2_135m_dpo.yaml`, or the recipe and
   config of kto or grpo. dpo_lora runs `humanline_dpo_single_device`.
4. Measures again. Prints both results with 95% intervals, and some responses before and after.
5. Writes a report of the run: `humanline report`.

The report (report.html), the training log, the samples and the aligned model (a Hugging Face folder) are in
outputs/smollm2_135m_humanline_dpo (_kto, _grpo, _dpo_lora).
"""

import argparse
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

from arithmetic import HELD_OUT_PROMPTS, is_right, read_jsonl, wilson_interval

ROOT = Path(__file__).parent.parent
MODEL = ROOT / "models" / "SmolLM2-135M-Instruct"
TUNE = Path(sys.executable).with_name("tune")


def call(*command: object) -> None:
    print(f"\n$ {' '.join(map(str, command)).replace(f'{ROOT}/', '').replace(str(TUNE), 'tune')}", flush=True)
    subprocess.run(list(map(str, command)), cwd=ROOT, check=True)


def sample(folder: Path, weights: str, output: Path) -> list[dict]:
    """Samples one response of the model in ``folder`` to each held-out prompt."""
    call(
        *(TUNE, "run", "recipes/humanline_sample", "--config", "configs/smollm2_135m_sample.yaml"),
        *(f"checkpointer.checkpoint_dir={folder}", f"checkpointer.checkpoint_files=[{weights}]"),
        *(f"prompts={HELD_OUT_PROMPTS}", f"output={output}", "temperature=0.7", "max_new_tokens=48", "batch_size=240"),
    )
    return read_jsonl(output)


def preference_accuracy(output: Path) -> tuple[float, float, int]:
    """Returns the share of held-out pairs with the right response likelier, before and after, and their number."""
    log = (output / "logs" / "metrics.txt").read_text()
    shares = [float(value) for value in re.findall(r"val/log_probs/accuracies:(\S+)", log)]
    return shares[0], shares[-1], len(read_jsonl(ROOT / "demo" / "held_out_groups.jsonl"))


def percent(successes: int, trials: int) -> str:
    low, high = wilson_interval(successes, trials)
    return f"{successes / trials:6.1%}  [{low:5.1%}, {high:5.1%}]"


def main() -> None:
    parser = argparse.ArgumentParser(description="Aligns SmolLM2-135M-Instruct on sums and measures it.")
    parser.add_argument("objective", choices=("dpo", "kto", "grpo", "dpo_lora"), default="dpo", nargs="?")
    objective = parser.parse_args().objective
    output = ROOT / "outputs" / f"smollm2_135m_humanline_{objective}"
    aligned = output / "epoch_0"

    start = time.perf_counter()
    shutil.rmtree(output / "logs", ignore_errors=True)  # the new run replaces the other files itself
    call(sys.executable, "-m", "humanline.tools.fetch_smollm2", "--output-dir", MODEL)
    before = sample(MODEL, "model.safetensors", output / "before.jsonl")
    trained = time.perf_counter()
    config = f"configs/smollm2_135m_{objective}.yaml"
    recipe = (ROOT / config).read_text().split()[2].rstrip(",")  # the first line is "# recipe: NAME"
    call(TUNE, "run", f"recipes/{recipe}", "--config", config)
    trained = time.perf_counter() - trained
    after = sample(aligned, "model-00001-of-00001.safetensors", output / "after.jsonl")

    right = [
        sum(is_right(row["all_generated_responses"][0], row["answer"]) for row in rows) for rows in (before, after)
    ]
    preferred_before, preferred_after, pairs = preference_accuracy(output)
    print(f"\n{'':28}{'before':^24}{'after':^24}")
    preferred = [round(share * pairs) for share in (preferred_before, preferred_after)]
    for name, counts, trials in (("pass@1", right, len(before)), ("preference accuracy", preferred, pairs)):
        columns = "".join(f"{percent(count, trials):24}" for count in counts)
        print(f"{f'{name} (of {trials})':28}{columns}")
    print("\nThe first five held-out prompts:")
    for first, second in list(zip(before, after, strict=True))[:5]:
        print(f"  {first['prompt'][-1]['content']}")
        for name, row in (("before", first), ("after", second)):
            print(f"    {name:7}{' '.join(row['all_generated_responses'][0].split())}")
    call(Path(sys.executable).with_name("humanline"), "report", output)
    seconds = time.perf_counter() - start
    print(f"\nTraining took {trained:.0f} s of {seconds:.0f} s. The aligned model: {aligned.relative_to(ROOT)}")


if __name__ == "__main__":
    main()
