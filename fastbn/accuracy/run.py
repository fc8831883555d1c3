"""One run of the command: all cases on all sides, then what is printed and written."""

from __future__ import annotations

import datetime
import shlex
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import product
from typing import Any

from fastbn._files import whole
from fastbn.accuracy import cases, promises, worker
from fastbn.accuracy.bounds import QUANTITIES, difference
from fastbn.accuracy.cases import CONSTANTS, EPS, PIECES, Data
from fastbn.accuracy.oracle import Exact
from fastbn.accuracy.worker import Workers
from fastbn.bench import machine

DTYPES = ("float32", "float64")


@dataclass
class Run:
    """Everything that one `fastbn accuracy` found. Keys are (dtype, name of a case), then labels of sides."""

    command: str
    date: str
    labels: tuple[str, ...]
    missing: tuple[str, ...]
    machine: dict[str, str] = field(default_factory=machine.describe)
    versions: dict[str, str] = field(default_factory=dict)
    errors: dict[tuple[str, str], dict[str, dict[str, float]]] = field(default_factory=dict)
    constants: dict[tuple[str, str], dict[str, str]] = field(default_factory=dict)
    nonfinite: dict[tuple[str, str], dict[str, str]] = field(default_factory=dict)
    merged: dict[tuple[str, str], dict[str, float]] = field(default_factory=dict)
    threads: dict[tuple[str, str], dict[str, float]] = field(default_factory=dict)  # (dtype, label)
    between: dict[tuple[str, str], dict[str, float]] = field(default_factory=dict)  # (dtype, label), to the first

    @property
    def missed(self) -> list[str]:
        """Where fastbn does not hold its bound."""
        worst: dict[str, float] = {}
        for (dtype, case), by_label in self.errors.items():
            for ratios in (ratios for label, ratios in by_label.items() if label.startswith("fastbn-")):
                for quantity, ratio in ratios.items():
                    if not ratio <= 1:
                        what = f"{dtype}, {case}: {quantity}"
                        worst[what] = max(worst.get(what, 0), ratio)
        for (dtype, case), by_order in self.merged.items():
            if not max(by_order.values()) <= 1:
                worst[f"{dtype}, Moments merged {case}"] = max(by_order.values())
        found = [f"{what} up to {ratio:.2g} times the bound" for what, ratio in worst.items()]
        found += [
            f"{label}, {dtype}, {what}: {wrong}"
            for promise in (self.constants, self.nonfinite)
            for (dtype, what), by_label in promise.items()
            for label, wrong in by_label.items() if wrong and label.startswith("fastbn-")
        ]
        found += [
            f"{label}, {dtype}: other bits of {', '.join(names)} with other numbers of threads"
            for (dtype, label), names in self.threads.items() if names and label.startswith("fastbn-")
        ]
        return found


def measure(labels: tuple[str, ...], missing: tuple[str, ...], quick: bool, only: str = "") -> Run:
    """Ask every side about every case whose name contains `only`."""
    run = Run(
        command=shlex.join(["fastbn", *sys.argv[1:]]),
        date=datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d %H:%M UTC"),
        labels=labels,
        missing=missing,
    )
    work = [(dtype, name) for dtype in DTYPES for name in cases.judged(dtype, quick=quick) if only in name]
    with Workers(labels) as workers, _progress(len(work)) as tick:
        run.versions = dict(workers.ask(worker.version).values())
        for dtype, name in work:
            tick(name)
            data = Data(name, dtype)
            exact = Exact(data.x, data.grad_y, data.gamma, data.beta, EPS)
            del data
            groups = [(label,) for label in labels] if name in cases.MANY else [labels]  # for the sake of memory
            run.errors[dtype, name] = {
                label: ratios for group in groups
                for label, ratios in workers.ask(worker.judged, name, dtype, exact, labels=group).items()
            }
        if not only:
            _promises(run, workers)
    return run


def _promises(run: Run, workers: Workers) -> None:
    ours = tuple(label for label in run.labels if label.startswith("fastbn-"))
    threaded = [label for label in run.labels if label == "torch" or (label in ours and label != "fastbn-numpy")]
    for dtype in DTYPES:
        for value in CONSTANTS:
            run.constants[dtype, f"{value:g}"] = workers.ask(worker.constant, value, dtype)
        for word in promises.NONFINITE:
            run.nonfinite[dtype, word] = workers.ask(worker.nonfinite, word, dtype)
        results = workers.ask(worker.typical, dtype, labels=ours) if ours else {}
        for label in ours[1:]:
            run.between[dtype, label] = {
                name: difference(name, results[label][name], results[ours[0]][name], dtype) for name in QUANTITIES
            }
        for label in threaded:
            run.threads[dtype, label] = workers.ask(worker.threads, dtype, labels=(label,))[label]
    for dtype, name in product(DTYPES, PIECES):
        run.merged[dtype, name] = promises.merged(name, dtype)


@contextmanager
def _progress(total: int) -> Iterator[Any]:
    """A bar on the terminal, where tqdm is installed."""
    try:
        from tqdm import tqdm
    except ImportError:
        yield lambda text: None
        return
    with tqdm(total=total, disable=None, unit="case") as bar:
        def tick(text: str) -> None:
            bar.set_description(text, refresh=False)
            bar.update()

        yield tick


def report(run: Run, *, json: bool, markdown: str | None) -> int:
    """Write, print; 1 where fastbn misses its bound or the page cannot be written, else 0."""
    from fastbn.accuracy import page

    failed = bool(run.missed)
    if markdown:
        try:
            with whole(markdown) as path:
                path.write_text(page.markdown(run), encoding="utf-8")
        except OSError as error:
            print(f"fastbn accuracy: error: {markdown} is not written: {error}", file=sys.stderr)
            failed = True
    print(page.as_json(run) if json else page.text(run))
    return 1 if failed else 0
