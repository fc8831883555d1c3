"""Measure the errors of fastbn and of the installed peers on hard data, in units of the stated bound."""

from __future__ import annotations

import argparse
import sys

from fastbn._files import check_writable


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--sides", metavar="NAME,...",
                        help="fastbn-cython-avx2, fastbn-numba, torch, ... or fastbn for all of its own (default: all)")
    parser.add_argument("--cases", metavar="WORDS", default="", help="only the cases whose names contain these words")
    parser.add_argument("--quick", action="store_true", help="no case of 2^20 rows and more")
    parser.add_argument("--json", action="store_true", help="print JSON instead of tables")
    parser.add_argument("--markdown", metavar="FILE.md", help="write the page docs/numerics.md into this file")


def run(arguments: argparse.Namespace) -> int:
    from fastbn.accuracy.cases import judged
    from fastbn.accuracy.run import measure, report
    from fastbn.accuracy.sides import ours, peers

    here, missing = peers()
    labels = known = (*ours(), *here)
    if arguments.sides:
        names = [name.strip() for name in arguments.sides.split(",")]
        for name in names:
            if name not in ("fastbn", *known):
                return _fail(f"--sides: expected some of fastbn, {', '.join(known)}, got {name!r}")
        labels = tuple(label for label in known if label in names or (label in ours() and "fastbn" in names))
        missing = ()
    if not any(arguments.cases in name for name in judged("float64", quick=arguments.quick)):
        return _fail(f"--cases: no case is named like {arguments.cases!r}")
    if arguments.markdown:
        if arguments.cases or arguments.sides or arguments.quick:
            return _fail("--markdown: the page needs all cases and sides, so neither --cases, --sides nor --quick")
        try:
            check_writable(arguments.markdown)
        except ValueError as error:
            return _fail(f"--markdown: {error}")
    return report(
        measure(labels, missing, arguments.quick, arguments.cases), json=arguments.json, markdown=arguments.markdown
    )


def _fail(message: str) -> int:
    print(f"fastbn accuracy: error: {message}", file=sys.stderr)
    return 2
