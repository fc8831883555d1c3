"""A whole run, as what the terminal shows, as JSON, and as the page docs/benchmarks.md."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from typing import Any

from fastbn.bench.measure import PASSES, REFERENCE_BYTES, SAMPLES, STOLEN, TRIES, Plan, Result, disturbance
from fastbn.bench.tables import as_markdown, as_text, tables
from fastbn.bench.targets import NUMBA_FROM, verdicts

HOW = f"""\
Every implementation runs in its own process, with the same number of threads, on arrays of the same normal random
numbers about 3. In each round every side runs once, in turns that rotate: one call that does not count, then calls in a
loop, each result alive until the next one is there. A sample is one call, or the mean of several where they are short;
there are up to {SAMPLES} in a round. Where the host of a virtual machine kept, in a side's round, \
{STOLEN * 100:g} % or more of the
processors' time that programs wanted (the system tells of it in ticks of 10 ms, so in a short round one is enough), the
round is tried again; of at most {TRIES} \
tries the one with the least of that counts, the others are dropped. A figure is the
median of the samples that count, in milliseconds per call. Ratios are of medians; above 1, fastbn is faster. `fastbn`
stands for its first backend of the table. Sizes and GB are decimal.

The roofline is what the operation must move at the least, as bare passes over the same arrays in the same process as
fastbn, on the same threads (`fastbn/bench/passes.pyx`: large arrays fetched ahead, and where inputs and output are 20
MiB or more, stores past the caches).
Training forward: read x, copy x to out. Backward: read both inputs, then a two-input one-output pass. Inference: the
copy. Moments: the read. Without `out=` each output lives until the next one is there, so the bare passes, too, write to
two arrays in turn (6 MB in L3: a third longer than into one). GB/s counts the bytes of these passes for every side
alike. fastbn can be faster than the roofline where its second pass finds in the cache what its first one left there,
which the bare passes do not try. Below 250 KB there is none: waking the threads would take as long as the passes. Of
rows that lie apart the bare passes read and copy the rows alone; but the processor fetches ahead what lies between
them, so they, too, take longer. What a ratio would be if fastbn took just the time of the bare passes on that array
stands in the last table, "at the roofline", and beside a target that was missed, whether they would miss it, too.

Before the rounds of a case, in each pass, two threads send a cache line to and fro. A host may move a virtual
machine's processors between groups of cores that have a cache of their own: threads then wait longer for each other,
which small arrays feel, and have more cache, which large ones do.

An array is its sizes: rows and columns, or those of images; behind them may stand `:float64`, `:F` for Fortran order,
`:rows` for every other row of a larger array. fastbn's NumPy reference is measured up to \
{REFERENCE_BYTES / 1e6:g} MB. In the last table the
target is what fastbn must reach, the aim what it should: times faster than a peer, or at most so many times as long as
the roofline, as its Cython backend ("numba/cython, the worst": of the arrays of an operation from \
{NUMBA_FROM / 1e6:g} MB on), or as
another array per byte ("per byte, to" it).

