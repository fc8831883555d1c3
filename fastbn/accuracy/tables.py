"""The results of a run as tables."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from fastbn.accuracy.bounds import QUANTITIES, STATED
from fastbn.accuracy.cases import ORDERS
from fastbn.accuracy.run import DTYPES, Run
from fastbn.bench.tables import NONE, Table

NAMES = {
    "torch": "PyTorch",
    "jax": "JAX",
    "jax-fast": "JAX, fast variance",
    "numpy": "NumPy",
    "scikit-learn": "scikit-learn",
}


def head(label: str) -> str:
    """A side as the head of a column."""
    return NAMES.get(label) or label.replace("fastbn-", "fastbn ").replace("cython-", "cython ")


def figure(ratio: float) -> str:
    """An error in units of its bound; `!` where it is missed."""
    return f"{ratio:.2g}" + ("" if ratio <= 1 else " !")


def stated() -> Table:
    """The bound, in words."""
    return Table("The bound", ["data", "quantity", "bound"], [[*key, text] for key, text in STATED.items()])


def summary(run: Run, dtype: str) -> Table:
    """For each side the worst of all cases, and how many cases hold."""
    chosen = [by_label for (kind, _), by_label in run.errors.items() if kind == dtype]
    quantities = [name for name in QUANTITIES if (dtype, name) in STATED]
    rows = []
    for label in run.labels if chosen else ():
        found = [by_label[label] for by_label in chosen]
        held = sum(all(ratio <= 1 for ratio in ratios.values()) for ratios in found)
        worst = [max((ratios[name] for ratios in found if name in ratios), default=None) for name in quantities]
        rows.append([head(label), *(NONE if ratio is None else figure(ratio) for ratio in worst),
                     f"{held} of {len(found)}"])
    return Table(f"{dtype}: the worst case of each side", ["", *quantities, "cases held"], rows)


def errors(run: Run, dtype: str) -> Table:
    """For each case and side the worst of all quantities, and which one that is where it is missed."""
    def cell(ratios: dict[str, float]) -> str:
        if not ratios:
            return NONE
        name = max(ratios, key=ratios.__getitem__)
        return figure(ratios[name]) + (f" {name}" if not ratios[name] <= 1 else "")

    return _by_side(run, f"{dtype}: each case", {
        name: {label: cell(by_label[label]) for label in run.labels}
        for (kind, name), by_label in run.errors.items() if kind == dtype
    })


def constants(run: Run, dtype: str) -> Table:
    return _words(run, f"{dtype}: constant columns", run.constants, dtype, "exact")


def nonfinite(run: Run, dtype: str) -> Table:
    return _words(run, f"{dtype}: one value that is not finite in another column", run.nonfinite, dtype, "same bits")


def _words(run: Run, title: str, found: Mapping[tuple[str, str], dict[str, str]], dtype: str, good: str) -> Table:
    return _by_side(run, title, {
        what: {label: f"{wrong} !" if wrong else good for label, wrong in by_label.items()}
        for (kind, what), by_label in found.items() if kind == dtype
    })


def _by_side(run: Run, title: str, cells: Mapping[str, dict[str, str]]) -> Table:
    rows = [[what, *(by_label[label] for label in run.labels)] for what, by_label in cells.items()]
    return Table(title, ["", *map(head, run.labels)], rows)


def merged(run: Run) -> Table:
    rows = [[f"{dtype} {name}", *map(figure, by_order.values())] for (dtype, name), by_order in run.merged.items()]
    return Table("Moments of 1,000 unequal pieces, merged", ["", *ORDERS], rows)


def threads(run: Run) -> Table:
    return _differences("1 thread beside 2, 3, ... 64, on 2,099 x 513, in ulp", run.threads, lambda found, name: (
        f"{found[name]:.2g}" if name in found else "same bits"))


def between(run: Run) -> Table:
    return _differences(f"Beside {head(run.labels[0])}, on 10,007 x 20, in ulp", run.between, lambda found, name: (
        f"{found[name]:.2g}"))


def _differences(
    title: str, found: Mapping[tuple[str, str], dict[str, float]], cell: Callable[[dict[str, float], str], str],
) -> Table:
    rows = [
        [dtype, head(label), *(cell(differences, name) for name in QUANTITIES)]
        for (dtype, label), differences in found.items()
    ]
    return Table(title, ["", "", *QUANTITIES], rows)


def everything(run: Run) -> list[Table]:
    """All tables that have rows."""
    made = [table(run, dtype) for dtype in DTYPES for table in (summary, errors, constants, nonfinite)]
    return [table for table in (*made, merged(run), threads(run), between(run)) if table.rows]
