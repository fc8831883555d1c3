"""Results as tables of words and figures, and those as text or Markdown."""

from __future__ import annotations

from dataclasses import dataclass, field

from fastbn.bench.cases import OPS
from fastbn.bench.measure import Result
from fastbn.bench.targets import Verdict, verdicts

NONE = "-"


@dataclass
class Table:
    title: str
    header: list[str]
    rows: list[list[str]]
    notes: list[str] = field(default_factory=list)


def tables(results: list[Result]) -> list[Table]:
    """One table for each operation, and one for the targets."""
    ops = dict.fromkeys(result.case.op for result in results)
    made = [_operation(op, [result for result in results if result.case.op == op]) for op in ops]
    targets = _targets(results)
    return [*made, targets] if targets.rows else made


def significant(value: float) -> str:
    """Three significant digits, without an exponent."""
    if value >= 100 or value == 0:
        return f"{value:.0f}"
    digits = 2
    while value < 1 and digits < 6:
        value, digits = value * 10, digits + 1
    return f"{value / 10 ** (digits - 2):.{digits - (value >= 10)}f}"


def _operation(op: str, results: list[Result]) -> Table:
    errors = [
        f"{label} on {result.case.array}: {message}" for result in results for label, message in result.errors.items()
    ]
    labels = list(dict.fromkeys(label for result in results for label in (*result.samples, *result.errors)))
    if op == "mixing":
        return _mixing(results, labels, errors)
    peers = [label for label in labels if not label.startswith("fastbn-") and label != "roofline"]
    header = ["array", "MB", *(f"{label} ms" for label in labels), "GB/s", *(f"{peer}/fastbn" for peer in peers)]
    rows = []
    for result in results:
        ratios = [result.ratio(peer) for peer in peers]
        if "roofline" in labels:
            ratios.append(result.ratio(result.best or "", "roofline"))
        rows.append([
            result.case.array,
            significant(result.case.nbytes / 1e6),
            *(_milliseconds(result, label) for label in labels),
            f"{result.gbps(result.best):.1f}" if result.best else NONE,
            *(NONE if ratio is None else f"{ratio:.2f}" for ratio in ratios),
        ])
    if "roofline" in labels:
        header.append("fastbn/roofline")
    return Table(f"{op}: {OPS[op]}", header, rows, errors)


def _milliseconds(result: Result, label: str) -> str:
    if label in result.errors:
        return "error"
    return significant(result.seconds[label] * 1e3) if label in result.seconds else NONE


def _mixing(results: list[Result], labels: list[str], errors: list[str]) -> Table:
    rows = []
    for result in results:
        seconds = result.seconds
        for pair in (label for label in labels if "+" in label and label in seconds):
            parts = pair.split("+")
            if all(part in seconds for part in parts):
                alone = sum(seconds[part] for part in parts)
                rows.append([
                    result.case.array, significant(result.case.nbytes / 1e6), pair.replace("+", ", "),
                    significant(alone * 1e3), significant(seconds[pair] * 1e3), f"{seconds[pair] / alone - 1:+.0%}",
                ])
    header = ["array", "MB", "in turn", "sum of both alone ms", "in one process ms", "cost"]
    return Table(f"mixing: {OPS['mixing']}", header, rows, errors)


def _targets(results: list[Result]) -> Table:
    found = verdicts(results)
    rows = [
        [
            one.op,
            one.array,
            one.what,
            f"{one.ratio:.2f}",
            f"{'<=' if one.at_most else '>='} {one.bound:g}",
            f"{one.aim:g}",
            "-" if one.at_roofline is None else f"{one.at_roofline:.2f}",
            _met(one),
        ]
        for one in found
    ]
    met, beyond = sum(one.met for one in found), sum(not one.met and one.met_at_roofline is False for one in found)
    title = f"targets: {met} of {len(rows)} met"
    if beyond:
        title += f", {beyond} of the others not by the bare passes either"
    header = ["operation", "array", "ratio", "measured", "target", "aim", "at the roofline", "met"]
    return Table(title, header, rows)


def _met(verdict: Verdict) -> str:
    if not verdict.met:
        return "NO, nor the bare passes" if verdict.met_at_roofline is False else "NO"
    return "yes, and the aim" if verdict.aim_met and verdict.aim != verdict.bound else "yes"


def as_text(table: Table) -> str:
    """Aligned columns: words to the left, figures to the right."""
    lines = [table.header, *table.rows]
    widths = [max(len(line[i]) for line in lines) for i in range(len(table.header))]
    left = [all(row[i][:1].isalpha() or "x" in row[i] for row in table.rows) for i in range(len(table.header))]
    text = [
        "  ".join(cell.ljust(width) if to_left else cell.rjust(width) for cell, width, to_left in
                  zip(line, widths, left, strict=True)).rstrip()
        for line in lines
    ]
    return "\n".join([table.title, *("  " + line for line in text), *(f"  ! {note}" for note in table.notes)])


def as_markdown(table: Table) -> str:
    """The same as a Markdown table under a heading."""
    title = f"## {table.title[:1].upper()}{table.title[1:]}"
    return "\n".join([title, "", *rows_as_markdown(table), *(f"\n{note}" for note in table.notes)])


def rows_as_markdown(table: Table) -> list[str]:
    rows = (table.header, ["---"] * len(table.header), *table.rows)
    return ["| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in rows]
