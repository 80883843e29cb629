"""Where the reference log-probs come from, and when the reference becomes the policy.

Every strategy has one interface: ``setup(policy, plan)``, ``log_probs(rows)``, ``before_optimizer_step(step)`` and
a state for the checkpoint.
"""

from humanline.reference._adapter_reference import AdapterReference
from humanline.reference._model_reference import ModelReference
from humanline.reference._plan import Plan
from humanline.reference._windowed_reference import WindowedReference

Reference = AdapterReference | ModelReference | WindowedReference

__all__ = ["AdapterReference", "ModelReference", "Plan", "Reference", "WindowedReference"]
