"""One run of the command, from its options to what it prints and writes."""

from __future__ import annotations

import datetime
import os
import shlex
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from fastbn._files import whole
from fastbn.bench import headline, machine, page
from fastbn.bench.cases import Case
from fastbn.bench.measure import Result, measure
from fastbn.bench.options import Options
from fastbn.bench.process import Processes, WorkerError

BUSY = 0.1  # the share of the processors from which on other programs spoil a measurement


def run(options: Options) -> int:
    """Measure, print, write; 1 where a side failed, else 0."""
    others = [machine.busy()]
    _warn_if_busy(others[0])
    with Progress(options.cases) as progress, Processes(options.plan.threads, _together(options)) as processes:
        results = measure(options.cases, options.plan, processes, progress.tick)
        others.append(machine.busy())
        versions = _versions(options, results, processes)
    found = page.Run(
        command=shlex.join(["fastbn", *sys.argv[1:]]),
        date=datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d %H:%M UTC"),
        machine=machine.describe(),
        versions=versions,
        missing=options.missing,
        others=[share for share in others if share is not None],
        plan=options.plan,
        results=results,
    )
    failed = any(result.errors for result in results)
    for name, write in _files(options, found):
        try:
            with whole(name) as path:
                write(path)
        except (OSError, headline.Unmeasured) as error:  # the other files are written all the same
            print(f"fastbn bench: error: {name} is not written: {error}", file=sys.stderr)
            failed = True
    print(page.as_json(found) if options.json else page.text(found))
    return 1 if failed else 0


def _files(options: Options, found: page.Run) -> Iterator[tuple[str, Callable[[Path], object]]]:
    """The files that were asked for, and what writes each."""
    if options.plot:
        from fastbn.bench.plot import draw

        yield options.plot, lambda path: draw(found.results, str(path))
    if options.markdown:
        text = page.markdown(found, _seen_from_page(options))
        yield options.markdown, lambda path: path.write_text(text, encoding="utf-8")
    if options.headline:
        around = Path(options.headline)
        yield options.headline, lambda path: path.write_text(
            headline.put(around.read_text(encoding="utf-8"), found.results, page.source(found)), encoding="utf-8")


def _warn_if_busy(share: float | None) -> None:
    if share is not None and share > BUSY:
        print(
            f"fastbn bench: other programs take {share:.0%} of the processors; times will be too long and scatter",
            file=sys.stderr,
        )


def _together(options: Options) -> tuple[str, ...]:
    """The roofline runs in the process of fastbn's first backend, on the very same arrays."""
    return (options.plan.ours[0], "roofline")


def _versions(options: Options, results: list[Result], processes: Processes) -> dict[str, str]:
    """Versions of what was measured."""
    labels = dict.fromkeys(label for result in results for label in result.samples)
    versions: dict[str, str] = {}
    for label in labels:
        try:
            versions |= processes.versions(label)
        except WorkerError as error:
            print(f"fastbn bench: {label}: {error}", file=sys.stderr)
    return versions


def _seen_from_page(options: Options) -> str | None:
    if not options.plot or not options.markdown:
        return None
    return Path(os.path.relpath(options.plot, Path(options.markdown).parent)).as_posix()


class Progress:
    """A bar on the terminal; without tqdm, or into a file, a line at each tenth of the way."""

    def __init__(self, cases: list[Case]) -> None:
        self.n_cases, self.done, self.tenths, self.began = len(cases), 0.0, 0, time.monotonic()
        try:
            from tqdm import tqdm
        except ImportError:
            self.bar: Any = None
        else:
            self.bar = tqdm(total=len(cases), unit="case", disable=None, bar_format=(
                "{l_bar}{bar}| {n:.1f}/{total} [{elapsed}<{remaining}]"
            ))

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, *details: object) -> None:
        if self.bar is not None:
            self.bar.close()

    def tick(self, case: Case, part: float) -> None:
        if self.bar is not None and not self.bar.disable:
            self.bar.set_description(f"{case.op} {case.array}", refresh=False)
            self.bar.update(part)
            return
        self.done += part
        tenths = int(round(10 * self.done / self.n_cases, 6))  # the parts may add up to a little less than the whole
        if tenths > self.tenths:
            self.tenths = tenths
            minutes, seconds = divmod(round(time.monotonic() - self.began), 60)
            print(f"fastbn bench: {10 * tenths} % after {minutes}:{seconds:02}", file=sys.stderr, flush=True)
