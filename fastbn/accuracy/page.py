"""A whole run: as text, as JSON, and as docs/numerics.md."""

from __future__ import annotations

import json
from string import Template
from typing import Any

from fastbn.accuracy import tables
from fastbn.accuracy.prose import PROSE
from fastbn.accuracy.run import Run
from fastbn.accuracy.tables import everything
from fastbn.bench.tables import Table, as_text


def facts(run: Run) -> dict[str, str]:
    """The machine and the run, in words."""
    return {
        **{name: run.machine[name] for name in ("processor", "architecture", "Python") if name in run.machine},
        "versions": ", ".join(f"{name} {version}" for name, version in sorted(run.versions.items())),
        **({"missing": ", ".join(run.missing) + " (not installed)"} if run.missing else {}),
        "date": run.date,
    }


def verdict(run: Run) -> str:
    """Whether fastbn holds its bound, in one line or several."""
    if not any(label.startswith("fastbn-") for label in run.labels):
        return "fastbn was not measured."
    if not run.missed:
        return f"fastbn holds the bound in all of the {len(run.errors)} cases measured."
    return "\n".join(["fastbn misses the bound here:", "", *(f"- {line}" for line in run.missed)])


def text(run: Run) -> str:
    head = "\n".join(f"{name + ':':14} {fact}" for name, fact in facts(run).items())
    note = "Errors are in units of the bound; ! marks one that is missed."
    return "\n\n".join([head, note, *(as_text(table) for table in everything(run)), verdict(run)])


def as_json(run: Run) -> str:
    def nested(found: Any) -> Any:
        return [dict(zip(("dtype", "name"), key, strict=True)) | {"found": value} for key, value in found.items()]

    return json.dumps({
        "command": run.command,
        "machine": run.machine,
        **facts(run),
        "labels": run.labels,
        "missing": run.missing,
        "versions": run.versions,
        "missed": run.missed,
        **{name: nested(getattr(run, name))
           for name in ("errors", "constants", "nonfinite", "merged", "threads", "between")},
    }, indent=1)


def markdown(run: Run) -> str:
    """The page: the prose with the tables in it."""
    return Template(PROSE).substitute(
        command=run.command,
        facts=_rows(Table("", ["", ""], [[*fact] for fact in facts(run).items()])),
        verdict=verdict(run),
        bound=_rows(tables.stated()),
        **{f"{name}_{dtype}": _rows(getattr(tables, name)(run, dtype))
           for name in ("summary", "errors", "constants", "nonfinite") for dtype in ("float32", "float64")},
        **{name: _rows(getattr(tables, name)(run)) for name in ("merged", "threads", "between")},
    )


def _rows(table: Table) -> str:
    lines = [table.header, ["---"] * len(table.header), *table.rows]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines)
