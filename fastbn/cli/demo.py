"""Train a network on real digits with and without batch normalization; print what was seen, and draw it."""

from __future__ import annotations

import argparse
import json
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import fastbn
from fastbn._files import check_writable, whole

EPOCHS = 250  # 5,000 steps
EXTRAS = {"sklearn": "scikit-learn", "matplotlib": "matplotlib", "tqdm": "tqdm"}  # imported in run() only
PNG, JSON = "fastbn-demo.png", "fastbn-demo.json"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--epochs", type=int, default=EPOCHS, metavar="N",
                        help="passes over the 1,200 training images, 20 steps each (default %(default)s)")
    parser.add_argument("--out", type=Path, default=Path(), metavar="DIR",
                        help=f"where {PNG} and {JSON} go (default: the current folder)")
    parser.add_argument("--backend", metavar="NAME", help="auto, cython, numba or numpy (default: auto)")
    parser.add_argument("--seed", type=int, default=0, metavar="N",
                        help="of the split, the initial weights and the order of the images (default %(default)s)")
    parser.add_argument("--json", action="store_true", help="print the results as JSON")
    parser.add_argument("--sweep", action="store_true",
                        help="instead: what each network reaches at each of several learning rates; writes no files")


def run(arguments: argparse.Namespace) -> int:
    missing = [name for module, name in EXTRAS.items() if find_spec(module) is None]
    if missing:
        return _fail(f"{', '.join(missing)} not found: pip install 'fastbn[demo]'", 1)
    try:
        _check(arguments)
    except (ValueError, fastbn.BackendUnavailableError) as error:
        return _fail(str(error), 2)
    if arguments.sweep:
        return _sweep(arguments)
    return _demo(arguments)


def _fail(message: str, status: int) -> int:
    print(f"fastbn demo: error: {message}", file=sys.stderr)
    return status


def _check(arguments: argparse.Namespace) -> None:
    """Everything that can be wrong, before any training; the folder last, so that a bad value leaves none behind."""
    if arguments.epochs < 1:
        raise ValueError(f"--epochs must be >= 1, got {arguments.epochs}")
    if arguments.seed < 0:
        raise ValueError(f"--seed must be >= 0, got {arguments.seed}")
    fastbn.warmup(arguments.backend)
    if not arguments.sweep:
        try:
            arguments.out.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ValueError(f"--out: {error}") from None
        for name in (JSON, PNG):
            check_writable(arguments.out / name)


def _demo(arguments: argparse.Namespace) -> int:
    from fastbn.demo import digits, figure, identity, report

    data = digits.Digits.load(arguments.seed)
    options = {"seed": arguments.seed, "backend": arguments.backend}
    with _bar(digits.steps_of(arguments.epochs) + identity.steps_in_all()) as bar:
        without, with_norm = digits.compare(data, epochs=arguments.epochs, progress=bar.update, **options)
        two = identity.part_two(without.network, data.train_x, data.train_labels,
                                learning_rate=digits.LEARNING_RATE, progress=bar.update, **options)
    found = report.results(_settings(arguments), without, with_norm, two)
    text, png = json.dumps(found, indent=1), figure.png(without, with_norm, two)
    try:
        for name, content in ((JSON, text.encode()), (PNG, png)):
            with whole(arguments.out / name) as path:
                path.write_bytes(content)
    except OSError as error:
        return _fail(str(error), 1)
    print(text if arguments.json else f"{report.as_text(found)}\n\nwrote {arguments.out / PNG} and {JSON} beside it")
    return 0


def _sweep(arguments: argparse.Namespace) -> int:
    from fastbn.demo import digits, report

    data, steps = digits.Digits.load(arguments.seed), digits.steps_of(arguments.epochs)
    with _bar(steps * len(digits.SWEEP_RATES) * len(digits.SWEEP_STDS)) as bar:
        rows = digits.sweep(data, epochs=arguments.epochs, seed=arguments.seed, backend=arguments.backend,
                            progress=bar.update)
    print(json.dumps(rows, indent=1) if arguments.json else report.sweep_text(rows, steps))
    return 0


def _bar(steps: int) -> Any:
    from tqdm import tqdm

    return tqdm(total=steps, desc="training", unit="step", leave=False, file=sys.stderr)


def _settings(arguments: argparse.Namespace) -> dict[str, Any]:
    from fastbn.demo import digits

    backend = arguments.backend
    return {
        "epochs": arguments.epochs,
        "batch": digits.BATCH,
        "learning_rate": digits.LEARNING_RATE,
        "initial_std": digits.STD,
        "seed": arguments.seed,
        "backend": fastbn.available_backends()[0] if backend in (None, "auto") else backend,
        "train": digits.TRAIN,
        "test": digits.TEST,
        "version": fastbn.__version__,
    }
