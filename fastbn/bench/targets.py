"""What fastbn must reach, and whether it did."""

from __future__ import annotations

from dataclasses import dataclass

from fastbn.bench.cases import LAYOUT_BASES, OP_SHAPES, SHAPES
from fastbn.bench.measure import Result


@dataclass(frozen=True)
class Target:
    """At least so many times faster than a peer, on these arrays."""

    op: str
    arrays: tuple[str, ...]
    peer: str
    least: float
    aim: float


SMALL = ("8x16", "64x128", "256x512", "32x4096", "16384x64")  # up to 4 MiB

TARGETS = (
    Target("forward-out", ("65536x256", "262144x256"), "torch", 1.4, 1.7),
    Target("forward-out", ("100352x64", "4096x1024"), "torch", 1.5, 2),
    Target("forward-out", ("16384x64", "256x512", "32x4096"), "torch", 2.5, 4),
    Target("forward-out", ("64x128", "8x16"), "torch", 2, 4),
    Target("forward", ("65536x256", "262144x256"), "torch", 4, 6),
    Target("forward", ("32x64x56x56", "32x256x14x14"), "torch", 4, 6),
    Target("backward", ("16384x64", "256x512"), "torch", 2, 3),
    Target("backward", ("4096x1024", "100352x64"), "torch", 1.2, 1.5),
    Target("backward", ("65536x256",), "torch", 2.5, 3.2),
    Target("backward", ("262144x256",), "torch", 4, 5),
    Target("backward", ("32x256x14x14",), "torch", 1.2, 1.5),
    Target("backward", ("32x64x56x56",), "torch", 1.1, 1.3),
    Target("relu", ("100352x64", "262144x256"), "torch", 4, 8),
    Target("layer", ("64x128",), "torch", 4, 8),
    Target("inference-out", SMALL, "torch", 1.5, 1.5),
    Target("inference-out", tuple(array for array in SHAPES if array not in SMALL), "torch", 1, 1),
    Target("inference", ("65536x256", "262144x256"), "torch", 3, 6),
    Target("moments", OP_SHAPES["moments"], "numpy", 10, 25),
    Target("moments", ("1000000x64",), "scikit-learn", 25, 45),
)

# At most so many times the time ...
ROOFLINE_LIMIT, ROOFLINE_FROM = 1.15, 64_000_000  # ... of the bare memory passes
ROOFLINE_OPS = ("forward-out", "backward-out")
NUMBA_LIMIT, NUMBA_FROM = 1.4, 1_000_000  # ... of the cython backend, for the numba one
LAYOUT_LIMIT = 1.5  # ... per byte, of the plain layout of that size


@dataclass(frozen=True)
class Verdict:
    """One target and what was measured. `bound` is a least ratio, or a most where `at_most`; `at_roofline` is what
    the ratio would be if fastbn took just the time of the bare memory passes on this array (a layout is compared with
    the plain one as measured)."""

    op: str
    array: str
    what: str
    ratio: float
    bound: float
    aim: float
    at_most: bool = False
    at_roofline: float | None = None

    @property
    def met(self) -> bool:
        return self._meets(self.ratio, self.bound)

    @property
    def aim_met(self) -> bool:
        return self._meets(self.ratio, self.aim)

    @property
    def met_at_roofline(self) -> bool | None:
        """Whether the bare passes would do; None where there are none."""
        return None if self.at_roofline is None else self._meets(self.at_roofline, self.bound)

    def _meets(self, ratio: float, bound: float) -> bool:
        return ratio <= bound if self.at_most else ratio >= bound


def verdicts(results: list[Result]) -> list[Verdict]:
    """All targets that these results have a word on."""
    return [*_peers(results), *_roofline(results), *_numba(results), *_layouts(results)]


def _peers(results: list[Result]) -> list[Verdict]:
    by_case = {(result.case.op, result.case.array): result for result in results}
    found = []
    for target in TARGETS:
        for array in target.arrays:
            result = by_case.get((target.op, array))
            ratio = result.ratio(target.peer) if result else None
            limit = result.ratio(target.peer, "roofline") if result else None
            if ratio is not None:
                found.append(Verdict(target.op, array, f"{target.peer}/fastbn", ratio, target.least, target.aim,
                                     at_roofline=limit))
    return found


def _at_most(
    result: Result, what: str, ratio: float | None, limit: float, at_roofline: float | None = None
) -> list[Verdict]:
    op, array = result.case.op, result.case.array
    return [] if ratio is None else [Verdict(op, array, what, ratio, limit, limit, True, at_roofline)]


def _roofline(results: list[Result]) -> list[Verdict]:
    return [
        verdict
        for result in results
        if result.case.op in ROOFLINE_OPS and result.case.nbytes >= ROOFLINE_FROM and result.best
        for verdict in _at_most(result, "fastbn/roofline", result.ratio(result.best, "roofline"), ROOFLINE_LIMIT)
    ]


def _numba(results: list[Result]) -> list[Verdict]:
    """The worst array of each operation."""
    worst: dict[str, Verdict] = {}
    for result in results:
        if result.case.nbytes >= NUMBA_FROM and result.case.op != "mixing":
            ratio = result.ratio("fastbn-numba", "fastbn-cython")
            for verdict in _at_most(result, "numba/cython, the worst", ratio, NUMBA_LIMIT):
                worst[verdict.op] = max(worst.get(verdict.op, verdict), verdict, key=lambda one: one.ratio)
    return list(worst.values())


def _layouts(results: list[Result]) -> list[Verdict]:
    layouts = [result for result in results if result.case.op == "layouts" and result.best]
    bases = {LAYOUT_BASES[one.case.array]: one for one in layouts if one.case.array in LAYOUT_BASES}
    found = []
    for result in layouts:
        base = bases.get(round(result.case.nbytes / 1e6))
        if base is not None and base is not result:
            ratio = _per_byte(result) / _per_byte(base)
            slow = result.ratio(str(result.best), "roofline")
            limit = ratio / slow if slow else None
            found += _at_most(result, f"per byte, to {base.case.array}", ratio, LAYOUT_LIMIT, limit)
    return found


def _per_byte(result: Result) -> float:
    return result.seconds[str(result.best)] / result.case.nbytes
