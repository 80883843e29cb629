from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torchtune.modules import TransformerDecoder
from torchtune.modules.peft import get_adapter_params
from torchtune.modules.tied_linear import TiedLinear

from humanline.errors import ConfigError

__all__ = ["check_architecture", "drop_tied_output", "fill_rotary_tables", "load_decoder"]


def check_architecture(model: nn.Module, state_dict: Mapping[str, Tensor], checkpoint_dir: str) -> None:
    """Checks that the names and shapes of a checkpoint's weights are those of a model, possibly on the meta device.

    Args:
        model (nn.Module): the model for the weights; its adapter, if any, is ignored.
        state_dict (Mapping[str, Tensor]): the checkpoint, in torchtune's names.
        checkpoint_dir (str): the checkpoint's folder, for the message.

    Raises:
        ConfigError: at the first difference.
    """
    adapter = get_adapter_params(model)
    wanted = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items() if name not in adapter}
    found = {name: tuple(tensor.shape) for name, tensor in state_dict.items()}
    for name in wanted | found:
        if wanted.get(name) != found.get(name):
            raise ConfigError(
                f"checkpointer.checkpoint_dir: {checkpoint_dir} has another architecture than model: "
                f"{name} is {_shape(found.get(name))} in the checkpoint and {_shape(wanted.get(name))} in the model; "
                f"{_remedy(name, found)}"
            )


def drop_tied_output(
    model: TransformerDecoder, state_dict: dict[str, Tensor], head: Tensor | None, checkpoint_dir: str
) -> bool:
    """Removes a copy of the embeddings, stored as output layer, from a checkpoint if the model ties the two.

    Args:
        model (TransformerDecoder): the model for the weights.
        state_dict (dict[str, Tensor]): the checkpoint, in torchtune's names; changed in place.
        head (Tensor | None): the output layer in the files, if reading left it out of ``state_dict``.
        checkpoint_dir (str): the checkpoint's folder, for the message.

    Returns:
        bool: whether there was a copy.

    Raises:
        ConfigError: if the output layer differs from the embeddings.
    """
    if not isinstance(model.output, TiedLinear):
        return False
    output, embeddings = state_dict.pop(_OUTPUT, head), state_dict.get(_EMBEDDINGS)
    if output is None or embeddings is None:
        return False
    if output.shape != embeddings.shape or not torch.equal(output.to(embeddings.dtype), embeddings):
        raise ConfigError(
            f"checkpointer.checkpoint_dir: {checkpoint_dir} has an output layer (lm_head.weight) that differs from "
            "its embeddings, but the model ties the two; use a builder that does not, or set "
            "model.tie_word_embeddings: False and the same key of config.json"
        )
    return True


def load_decoder(
    model: TransformerDecoder, state_dict: Mapping[str, Tensor], *, device: torch.device, dtype: torch.dtype
) -> TransformerDecoder:
    """Loads weights into a decoder that was built on the meta device, on one device and in one dtype.

    Args:
        model (TransformerDecoder): the decoder, without memory; it must have passed :func:`check_architecture`.
        state_dict (Mapping[str, Tensor]): its weights, in torchtune's names.
        device (torch.device): device of the loaded weights.
        dtype (torch.dtype): dtype of the loaded weights.

    Returns:
        TransformerDecoder: the same decoder, in evaluation mode.
    """
    weights = {name: tensor.to(device=device, dtype=dtype) for name, tensor in state_dict.items()}
    model.load_state_dict(weights, assign=True)
    fill_rotary_tables(model, device)
    return model.eval()


def fill_rotary_tables(model: nn.Module, device: torch.device) -> None:
    """Computes the tables of rotary embeddings on a device, since no state dict contains them."""
    with device:
        for module in model.modules():
            if hasattr(module, "rope_init"):
                module.rope_init()  # type: ignore[operator]


_OUTPUT, _EMBEDDINGS = "output.weight", "tok_embeddings.weight"


def _remedy(name: str, found: Mapping[str, object]) -> str:
    if name == _OUTPUT and name not in found:
        return (
            "its embeddings are also the output layer; use a builder that ties them (llama3_2, qwen2_5 up to 3B), "
            "or set model.tie_word_embeddings: True"
        )
    return "point both keys to the same model"


def _shape(shape: tuple[int, ...] | None) -> str:
    return "missing" if shape is None else str(list(shape))
