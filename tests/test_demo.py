"""The demo's claims, at small size, and its command line."""

import json
import subprocess
import sys

import numpy as np
import pytest

pytest.importorskip("sklearn")
pytest.importorskip("matplotlib")
pytest.importorskip("tqdm")

from fastbn.cli import main
from fastbn.cli.demo import JSON, PNG
from fastbn.demo import digits, identity
from fastbn.demo.network import Network, one_blas_thread, softmax_cross_entropy

SEED = 0


@pytest.fixture(scope="module", autouse=True)
def small():
    """What the demo's own defaults would spend minutes on, on a busy machine."""
    with one_blas_thread(), pytest.MonkeyPatch.context() as patch:
        patch.setattr(identity, "MOST_STEPS", 100)
        patch.setattr(identity, "LABELS_STEPS", 500)
        yield


@pytest.fixture(scope="module")
def data():
    return digits.Digits.load(SEED)


@pytest.fixture(scope="module")
def curves(data):
    """Both networks after 10 epochs, 200 steps: (without, with)."""
    return digits.compare(data, epochs=10, seed=SEED)


@pytest.fixture(scope="module")
def raw(curves, data):
    return identity.Raw.of(curves[0].network, data.train_x)


# ------------------------------------------------------------------------------------------------------- part one


@pytest.mark.parametrize("normalize", [False, True])
def test_gradients_agree_with_finite_differences(normalize):
    rng = np.random.default_rng(SEED)
    x, labels = rng.random((12, 7)), rng.integers(0, 3, 12)
    network = Network((7, 5, 6, 3), normalize=normalize, seed=SEED, std=0.5, dtype=np.float64)
    for array, _ in network.parameters():
        array += 0.1 * rng.standard_normal(array.shape)  # away from gamma = 1 and beta = 0

    def loss():
        return softmax_cross_entropy(network(x), labels)[0]

    network.backward(softmax_cross_entropy(network(x), labels)[1])
    pairs = network.parameters()
    assert len(pairs) == (8 if normalize else 6)
    step = 1e-5
    for array, grad in pairs:
        for at in list(np.ndindex(array.shape))[::4]:
            kept = array[at]
            array[at] = kept + step
            above = loss()
            array[at] = kept - step
            below = loss()
            array[at] = kept
            # Central differences: truncation of order step**2 and rounding of order 1e-16 / step, so 1e-10 or so.
            assert grad[at] == pytest.approx((above - below) / (2 * step), rel=1e-5, abs=1e-9)


def test_digits_are_the_real_ones_and_split_once(data):
    x = np.concatenate([data.train_x, data.test_x])
    assert x.shape == (1797, 64)
    assert len(data.test_x) == digits.TEST
    assert (x.min(), x.max()) == (0, 1)
    assert np.bincount(np.concatenate([data.train_labels, data.test_labels])).min() >= 170


def test_both_networks_start_from_the_same_weights():
    without, with_norm = (Network(digits.SIZES, normalize=normalize, seed=SEED) for normalize in (False, True))
    for (a, _), (b, _) in zip(without.hidden, with_norm.hidden, strict=True):
        np.testing.assert_array_equal(a.weight, b.weight)
    np.testing.assert_array_equal(without.last.weight, with_norm.last.weight)


def test_batch_norm_is_ahead_at_the_same_steps(curves):
    without, with_norm = curves
    assert without.steps == with_norm.steps
    seen = {step: (a, b) for step, a, b in zip(without.steps, without.accuracy, with_norm.accuracy, strict=True)}
    for step in (40, 100, 200):
        assert seen[step][1] > 0.9
        assert seen[step][1] > seen[step][0] + 0.3


def test_accuracy_is_measured_with_the_running_statistics(curves, data):
    network = curves[1].network
    seen = [norm.num_batches_tracked for _, norm in network.hidden]
    one_by_one = [network.accuracy(data.test_x[i : i + 1], data.test_labels[i : i + 1]) for i in range(digits.TEST)]
    assert np.mean(one_by_one) == pytest.approx(curves[1].accuracy[-1])
    assert seen == [norm.num_batches_tracked for _, norm in network.hidden] == [200, 200, 200]


def test_minibatches_see_every_image_once_an_epoch():
    rows = list(digits.minibatches(2, SEED))
    assert len(rows) == digits.steps_of(2)
    for epoch in (rows[:20], rows[20:]):
        np.testing.assert_array_equal(np.sort(np.concatenate(epoch)), np.arange(digits.TRAIN))


# ------------------------------------------------------------------------------------------------------- part two


def ignore(steps):
    pass


def test_sgd_undoes_the_normalization_where_the_target_asks_for_it(raw):
    end = identity.to_itself(raw, batch=len(raw.h), seed=SEED, progress=ignore)
    # Each step takes a tenth of the way to a target that is the same in every step: 0.9**300 = 2e-14 of it is left.
    np.testing.assert_allclose(end.gamma, np.sqrt(raw.h.var(axis=0) + 1e-5), rtol=1e-9)
    np.testing.assert_allclose(end.beta, raw.h.mean(axis=0), atol=1e-9)
    assert end.output_error < 1e-9


