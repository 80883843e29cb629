"""Where the reference log-probs come from, and when the reference becomes the policy.

Every strategy has one interface: ``setup(policy, new_model)``, ``log_probs(rows)``, ``before_optimizer_step(step)`` and
a state for the checkpoint.
"""

from humanline.reference._adapter_reference import AdapterReference
from humanline.reference._model_reference import ModelReference

Reference = AdapterReference | ModelReference

__all__ = ["AdapterReference", "ModelReference", "Reference"]
