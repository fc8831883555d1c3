"""What fastbn found on this machine, and what it chose."""

from __future__ import annotations

import json
import platform
from typing import Any

import numpy as np

from fastbn import _dispatch


def config() -> dict[str, Any]:
    from fastbn import __version__

    backends = {
        name: {"available": reason is None, "reason": reason}
        for name in _dispatch.BACKENDS
        for reason in [_dispatch.why_unavailable(name)]
    }
    compiled = backends["cython"]["available"]
    return {
        "fastbn": __version__,
        "python": platform.python_version(),
        "numpy": np.__version__,
        "machine": platform.machine(),
        "backends": backends,
        "auto": next(name for name in _dispatch.BACKENDS if backends[name]["available"]),
        "instruction_set": _dispatch.instruction_set() if compiled else None,
        "openmp": bool(_dispatch.kernels("cython").OPENMP) if compiled else None,
        "threads": {"count": _dispatch.thread_count(), "source": _dispatch.thread_source()},
    }


def show_config(as_dict: bool = False) -> dict[str, Any] | None:
    """Print the version, the backends, the instruction sets, OpenMP and the threads; or return them.

    Parameters
    ----------
    as_dict : bool
        Return a dict (of what JSON can hold) and print nothing.

    Returns
    -------
    dict or None
    """
    found = config()
    if as_dict:
        return found
    print(as_text(found))
    return None


def as_text(found: dict[str, Any]) -> str:
    isa = found["instruction_set"]
    openmp = {True: "yes", False: "no, the Cython kernels run on one thread", None: "no compiled kernels"}
    lines = [
        ("fastbn", found["fastbn"]),
        ("Python", f"{found['python']}, NumPy {found['numpy']}, {found['machine']}"),
    ]
    for name, state in found["backends"].items():
        chosen = ", chosen by auto" if name == found["auto"] else ""
        lines.append((f"backend {name}", f"available{chosen}" if state["available"] else f"missing: {state['reason']}"))
    if isa:
        forced = " (forced by FASTBN_ISA)" if isa["forced"] else ""
        compiled = ", ".join(isa["compiled"])
        text = f"{isa['chosen']}{forced}; compiled: {compiled}; widest found: {isa['found']}"
        lines.append(("instruction set", text))
    lines += [
        ("OpenMP", openmp[found["openmp"]]),
        ("threads", f"{found['threads']['count']} (from: {found['threads']['source']})"),
    ]
    return "\n".join(f"{name + ':':17} {value}" for name, value in lines)


def as_json(found: dict[str, Any]) -> str:
    return json.dumps(found, indent=2)
