"""Rounds: in each, every side runs its calls once, in turns that rotate; the figure of a side is its median sample.

Where the host of a virtual machine kept processors from a side, its round is tried again: the system tells of it,
whatever the figures are.

The rounds of a case are spread over passes through all the cases, minutes apart and each on arrays of its own: what
else a machine does may slow some minutes down, and one side more than another, and so may an array's place in memory.
"""

from __future__ import annotations

import importlib.util
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field

from fastbn.bench import machine, roofline
from fastbn.bench.cases import Case
from fastbn.bench.mixing import PAIRS
from fastbn.bench.process import Processes, WorkerError
from fastbn.bench.worker import PEERS

PAUSE = 0.02  # seconds between two sides: the OpenMP threads of the last one spin for 8 to 12 ms
PASSES = 5
SAMPLES = 9  # at most so many in a round: a call, or several where they are short
STOLEN = 0.02  # a side's round is tried again from this share of the time on that the host kept; told in ticks of 10 ms
TRIES = 5  # at most; the one with the least of it counts
REFERENCE_BYTES = 1_000_000  # fastbn's NumPy reference is measured up to here, unless asked for


@dataclass
class Plan:
    """Who takes part, and for how long."""

    threads: int
    rounds: int
    seconds: float  # of calls per side and round
    backends: tuple[str, ...]
    peers: tuple[str, ...]
    reference_limit: float = REFERENCE_BYTES

    @property
    def ours(self) -> tuple[str, ...]:
        return tuple(f"fastbn-{name}" for name in self.backends)

    def sides(self, case: Case) -> tuple[str, ...]:
        """Labels of the sides that a case is measured for; some may not offer the operation."""
        ours = tuple(
            label for label in self.ours if label != "fastbn-numpy" or case.nbytes <= self.reference_limit
        )
        if case.op == "mixing":
            known = [label for label in (*ours, *self.peers) if any(label in pair for pair in PAIRS)]
            return *known, *("+".join(pair) for pair in PAIRS if set(pair) <= set(known))
        return *ours, "roofline", *self.peers


@dataclass
class Result:
    """Seconds per call of each side on one case, some samples a round."""

    case: Case
    samples: dict[str, list[float]] = field(default_factory=dict)
    errors: dict[str, str] = field(default_factory=dict)
    stolen: dict[str, list[float]] = field(default_factory=dict)  # what the host kept of each try that counts
    dropped: dict[str, int] = field(default_factory=dict)  # tries that do not count
    trips: list[float] = field(default_factory=list)  # seconds of a line between processors, before each pass's rounds

    @property
    def seconds(self) -> dict[str, float]:
        """The median of each side."""
        return {label: statistics.median(samples) for label, samples in self.samples.items() if samples}

    @property
    def best(self) -> str | None:
        """The label of fastbn's first backend, which is what ``backend="auto"`` takes."""
        return next((label for label in self.samples if label.startswith("fastbn-") and "+" not in label), None)

    def ratio(self, slow: str, fast: str | None = None) -> float | None:
        """How many times longer one side takes than another (default: than fastbn)."""
        seconds, fast = self.seconds, fast or self.best
        return seconds[slow] / seconds[fast] if slow in seconds and fast in seconds else None

    def gbps(self, label: str) -> float:
        return roofline.bytes_moved(self.case) / self.seconds[label] / 1e9


def disturbance(results: list[Result]) -> dict[str, int]:
    """Tries that count, the disturbed ones among them, and tries that were dropped."""
    shares = [share for result in results for kept in result.stolen.values() for share in kept]
    return {
        "counted": len(shares),
        "disturbed": sum(share >= STOLEN for share in shares),
        "dropped": sum(n for result in results for n in result.dropped.values()),
    }


def installed_peers() -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Labels of the peers that are here, and of those that are missing."""
    here = {label: importlib.util.find_spec(package) is not None for label, (package, _, _) in PEERS.items()}
    return tuple(label for label in here if here[label]), tuple(label for label in here if not here[label])


def measure(
    cases: list[Case], plan: Plan, processes: Processes, tick: Callable[[Case, float], None],
) -> list[Result]:
    """Measure the cases, those on the same arrays one after the other; results in the order of `cases`.

    `tick` is told of the case at work and of the part of a case that was done since the last time.
    """
    order = sorted(range(len(cases)), key=lambda i: (cases[i].nbytes, cases[i].array, i))
    results = [Result(case) for case in cases]
    for first in range(min(PASSES, plan.rounds)):
        for i, following in zip(order, [*order[1:], None], strict=True):
            _measure_rounds(results[i], range(first, plan.rounds, PASSES), plan, processes, tick)
            if following is None or cases[following].array != cases[i].array:
                processes.forget()
    return results


def split(calls: float) -> tuple[int, int]:
    """The calls of a round as (calls in a sample, samples)."""
    samples = min(SAMPLES, max(1, round(calls)))
    return max(1, round(calls / samples)), samples


def _measure_rounds(
    result: Result, rounds: range, plan: Plan, processes: Processes, tick: Callable[[Case, float], None],
) -> None:
    case = result.case
    tick(case, 0)
    time.sleep(PAUSE)  # the threads of the last side of the case before spin, too
    trip = roofline.trip()
    result.trips += [trip] if trip else []
    work: dict[str, tuple[int, int]] = {}
    for label in plan.sides(case):
        if label in result.errors:
            continue
        try:
            estimate = processes.prepare(label, case)
        except WorkerError as error:
            result.errors[label] = str(error)
            continue
        if estimate is not None:
            work[label] = split(plan.seconds / estimate)
            for kept in (result.samples, result.stolen):
                kept.setdefault(label, [])
            result.dropped.setdefault(label, 0)
    for turn in rounds:
        labels = list(work)
        first = turn % len(labels) if labels else 0
        for label in labels[first:] + labels[:first]:
            try:
                _measure_side(result, label, work[label], processes)
            except WorkerError as error:
                result.errors[label] = str(error)
                del work[label], result.samples[label], result.stolen[label], result.dropped[label]
        tick(case, 1 / plan.rounds)


def _measure_side(result: Result, label: str, work: tuple[int, int], processes: Processes) -> None:
    tries: list[tuple[float, list[float]]] = []
    while len(tries) < TRIES and (not tries or tries[-1][0] >= STOLEN):
        time.sleep(PAUSE)
        before = machine.ticks()
        samples = processes.run(label, *work)
        tries.append((machine.stolen_share(machine.since(before)), samples))
    share, samples = min(tries, key=lambda one: one[0])  # not by the samples: the first of equals
    result.samples[label] += samples
    result.stolen[label].append(share)
    result.dropped[label] += len(tries) - 1
