import hashlib
from importlib.metadata import version
from typing import Any

import torch
import torch.distributed as dist
from omegaconf import DictConfig, OmegaConf
from torch import Tensor
from torchtune import training

from humanline.errors import ConfigError
from humanline.training._component import component


def read_weights(cfg: DictConfig) -> tuple[Any, dict[str, Tensor]]:
    """Reads the weights that ``cfg.checkpointer`` points to, in torchtune's names and memory-mapped where the format
    allows.

    Returns:
        tuple[Any, dict[str, Tensor]]: the checkpointer, which also writes the final weights, and the state dict.

    Raises:
        ConfigError: if files are missing or cannot be converted.
    """
    where = f"checkpointer: {cfg.checkpointer.get('checkpoint_dir')}"
    try:
        checkpointer = component(cfg, "checkpointer")
        return checkpointer, checkpointer.load_checkpoint()[training.MODEL_KEY]
    except ConfigError:
        raise
    except OSError as error:
        raise ConfigError(f"{where}: {error}; download the model there (tune download) or correct the path") from error
    except Exception as error:  # torchtune raises bare Exception for weights it has no name for
        raise ConfigError(
            f"{where}: cannot be read as {cfg.checkpointer.get('model_type')}: {' '.join(str(error).split())}"
        ) from error


def sampled_digest(weights: dict[str, Tensor]) -> str:
    """A digest of a few numbers of each weight, which tells checkpoints apart without reading them whole."""
    total = hashlib.blake2b(digest_size=8)
    for name in sorted(weights):
        whole = weights[name]
        flat = whole.view(-1) if whole.is_contiguous() else whole[0].reshape(-1)
        numbers = flat[:: max(1, len(flat) // 16)].contiguous().view(torch.uint8)
        total.update(f"{name} {whole.dtype} {tuple(whole.shape)}".encode() + numbers.numpy().tobytes())
    return total.hexdigest()


def fingerprint(weights: dict[str, Tensor], model: DictConfig, dtype: str) -> str:
    """A digest of weights and of the function that is made of them, the same on all ranks; a collective.

    Args:
        weights (dict[str, Tensor]): the full state dict.
        model (DictConfig): the builder and its arguments.
        dtype (str): what the model computes in.
    """
    digest = [""]
    if dist.get_rank() == 0:
        total = hashlib.blake2b(
            f"{OmegaConf.to_container(model, resolve=True)} {dtype} {version('torchtune')}".encode(), digest_size=16
        )
        for name in sorted(weights):
            total.update(f"{name} {weights[name].dtype} {tuple(weights[name].shape)}".encode())
            total.update(weights[name].contiguous().view(-1).view(torch.uint8).numpy().data)
        digest = [total.hexdigest()]
    dist.broadcast_object_list(digest)
    return digest[0]
