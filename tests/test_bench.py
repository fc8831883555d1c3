"""The command `fastbn bench`: its sides compute what they should, its figures make sense, and it ends cleanly."""

import argparse
import json
import multiprocessing
import os
import signal
from pathlib import Path

import numpy as np
import pytest

import fastbn
from fastbn import _dispatch
from fastbn.bench import cases, headline, machine, measure, passes, plot, roofline, tables, targets
from fastbn.bench.cases import Case
from fastbn.bench.data import Data
from fastbn.bench.measure import Plan, Result
from fastbn.bench.process import Processes, WorkerError, interrupts_held_back
from fastbn.bench.run import Progress
from fastbn.cli import bench

OFFERS = {  # which operations a side has
    "fastbn-cython": set(cases.OPS),
    "fastbn-numba": set(cases.OPS),
    "fastbn-numpy": set(cases.OPS),
    "torch": set(cases.OPS) - {"moments", "layouts", "backward-out"},
    "jax": {"forward", "relu", "backward", "layer", "inference", "moments"},
    "scikit-learn": {"moments"},
    "numpy": {"moments"},
    "fastbn-cython+torch": {"mixing"},
}
EPS = 1e-5


def run(*words):
    parser = argparse.ArgumentParser()
    bench.add_arguments(parser)
    return bench.run(parser.parse_args(words))


def skip_unless_here(label):
    missing = measure.installed_peers()[1]
    for part in label.split("+"):
        backend = part.removeprefix("fastbn-")
        if part in missing or (backend != part and backend not in fastbn.available_backends()):
            pytest.skip(f"{part} is not available")


# -------------------------------------------------------------------------------------------- what the sides compute


def expected(op, d):
    """What a side should return, by NumPy in float64."""
    axes = (0, *range(2, len(d.shape)))

    def column(values):
        return np.asarray(values, np.float64).reshape(-1, *[1] * (len(d.shape) - 2))

    x, grad_y = d.x.astype(np.float64), d.grad_y.astype(np.float64)
    mean, var = x.mean(axes), x.var(axes)
    if op == "moments":
        return [mean, var]
    if op.startswith("inference"):
        mean, var = d.mean, d.var
    x_hat = (x - column(mean)) / np.sqrt(column(var) + EPS)
    y = x_hat * column(d.gamma) + column(d.beta)
    if op == "relu":
        return [np.maximum(y, 0)]
    grad_gamma, grad_beta, n = (grad_y * x_hat).sum(axes), grad_y.sum(axes), x.size / d.channels
    grad_x = grad_y - column(grad_beta / n) - x_hat * column(grad_gamma / n)
    gradients = [grad_x * column(d.gamma / np.sqrt(var + EPS)), grad_gamma, grad_beta]
    if op == "layer":
        return [y, *gradients]
    return gradients if op.startswith("backward") else [y]


@pytest.mark.parametrize("label", OFFERS)
def test_each_side_computes_what_is_timed(label):
    skip_unless_here(label)
    offered = set()
    with Processes(threads=1) as processes:
        for array in ("40x6", "8x4x3x5:float64"):
            for op in cases.OPS:
                case = cases.parse(op, array)
                if processes.prepare(label, case) is None:
                    continue
                offered.add(op)
                results = processes.result(label)
                wanted = expected(op, Data(case)) * (1 + label.count("+"))
                for actual, exact in zip(results, wanted, strict=True):
                    np.testing.assert_allclose(actual, exact, rtol=2e-5, atol=2e-5, err_msg=f"{op} {array}")
    assert offered == OFFERS[label]


def test_roofline_passes_touch_all_of_the_arrays():
    side = roofline.Roofline(threads=2)
    d = Data(Case("forward-out", (100_000, 48)))
    words, other, out = (array.reshape(-1).view(np.uint64) for array in (d.x, d.grad_y, d.out))
    assert passes.read(words.view(np.uint8), 2) == np.bitwise_xor.reduce(words)
    side.prepare("forward-out", d)()
    np.testing.assert_array_equal(out, words)
    side.prepare("backward-out", d)()
    np.testing.assert_array_equal(out, words ^ other)
    assert side.prepare("forward-out", Data(Case("forward-out", (40, 6)))) is None


