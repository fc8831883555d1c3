"""The command `fastbn accuracy`: its judges see what is wrong, its page shows it. The bounds: test_exactness.py."""

import json
import multiprocessing
import re
from pathlib import Path

import numpy as np
import pytest

from fastbn.accuracy import cases, promises, run, sides
from fastbn.accuracy.prose import PROSE
from fastbn.accuracy.run import Run
from fastbn.cli import main

ALL = ("mean", "var", "y", "grad_x", "grad_gamma", "grad_beta")


def test_every_side_computes_what_it_is_judged_for(capsys):
    here, missing = sides.peers()
    assert set(here) | set(missing) == set(sides.PEERS)
    labels = (*sides.ours()[:1], *here)
    status = main(["accuracy", "--cases", "17 rows", "--sides", ",".join(labels), "--json"])
    found = json.loads(capsys.readouterr().out)
    assert (status, found["labels"], found["missed"]) == (0, list(labels), [])
    assert [(entry["dtype"], entry["name"]) for entry in found["errors"]] == [
        ("float32", "17 rows"), ("float64", "17 rows")]
    for entry in found["errors"]:
        for label, ratios in entry["found"].items():
            expected = ALL if entry["dtype"] == "float32" and label != "scikit-learn" else ALL[:2]
            assert tuple(ratios) == expected
            assert max(ratios.values()) < 100  # what is wrong is off by a million times the bound


def test_a_run_asks_for_everything(capsys, monkeypatch, tmp_path):
    """The whole way, on few cases and with two sides."""
    monkeypatch.setattr(run.cases, "judged", lambda dtype, quick: ["2 rows", "sorted"])
    monkeypatch.setattr(run, "CONSTANTS", (14.62,))
    monkeypatch.setattr(run, "PIECES", cases.PIECES[:1])
    found = run.measure(("fastbn-numpy", "numpy"), ("torch",), quick=True)
    assert found.missed == []
    assert run.report(found, json=False, markdown=str(tmp_path / "page.md")) == 0
    shown, written = capsys.readouterr().out, (tmp_path / "page.md").read_text()
    for text in (shown, written):
        for words in ("fastbn numpy", "torch (not installed)", "2 rows", "sorted", "14.62",
                      "same bits", "in pieces, mean/std 0", "fastbn holds the bound in all of the "):
            assert words in text, words
    assert "$" not in written


def made_up(**found):
    return Run("fastbn accuracy", "today", ("fastbn-cython-avx2", "numpy"), ("jax",), versions={"fastbn": "0"}, **found)


def test_what_is_missed_is_said_and_fails(capsys):
    bad = made_up(
        errors={("float32", "sorted"): {"fastbn-cython-avx2": {"mean": 0.1, "y": 1.5}, "numpy": {"y": 3e5}},
                ("float32", "17 rows"): {"fastbn-cython-avx2": {"mean": float("inf")}, "numpy": {}}},
        constants={("float64", "1"): {"fastbn-cython-avx2": "y is off by 1", "numpy": ""}},
        nonfinite={("float32", "nan"): {"fastbn-cython-avx2": "grad_x", "numpy": "mean"}},
        merged={("float64", "in pieces"): dict.fromkeys(cases.ORDERS, 2.0)},
        threads={("float32", "fastbn-cython-avx2"): {"y": 1.0}, ("float32", "torch"): {"y": 5.0}},
    )
    assert bad.missed == [
        "float32, sorted: y up to 1.5 times the bound",
        "float32, 17 rows: mean up to inf times the bound",
        "float64, Moments merged in pieces up to 2 times the bound",
        "fastbn-cython-avx2, float64, 1: y is off by 1",
        "fastbn-cython-avx2, float32, nan: grad_x",
        "fastbn-cython-avx2, float32: other bits of y with other numbers of threads",
    ]
    assert run.report(bad, json=False, markdown=None) == 1
    shown = capsys.readouterr().out
    for words in ("1.5 ! y", "3e+05 ! y", "0 of 2", "1 of 2", "jax (not installed)", "y is off by 1 !", "2 !"):
        assert words in shown, words
    assert made_up(errors={("float32", "sorted"): {"fastbn-cython-avx2": {"y": 0.9}, "numpy": {"y": 3.0}}}).missed == []


