"""The top-level keys of a training config, checked before anything is built."""

from dataclasses import MISSING, dataclass, fields
from typing import Any, get_args

import torch
from omegaconf import DictConfig, OmegaConf
from torchtune import utils

from humanline.config._component import is_given, suggestion
from humanline.data import RowBudget
from humanline.errors import ConfigError

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}

COMPONENTS = (
    "model",
    "checkpointer",
    "tokenizer",
    "dataset",
    "source",
    "engine",
    "reward",
    "dataset_val",
    "loss",
    "reference",
    "optimizer",
    "lr_scheduler",
    "metric_logger",
    "profiler",
)
REQUIRED_COMPONENTS = ("model", "checkpointer", "loss", "reference", "optimizer", "metric_logger")
OFFLINE, ONLINE = ("dataset",), ("source", "engine", "reward", "tokenizer")
_KINDS = {bool: "a boolean", float: "a number", int: "an integer", str: "a string", type(None): "null"}


@dataclass(frozen=True, kw_only=True)
class Settings:
    """Everything at the top level of a training config that is not a component.

    Args:
        output_dir (str): where checkpoints, logs and the final weights go.
        device (str): ``cuda`` (which falls back to the CPU where there is no GPU) or ``cpu``.
        dtype (str): what the model computes in, ``bf16`` or ``fp32``.
        master_dtype (str): what weights and optimizer states are kept in. ``fp32`` is the default; ``bf16`` halves the
            memory but needs an optimizer with stochastic rounding, since updates of 1e-5 to a bfloat16 weight of 0.05
            round away.
        seed (int): seed of the data order and of every generator.
        shuffle (bool): whether epochs are shuffled.
        batch_size (int): groups a microbatch and rank.
        gradient_accumulation_steps (int): microbatches an optimizer step.
        epochs (int): passes over the dataset.
        max_steps_per_epoch (int | None): optimizer steps after which an epoch ends early.
        tokens_per_row (int): length of a row of packed groups, tokens.
        rows_per_pass (int): rows of one forward and backward; ``rows_per_pass * tokens_per_row`` bounds the memory of
            activations.
        data_parallel_replicate_dim (int): over how many groups of ranks the model is repeated; within a group it is
            sharded (HSDP). One group a node keeps gathering inside of nodes; 1 shards over all ranks.
        clip_grad_norm (float | None): largest gradient norm; None only measures it.
        compile (bool): compile the transformer layers.
        enable_activation_checkpointing (bool): recompute each layer in backward.
        enable_activation_offloading (bool): keep the checkpointed activations in host memory (CUDA only).
        log_every_n_steps (int): optimizer steps between two log entries.
        log_peak_memory_stats (bool): log the peak memory as well.
        adapter (str | None): a LoRA adapter to go on from, a folder or file in torchtune's or PEFT's format; None
            starts a new one. For models with an adapter.
        save_adapter_weights_only (bool): at the end of an epoch write the adapter alone; False writes the weights with
            the adapter merged into them as well, as an HF folder. For models with an adapter.
        export_dtype (str | None): what whole weights are written in, for users and for sampling servers: ``fp32`` or
            ``bf16``. None keeps the update: weights that trained are written in ``master_dtype``, merged ones in
            float32, the others in the checkpoint's dtype. bf16 rounds most of a small update away. An adapter is always
            written in float32.
        optimizer_in_bwd (bool): False only: the reference syncs between backward and the optimizer's step, which that
            would merge.
        run_val_every_n_steps (int | None): optimizer steps between two evaluations on ``dataset_val``.
        save_every_n_steps (int | None): optimizer steps between two checkpoints; None saves weights only, at the end of
            an epoch.
        enable_async_checkpointing (bool): write checkpoints in the background, from a copy in host memory.
        keep_last_n_checkpoints (int): how many of the newest checkpoints to keep. Two or more leave one to go back to
            if the newest is damaged.
        best_checkpoint_metric (str | None): a metric of ``dataset_val``, such as ``val/rewards/accuracies``: the
            checkpoint that has the best of it is kept too, and its weights go into ``output_dir/best`` at the end.
        best_checkpoint_mode (str): ``max`` or ``min``, which of its values is the best.
        resume_from_checkpoint (bool | str): True or ``latest`` resumes from the newest checkpoint in ``output_dir``, a
            path from that one.
        stop_after_nonfinite_steps (int): after how many steps in a row with a loss or gradient that is not finite the
            run stops. Each such step is skipped.
        stop_after_empty_rounds (int): after how many online rounds in a row with nothing to learn from the run stops.
            The steps of such a round leave the weights as they are.
        collapse_window (int | None): how many log entries the watch for a collapse looks at; None does not watch.
        stop_on_collapse (bool): stop there, instead of warning.

    Raises:
        ConfigError: if a key is missing, unknown, or has a value that cannot work.
    """

    output_dir: str
    device: str = "cuda"
    dtype: str = "bf16"
    master_dtype: str = "fp32"
    seed: int = 0
    shuffle: bool = True
    batch_size: int = 8
    gradient_accumulation_steps: int = 1
    epochs: int = 1
    max_steps_per_epoch: int | None = None
    tokens_per_row: int = 2048
    rows_per_pass: int = 1
    data_parallel_replicate_dim: int = 1
    clip_grad_norm: float | None = 1.0
    compile: bool = False
    enable_activation_checkpointing: bool = False
    enable_activation_offloading: bool = False
    adapter: str | None = None
    save_adapter_weights_only: bool = True
    export_dtype: str | None = None
    optimizer_in_bwd: bool = False
    log_every_n_steps: int = 1
    log_peak_memory_stats: bool = False
    run_val_every_n_steps: int | None = None
    save_every_n_steps: int | None = None
    enable_async_checkpointing: bool = False
    keep_last_n_checkpoints: int = 2
    best_checkpoint_metric: str | None = None
    best_checkpoint_mode: str = "max"
    resume_from_checkpoint: bool | str = False
    stop_after_nonfinite_steps: int = 10
    stop_after_empty_rounds: int = 10
    collapse_window: int | None = 50
    stop_on_collapse: bool = False

    @classmethod
    def from_config(cls, cfg: DictConfig) -> "Settings":
        """Reads the settings from a whole config. Checks that it has its components and no unknown key.

        Raises:
            ConfigError: if a key is unknown, missing, or contradicts another. The message names the key.
        """
        known = {f.name: f for f in fields(cls)}
        values = {str(key): cfg[key] for key in cfg if key not in COMPONENTS}
        for key in values:
            if key not in known:
                raise ConfigError(f"{key}: not a key of this recipe{suggestion(key, [*known, *COMPONENTS])}")
        for name, field in known.items():
            if name not in values and field.default is MISSING:
                raise ConfigError(f"{name}: missing; add it to the config")
        online = is_given(cfg, "source")
        if online and is_given(cfg, "dataset"):
            raise ConfigError("source: expected either source or dataset, got both; remove one of them")
        for key in (*REQUIRED_COMPONENTS, *(ONLINE if online else OFFLINE)):
            if not is_given(cfg, key):
                raise ConfigError(f"{key}: missing; add this component, with its _component_, to the config")
        for key in () if online else ("engine", "reward"):
            if is_given(cfg, key):
                raise ConfigError(f"{key}: not used with dataset; remove it, or replace dataset by source")
        if values.get("best_checkpoint_metric") and not is_given(cfg, "dataset_val"):
            raise ConfigError("best_checkpoint_metric: needs dataset_val, which is missing; add it")
        return cls(**values)

    def __post_init__(self) -> None:
        for field in fields(self):
            key, value = field.name, getattr(self, field.name)
            kinds = get_args(field.type) or (field.type,)
            self._check(key, _is_one_of(value, kinds), _named(kinds))
            if int in kinds and value is not None and key != "seed":
                self._check(key, value >= 1, "an integer of at least 1")
        self._check("seed", 0 <= self.seed < 2**32, "an integer of at least 0 and below 2^32")
        for key in ("dtype", "master_dtype"):
            value = getattr(self, key)
            remedy = "; the range of float16 is too narrow for training" if value == "fp16" else ""
            self._check(key, value in DTYPES, "bf16 or fp32", remedy)
        self._check(
            "export_dtype",
            self.export_dtype is None or self.export_dtype in DTYPES,
            "fp32, bf16 or null",
            "; null keeps small updates",
        )
        self._check(
            "master_dtype",
            not (self.dtype == "fp32" and self.master_dtype == "bf16"),
            "fp32 with dtype: fp32",
            "; set dtype: bf16 or master_dtype: fp32",
        )
        self._check(
            "optimizer_in_bwd",
            not self.optimizer_in_bwd,
            "False",
            "; it would merge the optimizer's step into backward, and the reference syncs between the two; to save "
            "memory, use gradient accumulation or an 8-bit optimizer",
        )
        window = self.collapse_window
        self._check(
            "collapse_window",
            window is None or window >= 8,
            "an integer of at least 8 or null",
            "; each half of the window needs 4 entries",
        )
        self._check(
            "stop_on_collapse",
            window is not None or not self.stop_on_collapse,
            "False with collapse_window: null",
            "; set collapse_window: 50 to watch for a collapse",
        )
        modes = self.best_checkpoint_mode in ("max", "min")
        self._check("best_checkpoint_mode", modes, "max or min")
        self._check_best_checkpoint_metric()
        limit = self.clip_grad_norm
        self._check("clip_grad_norm", limit is None or limit > 0, "a norm above 0 or null", "; null only measures it")
        offload = self.enable_activation_offloading
        self._check(
            "enable_activation_offloading",
            self.torch_device.type == "cuda" or not offload,
            "False without a GPU",
            "; a run on the CPU has no other memory to offload to",
        )
        self._check(
            "enable_activation_offloading",
            self.enable_activation_checkpointing or not offload,
            "False without enable_activation_checkpointing",
            "; set enable_activation_checkpointing: True as well",
        )
        self.row_budget(self.torch_device)

    def _check_best_checkpoint_metric(self) -> None:
        if self.best_checkpoint_metric is None:
            return
        evaluated, saved = self.run_val_every_n_steps, self.save_every_n_steps
        self._check(
            "best_checkpoint_metric",
            evaluated is not None and saved is not None and saved % evaluated == 0,
            "null unless every checkpoint has an evaluation at its step",
            "; set run_val_every_n_steps, and save_every_n_steps to a multiple of it",
        )

    def row_budget(self, device: torch.device) -> RowBudget:
        """Returns the row budget of a pass. Its shape is fixed on CUDA and with ``compile``: kernels are per shape."""
        fixed = self.compile or device.type == "cuda"
        return RowBudget(tokens_per_row=self.tokens_per_row, rows_per_pass=self.rows_per_pass, fixed_shape=fixed)

    @property
    def torch_device(self) -> torch.device:
        """This rank's device. ``cuda`` is the CPU on a machine without a GPU.

        Raises:
            ConfigError: if this machine has no such device.
        """
        if self.device.startswith("cuda") and not torch.cuda.is_available():
            return torch.device("cpu")
        try:
            return utils.get_device(self.device)
        except (RuntimeError, ValueError) as error:
            raise ConfigError(
                f"device: expected cuda or cpu, got {self.device!r}, which is not available here ({error})"
            ) from error

    def _check(self, key: str, holds: bool, expected: str, remedy: str = "") -> None:
        if not holds:
            raise ConfigError(f"{key}: expected {expected}, got {getattr(self, key)!r}{remedy}")


def values_of(cfg: DictConfig) -> dict[str, Any]:
    """Returns a config's values by dotted key, without those that may differ by rank: the device and file paths."""
    values: dict[str, Any] = {}

    def collect(prefix: str, node: Any) -> None:
        if isinstance(node, dict | list):
            for key, inner in node.items() if isinstance(node, dict) else enumerate(node):
                collect(f"{prefix}.{key}" if prefix else str(key), inner)
        elif prefix != "device" and not (isinstance(node, str) and "/" in node):
            values[prefix] = node

    collect("", OmegaConf.to_container(cfg, resolve=True))
    return values


def _is_one_of(value: Any, kinds: tuple[Any, ...]) -> bool:
    """Returns whether a value has one of the types. An int counts as a float, a bool does not count as an int."""
    return type(value) in kinds or (type(value) is int and float in kinds)


def _named(kinds: tuple[Any, ...]) -> str:
    return " or ".join(_KINDS[kind] for kind in kinds)