@pytest.mark.parametrize(("op", "turns"), [("forward-out", 1), ("forward", 2), ("backward", 2), ("layer", 2)])
def test_roofline_passes_write_where_a_call_does(op, turns):
    d = Data(Case(op, (100_000, 48)))
    call = roofline.Roofline(threads=2).prepare(op, d)
    written = []
    for _ in range(2 * turns):
        d.out.fill(np.nan)
        call()
        written.append(not np.isnan(d.out[0, 0]))
    assert written == [turn == 0 for turn in range(turns)] * 2


@pytest.mark.parametrize("nbytes", [1, 63, 64, 1000, 300_007, (1 << 24) + 77])
@pytest.mark.parametrize("offset", [0, 1, 63])
def test_bare_passes_at_any_address(nbytes, offset):
    a, b = np.random.default_rng(0).integers(256, size=(2, nbytes), dtype=np.uint8)
    memory = np.full(nbytes + 192, 99, np.uint8)
    start = -memory.ctypes.data % 64 + offset
    out = memory[start : start + nbytes]
    passes.copy(a, out, 2)
    np.testing.assert_array_equal(out, a)
    passes.combine(a, b, out, 2)
    np.testing.assert_array_equal(out, a ^ b)
    assert (memory[:start] == 99).all()
    assert (memory[start + nbytes :] == 99).all()


