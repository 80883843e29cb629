import math
from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from humanline.errors import ConfigError
from humanline.losses._checks import check_number
from humanline.losses._log_ratio import PerceptualLoss, humanline_clip, token_kl, token_log_ratio


class HumanlineGRPOLoss(PerceptualLoss):
    """Group Relative Policy Optimization on perceived token log-ratios, relative to the synced reference.

    ``l_t`` is the token log-ratio of policy to reference, ``l~_t`` the perceived one, clipped to
    ``[log_eps_P, log_eps_R]``. With ``ratio_t = exp(l~_t)`` and ``A`` the response's advantage within its group, a
    token's loss is

        -min(A * ratio_t, A * clamp(ratio_t, 1 - epsilon_low, 1 + epsilon_high)) + beta * (exp(-l_t) + l_t - 1)

    The KL term uses the unclipped ``l_t``. GRPO is from https://arxiv.org/abs/2402.03300, its humanline form from
    https://arxiv.org/abs/2509.24207.

    Args:
        beta (float): weight of the KL to the reference, >= 0.
        log_eps_P (float | None): lower bound of the log-ratio, nats, <= 0; null sets no lower bound.
        log_eps_R (float | None): upper bound of the log-ratio, nats, >= 0; null sets no upper bound.
        epsilon_low (float): with a negative advantage, ratios below ``1 - epsilon_low`` are clipped; in ``(0, 1)``.
        epsilon_high (float): with a positive advantage, ratios above ``1 + epsilon_high`` are clipped; > 0.
        aggregation (str): terms of the loss's mean. ``token``: the microbatch's tokens; ``sequence``: its responses,
            each the mean of its tokens; ``dapo``: the tokens of the optimizer step's whole batch
            (https://arxiv.org/abs/2503.14476); ``fixed``: its responses, each the sum of its tokens divided by
            ``fixed_length`` (Dr. GRPO, https://arxiv.org/abs/2503.20783).
        fixed_length (int | None): with ``fixed``, tokens, such as the maximum length of a response; otherwise null.
        advantage_std (str): the standard deviation that divides advantages: ``population``, ``sample`` (with one
            response less in its denominator, as in TRL), or ``none`` for no division (Dr. GRPO).
        advantage_eps (float): is added to the standard deviation, in the unit of the scores; >= 0.
        perception (str): how bounds apply. ``clip`` clamps each token's log-ratio to them; ``sample`` detaches tokens
            by humanline sampling around them; ``none`` ignores them.
        gamma_P (float | None): shape of ``B_P ~ Beta(gamma_P, 1)``, > 0; required with ``sample`` and ``log_eps_P``,
            otherwise null.
        gamma_R (float | None): shape of ``B_R ~ Beta(gamma_R, 1)``, > 0; required with ``sample`` and ``log_eps_R``,
            otherwise null.

    Raises:
        ConfigError: if a setting is out of its range or contradicts another.
    """

    def __init__(
        self,
        beta: float = 0.01,
        log_eps_P: float | None = -1.5,
        log_eps_R: float | None = 1.5,
        epsilon_low: float = 0.2,
        epsilon_high: float = 0.2,
        aggregation: str = "token",
        fixed_length: int | None = None,
        advantage_std: str = "population",
        advantage_eps: float = 0.01,
        perception: str = "clip",
        gamma_P: float | None = None,
        gamma_R: float | None = None,
    ) -> None:
        super().__init__(log_eps_P, log_eps_R, perception, gamma_P, gamma_R)
        check_number("beta", beta, lambda beta: beta >= 0, "of at least 0; 0.01 is a common value, 0 turns the KL off")
        check_number("epsilon_low", epsilon_low, lambda eps: 0 < eps < 1, "in (0, 1); 0.2 is a common value")
        check_number("epsilon_high", epsilon_high, lambda eps: eps > 0, "above 0; 0.2 is a common value")
        if aggregation not in _AGGREGATIONS:
            raise ConfigError(f"loss.aggregation: expected {_one_of(_AGGREGATIONS)}, got {aggregation!r}")
        if (fixed_length is not None) != (aggregation == "fixed"):
            expected = "the maximum length of a response, tokens" if aggregation == "fixed" else "null"
            raise ConfigError(
                f"loss.fixed_length: expected {expected} with aggregation: {aggregation}, got {fixed_length!r}"
            )
        if fixed_length is not None and (isinstance(fixed_length, bool) or not fixed_length >= 1):
            raise ConfigError(f"loss.fixed_length: expected at least 1 token, got {fixed_length!r}")
        if advantage_std not in _STDS:
            raise ConfigError(f"loss.advantage_std: expected {_one_of(_STDS)}, got {advantage_std!r}")
        check_number("advantage_eps", advantage_eps, lambda eps: eps >= 0, "of at least 0; 0.01 and 1e-4 are common")
        self.beta = beta
        self.epsilon_low = epsilon_low
        self.epsilon_high = epsilon_high
        self.aggregation = aggregation
        self.fixed_length = fixed_length
        self.advantage_std = advantage_std
        self.advantage_eps = advantage_eps

    def forward(
        self,
        policy_logps: Tensor,
        reference_logps: Tensor,
        mask: Tensor,
        advantages: Tensor,
        draws: Tensor | None = None,
    ) -> Tensor:
        """Computes the loss of a whole microbatch (with ``dapo`` of a whole batch), a mean as set by ``aggregation``.

        Args:
            policy_logps (Tensor): token log-probs of the responses under the policy, nats, ``[B, S]``.
            reference_logps (Tensor): the same under the reference, ``[B, S]``.
            mask (Tensor): True at response tokens, bool ``[B, S]``.
            advantages (Tensor): one per response, ``[B]``, such as from :meth:`advantages`.
            draws (Tensor | None): with ``sample``, uniforms in [0, 1), ``[2, B, S]``; None draws them here.

        Returns:
            Tensor: the loss, float32 scalar.
        """
        total = self.total(policy_logps, reference_logps, mask, advantages, draws)
        return total / max(1, self.num_terms(mask.sum(-1).tolist()))

    def total(
        self,
        policy_logps: Tensor,
        reference_logps: Tensor,
        mask: Tensor,
        advantages: Tensor,
        draws: Tensor | None = None,
    ) -> Tensor:
        """Computes the sum that :meth:`forward` divides to a mean, for a part of a microbatch.

        The sum is over tokens; with ``sequence`` and ``fixed`` over responses, each the sum of its tokens divided by
        its length or ``fixed_length``. The arguments are those of :meth:`forward`.

        Returns:
            Tensor: the sum, float32 scalar.
        """
        log_ratio = token_log_ratio(policy_logps, reference_logps, mask)
        perceived = self.perceive(log_ratio, draws)
        # The minimum of the two products, taken before the exponential, because the larger one could overflow.
        losses = -advantages[:, None] * self._nearby(perceived, advantages).exp()
        if self.beta:  # 0 times an overflowing KL would be NaN
            losses = losses + self.beta * token_kl(log_ratio)
        losses = losses.where(mask, 0.0)
        lengths = mask.sum(-1).clamp(min=1)
        return (losses.sum(-1) / _AGGREGATIONS[self.aggregation].length(lengths, self.fixed_length)).sum()

    def num_clipped(
        self, policy_logps: Tensor, reference_logps: Tensor, mask: Tensor, advantages: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Counts the tokens whose ratio the clip of GRPO itself holds, which leaves them no gradient, and all tokens.

        The arguments are those of :meth:`forward`.

        Returns:
            tuple[Tensor, Tensor]: scalars ``(clipped, tokens)``. Tokens without an advantage are never clipped.
        """
        log_ratio = token_log_ratio(policy_logps.detach(), reference_logps, mask)
        perceived = humanline_clip(log_ratio, *self.bounds) if self.perception == "clip" else log_ratio
        held = (self._nearby(perceived, advantages) != perceived) & (advantages != 0)[:, None]
        return held.sum(), mask.sum()

    def _nearby(self, perceived: Tensor, advantages: Tensor) -> Tensor:
        """Returns the log of the ratio after GRPO's own clip, which acts on one side, by the sign of the advantage."""
        return torch.where(
            advantages[:, None] >= 0,
            perceived.clamp(max=math.log1p(self.epsilon_high)),
            perceived.clamp(min=math.log1p(-self.epsilon_low)),
        )

    def advantages(self, scores: Tensor, group_ids: Tensor) -> Tensor:
        """Computes :func:`group_advantages` with the loss's ``advantage_std`` and ``advantage_eps``."""
        return group_advantages(scores, group_ids, self.advantage_eps, self.advantage_std)

    @property
    def scope(self) -> str:  # type: ignore[override]
        return _AGGREGATIONS[self.aggregation].scope

    def num_terms(self, lengths: Sequence[int]) -> int:
        """Number of responses that have tokens with ``sequence`` and ``fixed``, otherwise number of tokens."""
        return _AGGREGATIONS[self.aggregation].terms(lengths)


def group_advantages(scores: Tensor, group_ids: Tensor, eps: float = 0.01, std: str = "population") -> Tensor:
    """``A = (s - mean) / (std + eps)`` within each group, or ``s - mean``.

    Args:
        scores (Tensor): one per response, higher is better, ``[B]``.
        group_ids (Tensor): the group of each response, any integers, ``[B]``.
        eps (float): limits the advantages of groups with nearly equal scores; in the unit of the scores.
        std (str): ``population``, ``sample``, or ``none`` for ``s - mean``.

    Returns:
        Tensor: float32 ``[B]``; 0 in a group of one.
    """
    _, group, sizes = group_ids.unique(return_inverse=True, return_counts=True)
    scores = scores.double()  # scores may be large compared with their differences

    def group_sum(values: Tensor) -> Tensor:
        return values.new_zeros(len(sizes)).index_add(0, group, values)

    centred = scores - (group_sum(scores) / sizes)[group]
    less = _STDS[std]
    if less is None:
        return centred.float()
    spread = (group_sum(centred.square()) / (sizes - less).clamp(min=1)).sqrt()[group] + eps
    return torch.where(spread > 0, centred / spread, 0.0).float()


class _Aggregation(NamedTuple):
    """How token losses become the loss."""

    scope: str  # of the mean: microbatch or batch
    length: Callable[[Tensor, int | None], Tensor | int]  # divides a response's sum; of lengths and fixed_length
    terms: Callable[[Sequence[int]], int]  # the number of terms of the mean, from the lengths of all responses


def _responses(lengths: Sequence[int]) -> int:
    return sum(length > 0 for length in lengths)


_AGGREGATIONS = {
    "token": _Aggregation("microbatch", lambda lengths, fixed: 1, sum),
    "sequence": _Aggregation("microbatch", lambda lengths, fixed: lengths, _responses),
    "dapo": _Aggregation("batch", lambda lengths, fixed: 1, sum),
    "fixed": _Aggregation("microbatch", lambda lengths, fixed: fixed or 1, _responses),
}
_STDS: dict[str, int | None] = {"population": 0, "sample": 1, "none": None}  # how much less than G divides the squares


def _one_of(names: Iterable[str]) -> str:
    *most, last = names
    return f"{', '.join(most)} or {last}"