def test_promises_are_seen_to_be_broken(monkeypatch):
    monkeypatch.setattr(sides, "set_threads", lambda label, n: None)
    right = sides.fastbn_side("numpy")
    data = cases.Data("mean/std 0", "float32")

    def spoiled(name, spoil):
        return lambda *arrays: {key: spoil(value) if key == name else value for key, value in right(*arrays).items()}

    assert promises.constant(right, 14.62, "float32") == ""
    assert promises.constant(spoiled("var", lambda v: v + 1e-30), 14.62, "float32") == "var is 1.0e-30"
    assert "y is off" in promises.constant(spoiled("y", lambda v: np.nextafter(v, np.float32(9))), 14.62, "float32")
    assert promises.constant(spoiled("grad_x", lambda v: v / 0), 14.62, "float32") == "grad_x is not finite"
    assert promises.nonfinite(right, "nan", "float32") == ""
    assert promises.nonfinite(spoiled("mean", lambda v: v - v.max()), "inf", "float32") == "mean"
    calls = []

    def counting(*arrays):
        calls.append(1)
        return {"y": np.full_like(data.x, 1 + (len(calls) == 7) * 2.0**-22)}

    assert promises.threads("fastbn-numpy", counting, "float32") == {"y": 2.0}
    assert len(calls) == 64


def test_data_are_the_same_in_every_process():
    for dtype in ("float32", "float64"):
        for name in cases.judged(dtype, quick=True):
            a, b = cases.Data(name, dtype), cases.Data(name, dtype)
            assert a.x.dtype == dtype
            assert a.x.flags.c_contiguous
            assert np.isfinite(a.x).all()
            assert (a.x.tobytes(), a.grad_y.tobytes()) == (b.x.tobytes(), b.grad_y.tobytes())
    assert set(cases.MANY) <= set(cases.judged("float32"))
    assert not set(cases.MANY) & set(cases.judged("float32", quick=True))


def test_pieces_are_unequal_and_all():
    x = cases.Data(cases.PIECES[0], "float32").x
    pieces = cases.in_pieces(x)
    assert len(pieces) == 1000
    assert len({len(piece) for piece in pieces}) > 50
    np.testing.assert_array_equal(np.concatenate(pieces), x)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--sides", "fastbn-cython,torhc"], "--sides: expected some of fastbn, fastbn-"),
        (["--cases", "no such case"], "--cases: no case is named like 'no such case'"),
        (["--cases", "2^25", "--quick"], "--cases: no case is named like '2^25'"),
        (["--markdown", "/no/such/folder/page.md"], "--markdown: cannot write '/no/such/folder/page.md'"),
        (["--markdown", "page.md", "--cases", "2 rows"], "--markdown: the page needs all cases and sides"),
        (["--markdown", "page.md", "--sides", "fastbn"], "--markdown: the page needs all cases and sides"),
        (["--markdown", "page.md", "--quick"], "--markdown: the page needs all cases and sides"),
    ],
)
def test_bad_options_are_named_in_one_line(capsys, words, message):
    assert main(["accuracy", *words]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith(f"fastbn accuracy: error: {message}")
    assert err.count("\n") == 1


def test_an_interrupt_leaves_no_process(capsys, monkeypatch):
    def interrupt(*arguments):
        assert multiprocessing.active_children()
        raise KeyboardInterrupt

    monkeypatch.setattr(run, "Exact", interrupt)
    assert main(["accuracy", "--cases", "2 rows", "--sides", "fastbn-numpy"]) == 130
    assert not multiprocessing.active_children()
    assert capsys.readouterr().out == ""


def test_the_page_in_the_repository_has_the_words_of_today():
    written = (Path(__file__).parents[1] / "docs" / "numerics.md").read_text()
    for words in re.split(r"\$\w+", PROSE):
        assert words.strip() in written