@pytest.mark.parametrize("nbytes", [300_007, 10 << 20])  # through the caches and past them
def test_bare_passes_where_loads_would_wait_for_stores(nbytes):
    distance = -(-nbytes // (1 << 20)) << 20  # so the processor would not tell the arrays apart
    memory = np.full(3 * distance + (1 << 12), 99, np.uint8)
    a, b = np.random.default_rng(0).integers(256, size=(2, nbytes), dtype=np.uint8)
    x, y = memory[:nbytes], memory[distance : distance + nbytes]
    x[:], y[:] = a, b
    for behind in (16, 64, 100, 128):
        out = memory[2 * distance + behind :][:nbytes]
        passes.copy(x, out, 2)
        np.testing.assert_array_equal(out, a)
        passes.combine(x, y, out, 2)
        np.testing.assert_array_equal(out, a ^ b)
        assert (memory[2 * distance : 2 * distance + behind] == 99).all()
        assert (memory[2 * distance + behind + nbytes :] == 99).all()
        memory[2 * distance :] = 99


@pytest.mark.parametrize("width", [64, 72, 100, 256, 777])
@pytest.mark.parametrize("n_rows", [1, 2, 129, 1000])
@pytest.mark.parametrize("offset", [0, 3, 16, 63])
def test_bare_passes_of_rows_apart(n_rows, width, offset):
    x = np.random.default_rng(0).integers(256, size=(n_rows, 2 * width + 5), dtype=np.uint8)[:, 5 : 5 + width]
    memory = np.full(x.size + 192, 99, np.uint8)
    start = -memory.ctypes.data % 64 + offset
    passes.copy_rows(x, memory[start : start + x.size], 2)
    np.testing.assert_array_equal(memory[start : start + x.size], x.ravel())
    assert (memory[:start] == 99).all()
    assert (memory[start + x.size :] == 99).all()
    words = np.ascontiguousarray(x[:, : width // 64 * 64]).view(np.uint64)
    assert passes.read_rows(x, 2) == np.bitwise_xor.reduce(words, axis=None)


def test_bare_passes_past_the_caches_of_rows_apart():
    x = np.random.default_rng(0).integers(1 << 62, size=(2 * 65_537, 33))[::2]
    out = np.zeros(x.nbytes, np.uint8)
    assert out.nbytes >= 1 << 24
    passes.copy_rows(x.view(np.uint8), out, 2)
    np.testing.assert_array_equal(out.view(x.dtype), x.ravel())


def test_the_roofline_of_rows_apart():
    side = roofline.Roofline(threads=2)
    d = Data(Case("layouts", (10_000, 48), "float32", "rows"))
    side.prepare("layouts", d)()
    np.testing.assert_array_equal(d.out, d.x)
    images = Data(Case("layouts", (300, 8, 15, 17), "float32", "rows"))
    side.prepare("layouts", images)()
    np.testing.assert_array_equal(images.out, images.x)
    assert side.prepare("backward-out", d) is None
    assert side.prepare("layouts", Data(Case("layouts", (100_000, 15), "float32", "rows"))) is None
    with pytest.raises(ValueError, match="expected rows of 64 bytes or more"):
        passes.read_rows(np.zeros((4, 60), np.uint8), 2)
    with pytest.raises(ValueError, match="expected an out of 256 bytes, got 255"):
        passes.copy_rows(np.zeros((4, 64), np.uint8), np.zeros(255, np.uint8), 2)


def test_other_programs_are_told_of(capfd, monkeypatch):
    shares = iter([machine.Ticks(4, 5, 1), machine.Ticks(0, 20, 0)])
    monkeypatch.setattr("fastbn.bench.machine.since", lambda before: next(shares))
    monkeypatch.setattr("fastbn.bench.run.measure", lambda *words: [])
    assert run("--quick", "--rounds=1", "--ops=moments", "--shapes=300x5", "--peers=none", "--backends=cython") == 0
    out, err = capfd.readouterr()
    assert "other programs take 40% of the processors" in err
    assert "took 40% and 0% of the processors before and after the run" in out
    assert "kept processors from us in 0 tries, which were dropped, and in 0 of the 0 that count" in out


def test_how_far_the_processors_are_apart(capfd, monkeypatch):
    words = "--quick", "--rounds=2", "--ops=moments", "--shapes=24x8", "--peers=none", "--backends=cython", "--json"
    assert run(*words) == 0
    trips = json.loads(capfd.readouterr().out)["results"][0]["trips"]
    if machine.processors() > 1 and _dispatch.kernels("cython").OPENMP:
        assert len(trips) == 2  # one in each pass
        assert 1e-9 < min(trips) <= max(trips) < 1
    else:
        assert trips == []
    found = iter([1e-7, 4e-7])
    monkeypatch.setattr(roofline, "trip", lambda: next(found))
    assert run(*words[:-1]) == 0
    out = capfd.readouterr().out
    assert "a cache line took 100 to 400 ns there and back, half the time at most 100 ns" in out
    assert "percentile of 2 times" in out


def test_the_machine_tells_its_instruction_set(monkeypatch):
    assert machine.describe()["instruction set"] in _dispatch.INSTRUCTION_SETS
    monkeypatch.setenv("FASTBN_ISA", "baseline")
    assert machine.describe()["instruction set"] == "baseline"


def test_one_processor_is_not_apart(monkeypatch):
    monkeypatch.setattr(machine, "_usable", lambda: [3])
    assert roofline.trip() is None


def test_nothing_is_claimed_of_a_system_that_does_not_tell(capfd, monkeypatch):
    monkeypatch.setattr(machine, "ticks", lambda: machine.Ticks(0, 0, 0))
    assert run("--quick", "--rounds=1", "--ops=moments", "--shapes=24x8", "--peers=none", "--backends=cython") == 0
    out = capfd.readouterr().out
    assert "other programs" not in out
    assert "host" not in out
    words = "--quick", "--rounds=1", "--ops=moments", "--shapes=24x8", "--peers=none", "--backends=cython", "--json"
    assert run(*words) == 0
    assert json.loads(capfd.readouterr().out)["host"] is None


class FakeProcesses:
    """Sides whose nth call takes n seconds, or fails if `failing` is n."""

    def __init__(self, failing=None):
        self.turns = 0
        self.failing = failing

    def prepare(self, label, case):
        return 1.0

    def run(self, label, calls, times):
        self.turns += 1
        if self.turns == self.failing:
            raise WorkerError("ended")
        return [float(self.turns)]

    def forget(self):
        pass


def measure_disturbed(monkeypatch, stolen, processes):
    """One round of one side, of whose tries the host kept so many ticks of 100."""
    spent = iter(machine.Ticks(100 - n, 50, n) for n in stolen)
    monkeypatch.setattr(measure, "PAUSE", 0)
    monkeypatch.setattr(machine, "since", lambda before: next(spent))
    monkeypatch.setattr(Plan, "sides", lambda plan, case: ("numpy",))
    plan = Plan(threads=1, rounds=1, seconds=1.0, backends=(), peers=("numpy",))
    return measure.measure([cases.parse("moments", "24x8")], plan, processes, lambda case, part: None)[0]


@pytest.mark.parametrize(
    ("stolen", "counts", "disturbed"),
    [([0], 1, 0), ([1], 1, 0), ([5, 3, 0], 3, 0), ([5, 3, 2, 3, 9], 3, 1), ([4, 4, 4, 4, 4], 1, 1)],
)
def test_rounds_that_the_host_disturbed_are_tried_again(monkeypatch, stolen, counts, disturbed):
    processes = FakeProcesses()
    result = measure_disturbed(monkeypatch, stolen, processes)
    assert result.samples == {"numpy": [float(counts)]}
    assert result.stolen == {"numpy": [stolen[counts - 1] / 100]}
    assert processes.turns == len(stolen)
    assert measure.disturbance([result, result]) == {
        "counted": 2, "disturbed": 2 * disturbed, "dropped": 2 * (len(stolen) - 1),
    }


def test_of_a_side_that_fails_no_try_counts(monkeypatch):
    result = measure_disturbed(monkeypatch, [5], FakeProcesses(failing=2))
    assert result.errors == {"numpy": "ended"}
    assert result.samples == {}
    assert measure.disturbance([result]) == {"counted": 0, "disturbed": 0, "dropped": 0}


def test_what_the_host_kept_is_read_of_the_usable_processors(monkeypatch):
    text = "cpu  9 9 9 9 9 9 9 9 0 0\ncpu0 100 20 30 400 5 6 7 80 9 9\ncpu1 1 1 1 1 1 1 1 1 0 0\ncpu2 2 0 0 3\nintr 9\n"
    monkeypatch.setattr(machine, "_read", {Path("/proc/stat"): text}.__getitem__)
    monkeypatch.setattr(machine, "_usable", lambda: [0, 2])
    assert machine.ticks() == (165, 408, 80)
    assert machine.since(machine.Ticks(160, 409, 75)) == (5, 0, 5)
    assert machine.stolen_share(machine.Ticks(5, 90, 5)) == 0.5
    assert machine.stolen_share(machine.Ticks(0, 0, 0)) == 0
    monkeypatch.setattr(machine, "_read", lambda path: "")
    assert machine.ticks() == (0, 0, 0)


@pytest.mark.skipif(not Path("/proc/stat").exists(), reason="only Linux tells")
def test_this_system_tells():
    if not any(map(int, Path("/proc/stat").read_text().splitlines()[0].split()[1:])):
        pytest.skip("this system counts nothing")  # as some sandboxes do
    assert machine.ticks().busy > 0


@pytest.mark.parametrize("layout", cases.LAYOUTS)
def test_data_have_the_layout_they_should(layout):
    d = Data(Case("moments", (300, 5), "float64", layout))
    assert d.x.shape == d.grad_y.shape == (300, 5)
    assert d.x.dtype == np.float64
    assert d.x.flags.c_contiguous == (layout == "C")
    assert d.x.flags.f_contiguous == (layout == "F")
    assert d.x.mean() == pytest.approx(3, abs=0.2)
    assert d.x.std() == pytest.approx(1, abs=0.2)


# ------------------------------------------------------------------------------------------------------- the command


def test_a_run_measures_every_operation_and_array(tmp_path, capfd):
    picture, page = tmp_path / "roofline.png", tmp_path / "page.md"
    ops = [op for op in cases.OPS if op != "mixing"]  # which would start another PyTorch
    words = ["--quick", "--rounds", "1", "--threads", "1", "--json", "--ops", ",".join(ops), "--shapes", "24x8"]
    assert run(*words, "--plot", str(picture), "--markdown", str(page)) == 0
    found = json.loads(capfd.readouterr().out)
    assert [(one["op"], one["array"]) for one in found["results"]] == [(op, "24x8") for op in ops]
    assert found["threads"] == 1
    assert found["rounds"] == 1
    for one in found["results"]:
        assert one["errors"] == {}
        assert "fastbn-cython" in one["seconds"]
        assert all(0 < seconds < 60 for seconds in one["seconds"].values())
        assert all(gbps > 0 for gbps in one["gbps"].values())
        assert one["ratio_to_fastbn"]["fastbn-cython"] == 1
        assert set(one["stolen"]) == set(one["dropped"]) == set(one["samples"])
    assert found["host"] is None or found["host"]["counted"] == sum(len(one["samples"]) for one in found["results"])
    assert found["versions"]["fastbn"] == fastbn.__version__
    for peer in ("torch", "jax", "scikit-learn", "numpy"):
        assert (peer in found["versions"]) != (peer in found["missing"])
    assert picture.read_bytes().startswith(b"\x89PNG")
    text = page.read_text()
    assert all(f"## {op.capitalize()}: " in text for op in ops)
    assert "![GB/s against bytes for each implementation](roofline.png)" in text


@pytest.mark.parametrize("parts", [1, 7])
def test_without_a_terminal_it_says_how_far_it_is(capfd, parts):
    some = [Case("moments", (n, 8)) for n in (8, 16, 24)]
    with Progress(some) as progress:
        for case in some:
            for _ in range(parts):
                progress.tick(case, 1 / parts)
    said = [line.partition(" % after ")[0] for line in capfd.readouterr().err.splitlines()]
    tenths = (30, 60, 100) if parts == 1 else range(10, 101, 10)
    assert said == [f"fastbn bench: {tenth}" for tenth in tenths]


def test_tables_are_the_default(capfd):
    assert run("--quick", "--rounds=1", "--ops=moments", "--shapes=300x5", "--peers=numpy", "--backends=cython") == 0
    out = capfd.readouterr().out
    assert "moments: column means and variances" in out
    assert out.splitlines()[-2].split() == [
        "array", "MB", "fastbn-cython", "ms", "numpy", "ms", "GB/s", "numpy/fastbn",
    ]
    assert out.splitlines()[-1].split()[0] == "300x5"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--ops", "nosuch"], "--ops: expected some of forward-out, "),
        (["--shapes", "12"], "--shapes: expected sizes as in 65536x256 or 32x64x56x56, got '12'"),
        (["--shapes", "0x3"], "--shapes: expected sizes"),
        (["--shapes", "1x3"], "--shapes: more than one value per channel is needed, got '1x3'"),
        (["--shapes", "8x3:float16"], "--shapes: unknown kind 'float16' in '8x3:float16'; known: float32, float64, C"),
        (["--threads", "0"], "--threads: expected a whole number >= 1, got '0'"),
        (["--rounds", "two"], "--rounds: expected a whole number >= 1, got 'two'"),
        (["--backends", "fortran"], "--backends: expected some of cython, numba, numpy, got 'fortran'"),
        (["--peers", "excel"], "--peers: expected some of torch, jax, scikit-learn, numpy, got 'excel'"),
        (["--plot", "picture.nosuch"], "--plot: expected a file name such as roofline.png, got 'picture.nosuch'"),
        (["--plot", "a.png", "--ops", "mixing"], "--plot: layouts and mixing are not drawn"),
        (["--plot", "no/such/folder/a.png"], "--plot: cannot write 'no/such/folder/a.png'"),
        (["--markdown", "no/such/folder/a.md"], "--markdown: cannot write 'no/such/folder/a.md'"),
        (["--shapes", "8x3:float32:float64"], "--shapes: expected one of 'float32' and 'float64', got '8x3:float32:"),
        (["--shapes", "8x3:F:rows"], "--shapes: expected one of 'F' and 'rows', got '8x3:F:rows'"),
        (["--markdown", os.devnull], f"--markdown: cannot write {os.devnull!r}"),
        (["--headline", "LICENSE"], "--headline: 'LICENSE' must have the line '<!-- headline"),
        (["--quick", "--ops", "layouts", "--shapes", ""], "--shapes: expected sizes"),
    ],
)
def test_bad_options_are_named_in_one_line(words, message, capfd):
    assert run(*words) == 2
    error = capfd.readouterr().err
    assert error.startswith(f"fastbn bench: error: {message}")
    assert error.count("\n") == 1


def test_a_headline_needs_all_of_its_figures(tmp_path, capfd):
    page = tmp_path / "page.md"
    page.write_text(f"{headline.BEGIN}\nold\n{headline.END}\n")
    before = page.read_text()
    assert run("--ops=forward", "--shapes=65536x256", "--peers=none", "--headline", str(page)) == 2
    error = capfd.readouterr().err
    assert "--headline: the main figures need forward 65536x256 beside torch, forward-out 100352x64 beside" in error
    assert page.read_text() == before


def test_a_file_that_cannot_be_written_takes_no_other_along(tmp_path, capfd, monkeypatch):
    def full(results, path):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(plot, "draw", full)
    page, picture = tmp_path / "page.md", tmp_path / "a.png"
    words = ["--quick", "--rounds=1", "--ops=moments", "--shapes=24x8", "--peers=none", "--backends=numpy"]
    assert run(*words, "--plot", str(picture), "--markdown", str(page)) == 1
    out, err = capfd.readouterr()
    assert f"fastbn bench: error: {picture} is not written: [Errno 28] No space left on device" in err
    assert "24x8" in out
    assert [file.name for file in tmp_path.iterdir()] == ["page.md"]


def test_missing_backends_and_peers_are_named(capfd, monkeypatch):
    monkeypatch.setattr("fastbn.bench.options.why_unavailable", lambda name: f"{name} does not run here")
    assert run("--backends", "numba") == 2
    assert "--backends: numba does not run here" in capfd.readouterr().err
    monkeypatch.setattr("fastbn.bench.options.installed_peers", lambda: (("numpy",), ("torch",)))
    assert run("--peers", "torch") == 2
    assert "--peers: torch is not installed" in capfd.readouterr().err
    assert run("--quick", "--rounds=1", "--ops=moments", "--shapes=300x5") == 0
    assert "missing:           torch (not installed)" in capfd.readouterr().out


# --------------------------------------------------------------------------------------------------- the processes


def test_an_interrupt_leaves_no_process(monkeypatch):
    def interrupt(calls):
        assert multiprocessing.active_children()
        raise KeyboardInterrupt

    monkeypatch.setattr(measure, "split", interrupt)
    with pytest.raises(KeyboardInterrupt):
        run("--shapes", "24x8", "--peers", "numpy", "--backends", "cython")
    assert not multiprocessing.active_children()


def test_an_interrupt_amid_a_start_waits_for_its_end():
    done = []
    found = signal.signal(signal.SIGINT, signal.default_int_handler)  # a background job of a shell ignores it

    def start():
        with interrupts_held_back():
            before = signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})  # as it is in threads of libraries
            os.kill(os.getpid(), signal.SIGINT)
            signal.pthread_sigmask(signal.SIG_SETMASK, before)
            done.append(True)

    try:
        with pytest.raises(KeyboardInterrupt):
            start()
        assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    finally:
        signal.signal(signal.SIGINT, found)
    assert done == [True]


