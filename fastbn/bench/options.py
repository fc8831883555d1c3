"""The options of the command, checked before anything is measured."""

from __future__ import annotations

import argparse
import importlib.util
from collections.abc import Callable, Collection
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import fastbn
from fastbn._dispatch import BACKENDS, why_unavailable
from fastbn._files import check_writable
from fastbn.bench import headline
from fastbn.bench.cases import ON_REQUEST, OPS, Case, grid, parse
from fastbn.bench.measure import REFERENCE_BYTES, Plan, installed_peers
from fastbn.bench.worker import PEERS

T = TypeVar("T")
ROUNDS, SECONDS = 7, 0.05
QUICK_ROUNDS, QUICK_SECONDS, QUICK_BYTES = 3, 0.01, 20e6


class BadOption(ValueError):
    """The message names the option and says what is wrong with it."""


@dataclass
class Options:
    cases: list[Case]
    plan: Plan
    missing: tuple[str, ...]
    json: bool
    plot: str | None
    markdown: str | None
    headline: str | None


def checked(given: argparse.Namespace) -> Options:
    """The options as they were meant; BadOption for the first that makes no sense."""
    ops = _option("--ops", given.ops, lambda text: _names(text, OPS))
    arrays = _option("--shapes", given.shapes, _arrays)
    backends = _option("--backends", given.backends, _backends)
    here, missing = installed_peers()
    peers = _option("--peers", given.peers, lambda text: _peers(text, here))
    plan = Plan(
        threads=_option("--threads", given.threads, _count) or fastbn.get_num_threads(),
        rounds=_option("--rounds", given.rounds, _count) or (QUICK_ROUNDS if given.quick else ROUNDS),
        seconds=QUICK_SECONDS if given.quick else SECONDS,
        backends=backends or fastbn.available_backends(),
        peers=here if peers is None else peers,
        reference_limit=float("inf") if backends and "numpy" in backends else REFERENCE_BYTES,
    )
    cases = grid(ops, arrays, QUICK_BYTES if given.quick and not arrays else float("inf"))
    if not cases:
        raise BadOption(f"--quick: none of the arrays of {given.ops} is small; give --shapes")
    _option("--plot", given.plot, lambda text: _picture(text, cases))
    _option("--markdown", given.markdown, check_writable)
    _option("--headline", given.headline, lambda text: _marked(text, cases, plan.peers))
    missing = missing if peers is None else ()
    return Options(cases, plan, missing, given.json, given.plot, given.markdown, given.headline)


def _option(name: str, text: str | None, convert: Callable[[str], T]) -> T | None:
    try:
        return None if text is None else convert(text)
    except ValueError as error:
        raise BadOption(f"{name}: {error}") from None


def _names(text: str, known: Collection[str]) -> list[str]:
    names = list(dict.fromkeys(name.strip() for name in text.split(",")))
    for name in names:
        if name not in known:
            raise ValueError(f"expected some of {', '.join(known)}, got {name!r}")
    return names


def _arrays(text: str) -> list[str]:
    return list(dict.fromkeys(parse("forward", array).array for array in text.split(",")))


def _backends(text: str) -> tuple[str, ...]:
    names = _names(text, BACKENDS)
    for name in names:
        reason = why_unavailable(name)
        if reason:
            raise ValueError(reason)
    return tuple(name for name in BACKENDS if name in names)


def _peers(text: str, here: tuple[str, ...]) -> tuple[str, ...]:
    if text.strip() == "none":
        return ()
    names = _names(text, PEERS)
    for name in names:
        if name not in here:
            raise ValueError(f"{name} is not installed")
    return tuple(names)


def _count(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise ValueError(f"expected a whole number >= 1, got {text!r}")
    return int(text)


def _marked(text: str, cases: list[Case], peers: tuple[str, ...]) -> str:
    check_writable(text)
    page = Path(text).read_text(encoding="utf-8") if Path(text).exists() else ""
    if not 0 <= page.find(headline.BEGIN) < page.find(headline.END):
        raise ValueError(f"{text!r} must have the line {headline.BEGIN!r} and behind it {headline.END!r}")
    headline.check([(case.op, case.array) for case in cases], peers)
    return text


def _picture(text: str, cases: list[Case]) -> str:
    if all(case.op in ON_REQUEST for case in cases):
        raise ValueError(f"{' and '.join(ON_REQUEST)} are not drawn; give --ops another one, too")
    if importlib.util.find_spec("matplotlib") is None:
        raise ValueError("matplotlib is not installed: pip install 'fastbn[bench]'")
    from matplotlib.backend_bases import FigureCanvasBase

    if Path(text).suffix.lstrip(".").lower() not in FigureCanvasBase.get_supported_filetypes():
        raise ValueError(f"expected a file name such as roofline.png, got {text!r}")
    check_writable(text)
    return text
