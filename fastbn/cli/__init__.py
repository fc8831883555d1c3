"""The command line: fastbn info | demo | bench | accuracy. Each subcommand is a module, imported when asked for."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from importlib import import_module

import fastbn
from fastbn._dispatch import BadSetting

COMMANDS = {
    "info": "what fastbn found on this machine, and what it chose",
    "demo": "train a network on real digits with and without batch normalization, and draw it",
    "bench": "measure fastbn against the installed peers and the speed of memory",
    "accuracy": "measure the errors of fastbn and of the installed peers on hard data",
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run one subcommand; returns the exit status."""
    try:
        status = _run(argv)
        sys.stdout.flush()  # here, where it can be told if it fails
    except KeyboardInterrupt:
        print("\ninterrupted", file=sys.stderr)
        return 130
    except BadSetting as error:
        print(f"fastbn: error: {error}", file=sys.stderr)
        return 2
    except OSError as error:
        if not isinstance(error, BrokenPipeError):  # `fastbn info | head`: who reads has read enough
            print(f"fastbn: error: {error}", file=sys.stderr)
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # for what is left, which Python would try to print at its exit
        return 1
    return status


def _run(argv: Sequence[str] | None) -> int:
    parser = argparse.ArgumentParser(prog="fastbn", description="Batch normalization for multicore CPUs.")
    parser.add_argument("--version", action="version", version=f"fastbn {fastbn.__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="{" + ",".join(COMMANDS) + "}")
    for name, text in COMMANDS.items():
        module = import_module(f"fastbn.cli.{name}")
        command = commands.add_parser(name, help=text, description=module.__doc__)
        module.add_arguments(command)
        command.set_defaults(run=module.run)
    arguments = parser.parse_args(argv)
    status: int = arguments.run(arguments)
    return status
