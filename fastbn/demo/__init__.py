"""The demo: what batch normalization does, seen on real digits. ``fastbn demo`` runs it; nothing here is public API.

The modules in the order in which a reader needs them::

    network.py    linear layers, sigmoids, softmax cross-entropy and SGD, in plain NumPy around fastbn.BatchNorm
    digits.py     part one: the same network with and without batch normalization, as in figure 1 of the paper
    identity.py   part two: does SGD undo the normalization, and what does it cost without gamma and beta?
    report.py     the tables and the findings, in words
    figure.py     the PNG
"""
