from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from humanline.checkpoint._export import write_weights
from humanline.config import DTYPES, Settings
from humanline.models import LogProbDecoder, adapter_modules


class WeightsOut:
    """Writes a run's weights: those of an epoch, the best ones, and those for a sampling server.

    Args:
        policy (LogProbDecoder): the policy.
        checkpointer (Any): torchtune's checkpointer, which knows the checkpoint's files.
        checkpoint_dtypes (Mapping[str, torch.dtype]): the dtype of each weight of the checkpoint.
        settings (Settings): the config's top-level keys.
        tokenizer (Any): the run's tokenizer, whose files are written too; None leaves the checkpoint's.

    Attributes:
        has_whole_weights (bool): whether a folder has more than an adapter.
    """

    def __init__(
        self,
        policy: LogProbDecoder,
        checkpointer: Any,
        checkpoint_dtypes: Mapping[str, torch.dtype],
        settings: Settings,
        tokenizer: Any = None,
    ) -> None:
        self.policy, self.checkpointer, self.checkpoint_dtypes = policy, checkpointer, checkpoint_dtypes
        self.folder, self.tokenizer = Path(settings.output_dir), tokenizer
        self.export_dtype = DTYPES[settings.export_dtype] if settings.export_dtype else None
        self.merged = not settings.save_adapter_weights_only
        self.has_whole_weights = self.merged or not adapter_modules(policy)

    def write(self, name: str, card: str) -> str | None:
        """Writes the weights into the folder ``name`` of ``output_dir``; a collective.

        An adapter is written into ``name/adapter``. The merged weights are written too if
        ``save_adapter_weights_only`` is False.

        Args:
            name (str): the folder's name.
            card (str): the text of its ``README.md``.

        Returns:
            str | None: on all ranks, the error if the weights could not be written; None if they were written.
        """
        return self._write(self.folder / name, merged=self.merged, card=card)

    def hand_over(self, folder: Path) -> str | None:
        """Writes the full weights, merged with any adapter, for a sampling server. Otherwise like :meth:`write`."""
        return self._write(folder, merged=True, card=None)

    def _write(self, folder: Path, *, merged: bool, card: str | None) -> str | None:
        return write_weights(
            folder,
            self.policy,
            self.checkpointer,
            checkpoint_dtypes=self.checkpoint_dtypes,
            export_dtype=self.export_dtype,
            merged=merged,
            card=card,
            tokenizer=self.tokenizer,
        )
