"""The training and held-out groups of a run, as far as they are known before the model is loaded."""

import functools
from collections.abc import Callable, Iterable
from typing import Any

import torch
from omegaconf import DictConfig
from torchtune import utils
from torchtune.modules import TransformerDecoder

from humanline.checkpoint import WeightsOut, build_decoder, saved_dates
from humanline.config import component, dated_component, is_given, today
from humanline.data import GroupDataset, OfflineSource, Rows, Source, pack, parts
from humanline.distributed import check_same, gathered
from humanline.errors import ConfigError, DataError
from humanline.models import LogProbDecoder
from humanline.optim import rehearse_optimizer
from humanline.rollout import OnlineSource, RoundPlan, SampledSource, Steps, dates_of_rounds
from humanline.training._environment import Environment
from humanline.training._hand_over import HandOver
from humanline.training._objectives import Objective
from humanline.training._passes import Passes

log = utils.get_logger("INFO")


class Data:
    """Reads the datasets or prompts of a config, and checks that they fit the objective, the model and a row.

    It also rehearses the optimizer and the schedule for all steps, and builds engine and reward, because they can fail
    cheaply. Collective: all ranks construct it.

    Args:
        cfg (DictConfig): the whole config.
        environment (Environment): the run's environment.
        objective (Objective): selects the groups to learn from.

    Attributes:
        held_out (GroupDataset | None): the groups of ``dataset_val``; None without it.
        steps_per_epoch (int): optimizer steps in an epoch.
        total_steps (int): optimizer steps of the run.
        passes (Passes): lays groups out for this rank.

    Raises:
        ConfigError: if a component cannot be built, or batch sizes and data do not fit.
        DataError: if a group does not fit the model or a row; the message names it.
    """

    def __init__(self, cfg: DictConfig, environment: Environment, objective: Objective) -> None:
        self.cfg, self.environment, self.objective = cfg, environment, objective
        settings = environment.settings
        self.budget = settings.row_budget(environment.device)
        begun = _begun(environment)
        self.tokenizer = dated_component(cfg, "tokenizer", begun["tokenizer.date"])
        with torch.device("meta"):
            self.shape: TransformerDecoder = build_decoder(cfg)
        self.steps = Steps(
            batch_size=settings.batch_size,
            accumulation=settings.gradient_accumulation_steps,
            world_size=environment.world_size,
            seed=settings.seed,
            shuffle=settings.shuffle,
            max_steps_per_epoch=settings.max_steps_per_epoch,
        )
        self.known = self._known()
        objective.check_microbatch(settings.batch_size * environment.world_size, "batch_size")
        held_out = component(cfg, "dataset_val", self.tokenizer)
        self.held_out = None if held_out is None else self._examples("dataset_val", held_out)
        if self.held_out is not None:
            objective.check_microbatch(len(self.held_out), "dataset_val")
        self.steps_per_epoch = self.known.steps_per_epoch
        check_same(
            {
                "groups": self.known.digest(),
                "groups of dataset_val": self.held_out and self.held_out.digest(),
                "steps_per_epoch": self.steps_per_epoch,
            }
        )
        self.total_steps = settings.epochs * self.steps_per_epoch
        self.passes = Passes(objective, self.budget, self.known.budget, environment.device, settings.seed)
        rehearse_optimizer(cfg, self.shape, environment.device, self.total_steps)
        self.engine, self.reward = component(cfg, "engine"), dated_component(cfg, "reward", begun["reward.date"])
        if isinstance(self.known, RoundPlan) and self.known.source.overlap and self.engine.in_process:
            raise ConfigError(
                f"source.overlap: expected an engine outside this process, got {type(self.engine).__name__}; use "
                "HTTPEngine, or remove overlap"
            )

    @property
    def ahead(self) -> Callable[[int], Iterable[Rows]] | None:
        """A function that returns the passes of an optimizer step; None if its groups are not known in advance."""
        known = self.known
        return functools.partial(self.passes.of_step, known) if isinstance(known, OfflineSource) else None

    def source(self, policy: LogProbDecoder, weights_out: WeightsOut) -> Source:
        """Builds the source of the groups: the dataset, or the policy itself.

        Args:
            policy (LogProbDecoder): the policy.
            weights_out (WeightsOut): writes the policy for an engine outside this process.

        Raises:
            ConfigError: if the engine cannot sample for this run.
        """
        if isinstance(self.known, OfflineSource):
            return self.known
        output_dir = self.environment.settings.output_dir
        engine = self.engine.build(self.tokenizer, policy)
        hand_over = HandOver(engine, weights_out, output_dir)
        return SampledSource(
            self.known,
            engine,
            self.reward,
            self.objective.examples,
            hand_over,
            output_dir,
            self.total_steps,
            self.environment.temperature,
        )

    @property
    def is_sampled(self) -> bool:
        """Whether the policy samples the groups."""
        return isinstance(self.known, RoundPlan)

    def left_out(self) -> list[str]:
        """Returns a log line for each reason why groups are in no step."""
        return self.known.left_out()

    def date(self) -> dict[str, str]:
        """Returns the date that the chat template reads, as a part of the run's position; empty if it reads none."""
        date = getattr(self.tokenizer, "date", None)
        return {} if date is None else {"tokenizer.date": date}

    def _known(self) -> OfflineSource | RoundPlan:
        """Returns the groups of all steps, or the prompts that the policy will answer."""
        if is_given(self.cfg, "source"):
            online: OnlineSource = component(self.cfg, "source")
            plan = online.plan(self.tokenizer, self.steps)
            self._fitting("source.max_new_tokens", plan.longest())
            return plan
        dataset = self._examples("dataset", component(self.cfg, "dataset", self.tokenizer))
        if self.environment.rank == 0 and (warning := self.objective.imbalance_warning(dataset)):
            log.warning(warning)
        return OfflineSource(dataset, **vars(self.steps))

    def _examples(self, key: str, dataset: GroupDataset) -> GroupDataset:
        """Returns the objective's groups of a dataset."""
        dataset = self._fitting(f"{key}.max_tokens", dataset)
        if self.environment.rank == 0:
            log.info(f"{key}: {dataset.report()}")
        return dataset

    def _fitting(self, limit: str, dataset: GroupDataset) -> GroupDataset:
        """Returns the objective's groups of a dataset, after checking that each fits the model and a row."""
        dataset = self.objective.examples(dataset)
        shape, budget = self.shape, self.budget
        vocabulary = shape.tok_embeddings.num_embeddings
        kl_group = self.objective.longest_kl_group(dataset)
        for group in [*dataset, kl_group] if kl_group else dataset:
            pack([group] if self.objective.whole_groups else parts(group, budget), budget)
            longest = len(group.prompt) + max(map(len, group.responses)) - 1
            if longest > shape.max_seq_len:
                raise DataError(
                    f"{group.id}: prompt and response need {longest} positions, the model has {shape.max_seq_len} "
                    f"(max_seq_len); lower {limit}"
                )
            largest: Any = max(map(max, (group.prompt, *group.responses)))
            if largest >= vocabulary:
                raise DataError(
                    f"{group.id}: token id {largest} is outside the model's vocabulary of {vocabulary}; encode with "
                    "the model's tokenizer"
                )
        return dataset


def _begun(environment: Environment) -> dict[str, str]:
    """Returns the day on which the run began, for each component whose chat template may read it. Collective.

    It is in the checkpoint to resume from. A run that was restarted before its first checkpoint has it in its rounds.
    """
    which, output_dir = environment.resume_from, environment.settings.output_dir
    begun = dict.fromkeys(("tokenizer.date", "reward.date"), today())
    if which:
        begun |= saved_dates(output_dir, which)
    elif environment.restarted:
        begun |= dates_of_rounds(output_dir)
    ranks: list[dict[str, str]] = gathered(begun)
    return ranks[0]