@pytest.mark.parametrize(("option", "writer"), [("--plot", "plot.draw"), ("--markdown", "page.markdown")])
def test_an_interrupt_while_writing_leaves_the_old_file(tmp_path, monkeypatch, option, writer):
    target = tmp_path / "page.png"
    target.write_text("old")

    def interrupt(results, path):
        if option == "--plot":
            Path(path).write_text("half")
        raise KeyboardInterrupt

    monkeypatch.setattr(f"fastbn.bench.{writer}", interrupt)
    with pytest.raises(KeyboardInterrupt):
        run("--quick", "--rounds=1", "--ops=moments", "--shapes=24x8", "--peers=none", option, str(target))
    assert [(file.name, file.read_text()) for file in tmp_path.iterdir()] == [("page.png", "old")]


def test_the_rounds_of_a_case_are_spread_over_passes(monkeypatch):
    wanted = [cases.parse("moments", shape) for shape in ("24x8", "12x4")]
    turns = []
    real = Processes.run
    monkeypatch.setattr(measure, "PAUSE", 0)
    monkeypatch.setattr(machine, "since", lambda before: machine.Ticks(1, 1, 0))  # else rounds may be tried again
    with Processes(1) as processes:
        monkeypatch.setattr(Processes, "run", lambda *words: turns.append(words[1:]) or real(*words))
        shares = []
        plan = Plan(threads=1, rounds=7, seconds=1e-4, backends=(), peers=("numpy",))
        results = measure.measure(wanted, plan, processes, lambda case, part: shares.append((case.shape, part)))
    assert [shape for shape, part in shares if part] == (
        2 * [(12, 4), (12, 4), (24, 8), (24, 8)] + 3 * [(12, 4), (24, 8)])
    assert sum(part for _, part in shares) == pytest.approx(2)
    assert [result.case for result in results] == wanted
    numpy_turns = [words for words in turns if words[0] == "numpy"]
    assert sum(len(result.samples["numpy"]) for result in results) == sum(times for _, _, times in numpy_turns)


