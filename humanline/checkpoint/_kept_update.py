import math

from torch import Tensor

_CHUNK = 1 << 20  # elements compared at a time: no full copy of a weight, and float32 sums keep their digits


class KeptUpdate:
    r"""Measures the share of an update that remains after rounding, over all weights of a model.

    The update is :math:`u = w_1 - w_0`, and after rounding :math:`r = round(w_1) - w_0` remains. The share is the
    smaller of

    - the projection :math:`\langle r, u \rangle / \|u\|^2`: ``r`` is this multiple of ``u`` plus noise orthogonal to
      it. To first order, a loss or a margin gains this share of the update's gain;
    - the cosine :math:`\langle r, u \rangle / (\|r\| \|u\|)`, which is smaller if the noise is larger than the update.

    The ratio of norms :math:`\|r\| / \|u\|` alone would not do. If every weight should move by a fifth of a bfloat16
    step, one in five may move by a whole step and the others not at all: the noise then has twice the update's norm.
    """

    def __init__(self) -> None:
        self._left_update = self._update = self._left = 0.0  # <r, u>, |u|^2, |r|^2

    def add(self, before: Tensor, after: Tensor, rounded: Tensor) -> None:
        """Counts a weight: before the update, after it, and rounded. All three have one shape."""
        tensors = [tensor.reshape(-1).split(_CHUNK) for tensor in (before, after, rounded)]
        for start, end, written in zip(*tensors, strict=True):
            update, left = end.float() - start.float(), written.float() - start.float()
            self._left_update += float(left @ update)
            self._update += float(update @ update)
            self._left += float(left @ left)

    @property
    def share(self) -> float:
        """The share, from 0 to 1; 1 if there was no update."""
        if self._update == 0:
            return 1.0
        if self._left == 0:
            return 0.0
        projection = self._left_update / self._update
        cosine = self._left_update / math.sqrt(self._left * self._update)
        return max(0.0, min(projection, cosine))
