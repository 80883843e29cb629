"""The log of a run: metrics of steps and evaluations, the progress bar, and the watch for a collapse."""

from contextlib import ExitStack
from typing import Any

from omegaconf import DictConfig
from torchtune import training, utils
from tqdm.contrib.logging import logging_redirect_tqdm

from humanline.config import component, listed
from humanline.progress import Progress
from humanline.torchtune_seam.log_table import log_table
from humanline.training._collapse import CollapseWatch
from humanline.training._environment import Environment
from humanline.training._metrics import MetricSums

log = utils.get_logger("INFO")

LARGEST_MISMATCH = 0.1
"""Nats a token: a larger mean difference between the log-probs of engine and trainer is warned of."""

_SHOWN = {
    "loss": "loss",
    "rewards/margins": "margin",
    "rewards/gain": "gain",
    "kl": "kl",
    "unclamped": "unclamped",
    "tokens_per_second": "tok/s",
}
_SHOWN_OF_VAL = {
    "loss": "loss",
    "rewards/margins": "margin",
    "rewards/gain": "gain",
    "rewards/accuracies": "accuracy",
    "kl": "kl",
}


class Logbook:
    """Sums metrics between two log entries, and passes the means to the loggers of rank 0.

    Building a logger creates a file, or a run at its service. So build this object last.

    Args:
        cfg (DictConfig): the whole config.
        environment (Environment): the run's environment.
        signal (str): the metric that training should raise; it is watched for a collapse.
        state (dict[str, Any] | None): the :meth:`state_dict` in the checkpoint to resume from; None for a new run.

    Attributes:
        last (dict[str, tuple[int, float]]): the last step and value of each metric.
    """

    def __init__(self, cfg: DictConfig, environment: Environment, signal: str, state: dict[str, Any] | None) -> None:
        settings = self.settings = environment.settings
        self.device, self.rank = environment.device, environment.rank
        self.sums = MetricSums(self.device)
        self.collapse = CollapseWatch(signal, settings.collapse_window) if settings.collapse_window else None
        if state is not None:
            self.sums.load_state_dict(state["metrics"])
            if self.collapse is not None:
                self.collapse.load_state_dict(state.get("collapse", []))
        self.loggers: list[Any] = []
        if self.rank == 0:
            self.loggers = [component(part, key) for part, key in listed(cfg, "metric_logger")]
        for logger in self.loggers:
            logger.log_config(cfg)
        self.last: dict[str, tuple[int, float]] = dict(state.get("last", {})) if state is not None else {}
        self._has_warned = False
        self._open = ExitStack()
        self._bar = Progress(disable=True)

    def show_bar(self, step: int, total_steps: int) -> None:
        """Shows a progress bar on rank 0 until :meth:`close_bar`; log lines appear above it."""
        bar = Progress(total=total_steps, initial=step, disable=self.rank != 0, unit="step")
        self._bar = self._open.enter_context(bar)
        self._open.enter_context(logging_redirect_tqdm([log], tqdm_class=Progress))

    def close_bar(self) -> None:
        self._open.close()

    def end_step(self, last: bool) -> None:
        self._bar.update()
        if last:  # what is logged after it is not above the bar
            self.close_bar()

    def completions(self, step: int, name: str, rows: list[dict[str, Any]]) -> None:
        """Passes completions to the loggers of rank 0 that have a place for tables."""
        for logger in self.loggers:
            table = f"completions/{name.split()[0]}"
            log_table(logger, table, [*rows[0]], [[*row.values()] for row in rows], step)

    def entry(self, step: int, metrics: dict[str, float]) -> list[str]:
        """Logs ``metrics`` and the means since the last entry. Collective.

        Returns:
            list[str]: a warning for each sign that the policy may be collapsing.
        """
        metrics |= self.sums.means()
        if self.settings.log_peak_memory_stats and self.device.type == "cuda":
            metrics |= training.get_memory_stats(device=self.device)
        self.write(step, metrics)
        self._warn_of_mismatch(metrics)
        postfix = {label: f"{metrics[name]:.4g}" for name, label in _SHOWN.items() if name in metrics}
        self._bar.set_postfix(postfix, refresh=False)
        return self.watch(step, metrics)

    def evaluation(self, step: int, metrics: dict[str, float]) -> None:
        """Logs the metrics of an evaluation, and shows the chief ones on rank 0."""
        self.write(step, metrics)
        shown = {label: metrics[f"val/{name}"] for name, label in _SHOWN_OF_VAL.items() if f"val/{name}" in metrics}
        if self.rank == 0:
            log.info(f"val at step {step}: {', '.join(f'{label}={value:.4g}' for label, value in shown.items())}")

    def watch(self, step: int, metrics: dict[str, float]) -> list[str]:
        """Returns a warning for each sign in ``metrics`` that the policy may be collapsing."""
        warnings = [] if self.collapse is None else self.collapse.add(metrics)
        return [f"step {step}: {warning}" for warning in warnings]

    def write(self, step: int, metrics: dict[str, float]) -> None:
        """Passes metrics to the loggers of rank 0. An OSError, such as a full disk, does not end the run."""
        self.last |= {name: (step, value) for name, value in metrics.items()}
        for logger in self.loggers:
            try:
                logger.log_dict(metrics, step=step)
            except OSError as error:
                log.error(f"step {step}: its metrics could not be logged: {error}; training continues")

    def state_dict(self) -> dict[str, Any]:
        """Returns the state that a resumed run needs. Collective."""
        state: dict[str, Any] = {"metrics": self.sums.state_dict(), "last": dict(self.last)}
        return state if self.collapse is None else state | {"collapse": self.collapse.state_dict()}

    def close(self) -> None:
        """Closes the loggers."""
        for logger in self.loggers:
            try:
                logger.close()
            except OSError as error:  # such as a full disk, which was logged at each step
                log.error(f"metric_logger: could not be closed: {error}")

    def _warn_of_mismatch(self, metrics: dict[str, float]) -> None:
        """Warns once if the log-probs of engine and trainer differ by more than rounding explains."""
        mean = metrics.get("mismatch/mean", 0.0)
        if self.rank != 0 or self._has_warned or mean <= LARGEST_MISMATCH:
            return
        self._has_warned = True
        log.warning(
            f"the engine's log-probs differ from the trainer's by {mean:.3g} nats a token in the mean (mismatch/mean): "
            "they compute different functions. Check that the server has loaded the round's weights, its dtype and "
            "context length, and engine.logprobs_mode"
        )
