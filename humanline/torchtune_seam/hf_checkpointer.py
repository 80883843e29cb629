"""torchtune's checkpointer of Hugging Face's format, extended by families that its release does not know."""

import json
import re
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import Tensor
from torchtune import training
from torchtune.models.convert_weights import get_mapped_key

from humanline.errors import ConfigError
from humanline.torchtune_seam.internals import QWEN2_FROM_HF, SUFFIXES_TO_NOT_COPY, copy_files, safe_torch_load

QWEN3_FROM_HF: dict[str, str] = {theirs: ours for theirs, ours in QWEN2_FROM_HF.items() if ours is not None} | {
    f"model.layers.{{}}.self_attn.{norm}.weight": f"layers.{{}}.attn.{norm}.scale" for norm in ("q_norm", "k_norm")
}
GEMMA3_FROM_HF: dict[str, str] = QWEN3_FROM_HF | {
    "model.layers.{}.post_attention_layernorm.weight": "layers.{}.sa_scale.scale",
    "model.layers.{}.pre_feedforward_layernorm.weight": "layers.{}.mlp_norm.scale",
    "model.layers.{}.post_feedforward_layernorm.weight": "layers.{}.mlp_scale.scale",
}
NEW_FAMILIES: dict[str, dict[str, str]] = {"QWEN3": QWEN3_FROM_HF, "GEMMA3": GEMMA3_FROM_HF}
"""HF name -> torchtune name of each weight, per ``model_type``. Rows keep their order."""

# Names in checkpoints of models that see images: prefixes of the text model, with what they stand for, and the rest.
_TEXT = {"language_model.model.": "model.", "model.language_model.": "model.", "language_model.lm_head.": "lm_head."}
_NOT_TEXT = re.compile(r"(model\.)?(vision_tower|multi_modal_projector)\.")

INDEX = "model.safetensors.index.json"


class FullModelHFCheckpointer(training.FullModelHFCheckpointer):
    """torchtune's checkpointer of the same name with two more families, ``QWEN3`` and ``GEMMA3``.

    For these two, each weight goes back into the file, and under the name, that it came from. Of a Gemma 3 with a
    vision tower, only the text model is loaded; saving writes the other weights unchanged, so that the folder has the
    whole model. For other families, everything is torchtune's.

    Args:
        checkpoint_dir (str): the folder with weights and config.json.
        checkpoint_files (list[str] | dict[str, str]): the files with weights, as for torchtune's.
        model_type (str): the family: ``QWEN3``, ``GEMMA3`` or one of torchtune's.
        output_dir (str): where epochs are written.
        **others (Any): as for torchtune's.
    """

    def __init__(
        self, checkpoint_dir: str, checkpoint_files: Any, model_type: str, output_dir: str, **others: Any
    ) -> None:
        self._from_hf = NEW_FAMILIES.get(model_type)
        known = model_type if self._from_hf is None else "QWEN2"  # any: it is replaced below
        super().__init__(checkpoint_dir, checkpoint_files, known, output_dir, **others)
        if self._from_hf is not None:
            self._model_type = model_type
            self._weight_map: dict[str, str] = {}
            self._hf_names: dict[str, str] = {}
            self._not_text: dict[str, Tensor] = {}

    def load_checkpoint(self) -> dict[str, Any]:
        """Reads the weights, memory-mapped if the format allows it.

        Returns:
            dict[str, Any]: ``model``: the state dict, in torchtune's names.
        """
        if self._from_hf is None:
            return super().load_checkpoint()
        weights: dict[str, Tensor] = {}
        self._weight_map, self._hf_names, self._not_text = {}, {}, {}
        for path in map(Path, self._checkpoint_paths):
            for name, tensor in safe_torch_load(path).items():
                self._weight_map[name] = path.with_suffix(".safetensors").name
                if _NOT_TEXT.match(name):
                    self._not_text[name] = tensor
                    continue
                start = next(filter(name.startswith, _TEXT), "")
                ours = get_mapped_key(_TEXT.get(start, "") + name.removeprefix(start), self._from_hf)
                weights[ours] = tensor
                self._hf_names[ours] = name
        return {training.MODEL_KEY: weights}

    def save_checkpoint(
        self, state_dict: dict[str, Any], epoch: Any, intermediate_checkpoint: bool = False, adapter_only: bool = False
    ) -> None:
        """Writes the weights in ``state_dict["model"]`` and the other files of ``checkpoint_dir`` to an epoch's folder.

        Raises:
            ConfigError: for an adapter or a recipe's state of the two families, which humanline's recipes write.
        """
        if self._from_hf is None:
            super().save_checkpoint(state_dict, epoch, intermediate_checkpoint, adapter_only)
            return
        if intermediate_checkpoint or adapter_only or training.ADAPTER_KEY in state_dict:
            raise ConfigError(
                f"checkpointer.model_type: {self._model_type} writes whole weights only, got an adapter or a recipe's "
                "state; use a recipe of humanline, which writes these itself"
            )
        folder = Path(self._output_dir) / f"epoch_{epoch}"
        folder.mkdir(parents=True, exist_ok=True)
        weights = {self._hf_names[name]: tensor for name, tensor in state_dict[training.MODEL_KEY].items()}
        weights |= self._not_text
        files: dict[str, dict[str, Tensor]] = {}
        for name, tensor in weights.items():
            files.setdefault(self._weight_map[name], {})[name] = tensor.contiguous()
        for file, tensors in files.items():
            save_file(tensors, folder / file, metadata={"format": "pt"})
        index = {
            "metadata": {"total_size": sum(tensor.nbytes for tensor in weights.values())},
            "weight_map": {name: self._weight_map[name] for name in weights},
        }
        (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n")
        copy_files(self._checkpoint_dir, folder, ignore_suffixes=SUFFIXES_TO_NOT_COPY)
