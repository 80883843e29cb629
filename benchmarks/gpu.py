"""Measures on a GPU what this project could not measure without one, in one command.

    python benchmarks/gpu.py                          # every section, in the order of its value
    python benchmarks/gpu.py llama llama_compiled --output outputs/gpu.jsonl
    python benchmarks/gpu.py --rehearse               # on a CPU, with tiny sizes: that each section runs to its end

It is meant to take ten minutes on one card, which is not measured; the limits of all sections are 23 minutes. Each
section is a process of its own with a time limit, so that a failure of one leaves the others. It appends one line of
JSON to the output: `section`, `status` (`ok`, `failed` or `timeout`), `seconds` of the whole process, `machine`
(card and versions), `measured` (names with their units, such as `forward_ms` or `peak_gb`), and the last lines of what
it printed if it failed. Times are medians over repetitions after a warm-up, by CUDA events.

`mfu` counts the operations of the real tokens: 2 per parameter and token of a forward, 4 of a backward, without the
attention's and without recomputation, over the card's published dense bf16 peak. A card whose peak is not listed here
gets the rate of a large product instead (`peak_is: measured`).
"""

import argparse
import json
import os
import subprocess
import sys
import time
import traceback
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from gpu_sections import SECTIONS, Bench

ROOT = Path(__file__).parent.parent


def machine(device: str) -> dict[str, Any]:
    found: dict[str, Any] = {name: version(name) for name in ("torch", "torchtune", "torchao")}
    if device == "cuda":
        card = torch.cuda.get_device_properties(0)
        found |= {"card": card.name, "capability": f"{card.major}.{card.minor}", "memory_gb": card.total_memory / 1e9}
        found["shared_memory_per_block"] = getattr(card, "shared_memory_per_block_optin", None)
    return found


def measure(name: str, device: str, output: Path) -> bool:
    """Runs a section in a process of its own and appends its line; returns whether it ended well."""
    start = time.perf_counter()
    command = [sys.executable, __file__, "--section", name, "--device", device]
    line: dict[str, Any] = {"section": name, "status": "ok", "machine": machine(device)}
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=SECTIONS[name][1], env=os.environ)
        if done.returncode:
            line |= {"status": "failed", "printed": (done.stdout + done.stderr).splitlines()[-20:]}
        else:
            line["measured"] = json.loads(done.stdout.splitlines()[-1])
    except subprocess.TimeoutExpired as error:
        printed = [part.decode() if isinstance(part, bytes) else part or "" for part in (error.stdout, error.stderr)]
        line |= {"status": "timeout", "printed": "".join(printed).splitlines()[-20:]}
    line["seconds"] = round(time.perf_counter() - start, 1)
    with output.open("a") as file:
        file.write(json.dumps(line) + "\n")
    print(json.dumps({key: value for key, value in line.items() if key != "machine"}), flush=True)
    return line["status"] == "ok"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("sections", nargs="*", metavar="SECTION", help=", ".join(SECTIONS))
    parser.add_argument("--output", type=Path, default=ROOT / "outputs" / "gpu.jsonl")
    parser.add_argument("--rehearse", action="store_true", help="tiny sizes on the CPU")
    parser.add_argument("--section", help=argparse.SUPPRESS)
    parser.add_argument("--device", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.section:
        bench = Bench(arguments.device, tiny=arguments.device == "cpu")
        try:
            print(json.dumps(SECTIONS[arguments.section][0](bench)))
        except Exception:
            traceback.print_exc()
            sys.exit(1)
        return
    if unknown := set(arguments.sections) - SECTIONS.keys():
        parser.error(f"no section is named {', '.join(sorted(unknown))}; there are {', '.join(SECTIONS)}")
    if not arguments.rehearse and not torch.cuda.is_available():
        parser.error("there is no GPU; --rehearse runs each section on the CPU with tiny sizes")
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    device = "cpu" if arguments.rehearse else "cuda"
    ended_well = [measure(name, device, arguments.output) for name in arguments.sections or SECTIONS]
    sys.exit(0 if all(ended_well) else 1)


if __name__ == "__main__":
    main()
