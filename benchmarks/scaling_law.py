"""Power laws of loss against size, and how sure their exponents are. Axis legend: S sizes, U users, G floors tried.

Two forms: "Kaplan", L = (c / x)^a (Kaplan et al. 2020, eq. 1.1), a line in logarithms; "Hoffmann", L = E + A / x^a
(Hoffmann et al. 2022, eq. 2, at equal data, whose term is then part of E), the floor E chosen from a grid by the least
squared error of the logarithm of L. Intervals draw the users anew, the same for all sizes: they say how far the
requests decide, not what another seed or recipe would change.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np

KAPLAN, HOFFMANN = "Kaplan", "Hoffmann"
DRAWS, SEED, FLOORS = 1000, 7, 300


@dataclass(frozen=True)
class Ladder:
    """Sizes and what they reached: ``axes`` by name, float [S]; ``losses`` of each user, float [S, U], NaN where a
    request has none."""

    labels: tuple[str, ...]
    axes: dict[str, np.ndarray]
    losses: np.ndarray

    def __post_init__(self) -> None:
        if len(self.labels) < 4:
            raise ValueError(f"scaling: expected at least 4 sizes to fit three numbers to, got {len(self.labels)}")
        for name, values in {**self.axes, "losses": self.losses}.items():
            if len(values) != len(self.labels):
                raise ValueError(f"scaling: {name}: expected {len(self.labels)} sizes, got {len(values)}")


@dataclass(frozen=True)
class Law:
    """A fitted law: ``floor`` 0 for Kaplan's form; ``scale`` A, or c^a; ``largest_miss`` in nats."""

    axis: str
    form: str
    exponent: float
    exponent_interval: tuple[float, float]
    floor: float
    floor_interval: tuple[float, float]
    scale: float
    largest_miss: float

    def __call__(self, x: np.ndarray) -> np.ndarray:
        return np.asarray(self.floor + self.scale * x**-self.exponent)


def fit(x_S: np.ndarray, loss_S: np.ndarray, floors: bool) -> tuple[float, float, float]:
    """(exponent, floor, scale) of the least squared error of log L."""
    tried_G = np.linspace(0.0, loss_S.min() * 0.999, FLOORS) if floors else np.zeros(1)
    y_GS = np.log(loss_S[None] - tried_G[:, None])
    x = np.log(x_S) - np.log(x_S).mean()
    slope_G = (y_GS * x).sum(1) / (x * x).sum()
    start_G = y_GS.mean(1) - slope_G * np.log(x_S).mean()
    of_GS = tried_G[:, None] + np.exp(start_G[:, None] + slope_G[:, None] * np.log(x_S))
    best = int(((np.log(of_GS) - np.log(loss_S)) ** 2).sum(1).argmin())
    return float(-slope_G[best]), float(tried_G[best]), float(np.exp(start_G[best]))


def laws(ladder: Ladder) -> list[Law]:
    """Both forms on every axis, with 95 % intervals."""
    rng, users = np.random.default_rng(SEED), ladder.losses.shape[1]
    drawn = [np.nanmean(ladder.losses[:, rng.integers(0, users, users)], 1) for _ in range(DRAWS)]
    loss_S = np.nanmean(ladder.losses, 1)
    fitted = []
    for axis, x_S in ladder.axes.items():
        for form in (KAPLAN, HOFFMANN):
            exponent, floor, scale = fit(x_S, loss_S, form == HOFFMANN)
            again = np.array([fit(x_S, d, form == HOFFMANN)[:2] for d in drawn])
            low, high = np.quantile(again, [0.025, 0.975], axis=0)
            miss = float(np.abs(floor + scale * x_S**-exponent - loss_S).max())
            fitted.append(
                Law(axis, form, exponent, (float(low[0]), float(high[0])), floor, (float(low[1]), float(high[1])),
                    scale, miss)
            )  # fmt: skip
    return fitted


def draw(ladder: Ladder, fitted: list[Law], path: Path) -> None:
    """Losses and laws by axis."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, panels = plt.subplots(1, len(ladder.axes), figsize=(4.2 * len(ladder.axes), 3.4), constrained_layout=True)
    loss_S = np.nanmean(ladder.losses, 1)
    for panel, (axis, x_S) in zip(panels, ladder.axes.items(), strict=True):
        panel.plot(x_S, loss_S, "o", color="black")
        for label, x, y in zip(ladder.labels, x_S, loss_S, strict=True):
            panel.annotate(label, (x, y), textcoords="offset points", xytext=(4, 4), fontsize=7)
        along = np.geomspace(x_S.min(), x_S.max(), 100)
        for law in (law for law in fitted if law.axis == axis):
            low, high = law.exponent_interval
            panel.plot(along, law(along), label=f"{law.form}: {law.exponent:.3f} ({low:.3f} to {high:.3f})")
        panel.set_xscale("log")
        panel.set_xlabel(axis)
        panel.legend(fontsize=7)
    panels[0].set_ylabel("validation loss, nats")
    figure.savefig(path, dpi=90)
    plt.close(figure)
