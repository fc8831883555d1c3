"""The machine that a measurement ran on."""

from __future__ import annotations

import os
import platform
import re
import time
from pathlib import Path
from typing import NamedTuple

from fastbn import _dispatch

CPUS = Path("/sys/devices/system/cpu")


def describe() -> dict[str, str]:
    """What a reader must know to judge the figures. Unknown facts are left out."""
    found = {
        "processor": _first_match("/proc/cpuinfo", r"model name\s*:\s*(.+)") or platform.processor(),
        "architecture": platform.machine(),
        "instruction set": _instruction_set(),
        "processors usable": str(processors()),
        "caches": ", ".join(f"{name} {size}" for name, size in caches().items()),
        "memory": _memory(),
        "huge pages": _first_match("/sys/kernel/mm/transparent_hugepage/enabled", r"\[(\w+)\]"),
        "system": f"{platform.system()}, {' '.join(platform.libc_ver())}".rstrip(", "),
        "Python": platform.python_version(),
    }
    return {name: fact for name, fact in found.items() if fact}


def caches() -> dict[str, str]:
    """Data caches that the first processor sees, such as {"L2": "2048K"}."""
    found = {}
    for folder in sorted((CPUS / "cpu0/cache").glob("index*")):
        if _read(folder / "type") in ("Data", "Unified"):
            found[f"L{_read(folder / 'level')}"] = _read(folder / "size")
    return found


def cache_bytes() -> dict[str, int]:
    """The same in bytes."""
    units = {"K": 2**10, "M": 2**20, "G": 2**30}
    return {name: int(size[:-1]) * units[size[-1]] for name, size in caches().items() if size[-1:] in units}


class Ticks(NamedTuple):
    """What the usable processors did, in ticks, most often 100 a second each; all 0 where the system does not tell."""

    busy: int
    idle: int
    stolen: int  # programs would have run, but the host of a virtual machine did not run the processor ("steal")


def ticks() -> Ticks:
    """Those since the start."""
    usable, found = {f"cpu{n}" for n in _usable()}, Ticks(0, 0, 0)
    for name, *words in map(str.split, _read(Path("/proc/stat")).splitlines()):
        if name in usable:
            user, nice, system, idle, iowait, irq, softirq, steal = [*map(int, words), *8 * [0]][:8]
            one = Ticks(user + nice + system + irq + softirq, idle + iowait, steal)
            found = Ticks(*map(sum, zip(found, one, strict=True)))
    return found


def since(before: Ticks) -> Ticks:
    """Those since then; none where a count went back, as those of idle and stolen time may."""
    return Ticks(*(max(0, now - then) for now, then in zip(ticks(), before, strict=True)))


def busy(seconds: float = 0.5) -> float | None:
    """The share of the processors' time that programs take just now, from 0 to 1; None where that cannot be told."""
    before = ticks()
    time.sleep(seconds)
    spent = since(before)
    return spent.busy / sum(spent) if sum(spent) > 0 else None


def stolen_share(spent: Ticks) -> float:
    """How much of the time that programs wanted the host kept, from 0 to 1."""
    return spent.stolen / max(1, spent.busy + spent.stolen)


def processors() -> int:
    """How many are usable."""
    return len(_usable())


def _instruction_set() -> str:
    """What the compiled kernels take."""
    try:
        return str(_dispatch.instruction_set()["chosen"])
    except _dispatch.BackendUnavailableError:
        return ""


def _usable() -> list[int]:
    if hasattr(os, "sched_getaffinity"):
        return sorted(os.sched_getaffinity(0))
    return list(range(os.cpu_count() or 1))


def _memory() -> str:
    kib = _first_match("/proc/meminfo", r"MemTotal:\s*(\d+)")
    return f"{int(kib) / 2**20:.0f} GiB" if kib else ""


def _read(path: Path) -> str:
    try:
        return path.read_text().strip()
    except OSError:
        return ""


def _first_match(path: str, pattern: str) -> str:
    match = re.search(pattern, _read(Path(path)))
    return match.group(1).strip() if match else ""