def test_a_failing_side_is_reported_and_the_others_go_on():
    case = cases.parse("moments", "24x8")
    plan = Plan(threads=1, rounds=2, seconds=1e-4, backends=("cython",), peers=("nosuch", "numpy"))
    with Processes(1, ("fastbn-cython", "roofline")) as processes:
        result = measure.measure([case], plan, processes, lambda case, part: None)[0]
    assert result.errors == {"nosuch": "KeyError: 'nosuch'"}
    assert set(result.seconds) == {"fastbn-cython", "numpy"}
    table = tables.tables([result])[0]
    assert "error" in table.rows[0]
    assert table.notes == ["nosuch on 24x8: KeyError: 'nosuch'"]


def test_a_dead_or_hanging_side_is_reported_and_started_again():
    case = cases.parse("moments", "24x8")
    with Processes(1) as processes:
        processes.prepare("numpy", case)
        worker = processes.workers["numpy",]
        os.kill(worker.process.pid, 9)
        with pytest.raises(WorkerError, match="its process died, exit status -9"):
            processes.run("numpy", 1, 1)
        assert processes.prepare("numpy", case) > 0
        with pytest.raises(WorkerError, match="no answer within 0 s; its process was ended"):
            processes.workers["numpy",].ask("run", "numpy", 10**7, 1, limit=0.05)
        assert not processes.workers["numpy",].process.is_alive()
        assert processes.prepare("numpy", case) > 0


