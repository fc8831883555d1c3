"""The roofline picture: GB/s against the size of the array for each implementation, one panel an operation."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogFormatter

from fastbn.bench import machine
from fastbn.bench.cases import ON_REQUEST, OPS
from fastbn.bench.measure import Result

COLORS = {  # Okabe and Ito's palette, told apart by colour-blind readers
    "fastbn-cython": "#0072B2", "fastbn-numba": "#56B4E9", "fastbn-numpy": "#999999", "torch": "#D55E00",
    "jax": "#CC79A7", "numpy": "#009E73", "scikit-learn": "#E69F00", "roofline": "#000000",
}


def draw(results: list[Result], path: str) -> None:
    """Write the picture; the name's ending says in which format."""
    ops = [op for op in OPS if op not in ON_REQUEST and any(result.case.op == op for result in results)]
    sizes = [result.case.nbytes for result in results if result.case.op in ops] or [1]
    columns = min(3, max(1, len(ops)))
    rows = max(1, -(-len(ops) // columns))
    figure = Figure(figsize=(4.6 * columns, 3.3 * rows + 0.7), layout="constrained")
    FigureCanvasAgg(figure)
    grid = figure.subplots(rows, columns, squeeze=False)
    for axes, op in zip(grid.flat, ops, strict=False):
        _panel(axes, op, [result for result in results if result.case.op == op], (min(sizes) / 2, max(sizes) * 2))
    for axes in list(grid.flat)[len(ops):]:
        axes.remove()
    _legend(figure, grid)
    figure.savefig(Path(path), dpi=130)


def _panel(axes: Any, op: str, results: list[Result], sizes: tuple[float, float]) -> None:
    labels = dict.fromkeys(label for result in results for label in result.samples)
    for label in sorted(labels, key=lambda one: list(COLORS).index(one)):
        known = sorted((result for result in results if label in result.seconds), key=lambda one: one.case.nbytes)
        plain = [one for one in known if _is_plain(one)]
        style: dict[str, Any] = {"color": COLORS[label], "linewidth": 2.2 if label == "fastbn-cython" else 1.3}
        if label == "roofline":
            style |= {"linestyle": "--", "linewidth": 1.8, "zorder": 5}
        marker = "o" if label != "roofline" else "_" if len(plain) == 1 else ""  # a line of one point has no length
        axes.plot(*_points(plain, label), marker=marker, markersize=4, label=label, **style)
        others = [one for one in known if not _is_plain(one)]
        style |= {"marker": "_" if label == "roofline" else "D", "linestyle": "none"}
        axes.plot(*_points(others, label), markersize=5, fillstyle="none", **style)
    axes.set(xscale="log", yscale="log", xlim=sizes)
    axes.set_title(f"{op}: {OPS[op].split(':')[0]}", fontsize=9)
    axes.grid(True, which="major", alpha=0.3)
    axes.xaxis.set_major_formatter(FuncFormatter(_bytes))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.yaxis.set_minor_formatter(LogFormatter(minor_thresholds=(1, 0.4)))  # in panels of less than a decade
    _mark_caches(axes)


def _is_plain(result: Result) -> bool:
    """Plain rows and columns are joined by a line; images, float64 and other layouts are marks beside it."""
    case = result.case
    return len(case.shape) == 2 and case.dtype == "float32" and case.layout == "C"


def _points(results: list[Result], label: str) -> tuple[list[int], list[float]]:
    return [one.case.nbytes for one in results], [one.gbps(label) for one in results]


def _bytes(value: float, _: object) -> str:
    for unit, size in (("GB", 1e9), ("MB", 1e6), ("KB", 1e3)):
        if value >= size:
            return f"{value / size:g} {unit}"
    return f"{value:g} B"


def _mark_caches(axes: Any) -> None:
    low, high = axes.get_xlim()
    for name, size in machine.cache_bytes().items():
        if low < size < high:
            axes.axvline(size, color="0.6", linewidth=0.8, linestyle=":", zorder=0)
            axes.annotate(name, (size, 1), xycoords=("data", "axes fraction"), xytext=(2, -9),
                          textcoords="offset points", fontsize=7, color="0.4")


def _legend(figure: Figure, grid: Any) -> None:
    handles = {
        label: handle
        for axes in grid.flat if axes.figure is not None
        for handle, label in zip(*axes.get_legend_handles_labels(), strict=True)
    }
    shown = [label for label in COLORS if label in handles]
    figure.legend([handles[label] for label in shown], shown, loc="outside upper center", ncols=max(1, len(shown)))
    words = "bytes of x; dotted: caches; diamonds, and dashes of the roofline: images, float64, other layouts"
    figure.supxlabel(words, fontsize=9)
    figure.supylabel("GB/s (bytes of the bare memory passes / time)", fontsize=9)
