"""Measures preference data under the model that it shall train, before training, and leaves out what trains badly.

Data whose responses are improbable under the initial reference trains worse: in the paper the quartile with the lowest
mean token log-probs (https://arxiv.org/abs/2509.24207). This recipe computes the mean log-prob of each response's
tokens, on every visible device. It reports quartiles, lengths, cut and repeated responses, overlap, and KTO's balance,
for a `dataset` of any builder and schema, as a training config has it.

    tune run recipes/humanline_quality --config configs/smollm2_135m_quality.yaml dataset.source=FILE
    tune run recipes/humanline_quality --config configs/smollm2_135m_quality.yaml dataset.source=FILE \
      filter.min_log_prob=bottom_quartile

`output` receives the figures as JSON, a .jsonl of the same name each group's log-probs, a .png the histogram. With
`filter` it writes what stays to `kept`, as token ids, and what does not, with the reasons, beside it. If an interrupted
run is started again, it resumes with the missing groups; a change of the filter alone computes nothing again.
"""

import sys
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from humanline.data import GroupDataset, RowBudget, as_labelled, parts
from humanline.distributed import gathered
from humanline.errors import ConfigError, DataError
from humanline.losses import HumanlineKTOLoss
from humanline.models import LogProbDecoder
from humanline.programs import (
    Filter,
    Measured,
    PartialFile,
    as_line,
    check_fit,
    check_keys,
    check_outputs,
    common_end,
    component,
    dated_component,
    draw_histogram,
    histogram,
    mean_log_probs,
    model_sources,
    one_of,
    parse,
    process_group,
    start_on_every_device,
    summary,
    table,
    today,
    whole_model,
    whole_number,
    write_json,
    write_jsonl,
)
from humanline.progress import Progress
from humanline.training import KTO
from omegaconf import DictConfig
from torchtune import utils

REQUIRED = ("model", "checkpointer", "dataset", "output")
DEFAULTS: dict[str, Any] = dict.fromkeys(("tokenizer", "filter", "kept", "output_dir"))
DEFAULTS |= {"device": "cuda", "dtype": "bf16", "tokens_per_row": 2048, "rows_per_pass": 1}
GROUPS_PER_RANK = 16  # between two writes

log = utils.get_logger("INFO")


