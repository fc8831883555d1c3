"""Measure fastbn against the installed peers and against the memory's speed, on this machine."""

from __future__ import annotations

import argparse
import sys

from fastbn.bench.cases import OPS


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--ops", metavar="OP,...", help=f"operations: {', '.join(OPS)} (default: all)")
    parser.add_argument(
        "--shapes", metavar="SHAPE,...",
        help="arrays for every operation, such as 65536x256 or 32x64x56x56, with :float64, :F (Fortran order) or :rows "
             "(every other row of a larger array) behind it (default: each operation's own; they take up to 5 GB)",
    )
    parser.add_argument("--threads", metavar="N", help="threads for every side (default: as fastbn's calls)")
    parser.add_argument("--rounds", metavar="N", help="rounds; figures are their medians (default: 7)")
    parser.add_argument("--backends", metavar="NAME,...", help="cython, numba, numpy (default: all that run here)")
    parser.add_argument("--peers", metavar="NAME,...", help="torch, jax, scikit-learn, numpy; none (default: all)")
    parser.add_argument("--quick", action="store_true", help="small arrays, fewer and shorter rounds")
    parser.add_argument("--json", action="store_true", help="print JSON instead of tables")
    parser.add_argument("--plot", metavar="FILE.png", help="draw GB/s against bytes, one panel an operation")
    parser.add_argument("--markdown", metavar="FILE.md", help="write the tables as a page")
    parser.add_argument(
        "--headline", metavar="FILE.md",
        help="put the main figures into a page, such as README.md, between its two marks",
    )


def run(arguments: argparse.Namespace) -> int:
    from fastbn.bench.options import BadOption, checked
    from fastbn.bench.run import run as measure_and_report

    try:
        options = checked(arguments)
    except BadOption as error:
        print(f"fastbn bench: error: {error}", file=sys.stderr)
        return 2
    return measure_and_report(options)
