"""What a run logs: the metrics of steps and evaluations, the bar, and the watch for a collapse."""

from contextlib import ExitStack
from typing import Any

from omegaconf import DictConfig
from torchtune import training, utils
from tqdm import tqdm
from tqdm.contrib.logging import logging_redirect_tqdm

from humanline.config import component
from humanline.training._collapse import CollapseWatch
from humanline.training._environment import Environment
from humanline.training._metrics import MetricSums

log = utils.get_logger("INFO")

_SHOWN = {
    "loss": "loss",
    "rewards/margins": "margin",
    "rewards/gain": "gain",
    "kl": "kl",
    "unclamped": "unclamped",
    "tokens_per_second": "tok/s",
}


class Logbook:
    """Sums up metrics between two log entries, and hands the means to the logger of rank 0.

    The logger is built here, and makes a file or a run of its service: build this last.

    Args:
        cfg (DictConfig): the whole config.
        environment (Environment): where the run takes place.
        signal (str): the metric that training raises, which is watched for a collapse.
        state (dict[str, Any] | None): what :meth:`state_dict` of the run that this one resumes gave.
    """

    def __init__(self, cfg: DictConfig, environment: Environment, signal: str, state: dict[str, Any] | None) -> None:
        settings = self.settings = environment.settings
        self.device, self.rank, self.signal = environment.device, environment.rank, signal
        self.sums = MetricSums(self.device)
        self.collapse = CollapseWatch(settings.collapse_window) if settings.collapse_window else None
        if state is not None:
            self.sums.load_state_dict(state["metrics"])
            if self.collapse is not None:
                self.collapse.load_state_dict(state.get("collapse", []))
        self.logger: Any = component(cfg, "metric_logger") if self.rank == 0 else None
        if self.logger is not None:
            self.logger.log_config(cfg)
        self._open = ExitStack()
        self._bar: tqdm[Any] = tqdm(disable=True)

    def show_bar(self, step: int, total_steps: int) -> None:
        """Shows the run's progress on rank 0 until :meth:`close`; what is logged stands above it."""
        bar = tqdm(total=total_steps, initial=step, disable=self.rank != 0, unit="step")
        self._bar = self._open.enter_context(bar)
        self._open.enter_context(logging_redirect_tqdm([log]))

    def close_bar(self) -> None:
        self._open.close()

    def end_step(self) -> None:
        self._bar.update()

    def entry(self, step: int, metrics: dict[str, float]) -> str | None:
        """Logs the means since the last entry, and ``metrics``; a collective.

        Returns:
            str | None: what to warn of, if the policy seems to collapse.
        """
        metrics |= self.sums.means()
        if self.settings.log_peak_memory_stats and self.device.type == "cuda":
            metrics |= training.get_memory_stats(device=self.device)
        self.write(step, metrics)
        postfix = {label: f"{metrics[name]:.4g}" for name, label in _SHOWN.items() if name in metrics}
        self._bar.set_postfix(postfix, refresh=False)
        if self.collapse is None or not {self.signal, "kl"} <= metrics.keys():
            return None
        warning = self.collapse.add(metrics[self.signal], metrics["kl"])
        return None if warning is None else f"step {step}: {self.signal}: {warning}"

    def write(self, step: int, metrics: dict[str, float]) -> None:
        """Hands metrics to the logger of rank 0. What a full disk or a lost server keeps it from ends no run."""
        if self.logger is None:
            return
        try:
            self.logger.log_dict(metrics, step=step)
        except OSError as error:
            log.error(f"step {step}: its metrics could not be logged: {error}; training goes on")

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run needs; a collective."""
        state: dict[str, Any] = {"metrics": self.sums.state_dict()}
        return state if self.collapse is None else state | {"collapse": self.collapse.state_dict()}

    def close(self) -> None:
        """Ends what the logger holds open."""
        if self.logger is None:
            return
        try:
            self.logger.close()
        except OSError as error:  # as on a full disk, which has been said of each step
            log.error(f"metric_logger: could not be closed: {error}")
