"""Draws the figures of docs/method.md from humanline.perception, into docs/figures.

    pip install -e '.[plots]'
    python docs/make_figures.py

With the same matplotlib, running it again writes the same bytes.
"""

import math
from pathlib import Path

import matplotlib

matplotlib.use("svg")

import matplotlib.pyplot as plt
import torch
from matplotlib.figure import Figure

from humanline.perception import acceptance_probability, capacity, humanline_sample, value, weighting

FIGURES = Path(__file__).parent / "figures"
LOG_EPS_P, LOG_EPS_R = -1.5, 1.5  # nats
ORANGE, BLUE, GREEN, VERMILION, GREY = (
    "#E69F00",
    "#0072B2",
    "#009E73",
    "#D55E00",
    "#595959",
)  # Okabe and Ito, and a grey

plt.rcParams.update(
    {
        "axes.axisbelow": True,
        "axes.grid": True,
        "axes.spines.right": False,
        "axes.spines.top": False,
        "figure.facecolor": "white",  # GitHub's dark theme shows through anything else
        "font.size": 11,
        "grid.color": "#E5E5E5",
        "legend.frameon": False,
        "lines.linewidth": 2,
        "savefig.facecolor": "white",
        "svg.hashsalt": "humanline",
    }
)


def perception() -> Figure:
    """The value function, the capacity, and the weighting of a toy policy's outcomes."""
    figure, (left, middle, right) = plt.subplots(1, 3, figsize=(13.5, 4.2), layout="constrained")

    z = torch.linspace(-3, 3, 601, dtype=torch.float64)
    left.plot(z, value(z), color=BLUE)
    left.plot(z, z, color=GREY, linewidth=1, linestyle="--")
    left.text(-1.1, -0.75, "$v = z$", color=GREY, ha="right")
    left.set(title="Value: losses loom larger", xlabel="outcome $z - z_0$ (nats)", ylabel="value $v(z)$")

    a = torch.linspace(0, 1, 1001, dtype=torch.float64)
    styles = {0.4: (VERMILION, ":"), 0.61: (BLUE, "-"), 0.8: (GREEN, "-."), 1.0: (GREY, "--")}
    for gamma, (color, style) in styles.items():
        middle.plot(a, capacity(a, gamma), color=color, linestyle=style, label=rf"$\gamma = {gamma:g}$")
    middle.legend()
    middle.set(
        title="Capacity: how likely $a$ feels",
        xlabel="probability $a$",
        ylabel=r"$\Omega^+(a; \gamma)$",
        aspect="equal",
    )

    # Outcomes of a policy whose log-ratio to the reference is Gaussian, in steps of half a nat. Its mean is half its
    # variance because the reference's probabilities, those of the policy times exp(-z), have to sum to 1.
    z = torch.arange(-4, 6, dtype=torch.float64) / 2
    probabilities = torch.softmax(-(z - 0.32).square() / (2 * 0.64), 0)
    right.bar(z - 0.1, probabilities, 0.2, color=GREY, label="probability under the policy")
    right.bar(z + 0.1, weighting(z, probabilities), 0.2, color=ORANGE, label=r"perceived weight $\omega$")
    right.legend(loc="upper left", bbox_to_anchor=(0, 1.02), fontsize=10)
    right.set(
        title="Weighting: both ends count for more",
        xlabel=r"outcome $z = \log\pi_\theta - \log\pi_{ref}$ (nats)",
        ylabel="probability, weight",
        ylim=(0, 0.33),
    )
    right.grid(axis="x", visible=False)
    return figure


def sampling() -> Figure:
    """Humanline sampling tends to clipping: the probability of acceptance, and how fast the difference goes."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4.2), layout="constrained")

    log_ratio = torch.linspace(-3, 3, 2401, dtype=torch.float64)
    styles = {1: (ORANGE, ":"), 4: (GREEN, "-."), 16: (VERMILION, "--"), 256: (BLUE, "-")}
    left.axvspan(LOG_EPS_P, LOG_EPS_R, color="#F0F0F0")
    left.text(0, 0.62, "left alone by the clip", color=GREY, ha="center")
    for gamma, (color, style) in styles.items():
        accepted = acceptance_probability(log_ratio, LOG_EPS_P, LOG_EPS_R, gamma, gamma)
        left.plot(log_ratio, accepted, color=color, linestyle=style, label=rf"$\gamma = {gamma}$")
    left.legend(loc="lower center")
    left.set(title="A token keeps its gradient", xlabel="token log-ratio $l$ (nats)", ylabel="probability")

    gammas = [2**n for n in range(13)]
    closed_form = [disagreement(gamma) for gamma in gammas]
    right.plot(gammas, closed_form, color=BLUE, label=r"closed form, towards $2 / (e\,\gamma)$")
    right.plot(
        gammas[::2], [sampled_disagreement(gamma) for gamma in gammas[::2]], "o", color=VERMILION, label="sampled"
    )
    right.legend()
    right.set(
        title="Where sampling and clipping differ, per bound",
        xlabel=r"$\gamma$",
        ylabel="length of log-ratios (nats)",
        xscale="log",
        yscale="log",
    )
    return figure


def disagreement(gamma: float) -> float:
    """The integral over ``l`` of the probability that a one-sided sample and the clip decide differently, nats."""
    return (gamma * math.log1p(1 / gamma) - 1 + 2 * (gamma / (gamma + 1)) ** gamma) / gamma


def sampled_disagreement(gamma: float, draws: int = 100_000) -> float:
    """:func:`disagreement`, from tokens spread evenly within 16/gamma nats of the bound."""
    generator = torch.Generator().manual_seed(0)
    width = 32 / gamma
    distance = width * (torch.rand(draws, generator=generator) - 0.5)
    log_ratio = (LOG_EPS_P + distance).requires_grad_()
    uniforms = torch.rand((2, draws), generator=generator)
    sampled = humanline_sample(log_ratio, LOG_EPS_P, None, gamma, None, uniforms)
    (gradient,) = torch.autograd.grad(sampled.sum(), log_ratio)
    return width * (gradient == 1).ne(distance >= 0).double().mean().item()


def main() -> None:
    FIGURES.mkdir(exist_ok=True)
    for draw in (perception, sampling):
        path = FIGURES / f"{draw.__name__}.svg"
        draw().savefig(path, metadata={"Date": None})
        print(path)


if __name__ == "__main__":
    main()
