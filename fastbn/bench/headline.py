"""The few main figures of a run, for a page that is written by hand around them."""

from __future__ import annotations

from collections.abc import Collection

from fastbn.bench.measure import Result
from fastbn.bench.tables import Table, rows_as_markdown, significant

BEGIN, END = "<!-- headline: written by fastbn bench -->", "<!-- end of headline -->"
CASES = (  # operation, array, peer, in words
    ("forward", "65536x256", "torch", "training forward"),
    ("forward-out", "100352x64", "torch", "training forward into a given array"),
    ("relu", "100352x64", "torch", "training forward and ReLU"),
    ("backward", "65536x256", "torch", "backward"),
    ("layer", "64x128", "torch", "layer, forward and backward"),
    ("inference", "65536x256", "torch", "inference"),
    ("forward", "32x64x56x56", "torch", "training forward"),
    ("moments", "1000000x64", "numpy", "column means and variances"),
    ("moments", "1000000x64", "scikit-learn", "column means and variances"),
)


class Unmeasured(ValueError):
    """A main case lacks figures; the message says which. A table without its row would look as if it were whole."""


def check(cases: Collection[tuple[str, str]], peers: Collection[str]) -> None:
    """Raise Unmeasured where not all of the main cases are among these (operation, array), beside these peers."""
    lacking = [f"{op} {array} beside {peer}" for op, array, peer, _ in CASES
               if (op, array) not in cases or peer not in peers]
    if lacking:
        raise Unmeasured(f"the main figures need {', '.join(lacking)}, too")


def table(results: list[Result]) -> Table:
    """The main cases; Unmeasured where one is missing or has failed."""
    by_case = {(result.case.op, result.case.array): result for result in results}
    rows = []
    for op, array, peer, words in CASES:
        result = by_case.get((op, array))
        ratio = result.ratio(peer) if result else None
        if result is None or result.best is None or ratio is None:
            raise Unmeasured(f"no figures of {op} {array} beside {peer}")
        times = (result.seconds[label] for label in (result.best, peer))
        rows.append([words, array, *(significant(seconds * 1e3) for seconds in times), peer, f"{ratio:.1f}"])
    return Table("", ["operation", "array, float32", "fastbn ms", "peer ms", "peer", "times faster"], rows)


def put(page: str, results: list[Result], source: str) -> str:
    """The page with the figures between its two marks."""
    before, _, rest = page.partition(BEGIN)
    _, _, after = rest.partition(END)
    return "\n".join([f"{before}{BEGIN}", *rows_as_markdown(table(results)), "", source, f"{END}{after}"])
