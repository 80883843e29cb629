"""The top-level keys of a training config, checked before anything is built."""

import math
import re
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
    """The top level of a training config, without its components.

    The text under each field is what ``docs/configuration.md`` says of it.

    Raises:
        ConfigError: if a key is missing, unknown, or has a value that cannot work.
    """

    # ---- Where, and in what precision

    output_dir: str
    """Folder of checkpoints, logs, sampled rounds and final weights."""

    device: str = "cuda"
    """``cuda`` or ``cpu``. Where there is no GPU, ``cuda`` falls back to the CPU."""

    dtype: str = "bf16"
    """What the model computes in: ``bf16`` or ``fp32``. A frozen base is kept in it, too."""

    master_dtype: str = "fp32"
    """What trained weights and optimizer states are kept in: ``fp32`` or ``bf16``. ``bf16`` halves their memory and
    needs an optimizer with stochastic rounding, such as ``humanline.training.StochasticAdamW``: rounding to nearest
    would lose most updates."""

    temperature: float | None = None
    """Divides the logits of policy and reference before log-probs are taken. None uses ``source.temperature``, so that
    the probabilities are those that responses are drawn with, and 1 for a dataset."""

    seed: int = 0
    """Seed of the data order and of every random generator. An optimizer with a seed of its own needs it, too:
    ``optimizer.seed: ${seed}``."""

    # ---- Steps

    batch_size: int = 8
    """Groups in a microbatch on each rank. They pass through the model row by row, so more groups need no more memory
    of the GPU. On fewer GPUs raise it to keep the groups of a step."""

    gradient_accumulation_steps: int = 1
    """Microbatches in an optimizer step. DPO's loss is the same with either key. KTO's baseline and GRPO's means over
    tokens and responses are taken within a microbatch, so for these raise ``batch_size`` first."""

    epochs: int = 1
    """Passes over the dataset; with ``source``, over its prompts."""

    max_steps_per_epoch: int | None = None
    """Optimizer steps after which an epoch ends early. None uses all groups."""

    shuffle: bool = True
    """Whether the order of groups, or of prompts, is shuffled in each epoch."""

    clip_grad_norm: float | None = 1.0
    """Largest norm of the gradient. None only measures the norm."""

    # ---- Memory and speed

    tokens_per_row: int = 2048
    """Length of a row, tokens. Groups are packed into rows: the prompt stands once and its responses branch from it. A
    group that needs more than a row repeats its prompt in the next one."""

    rows_per_pass: int = 1
    """Rows in one forward and backward pass. ``rows_per_pass * tokens_per_row`` bounds the memory of activations. Fewer
    rows need less memory, are slower, and change no loss. For DPO a pass has to hold the longest pair."""

    enable_activation_checkpointing: bool = False
    """Keep only the input of each layer, and recompute the rest in backward: less memory, more time."""

    enable_activation_offloading: bool = False
    """Keep these inputs in host memory. Needs a GPU and ``enable_activation_checkpointing``."""

    compile: bool = False
    """Compile the transformer layers."""

    data_parallel_replicate_dim: int = 1
    """Into how many groups the ranks are divided (HSDP). Each group holds the whole model, sharded over its ranks. With
    the number of nodes, weights are gathered inside of nodes only. 1 shards over all ranks."""

    optimizer_in_bwd: bool = False
    """Only False works. The reference syncs between backward and the optimizer's step, which this would merge."""

    # ---- Adapters and exported weights

    adapter: str | None = None
    """LoRA adapter to start from: a folder or file in torchtune's or PEFT's format. None starts a new one. For models
    with an adapter only."""

    save_adapter_weights_only: bool = True
    """At the end of an epoch write the adapter alone. False also writes the merged weights, as a Hugging Face folder.
    For models with an adapter only."""

    export_dtype: str | None = None
    """What whole weights are written in, for users and for sampling servers: ``fp32``, ``bf16`` or None. None keeps the
    update: trained weights are written in ``master_dtype``, merged ones in float32, the others in the checkpoint's
    dtype. ``bf16`` rounds most of a small update away. An adapter is always written in float32."""

    push_to_hub: str | None = None
    """Repository of the Hugging Face hub, ``owner/name``, to which the final weights are uploaded when the run ends:
    ``best``, if ``best_checkpoint_metric`` is set, else those of the last epoch. A new repository is private."""

    # ---- Evaluation and checkpoints

    run_val_every_n_steps: int | None = None
    """Optimizer steps between two evaluations on ``dataset_val``. None evaluates only before the first step and after
    the last."""

    generate_val_every_n_steps: int | None = None
    """Optimizer steps after which the policy answers prompts of ``dataset_val``, also before the first step and after
    the last, with the same draws each time. The completions go to ``output_dir/completions``. None answers none."""

    generate_val_prompts: int = 4
    """How many prompts it answers: the first ones that differ."""

    generate_val_max_new_tokens: int = 128
    """Most tokens of such a completion."""

    save_every_n_steps: int | None = None
    """Optimizer steps between two training checkpoints. None writes no checkpoint, only weights at the end of an
    epoch."""

    keep_last_n_checkpoints: int = 2
    """How many of the newest checkpoints to keep. With two or more the run can fall back to an older one if the newest
    is damaged."""

    best_checkpoint_metric: str | None = None
    """Metric of ``dataset_val`` that chooses the best checkpoint, such as ``val/rewards/accuracies`` (DPO, KTO) or
    ``val/log_probs/accuracies``. That checkpoint is kept, and its weights are written to ``output_dir/best`` at the
    end. ``save_every_n_steps`` has to be a multiple of ``run_val_every_n_steps``."""

    best_checkpoint_mode: str = "max"
    """``max`` or ``min``: which value of that metric is the best."""

    enable_async_checkpointing: bool = False
    """Write checkpoints in the background, from a copy in host memory, while training continues."""

    resume_from_checkpoint: bool | str = False
    """``latest`` (or True) resumes from the newest checkpoint in ``output_dir``, a path
    (``output_dir/checkpoints/step_N``) from that one."""

    # ---- Logs, and when to stop

    log_every_n_steps: int = 1
    """Optimizer steps between two log entries."""

    log_peak_memory_stats: bool = False
    """Log the peak memory of the GPU as well."""

    log_completions: int | None = None
    """How many completions of each round, and of ``generate_val_every_n_steps``, the log shows. All of them are in
    ``output_dir/completions``, and go to Weights & Biases or TensorBoard as a table. None shows none."""

    stop_after_nonfinite_steps: int = 10
    """Stop after so many consecutive steps whose loss or gradient is not finite. Each such step is skipped."""

    stop_after_empty_rounds: int = 10
    """Stop after so many consecutive online rounds without anything to learn. Their steps leave the weights as they
    are."""

    collapse_window: int | None = 50
    """Log entries that the watch for a collapse compares: the reward falls while the KL to the reference grows, the
    entropy falls to a tenth of what it was at the start, the responses of rounds become five times as long or as short,
    or one response answers half of the prompts. None does not watch."""

    stop_on_collapse: bool = False
    """Stop at a collapse. False only warns."""

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
        repo = self.push_to_hub
        self._check("push_to_hub", repo is None or re.fullmatch(r"[\w.-]+/[\w.-]+", repo) is not None, "owner/name")
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
        divisor = self.temperature
        self._check("temperature", divisor is None or 0 < divisor < math.inf, "a number above 0, or null")
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
        """Returns the row budget of a pass. It has few shapes on CUDA and with ``compile``: kernels are per shape."""
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
