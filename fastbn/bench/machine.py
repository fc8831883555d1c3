"""The machine that a measurement ran on."""

from __future__ import annotations

import os
import platform
import re
import time
from pathlib import Path
from typing import NamedTuple

CPUS = Path("/sys/devices/system/cpu")


def describe() -> dict[str, str]:
    """What a reader must know to judge the figures. Unknown facts are left out."""
    found = {
        "processor": _first_match("/proc/cpuinfo", r"model name\s*:\s*(.+)") or platform.processor(),
        "architecture": platform.machine(),
        "processors usable": str(len(_usable())),
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
    """Ticks of all processors, most often 100 a second each; 0 where the system does not tell."""

    total: int
    idle: int
    stolen: int  # the host of a virtual machine ran other guests


def ticks() -> Ticks:
    """Those since the start."""
    found = [int(word) for word in _first_match("/proc/stat", r"cpu +([\d ]+)").split()]
    return Ticks(sum(found[:8]), sum(found[3:5]), sum(found[7:8]))


def since(before: Ticks) -> Ticks:
    """Those since then."""
    return Ticks(*(now - then for now, then in zip(ticks(), before, strict=True)))


def busy(seconds: float = 0.5) -> float | None:
    """The share of all processors' time that programs take just now, from 0 to 1; None where that cannot be told."""
    before = ticks()
    time.sleep(seconds)
    total, idle, stolen = since(before)
    return 1 - (idle + stolen) / total if total > 0 else None


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
