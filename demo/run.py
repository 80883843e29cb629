"""The demo: trains SmolLM2 on its own answers to sums, once without and once with humanline, and measures both.

    make demo                    # GRPO; or, with the package installed: python demo/run.py
    make demo OBJECTIVE=dpo      # or kto, dpo_lora; python demo/run.py dpo

1. Fetches SmolLM2-135M-Instruct.
2. Measures pass@1: four sampled answers to each of 240 held-out sums.
3. Trains twice from the same weights on the same data, in the same order: the plain objective with a frozen reference,
   then `tune run recipes/humanline_grpo_distributed --config configs/smollm2_135m_grpo.yaml`, or the recipe and config
   of dpo or kto. dpo_lora runs `humanline_dpo_single_device`.
4. Measures both. Prints the results with 95% intervals and some answers, and draws them.
5. Writes a report of both runs: `humanline report`.

The measurements, the picture (demo.png) and the report (report.html) are in outputs/demo_grpo; the runs, with the
aligned models as Hugging Face folders, in outputs/smollm2_135m_grpo and outputs/smollm2_135m_humanline_grpo.
"""

import argparse
import json
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
MODEL = ROOT / "models" / "SmolLM2-135M-Instruct"
BIN = Path(sys.executable).parent
PLAIN = ("loss.perception=none", "reference.sync_every=null")


def call(*command: object) -> None:
    print(f"\n$ {' '.join(map(str, command)).replace(f'{BIN}/', '').replace(f'{ROOT}/', '')}", flush=True)
    subprocess.run(list(map(str, command)), cwd=ROOT, check=True)


def measure(folder: Path, output: Path) -> dict[str, Any]:
    """Samples answers of the model in ``folder``, and returns their pass@1 with its interval, as fractions."""
    weights = next(file.name for file in sorted(folder.glob("model*.safetensors")))
    call(
        *(BIN / "tune", "run", "recipes/humanline_eval", "--config", "configs/smollm2_135m_eval.yaml"),
        *(f"checkpointer.checkpoint_dir={folder}", f"checkpointer.checkpoint_files=[{weights}]"),
        *(f"output={output}", "samples_per_prompt=4", "k=[1]", "batch_size=480"),
    )
    return json.loads(output.read_text())["figures"]["pass@1"]


def first_answers(output: Path) -> list[tuple[str, str]]:
    """Returns the first sums, and the first answer to each."""
    rows = [json.loads(line) for line in output.with_suffix(".jsonl").read_text().splitlines()[:4]]
    return [(row["prompt"][-1]["content"], " ".join(row["all_generated_responses"][0].split())) for row in rows]


def draw(found: dict[str, dict[str, Any]], file: Path) -> None:
    import matplotlib.pyplot as plt

    figure, axis = plt.subplots(figsize=(5, 3), layout="constrained")
    for name, each in found.items():
        distances = [[each["mean"] - each["low"]], [each["high"] - each["mean"]]]
        axis.bar(name, each["mean"], yerr=distances, capsize=6)
    axis.set(ylabel="pass@1, with its 95% interval", ylim=(0, 1))
    figure.savefig(file, dpi=150)


def main() -> None:
    parser = argparse.ArgumentParser(description="Aligns SmolLM2-135M-Instruct on sums and measures it.")
    parser.add_argument("objective", choices=("grpo", "dpo", "kto", "dpo_lora"), default="grpo", nargs="?")
    objective = parser.parse_args().objective
    method = objective.upper().split("_")[0]
    config = f"configs/smollm2_135m_{objective}.yaml"
    recipe = (ROOT / config).read_text().split()[2].rstrip(",")  # the first line is "# recipe: NAME"
    folder = ROOT / "outputs" / f"demo_{objective}"
    folder.mkdir(parents=True, exist_ok=True)
    runs = {
        f"plain {method}": (ROOT / "outputs" / f"smollm2_135m_{objective}", PLAIN),
        f"humanline {method}": (ROOT / "outputs" / f"smollm2_135m_humanline_{objective}", ()),
    }

    start = time.perf_counter()
    call(sys.executable, "-m", "humanline.tools.fetch_smollm2", "--output-dir", MODEL)
    samples = {name: folder / f"{name.replace(' ', '_')}.json" for name in ("untrained", *runs)}
    measured = {"untrained": measure(MODEL, samples["untrained"])}
    trained = {"untrained": ""}
    for name, (output, overrides) in runs.items():
        shutil.rmtree(output / "logs", ignore_errors=True)  # the new run replaces the other files itself
        began = time.perf_counter()
        own = [f"output_dir={output.relative_to(ROOT)}", *overrides]
        call(BIN / "tune", "run", f"recipes/{recipe}", "--config", config, *own)
        trained[name] = f"{time.perf_counter() - began:.0f} s"
        measured[name] = measure(output / "epoch_0", samples[name])
    outputs = [output for output, _ in runs.values()]
    call(BIN / "humanline", "report", *outputs, "--output", folder / "report.html")

    sums = len(samples["untrained"].with_suffix(".jsonl").read_text().splitlines())
    print(f"\n{'':18}{f'pass@1 of {sums} sums':26}training")
    for name, each in measured.items():
        print(f"{name:18}{each['mean']:6.1%}  [{each['low']:5.1%}, {each['high']:5.1%}]   {trained[name]}".rstrip())
    print("\nThe first held-out sums:")
    answers = {name: first_answers(output) for name, output in samples.items()}
    for i, (prompt, _) in enumerate(answers["untrained"]):
        print(f"  {prompt}")
        for name, found in answers.items():
            print(f"    {name:17}{found[i][1]}")
    draw(measured, folder / "demo.png")
    seconds = time.perf_counter() - start
    print(f"\n{seconds / 60:.0f} min in all. The picture and the report: {folder.relative_to(ROOT)}")


if __name__ == "__main__":
    main()