# ------------------------------------------------------------------------------------- figures, targets, tables


def result_of(op, array, **milliseconds):
    labels = {"cython": "fastbn-cython", "numba": "fastbn-numba"}
    samples = {labels.get(label, label): [ms / 1e3] for label, ms in milliseconds.items()}
    return Result(cases.parse(op, array), samples)


def test_the_default_grid_covers_the_targets():
    grid = {(case.op, case.array) for case in cases.grid(None, None)}
    assert {(target.op, array) for target in targets.TARGETS for array in target.arrays} <= grid
    assert {("layouts", array) for array in targets.LAYOUT_BASES} <= grid
    assert {case.op for case in cases.grid(None, ["8x3"])} == set(cases.OPS) - set(cases.ON_REQUEST)


def test_arrays_are_read_as_they_are_written():
    for op, arrays in cases.OP_SHAPES.items():
        assert [cases.parse(op, array).array for array in arrays] == list(arrays)
    assert cases.parse("moments", "10x3:F:float64") == Case("moments", (10, 3), "float64", "F")
    assert cases.parse("moments", "10x3:F:float64").nbytes == 240


def test_targets_are_judged():
    results = [
        result_of("forward-out", "65536x256", cython=2, numba=3, torch=3, roofline=1.9),
        result_of("backward", "65536x256", cython=2, torch=3),
        result_of("layouts", "62500x64", cython=1),
        result_of("layouts", "62500x64:F", cython=1.6, roofline=1.4),
    ]
    found = {(one.op, one.what): one for one in targets.verdicts(results)}
    assert found["forward-out", "torch/fastbn"].met
    assert not found["forward-out", "torch/fastbn"].aim_met
    assert not found["backward", "torch/fastbn"].met
    assert found["forward-out", "fastbn/roofline"].ratio == pytest.approx(2 / 1.9)
    assert found["forward-out", "fastbn/roofline"].met
    assert found["forward-out", "torch/fastbn"].at_roofline == pytest.approx(3 / 1.9)
    assert found["backward", "torch/fastbn"].at_roofline is None
    assert found["layouts", "per byte, to 62500x64"].at_roofline == pytest.approx(1.4)
    assert not found["forward-out", "numba/cython, the worst"].met
    assert not found["layouts", "per byte, to 62500x64"].met
    assert found["layouts", "per byte, to 62500x64"].met_at_roofline
    assert found["backward", "torch/fastbn"].met_at_roofline is None
    assert len(found) == 5


