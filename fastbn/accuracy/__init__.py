"""What ``fastbn accuracy`` does: the errors of fastbn and of its peers on hard data, in units of the stated bound.

The way of a case through the package::

    cases.py      hard data, by name
    oracle.py     what is exact about it
    bounds.py     the stated bound, and errors in units of it
    promises.py   what is promised beside it: constant columns, NaN, merging, threads
    run.py        all cases and promises, on all sides
      -> worker.py   one process for each side
           -> sides.py   fastbn's backends and the peers
    tables.py, page.py, prose.py   the results as text, JSON and docs/numerics.md
"""