As users call it means without `out=`; where a peer has no `out=`, its column has no figure. PyTorch:
`torch.native_batch_norm` and its backward, which its layers call, and `nn.BatchNorm*d` with `autograd.grad`. JAX:
two-pass batch normalization under `jax.jit`. NumPy: `x.mean(0), x.var(0)`. scikit-learn: `StandardScaler().fit(x)`.
"""


@dataclass
class Run:
    """Everything that one `fastbn bench` found."""

    command: str
    date: str
    machine: dict[str, str]
    versions: dict[str, str]
    missing: tuple[str, ...]
    others: list[float]  # the share of the processors that other programs took, before the run and after it
    plan: Plan
    results: list[Result]


def facts(run: Run) -> dict[str, str]:
    """The machine and the run, in words."""
    return {
        **run.machine,
        "threads": str(run.plan.threads),
        "versions": ", ".join(f"{name} {version}" for name, version in run.versions.items()),
        **({"missing": ", ".join(run.missing) + " (not installed)"} if run.missing else {}),
        **({"other programs": _shares(run.others), "the machine's host": _host(run.results)} if run.others else {}),
        **_between(run.results),
        "rounds": f"{run.plan.rounds} in {min(PASSES, run.plan.rounds)} passes, "
                  f"with about {run.plan.seconds * 1e3:g} ms of calls per side each",
        "date": run.date,
    }


def _shares(others: list[float]) -> str:
    return "took " + " and ".join(f"{share:.0%}" for share in others) + " of the processors before and after the run"


def _host(results: list[Result]) -> str:
    return ("kept processors from us in {dropped:,} tries, which were dropped, and in {disturbed:,} of the {counted:,} "
            "that count, as far as it tells").format(**disturbance(results))


def _between(results: list[Result]) -> dict[str, str]:
    trips = sorted(trip * 1e9 for result in results for trip in result.trips)
    if not trips:
        return {}
    low, middle, high = (trips[round(share * (len(trips) - 1))] for share in (0.05, 0.5, 0.95))
    return {"between processors": f"a cache line took {low:.0f} to {high:.0f} ns there and back, half the time at most "
                                  f"{middle:.0f} ns (5th, 95th and 50th percentile of {len(trips):,} times)"}


def text(run: Run) -> str:
    head = "\n".join(f"{name + ':':18} {fact}" for name, fact in facts(run).items())
    return "\n\n".join([head, *(as_text(table) for table in tables(run.results))])


def markdown(run: Run, picture: str | None = None) -> str:
    """The page; `picture` is the file of the plot, as seen from the page."""
    parts = [
        "# Benchmarks",
        f"Written by `{run.command}`: measured, none of it typed. Do not edit; run it again.",
        "\n".join(["| | |", "| --- | --- |", *(f"| {name} | {fact} |" for name, fact in facts(run).items())]),
        *([f"![GB/s against bytes for each implementation]({picture})"] if picture else []),
        "## How it is measured",
        HOW.strip(),
        *(as_markdown(table) for table in tables(run.results)),
    ]
    return "\n\n".join(parts) + "\n"


def source(run: Run) -> str:
    """Where the figures come from, in a sentence."""
    versions = ", ".join(f"{name} {version}" for name, version in run.versions.items())
    threads = f"{run.plan.threads} thread" + "s" * (run.plan.threads != 1)
    return (f"Medians, {threads}, {run.machine['processor']}, {versions}, {run.date}; "
            f"from `{run.command}`.")


def as_json(run: Run) -> str:
    found = {
        "command": run.command,
        "date": run.date,
        "machine": run.machine,
        "versions": run.versions,
        "missing": run.missing,
        "other_programs": run.others,
        "host": disturbance(run.results) if run.others else None,
        "threads": run.plan.threads,
        "rounds": run.plan.rounds,
        "results": [_result(result) for result in run.results],
        "targets": [
            {**asdict(one), "met": one.met, "aim_met": one.aim_met, "met_at_roofline": one.met_at_roofline}
            for one in verdicts(run.results)
        ],
    }
    return json.dumps(found, indent=2)


def _result(result: Result) -> dict[str, Any]:
    case, seconds = result.case, result.seconds
    return {
        "op": case.op,
        "array": case.array,
        "shape": case.shape,
        "dtype": case.dtype,
        "layout": case.layout,
        "bytes": case.nbytes,
        "seconds": seconds,
        "samples": result.samples,
        "stolen": result.stolen,
        "dropped": result.dropped,
        "trips": result.trips,
        "gbps": {label: result.gbps(label) for label in seconds},
        "ratio_to_fastbn": {label: result.ratio(label) for label in seconds},
        "ratio_to_roofline": {label: result.ratio(label, "roofline") for label in seconds if "roofline" in seconds},
        "errors": result.errors,
    }