def test_a_target_that_the_bare_passes_miss_is_told_apart():
    results = [
        result_of("forward-out", "65536x256", cython=3, torch=3, roofline=2),
        result_of("forward-out", "262144x256", cython=3, torch=3, roofline=2.9),
        result_of("layouts", "62500x64", cython=1),
        result_of("layouts", "62500x64:F", cython=1.7, roofline=1.6),
        result_of("layouts", "62500x64:rows", cython=1.7, roofline=1.2),
    ]
    table = tables._targets(results)
    peers = {(row[1], row[-1]) for row in table.rows if row[2] != "fastbn/roofline"}
    assert peers == {("65536x256", "NO"), ("262144x256", "NO, nor the bare passes"),
                     ("62500x64:F", "NO, nor the bare passes"), ("62500x64:rows", "NO")}
    assert table.title == "targets: 1 of 6 met, 2 of the others not by the bare passes either"


@pytest.mark.parametrize(("calls", "expected"), [(0.3, (1, 1)), (4.2, (1, 4)), (90.0, (10, 9)), (5000.0, (556, 9))])
def test_rounds_are_split_into_samples(calls, expected):
    assert measure.split(calls) == expected


def test_gigabytes_count_the_bare_passes():
    assert result_of("forward-out", "1000x250", cython=1).gbps("fastbn-cython") == pytest.approx(3)
    assert result_of("backward", "1000x250", cython=1).gbps("fastbn-cython") == pytest.approx(5)


