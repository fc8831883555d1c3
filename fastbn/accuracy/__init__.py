"""What ``fastbn accuracy`` does: the errors of fastbn and of its peers on hard data, in units of the stated bound.

The way of a case through the package::

    cases.py      hard data, by name
    oracle.py     what is exact about it
    bounds.py     the stated bound, and errors in units of it
    process.py    one process for each side
      -> worker.py   in that process: what a side is asked
           -> sides.py   fastbn's backends and the peers
    run.py        all cases on all sides, and the other promises: constants, NaN, merging, threads
    tables.py, page.py   the results as text, JSON and docs/numerics.md
"""
