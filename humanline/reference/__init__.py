"""The reference: how its log-probs are computed, and when it becomes the policy.

:class:`Reference` holds the rule of syncing. A config names a :class:`Strategy`, whose ``build(context)`` returns the
run's reference, which implements ``log_probs(rows)``, ``become_policy(step)`` and the state for checkpoints.
"""

from humanline.reference._adapter_reference import AdapterReference
from humanline.reference._model_reference import ModelReference
from humanline.reference._reference import Reference, Strategy
from humanline.reference._run_context import ModelBuilder, RunContext
from humanline.reference._windowed_reference import Window, WindowedReference

__all__ = [
    "AdapterReference",
    "ModelBuilder",
    "ModelReference",
    "Reference",
    "RunContext",
    "Strategy",
    "Window",
    "WindowedReference",
]
