"""Tables for torchtune's loggers, which take scalars only: behind them are objects that take more."""

from collections.abc import Sequence
from typing import Any

from torchtune.training.metric_logging import TensorBoardLogger, WandBLogger


def log_table(logger: Any, name: str, columns: Sequence[str], rows: Sequence[Sequence[Any]], step: int) -> None:
    """Logs a table to Weights & Biases, or as text to TensorBoard. Other loggers have no place for one.

    Args:
        logger (Any): the run's logger.
        name (str): name of the table.
        columns (Sequence[str]): names of its columns.
        rows (Sequence[Sequence[Any]]): its rows.
        step (int): the optimizer step.
    """
    if isinstance(logger, WandBLogger) and logger._wandb.run:
        table = logger._wandb.Table(columns=list(columns), data=[list(row) for row in rows])
        logger._wandb.log({name: table, "global_step": step})
    elif isinstance(logger, TensorBoardLogger) and logger._writer:
        lines = [columns, ["---"] * len(columns), *rows]
        text = "\n".join("| " + " | ".join(map(_cell, line)) + " |" for line in lines)
        logger._writer.add_text(name, text, global_step=step)


def _cell(value: Any) -> str:
    """Returns a value as a cell of a Markdown table."""
    text = "" if value is None else f"{value:.4g}" if isinstance(value, float) else str(value)
    return text.replace("\\", "\\\\").replace("|", "\\|").replace("<", "&lt;").replace("\n", "<br>")
