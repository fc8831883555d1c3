"""What a fork of the process asks of fastbn."""

from __future__ import annotations

import os
import threading

# For what a backend does once: import its module, compile. A child forked amid it, by another thread, would wait for
# locks of Python and Numba that nobody there will release. So who forks takes this one first, and waits instead.
first_use = threading.RLock()
# Forked from a process that had imported fastbn, it inherits OpenMP's bookkeeping but none of its threads, for which a
# parallel region would wait forever.
in_child = False


def _after_in_child() -> None:
    global in_child
    in_child = True
    first_use.release()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(before=first_use.acquire, after_in_parent=first_use.release, after_in_child=_after_in_child)
