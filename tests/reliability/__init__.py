"""The fault table: one module a fault, each with a ``run(tally, scale)`` and a docstring that says what must hold.

`tests/soak.py` runs them, each in a process of its own, and writes docs/reliability.md; `tests/test_reliability.py`
runs most of them at a small scale.
"""

from typing import NamedTuple

FULL = 0.05  # a run at less is a short one: what takes long even once is left out


class Row(NamedTuple):
    fault: str
    seconds: float  # after which a run at scale 1 counts as hanging
    short: float | None  # the scale in pytest; None: only by tests/soak.py


ROWS = {  # by module
    "fork": Row("fork after threads have run", 600, 0.02),
    "threads": Row("8 Python threads at once", 600, 0.01),
    "pools": Row("inside joblib, concurrent.futures, dask and a DataLoader", 600, 0.02),
    "interrupt": Row("KeyboardInterrupt", 900, 0.02),
    "out_of_memory": Row("out of memory", 300, 0.02),
    "huge": Row("more than 2**31 elements", 900, 0.02),
    "hostile_state": Row("a corrupted or hostile state", 600, 0.02),
    "nan_batch": Row("a batch of NaN in training", 300, 0.01),
    "growth": Row("a million small calls, and mixed shapes", 900, 0.004),
    "fuzz": Row("arguments by hypothesis", 3600, None),
    "sanitizers": Row("memory errors and undefined behaviour in the kernels", 3600, None),
    "debug": Row("bounds, assertions and buffer sizes in a debug build", 3600, None),
}
