from torch import Tensor, nn

from humanline.errors import ConfigError
from humanline.losses._clip import check_bounds, check_number, humanline_clip
from humanline.perception import humanline_sample


class PerceptualLoss(nn.Module):
    """What the humanline losses share: the token log-ratio as it is perceived, upstream of everything else.

    Args:
        log_eps_P (float | None): lower bound of the log-ratio, nats; None leaves that side open.
        log_eps_R (float | None): upper bound of the log-ratio, nats; None leaves that side open.
        perception (str): ``clip`` clamps the log-ratio to the bounds; ``sample`` detaches tokens by humanline sampling
            with the same bounds; ``none`` leaves the log-ratio as it is, whatever the bounds.
        gamma_P (float | None): with ``sample``, the shape of ``B_P ~ Beta(gamma_P, 1)``, > 0; towards infinity sampling
            accepts exactly what clipping leaves alone.
        gamma_R (float | None): with ``sample``, the shape of ``B_R ~ Beta(gamma_R, 1)``, > 0.

    Raises:
        ConfigError: if a setting is out of its range or contradicts another.
    """

    def __init__(
        self,
        log_eps_P: float | None,
        log_eps_R: float | None,
        perception: str,
        gamma_P: float | None,
        gamma_R: float | None,
    ) -> None:
        super().__init__()
        if perception not in ("clip", "sample", "none"):
            raise ConfigError(f"loss.perception: {perception!r} is unknown; choose clip, sample or none")
        check_bounds(log_eps_P, log_eps_R)
        self.log_eps_P = log_eps_P
        self.log_eps_R = log_eps_R
        self.perception = perception
        self.gamma_P = gamma_P
        self.gamma_R = gamma_R
        if perception == "sample" and log_eps_P is None and log_eps_R is None:
            raise ConfigError(
                "loss.perception: sample rejects nothing without bounds; give log_eps_P or log_eps_R, or set "
                "perception: none"
            )
        for side, bound, gamma in (("P", log_eps_P, gamma_P), ("R", log_eps_R, gamma_R)):
            if perception == "sample" and bound is not None:
                rule = f"above 0, which sampling needs beside log_eps_{side}; the larger, the closer to clipping"
                check_number(f"gamma_{side}", gamma, lambda gamma: gamma > 0, rule)
            elif gamma is not None:
                idle = f"perception: {perception}" if perception != "sample" else f"log_eps_{side}: null"
                raise ConfigError(f"loss.gamma_{side}: {gamma!r} means nothing with {idle}; remove one of the two")

    @property
    def bounds(self) -> tuple[float | None, float | None]:
        """The bounds that are in force, ``(log_eps_P, log_eps_R)``; ``(None, None)`` with ``perception: none``."""
        return (None, None) if self.perception == "none" else (self.log_eps_P, self.log_eps_R)

    def perceive(self, log_ratio: Tensor, draws: Tensor | None = None) -> Tensor:
        """``l~_t`` of ``l_t``, both ``[B, S]`` in nats.

        Args:
            log_ratio (Tensor): ``l_t``, ``[B, S]``.
            draws (Tensor | None): for ``sample``, uniforms in [0, 1), ``[2, B, S]``; None draws them here.
        """
        if self.perception == "clip":
            return humanline_clip(log_ratio, *self.bounds)
        if self.perception == "sample" and log_ratio.requires_grad:  # it changes gradients only
            return humanline_sample(log_ratio, *self.bounds, self.gamma_P, self.gamma_R, draws)
        return log_ratio
