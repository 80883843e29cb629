"""Where the reference log-probs come from, and when the reference becomes the policy.

The rule of syncing is :class:`Reference`; a strategy adds ``setup(policy, context)``, ``log_probs(rows)``,
``sync(step)`` and what a checkpoint needs of it.
"""

from humanline.reference._adapter_reference import AdapterReference
from humanline.reference._model_reference import ModelReference
from humanline.reference._reference import Reference
from humanline.reference._run_context import RunContext
from humanline.reference._windowed_reference import WindowedReference

__all__ = ["AdapterReference", "ModelReference", "Reference", "RunContext", "WindowedReference"]
