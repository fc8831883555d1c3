"""Run the fault table (tests/reliability/), each row in a process of its own, and tell what was tried and lost.

    python tests/soak.py                                      all of it
    python tests/soak.py --only fork,threads --scale 0.1      two rows, a tenth of them
    python tests/soak.py --markdown docs/reliability.md       and the page; its figures lie beside it, as JSON

A row that does not run keeps its figures on the page, if they come from the same machine and the same versions.
"""

import argparse
import datetime
import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

TESTS = Path(__file__).parent
sys.path[:0] = [str(TESTS)]

from reliability import ROWS  # noqa: E402  (after the path to it)
from reliability.tally import Tally  # noqa: E402

import fastbn  # noqa: E402
from fastbn.bench import machine  # noqa: E402

PACKAGES = ("numpy", "numba", "hypothesis", "joblib", "dask", "torch", "pandas", "polars")


def main(argv=None):
    parser = argparse.ArgumentParser(description="Try what may go wrong, and count what is lost.")
    parser.add_argument("--only", metavar="ROW,...", default=",".join(ROWS), help=f"some of {', '.join(ROWS)}")
    parser.add_argument("--scale", type=float, default=1.0, help="1 is the whole thing, some 25 minutes")
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.add_argument("--markdown", metavar="FILE.md", type=Path, help="write the page")
    parser.add_argument("--row", help=argparse.SUPPRESS)
    arguments = parser.parse_args(argv)
    if arguments.row:
        return in_this_process(arguments.row, arguments.scale)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that a row's process ends with this one
    names = arguments.only.split(",")
    if unknown := [name for name in names if name not in ROWS]:
        parser.error(f"--only: expected some of {', '.join(ROWS)}, got {', '.join(unknown)}")
    with Progress(len(names)) as progress:
        results = {name: run(name, arguments.scale, progress.part(name)) for name in names}
    print(json.dumps(results, indent=1) if arguments.json else as_text(results))
    if arguments.markdown:
        write(arguments.markdown, results)
    return 1 if any(result["lost"] for result in results.values()) else 0


def in_this_process(name, scale):
    tally = Tally(show=lambda line: print(line, flush=True))
    import_module(f"reliability.{name}").run(tally, scale)
    print(json.dumps(tally.result()), flush=True)
    return 1 if tally.lost else 0


def run(name, scale, tick=lambda done: None):
    """What a row tried and lost. That its process fails, dies or hangs is a loss, too."""
    began, last = time.monotonic(), {}
    with tempfile.TemporaryFile("w+") as errors, subprocess.Popen(
        [sys.executable, "-P", __file__, "--row", name, "--scale", str(scale)], text=True, start_new_session=True,
        env=os.environ | {"PYTHONPATH": str(Path(fastbn.__file__).parents[1])}, stdout=subprocess.PIPE, stderr=errors,
    ) as process:
        watchdog = threading.Timer(60 + ROWS[name].seconds * scale, os.killpg, (process.pid, signal.SIGKILL))
        watchdog.start()
        try:
            for line in process.stdout:
                last = json.loads(line)
                tick(last.get("done", 1))
            status = process.wait()
        except BaseException:
            os.killpg(process.pid, signal.SIGKILL)
            raise
        finally:
            watchdog.cancel()
        errors.seek(0)
        said = errors.read().strip()[-3000:]
    if "tried" in last:
        result = last
    else:
        result = {"tried": {}, "lost": [f"the process ended with status {status}: {said}"], "notes": []}
    today = datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d")
    return {**result, "scale": scale, "seconds": round(time.monotonic() - began, 1), "date": today}


class Progress:
    """A bar on the terminal, where tqdm is installed."""

    def __init__(self, rows):
        try:
            from tqdm import tqdm
        except ImportError:
            self.bar = None
        else:
            self.bar = tqdm(total=rows, disable=None, bar_format="{l_bar}{bar}| {n:.2f}/{total} [{elapsed}]")

    def __enter__(self):
        return self

    def __exit__(self, *details):
        if self.bar is not None:
            self.bar.close()

    def part(self, name):
        """What to call with the part of a row that is done."""
        if self.bar is None:
            return lambda done: None
        start = round(self.bar.n)
        self.bar.set_description(name)
        return lambda done: self.bar.update(start + done - self.bar.n)


# ------------------------------------------------------------------------------------------------------- the report


def tried(result):
    return "; ".join(f"{n:,} {what}" for what, n in result["tried"].items())


def as_text(results):
    lines = []
    for name, result in results.items():
        lines.append(f"{name}: {tried(result)}; lost: {len(result['lost'])}; {result['seconds']:.0f} s")
        lines += [f"  ! {loss}" for loss in result["lost"][:10]] + [f"    {note}" for note in result["notes"]]
    return "\n".join(lines)


def facts():
    versions = {"fastbn": fastbn.__version__}
    for name in PACKAGES:
        try:
            versions[name] = version(name)
        except PackageNotFoundError:
            versions[name] = "missing"
    return {**machine.describe(), "versions": ", ".join(f"{name} {number}" for name, number in versions.items())}


def write(page, results):
    """The page and, beside it, the figures that it was made of."""
    data = page.with_suffix(".json")
    old = json.loads(data.read_text()) if data.exists() else {}
    kept = old["rows"] if old.get("facts") == facts() else {}
    rows = {name: found for name in ROWS if (found := results.get(name, kept.get(name)))}
    data.write_text(json.dumps({"facts": facts(), "rows": rows}, indent=1) + "\n")
    page.write_text(markdown(rows), encoding="utf-8")


def markdown(rows):
    table = ["| fault | tried | lost | seconds | date |", "| --- | --- | ---: | ---: | --- |"]
    table += [
        f"| [{ROWS[name].fault}](#{name.replace('_', '-')}) | {tried(row)} | {len(row['lost'])} | "
        f"{row['seconds']:.0f} | {row['date']} |"
        for name, row in rows.items()
    ]
    parts = [
        "# Reliability",
        "Written by `python tests/soak.py --markdown docs/reliability.md`: measured, none of it typed. Do not edit;\n"
        "run it again. What is lost must be nothing.",
        "\n".join(["| | |", "| --- | --- |", *(f"| {name} | {fact} |" for name, fact in facts().items())]),
        "\n".join(table),
        "Each row is a module of `tests/reliability/`; the tests run most of them on every change, at a small scale.\n"
        "What each does, in its own words:",
    ]
    for name, row in rows.items():
        said = import_module(f"reliability.{name}").__doc__
        notes = [*row["notes"], *(f"LOST: {loss}" for loss in row["lost"])]
        if row["scale"] != 1:
            notes.append(f"at a scale of {row['scale']:g}")
        parts += [f"## {name.replace('_', ' ')}", said, "\n".join("- " + note for note in notes)]
    return "\n\n".join(part for part in parts if part) + "\n"


if __name__ == "__main__":
    sys.exit(main())
