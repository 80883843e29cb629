"""Writes the table of docs/memory.md: what every training config takes of a rank.

python docs/make_memory.py      # minutes
"""

from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from humanline.planning import LABELS, rehearse

ROOT = Path(__file__).parent.parent
BEGIN, END = "<!-- table -->\n", "<!-- end -->\n"


def main() -> None:
    lines = ["| config | ranks | " + " | ".join(LABELS) + " | peak |", "|---|---|" + "---|" * (len(LABELS) + 1)]
    for path in sorted((ROOT / "configs").glob("*.yaml")):
        cfg: Any = OmegaConf.load(path)
        if "loss" not in cfg:
            continue
        on_gpus, recipes = cfg.get("device", "cuda") == "cuda", path.read_text().splitlines()[0]
        count = 8 if on_gpus and "_single_device" not in recipes else 1
        estimate = rehearse(cfg, count)
        cells = (f"{estimate.peak.get(label, 0) / 1e9:.2f}" for label in LABELS)
        lines.append(f"| `{path.stem}` | {count} | " + " | ".join(cells) + f" | {estimate.total / 1e9:.2f} |")
        print(lines[-1], flush=True)
    page = ROOT / "docs" / "memory.md"
    before, _, rest = page.read_text().partition(BEGIN)
    page.write_text(before + BEGIN + "\n".join(lines) + "\n" + END + rest.partition(END)[2])


if __name__ == "__main__":
    main()
