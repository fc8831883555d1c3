"""The command line: fastbn info | demo | bench | accuracy. Each subcommand is a module, imported when asked for."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from importlib import import_module

import fastbn

COMMANDS = {
    "info": "what fastbn found on this machine, and what it chose",
    "demo": "train a network on real digits with and without batch normalization, and draw it",
    "bench": "measure fastbn against the installed peers and the speed of memory",
    "accuracy": "measure the errors of fastbn and of the installed peers on hard data",
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run one subcommand; returns the exit status."""
    parser = argparse.ArgumentParser(prog="fastbn", description="Batch normalization for multicore CPUs.")
    parser.add_argument("--version", action="version", version=f"fastbn {fastbn.__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="{" + ",".join(COMMANDS) + "}")
    for name, text in COMMANDS.items():
        module = import_module(f"fastbn.cli.{name}")
        command = commands.add_parser(name, help=text, description=module.__doc__)
        module.add_arguments(command)
        command.set_defaults(run=module.run)
    arguments = parser.parse_args(argv)
    try:
        status: int = arguments.run(arguments)
    except KeyboardInterrupt:
        print("\ninterrupted", file=sys.stderr)
        return 130
    return status
