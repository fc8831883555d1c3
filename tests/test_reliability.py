"""The fault table at a small scale; tests/soak.py runs it whole. And what tells a loss from none."""

import pytest
import soak
from reliability import ROWS


@pytest.mark.parametrize("name", [name for name, row in ROWS.items() if row.short is not None])
def test_nothing_is_lost(name):
    result = soak.run(name, ROWS[name].short)
    assert not result["lost"], "\n".join(result["lost"])
    assert sum(result["tried"].values()) > 0