def test_minibatches_undo_it_on_average(raw):
    end = identity.to_itself(raw, batch=identity.BATCH, seed=SEED, progress=ignore)
    # One batch of 60 has a standard deviation within about 9%; SGD averages some ten of them.
    assert np.abs(end.gamma_ratio - 1).max() < 0.15
    assert np.abs(end.beta_shift).max() < 0.15
    assert 1e-3 < end.output_error < 0.15


def test_sgd_leaves_it_where_the_target_does_not_ask(raw, data):
    end = identity.to_labels(raw, data.train_labels, learning_rate=1.0, seed=SEED, progress=ignore)
    assert np.median(np.abs(end.gamma_ratio - 1)) > 0.2
    assert end.output_error > 0.3


def test_gamma_and_beta_are_the_cheap_way(raw):
    by_two, by_all, frozen = identity.cost(raw, most_steps=400)
    assert by_two.numbers == 200
    assert by_two.reached
    assert by_all.numbers == frozen.numbers == 6500
    assert by_all.steps > 10 * by_two.steps
    assert by_all.loss < 0.1  # on its way
    assert frozen.loss == pytest.approx(1, abs=1e-4)  # 1 but for eps


# --------------------------------------------------------------------------------------------------- command line


def without_times(found):
    if isinstance(found, dict):
        return {key: without_times(value) for key, value in found.items()
                if not key.startswith("ms_per_step") and key not in ("seconds", "findings")}
    return [without_times(item) for item in found] if isinstance(found, list) else found


def test_json_and_files(tmp_path, capsys):
    runs = []
    for folder in (tmp_path / "new" / "a", tmp_path):
        assert main(["demo", "--epochs", "2", "--out", str(folder), "--json"]) == 0
        runs.append(json.loads(capsys.readouterr().out))
    found = runs[0]
    assert [row["step"] for row in found["table"]] == [20, 40]
    assert 0 < found["with"]["ms_per_step_in_batch_norm"] < found["with"]["ms_per_step"]
    assert found["without"]["ms_per_step_in_batch_norm"] == 0
    assert without_times(runs[0]) == without_times(runs[1])
    folder = tmp_path / "new" / "a"
    assert sorted(path.name for path in folder.iterdir()) == [JSON, PNG]
    assert json.loads((folder / JSON).read_text()) == found
    assert (folder / PNG).read_bytes().startswith(b"\x89PNG")


def test_text(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(["demo", "--epochs", "1", "--backend", "numpy"]) == 0
    out = capsys.readouterr().out
    assert "backend numpy" in out
    assert "SGD undid the normalization" in out
    assert (tmp_path / PNG).exists()


def test_sweep_writes_nothing(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(digits, "SWEEP_STDS", (0.1,))
    assert main(["demo", "--sweep", "--epochs", "1"]) == 0
    assert len(capsys.readouterr().out.splitlines()) == 3 + len(digits.SWEEP_RATES)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--epochs", "0"], "--epochs must be >= 1, got 0"),
        (["--epochs", "-3"], "--epochs must be >= 1, got -3"),
        (["--seed", "-1"], "--seed must be >= 0, got -1"),
        (["--backend", "cuda"], "backend must be one of"),
    ],
)
def test_bad_values_are_told_before_any_training(options, message, tmp_path, capsys):
    assert main(["demo", "--out", str(tmp_path / "out"), *options]) == 2
    captured = capsys.readouterr()
    assert message in captured.err
    assert captured.err.count("\n") == 1
    assert captured.out == ""
    assert not list(tmp_path.iterdir())


def test_a_folder_that_cannot_be_made(tmp_path, capsys):
    (tmp_path / "file").write_text("")
    assert main(["demo", "--out", str(tmp_path / "file" / "out")]) == 2
    assert capsys.readouterr().err.count("\n") == 1
    assert (tmp_path / "file").read_text() == ""


def test_missing_extras_say_how_to_get_them(tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "tqdm", None)
    assert main(["demo", "--out", str(tmp_path / "out")]) == 1
    err = capsys.readouterr().err
    assert "tqdm not found: pip install 'fastbn[demo]'" in err
    assert err.count("\n") == 1
    assert not list(tmp_path.iterdir())


def test_interrupted_it_leaves_no_files(tmp_path, monkeypatch):
    def interrupt(*arguments, **options):
        raise KeyboardInterrupt

    monkeypatch.setattr(identity, "cost", interrupt)
    assert main(["demo", "--epochs", "1", "--out", str(tmp_path)]) == 130
    assert not list(tmp_path.iterdir())


def test_a_failed_write_leaves_no_files(tmp_path, capsys, monkeypatch):
    def full(*arguments):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.replace", full)
    assert main(["demo", "--epochs", "1", "--out", str(tmp_path)]) == 1
    assert "No space left" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_other_commands_do_not_import_what_the_demo_needs():
    code = ("import sys, fastbn.cli; fastbn.cli.main(['info', '--json']); "
            "sys.exit(any(name in sys.modules for name in ('sklearn', 'matplotlib', 'tqdm', 'fastbn.demo')))")
    subprocess.run([sys.executable, "-P", "-c", code], check=True, stdout=subprocess.DEVNULL)
