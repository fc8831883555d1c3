"""The figure: what figure 1 of the paper shows, gamma and beta on their way, and where part two left them."""

from __future__ import annotations

import io
from typing import Any

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from fastbn.demo.digits import Curve
from fastbn.demo.identity import PartTwo

WITHOUT, WITH = "#c44e52", "#2a6fbb"  # one colour a network, in all panels
ITSELF, LABELS = "#2e8b57", "#d98218"  # one a target of part two
OTHER = "#8c8c8c"
DPI = 130


def png(without: Curve, with_norm: Curve, two: PartTwo) -> bytes:
    """The figure as the bytes of a PNG file."""
    figure = draw(without, with_norm, two)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=DPI)
    return buffer.getvalue()


def draw(without: Curve, with_norm: Curve, two: PartTwo) -> Figure:
    """Six panels: part one above and at the left, part two at the right below."""
    figure = Figure(figsize=(11, 6.4), layout="constrained")
    FigureCanvasAgg(figure)  # draws without a display
    panels = figure.subplots(2, 3)
    for axes in panels.flat:
        axes.spines[["top", "right"]].set_visible(False)
    _accuracy(panels[0, 0], without, with_norm)
    limits = _percentile_limits(without, with_norm)
    _percentiles(panels[0, 1], without, WITHOUT, "(b) without batch norm", limits)
    _percentiles(panels[0, 2], with_norm, WITH, "(c) with batch norm", limits)
    _gamma_beta(panels[1, 0], with_norm)
    _ends(panels[1, 1], two.raw.std, two.itself.gamma, two.labels.gamma, 1.0)
    std = r"$\sqrt{\mathrm{var}+\epsilon}$ of the unit"
    panels[1, 1].set(title="(e) where SGD drove gamma", xlabel=std)
    panels[1, 1].set_ylabel(r"$\gamma$", rotation=0, labelpad=10)
    _ends(panels[1, 2], two.raw.mean, two.itself.beta, two.labels.beta, 0.0)
    panels[1, 2].set(title="(f) where SGD drove beta", xlabel="mean of the unit")
    panels[1, 2].set_ylabel(r"$\beta$", rotation=0, labelpad=10)
    panels[1, 2].legend(frameon=False, fontsize=9)  # for (e) too, where there is no room
    return figure


def _accuracy(axes: Any, without: Curve, with_norm: Curve) -> None:
    axes.plot(with_norm.steps, with_norm.accuracy, color=WITH, label="with batch norm")
    axes.plot(without.steps, without.accuracy, color=WITHOUT, linestyle="--", label="without")
    axes.set(title="(a) with and without batch norm", xlabel="step", ylabel="test accuracy", ylim=(0, 1.02))
    axes.legend(frameon=False, loc="lower right")


def _percentile_limits(*curves: Curve) -> tuple[float, float]:
    values = np.concatenate([curve.percentiles for curve in curves])
    margin = 0.05 * float(np.ptp(values))
    return float(values.min()) - margin, float(values.max()) + margin


def _percentiles(axes: Any, curve: Curve, color: str, title: str, limits: tuple[float, float]) -> None:
    low, middle, high = np.transpose(curve.percentiles)
    axes.fill_between(curve.steps, low, high, color=color, alpha=0.15, linewidth=0)
    for values, name in ((low, "15"), (middle, "50"), (high, "85")):
        axes.plot(curve.steps, values, color=color, linewidth=1.6 if name == "50" else 0.9)
        axes.annotate(f"{name}%", (curve.steps[-1], values[-1]), xytext=(3, 0), textcoords="offset points",
                      va="center", fontsize=8, color=color)
    axes.set(title=title, xlabel="step", ylabel="input of one sigmoid", ylim=limits)


def _gamma_beta(axes: Any, curve: Curve) -> None:
    axes.plot(curve.steps, curve.gamma, color=WITH, linewidth=1.2)
    axes.plot(curve.steps, curve.beta, color=WITH, linewidth=1.2, linestyle=":")
    axes.set(title="(d) gamma and beta of five units", xlabel="step", ylabel=r"$\gamma$, $\beta$")
    axes.plot([], [], color=WITH, label=r"$\gamma$")
    axes.plot([], [], color=WITH, linestyle=":", label=r"$\beta$")
    axes.legend(frameon=False)


def _ends(axes: Any, identity: Any, itself: Any, labels: Any, start: float) -> None:
    span = [identity.min(), identity.max()]
    axes.plot(span, span, color=OTHER, linewidth=0.8, label="identity")
    axes.axhline(start, color=OTHER, linewidth=0.8, linestyle="--", label="start")
    axes.plot(identity, itself, "o", color=ITSELF, markersize=4, label="target: raw activations")
    axes.plot(identity, labels, "x", color=LABELS, markersize=4, label="target: labels")