class HumanlineQualityRecipe:
    """Measures a dataset.

    Args:
        cfg (DictConfig): the whole config.

    Keys:
        output (str): the .json file of the figures.
        filter (dict | None): what to leave out: ``min_log_prob`` (nats, or ``bottom_quartile``), ``cut: False`` for
            responses without their end, ``duplicates: False`` for responses that repeat another one to the prompt.
        kept (str | None): the .jsonl file of what the filter leaves; None names it after ``output``.
        output_dir (str | None): a folder for ``output`` to refer to.
        device (str): ``cuda`` or ``cpu``. Where there is no GPU, ``cuda`` falls back to the CPU.
        dtype (str): dtype of the computation, ``bf16`` or ``fp32``.
        tokens_per_row (int): length of a row, tokens, as in training.
        rows_per_pass (int): rows in one pass.

    Raises:
        ConfigError: if a key is missing, unknown, or invalid.
    """

    def __init__(self, cfg: DictConfig) -> None:
        check_keys(cfg, REQUIRED, DEFAULTS)
        device = cfg.get("device", DEFAULTS["device"])
        self.device = utils.get_device(device if torch.cuda.is_available() else "cpu")
        self.output = Path(str(cfg.output)).expanduser()
        if self.output.suffix != ".json":
            raise ConfigError(f"output: expected a name ending in .json, got '{cfg.output}'")
        self.filter = Filter.of(cfg.filter) if cfg.get("filter") is not None else None
        if self.filter is None and cfg.get("kept"):
            raise ConfigError("kept: there is no filter; set one, or remove kept")
        self.kept = Path(cfg.get("kept") or self.output.with_suffix(".kept.jsonl")).expanduser()
        self.left_out = self.kept.with_suffix(".left_out.jsonl")
        beside = [self.output.with_suffix(suffix) for suffix in (".jsonl", ".png")]
        check_outputs([self.output, *beside, self.kept, self.left_out], cfg.dataset)
        self.dtype = one_of(cfg, "dtype", {"fp32": torch.float32, "bf16": torch.bfloat16}, DEFAULTS["dtype"])
        sizes = {key: whole_number(cfg, key, DEFAULTS[key], least=1) for key in ("tokens_per_row", "rows_per_pass")}
        self.budget = RowBudget(**sizes, fixed_shape=self.device.type == "cuda")

    def setup(self, cfg: DictConfig) -> None:
        """Reads the data, then the model, so that bad data is reported first. It needs a process group."""
        self.rank, self.world_size = dist.get_rank(), dist.get_world_size()
        tokenizer = dated_component(cfg, "tokenizer", today())
        self.dataset: GroupDataset = component(cfg, "dataset", tokenizer)
        self.stop_tokens = set(getattr(tokenizer, "stop_tokens", ()))
        if self.filter is not None and not self.filter.cut and not self.stop_tokens:
            raise ConfigError("filter.cut: the end of a turn is not known without a tokenizer; set tokenizer")
        for group in self.dataset:
            parts(group, self.budget)  # refuses a response that no row holds
        if self.rank == 0:
            log.info(f"dataset: {self.dataset.report()}")
        fits = partial(check_fit, self.dataset)
        self.model = LogProbDecoder(whole_model(cfg, self.device, self.dtype, fits))
        self.file = PartialFile(self.output, [model_sources(cfg), self.dataset.digest(), str(self.dtype)])

    def measure(self) -> list[Measured]:
        """Computes the mean log-probs that an earlier run has not, on all ranks, and returns all of them."""
        with self.file if self.rank == 0 else nullcontext() as file:
            found: list[list[float]] = gathered(file and file.rows)[0]
            total, hidden = len(self.dataset), self.rank > 0
            with Progress(total=total, initial=len(found), unit="group", desc="log-probs", disable=hidden) as bar:
                while len(found) < total:
                    chunk = range(len(found), min(len(found) + GROUPS_PER_RANK * self.world_size, total))
                    mine = {i: self.dataset[i] for i in chunk[self.rank :: self.world_size]}
                    shares = gathered(mean_log_probs(self.model, mine, self.budget, self.device))
                    new = [shares[place % self.world_size][i] for place, i in enumerate(chunk)]
                    if file is not None:
                        file.add(new)
                    found += new
                    bar.update(len(new))
        return [Measured(group, each, self.stop_tokens) for group, each in zip(self.dataset, found, strict=True)]

    def report(self, data: list[Measured]) -> None:
        """Prints and writes the figures."""
        figures = summary(data)
        log_probs = [value for each in data for value in each.log_probs]
        print(f"\n{table(figures)}\n\nresponses by the mean log-prob of their tokens, nats\n{histogram(log_probs)}\n")
        if (balance := self._balance()) is not None:
            print(f"{balance}\n")
        write_json(self.output, {"dataset": self.dataset.report(), **figures, "kto": balance})
        lines = ({"id": each.group.id, "mean_log_probs": each.log_probs, "cut": each.cut} for each in data)
        write_jsonl(self.output.with_suffix(".jsonl"), lines)
        draw_histogram(log_probs, figures, self.output.with_suffix(".png"))

    def _balance(self) -> str | None:
        """Returns whether KTO's desirable and undesirable examples are balanced; None without either."""
        try:
            labelled = as_labelled(self.dataset)
        except DataError:
            return None  # no response is better than another one
        return KTO(HumanlineKTOLoss()).imbalance_warning(labelled) or "KTO: desirable and undesirable are balanced"

    def keep(self, data: list[Measured]) -> None:
        """Writes what the filter leaves, and what it leaves out, and prints the command that trains on the former."""
        assert self.filter is not None
        budget = self.dataset.budget
        results = list(self.filter.apply(data))
        kept = [as_line(rest) for rest, _ in results if rest is not None]
        if not kept:
            raise ConfigError("filter: it leaves no group; lower min_log_prob, or keep cut responses")
        cut = [as_line(m.group) | {"reasons": why} for m, (_, why) in zip(data, results, strict=True) if why]
        write_jsonl(self.kept, kept)
        write_jsonl(self.left_out, cut)
        print(
            f"{len(kept):,} of {len(data):,} groups stay, {len(data) - len(cut):,} of them whole: {self.kept}\n"
            f"The others, with the reasons: {self.left_out}\nTo train on what stays, add to a training command:\n"
            f"  dataset=humanline.data.encoded_groups dataset.source={self.kept} "
            f"dataset.max_tokens={budget.max_tokens} dataset.max_prompt_tokens={budget.max_prompt_tokens or 'null'}"
        )


@parse
def recipe_main(cfg: DictConfig) -> None:
    """Measures a dataset on every visible device. An error in config or data ends it with one line."""
    with common_end(Path(__file__).name):
        recipe = HumanlineQualityRecipe(cfg)
        start_on_every_device(recipe.device.type, __file__)
        with process_group(recipe.device):
            recipe.setup(cfg)
            data = recipe.measure()
            if recipe.rank == 0:
                recipe.report(data)
                if recipe.filter is not None:
                    recipe.keep(data)


if __name__ == "__main__":
    sys.exit(recipe_main())