@pytest.mark.parametrize(
    ("value", "text"),
    [(0.0000421, "0.000042"), (0.00912, "0.00912"), (0.1, "0.100"), (1.5, "1.50"), (17.62, "17.6"), (134.4, "134")],
)
def test_figures_have_three_significant_digits(value, text):
    assert tables.significant(value) == text


def test_mixing_compares_with_both_alone():
    result = result_of("mixing", "256x512", cython=1, torch=3, **{"fastbn-cython+torch": 5})
    assert tables.tables([result])[0].rows == [["256x512", "0.524", "fastbn-cython, torch", "4.00", "5.00", "+25%"]]


def test_the_picture_holds_all_kinds_of_arrays(tmp_path):
    results = [
        result_of("forward-out", array, cython=1, numba=2, torch=3, roofline=0.5)
        for array in ("64x128", "65536x256", "32x64x56x56", "65536x256:float64")
    ]
    plot.draw(results, str(tmp_path / "a.png"))
    assert (tmp_path / "a.png").stat().st_size > 10_000


def test_the_headline_replaces_what_is_between_the_marks(monkeypatch):
    page = f"before\n{headline.BEGIN}\nold\n{headline.END}\nafter\n"
    results = [result_of("forward", "65536x256", cython=2, numba=3, torch=9), result_of("relu", "8x16", cython=1)]
    with pytest.raises(headline.Unmeasured, match="no figures of forward-out 100352x64 beside torch"):
        headline.put(page, results, "Measured.")
    monkeypatch.setattr(headline, "CASES", headline.CASES[:1])
    assert headline.put(page, results, "Measured.").splitlines() == [
        "before",
        headline.BEGIN,
        "| operation | array, float32 | fastbn ms | peer ms | peer | times faster |",
        "| --- | --- | --- | --- | --- | --- |",
        "| training forward | 65536x256 | 2.00 | 9.00 | torch | 4.5 |",
        "",
        "Measured.",
        headline.END,
        "after",
    ]
