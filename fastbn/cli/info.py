"""Print what fastbn found on this machine: backends, instruction sets, OpenMP, threads."""

from __future__ import annotations

import argparse

from fastbn._config import as_json, as_text, config


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", action="store_true", help="print JSON")


def run(arguments: argparse.Namespace) -> int:
    found = config()
    print(as_json(found) if arguments.json else as_text(found))
    return 0
