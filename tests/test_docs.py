"""The examples in the docstrings run, and print what they say."""

import doctest
import inspect
from pathlib import Path

import numpy as np
import pytest

import fastbn
from fastbn.bench.headline import BEGIN, END

ROOT = Path(__file__).parent.parent
PUBLIC = {name: getattr(fastbn, name) for name in fastbn.__all__}
WITH_EXAMPLES = {"BatchNorm", "Moments", "batch_norm", "moments", "thread_limit"}


@pytest.mark.parametrize("name", sorted(WITH_EXAMPLES))
def test_examples(name):
    rng = np.random.default_rng(0)
    x, grad_y = rng.standard_normal((2, 32, 64))
    names = {"np": np, "fastbn": fastbn, "x": x, "grad_y": grad_y}
    example = doctest.DocTestParser().get_doctest(inspect.getdoc(PUBLIC[name]), names, name, None, 0)
    assert example.examples
    runner = doctest.DocTestRunner(optionflags=doctest.NORMALIZE_WHITESPACE | doctest.ELLIPSIS)
    report = []
    runner.run(example, out=report.append)
    assert runner.summarize(verbose=False).failed == 0, "".join(report)


def test_no_example_is_forgotten():
    found = {name for name, value in PUBLIC.items() if ">>>" in (inspect.getdoc(value) or "")}
    assert found == WITH_EXAMPLES


@pytest.mark.parametrize("name", fastbn.__all__)
def test_public_docstrings_name_every_argument(name):
    value = PUBLIC[name]
    text = inspect.getdoc(value)
    assert text
    if inspect.isclass(value) and name in ("Saved", "BackendUnavailableError"):
        return  # made by fastbn alone
    for argument in inspect.signature(value).parameters:
        assert argument in text, argument


@pytest.mark.parametrize("name", ["batch_norm", "batch_norm_backward", "batch_norm_inference", "moments"])
def test_the_functions_share_names_and_defaults(name):
    parameters = inspect.signature(PUBLIC[name]).parameters
    defaults = {"axis": 1, "eps": 1e-5, "activation": None, "out": None, "num_threads": None, "backend": None,
                "gamma": None, "beta": None}
    for key, parameter in parameters.items():
        if parameter.default is not inspect.Parameter.empty:
            assert parameter.default == defaults[key]
        if key not in ("x", "mean", "var", "gamma", "beta", "grad_y", "saved"):
            assert parameter.kind is inspect.Parameter.KEYWORD_ONLY
    assert {"num_threads", "backend"} <= set(parameters)


def test_the_speeds_in_the_readme_are_those_of_the_benchmarks_page():
    headline = (ROOT / "README.md").read_text().partition(BEGIN)[2].partition(END)[0]
    page = (ROOT / "docs" / "benchmarks.md").read_text()
    rows = [row.strip("| ").split(" | ") for row in headline.splitlines() if row.startswith("| ")][2:]
    assert rows
    for _, array, ours, peers, _, _ in rows:
        assert any({ours, peers} <= set(line.split(" | ")) for line in page.splitlines()
                   if line.startswith(f"| {array} | "))
    assert headline.rstrip().splitlines()[-1].split("; from ")[1].rstrip(".") in page
