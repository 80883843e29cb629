"""The initial model of a run: its weights from the checkpoint, and the models built from them."""

import hashlib
import time
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig
from torch import Tensor
from torchtune import training, utils

from humanline.checkpoint import (
    WeightsOut,
    build_decoder,
    code_digest,
    fingerprint,
    read_adapter,
    read_decoder_weights,
    rounding_on_load,
    sampled_digest,
)
from humanline.config import DTYPES, is_given
from humanline.distributed import check_same
from humanline.errors import ConfigError
from humanline.models import (
    LogProbDecoder,
    adapter_modules,
    build_model,
    check_adapter,
    has_quantized_base,
    initial_adapter,
    trainable_parameters,
)
from humanline.training._environment import Environment

log = utils.get_logger("INFO")


class InitialModel:
    """Reads the initial weights of a run, and builds models from them. Delete it then, to free the weights.

    Args:
        cfg (DictConfig): the whole config.
        environment (Environment): the run's environment.

    Raises:
        ConfigError: if weights, model and settings do not match.
    """

    def __init__(self, cfg: DictConfig, environment: Environment) -> None:
        self.cfg, self.environment = cfg, environment
        settings = environment.settings
        with training.set_default_dtype(DTYPES[settings.dtype]), torch.device("meta"):
            shape = LogProbDecoder(build_decoder(cfg))
        self.windows = shape.windows
        self.checkpointer, weights = read_decoder_weights(cfg, shape)
        if Path(cfg.checkpointer.output_dir).resolve() != Path(settings.output_dir).resolve():
            raise ConfigError(
                f"checkpointer.output_dir: expected output_dir ({settings.output_dir}), got "
                f"{cfg.checkpointer.output_dir}; set it to ${{output_dir}}"
            )
        self.checkpoint_dtypes = {name: tensor.dtype for name, tensor in weights.items()}
        check_adapter(shape, environment.world_size, settings.data_parallel_replicate_dim)
        self.has_adapter = bool(adapter_modules(shape))
        self._check_export()
        key = "dtype" if self.has_adapter else "master_dtype"  # the dtype of the checkpoint's weights in memory
        if environment.rank == 0 and (warning := rounding_on_load(cfg, weights, key, DTYPES[getattr(settings, key)])):
            log.warning(warning)
        if self.has_adapter and settings.adapter:
            weights |= read_adapter(settings.adapter, shape, self.checkpointer)
        elif self.has_adapter:
            weights |= initial_adapter(shape, weights, settings.seed)
        elif settings.adapter:
            raise ConfigError("adapter: the model has no adapter; use a lora_ or qlora_ builder in model._component_")
        check_same({"checkpointer.checkpoint_dir and adapter": sampled_digest(weights)})
        self.weights = weights
        # One rank has nothing to shard, and torchao's NF4 fails when FSDP2 gathers over one rank.
        plain = environment.world_size == 1 and has_quantized_base(shape)
        self.mesh = None if plain else environment.mesh

    def policy(self) -> LogProbDecoder:
        """Builds the policy with the initial weights."""
        settings, start = self.environment.settings, time.perf_counter()
        policy = self._build(self.weights, settings.master_dtype, settings.enable_activation_checkpointing)
        if self.environment.rank == 0:
            log.info(f"Loading the model took {time.perf_counter() - start:.1f} s")
            trained = sum(parameter.numel() for parameter in trainable_parameters(policy).values())
            log.info(f"{trained:,} trainable parameters")
        return policy

    def reference_model(self) -> LogProbDecoder:
        """Builds a model like the policy, in its compute dtype; the trainable weights are undefined."""
        # The reference copies the trainable weights from the policy; only an adapter's frozen base is loaded.
        weights = self.weights if self.has_adapter else None
        return self._build(weights, self.environment.settings.dtype, activation_checkpointing=False)

    def weights_out(self, policy: LogProbDecoder, tokenizer: Any = None) -> WeightsOut:
        """Builds the writer of the policy's weights, in the format of the checkpoint's files.

        Args:
            policy (LogProbDecoder): the policy.
            tokenizer (Any): the run's tokenizer, whose files are written too; None leaves the checkpoint's.
        """
        return WeightsOut(policy, self.checkpointer, self.checkpoint_dtypes, self.environment.settings, tokenizer)

    def fingerprint(self) -> str:
        """Returns a digest of the initial weights and of the function that they compute. Collective."""
        facts = f"{self.environment.settings.dtype} windows {self.windows}"
        return fingerprint(self.weights, self.cfg.model, facts)

    def computation(self) -> str:
        """Returns a digest of everything that log-probs depend on, except weights, model and tokens."""
        settings, device = self.environment.settings, self.environment.device
        name = torch.cuda.get_device_name(device) if device.type == "cuda" else ""
        precision = f"{settings.dtype} {settings.master_dtype} {torch.get_float32_matmul_precision()}"
        code = code_digest(self.cfg.model._component_)
        facts = f"{code} {device.type} {name} {precision} compiled {settings.compile}"
        facts += f" temperature {self.environment.temperature}"
        return hashlib.blake2b(facts.encode(), digest_size=16).hexdigest()

    def _build(
        self, weights: dict[str, Tensor] | None, param_dtype: str, activation_checkpointing: bool
    ) -> LogProbDecoder:
        settings = self.environment.settings
        model = build_model(
            lambda: build_decoder(self.cfg),
            weights,
            mesh=self.mesh,
            device=self.environment.device,
            param_dtype=DTYPES[param_dtype],
            compute_dtype=DTYPES[settings.dtype],
            activation_checkpointing=activation_checkpointing,
            compile=settings.compile,
        )
        model.temperature = self.environment.temperature
        return model

    def _check_export(self) -> None:
        settings = self.environment.settings
        hands_over = is_given(self.cfg, "engine") and self.cfg.engine.get("weights_dir") is not None
        if self.has_adapter and settings.export_dtype and settings.save_adapter_weights_only and not hands_over:
            raise ConfigError(
                f"export_dtype: {settings.export_dtype} has no effect, since an adapter is written in float32; set "
                "save_adapter_weights_only: False to write merged weights too, or remove export_dtype"
            )
