"""The examples in the docstrings run, and print what they say."""

import doctest
import inspect

import numpy as np
import pytest

import fastbn

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
