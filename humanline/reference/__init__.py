"""Where the reference log-probs come from, and when the reference becomes the policy.

The rule of syncing is :class:`Reference`. A config names a :class:`Strategy`, whose ``build(context)`` makes the run's
reference: it adds ``log_probs(rows)``, ``become_policy(step)`` and what a checkpoint needs of it.
"""

from humanline.reference._adapter_reference import AdapterReference
from humanline.reference._model_reference import ModelReference
from humanline.reference._reference import Reference, Strategy
from humanline.reference._run_context import ModelBuilder, RunContext
from humanline.reference._windowed_reference import WindowedReference

__all__ = [
    "AdapterReference",
    "ModelBuilder",
    "ModelReference",
    "Reference",
    "RunContext",
    "Strategy",
    "WindowedReference",
]
