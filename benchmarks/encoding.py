"""Measures how fast a dataset of text is encoded, how fast a second start reads it, and the memory that ranks need.

    python benchmarks/encoding.py GROUPS.jsonl --model models/SmolLM2-135M-Instruct

GROUPS.jsonl has scored responses (`prompt`, `all_generated_responses`, `all_rm_scores`). Its pairs of a better and a
worse response are repeated up to `--pairs`. Each figure comes from a process of its own:

- the first start encodes the pairs: pairs per second, from the call of `preference_groups` to its return;
- a second start, in seconds: the same call, and what a DPO run asks of a dataset before its first step;
- `--ranks` processes that have read every token: the growth of their proportional set size (PSS), summed, in bytes per
  token. PSS counts a page of n processes as 1/n in each.
"""

import argparse
import json
import multiprocessing
import os
import tempfile
import time
from multiprocessing.synchronize import Barrier
from pathlib import Path
from typing import Any

from humanline.data import ChatTokenizer, GroupDataset, as_pairs, preference_groups

ROOT = Path(__file__).parent.parent


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("groups", type=Path)
    parser.add_argument("--model", type=Path, default=ROOT / "models" / "SmolLM2-135M-Instruct")
    parser.add_argument("--pairs", type=int, default=60_000)
    parser.add_argument("--ranks", type=int, default=8)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        os.environ["HUMANLINE_CACHE"] = folder
        source = Path(folder) / "pairs.jsonl"
        write_pairs(arguments.groups, source, arguments.pairs)
        size = source.stat().st_size
        print(f"{arguments.pairs:,} pairs, {size / 1e6:,.0f} MB of JSON, {os.cpu_count()} cores")
        first = in_a_process(start, arguments.model, source)
        print(f"first start: {first['dataset']:.1f} s, {arguments.pairs / first['dataset']:,.0f} pairs/s")
        print(f"  {first['report']}")
        second = in_a_process(start, arguments.model, source)
        print(
            f"second start: {second['dataset']:.2f} s; with all that a run asks of the dataset before its first step "
            f"{second['ready']:.1f} s; with the process's own start and imports {second['process']:.1f} s"
        )
        grown = in_ranks(arguments.ranks, arguments.model, source)
        print(
            f"memory of {arguments.ranks} ranks: {sum(grown) / first['tokens']:.2f} bytes per token "
            f"({sum(grown) / 1e6:,.0f} MB for {first['tokens']:,} tokens)"
        )


def write_pairs(groups: Path, file: Path, count: int) -> None:
    """Writes pairs in the Hugging Face format."""
    pairs = []
    for line in groups.open(encoding="utf-8"):
        row = json.loads(line)
        scored = list(zip(row["all_rm_scores"], row["all_generated_responses"], strict=True))
        pairs += [
            {"prompt": row["prompt"], "chosen": better, "rejected": worse}
            for high, better in scored
            for low, worse in scored
            if high > low
        ]
    with file.open("w", encoding="utf-8") as out:
        for i in range(count):
            out.write(json.dumps(pairs[i * 7919 % len(pairs)]) + "\n")


def in_a_process(call: Any, *arguments: Any) -> Any:
    """Returns the result of a call in a new process."""
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(call, (time.time(), *arguments))


def start(began: float, model: Path, source: Path) -> dict[str, Any]:
    """Builds the dataset; returns seconds, its report, and the number of its tokens."""
    tokenizer = ChatTokenizer(str(model))
    before = time.perf_counter()
    dataset = preference_groups(tokenizer, str(source))
    seconds = time.perf_counter() - before
    tokens = use(dataset)
    return {
        "dataset": seconds,
        "ready": time.perf_counter() - before,
        "process": time.time() - began,
        "report": dataset.report(),
        "tokens": tokens,
    }


def use(dataset: GroupDataset) -> int:
    """Does what a run does before its first step; returns the number of tokens."""
    pairs = as_pairs(dataset)
    pairs.report()
    pairs.digest()
    return sum(len(group.prompt) + sum(map(len, group.responses)) for group in pairs)


def in_ranks(count: int, model: Path, source: Path) -> list[int]:
    """Returns by how much each of several processes grew when all of them read the dataset, bytes."""
    context = multiprocessing.get_context("spawn")
    barrier, queue = context.Barrier(count), context.Queue()
    ranks = [context.Process(target=rank, args=(barrier, queue, model, source)) for _ in range(count)]
    for each in ranks:
        each.start()
    grown = [queue.get() for _ in ranks]
    for each in ranks:
        each.join()
    return grown


def rank(barrier: Barrier, queue: Any, model: Path, source: Path) -> None:
    tokenizer = ChatTokenizer(str(model))
    barrier.wait()
    before = proportional_set_size()
    barrier.wait()
    dataset = as_pairs(preference_groups(tokenizer, str(source)))
    use(dataset)
    barrier.wait()
    queue.put(proportional_set_size() - before)
    barrier.wait()


def proportional_set_size() -> int:
    """Returns the memory of this process, bytes; a page that n processes map counts as 1/n."""
    for line in Path("/proc/self/smaps_rollup").read_text().splitlines():
        if line.startswith("Pss:"):
            return int(line.split()[1]) * 1024
    raise OSError("/proc/self/smaps_rollup has no line Pss")


if __name__ == "__main__":
    main()
