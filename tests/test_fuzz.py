"""Some hundred examples of reliability/fuzz.py, the same ones in each run; `make fuzz` tries 20,000 new ones."""

from hypothesis import given, settings
from hypothesis import strategies as st
from reliability.examples import examples
from reliability.fuzz import check


@settings(max_examples=150)
@given(data=st.data())
def test_any_arguments(backend, data):
    check(data.draw(examples([backend])))
