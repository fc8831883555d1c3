"""What ``fastbn bench`` does: fastbn against its peers and against the machine's memory.

The way of a measurement through the package::

    cases.py      an operation on a shape: what is measured        targets.py   what fastbn must reach there
    measure.py    rounds, alternating the sides; medians
      -> process.py   one process for each side, asked over a pipe
           -> worker.py   in that process: arrays (data.py), calls, the clock
                -> ours.py, torch_peer.py, jax_peer.py, array_peers.py, mixing.py   the calls themselves
                -> roofline.py                                                      the bare memory passes
    tables.py, page.py, plot.py   the results as text, Markdown and a picture; machine.py: on what
"""
