"""Which backend, how many threads, and what the command line says about both."""

import json
import os
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest

import fastbn
from fastbn import _dispatch
from fastbn.cli import main


def test_the_argument_wins_over_the_scope_over_the_process(default_threads):
    assert fastbn.get_num_threads() == _dispatch.default_threads()[0] >= 1
    fastbn.set_num_threads(5)
    assert (_dispatch.thread_count(), _dispatch.thread_source()) == (5, "set_num_threads")
    with fastbn.thread_limit(3):
        assert (_dispatch.thread_count(), _dispatch.thread_source()) == (3, "thread_limit")
        assert _dispatch.thread_count(7) == 7
        with fastbn.thread_limit(9):
            assert fastbn.get_num_threads() == 9
        assert fastbn.get_num_threads() == 3
    assert fastbn.get_num_threads() == 5


def test_thread_limit_ends_with_an_error(default_threads):
    before = fastbn.get_num_threads()
    with pytest.raises(KeyError), fastbn.thread_limit(before + 1):
        raise KeyError
    assert fastbn.get_num_threads() == before


def test_thread_limit_is_the_current_thread_s_alone(default_threads):
    fastbn.set_num_threads(4)
    seen = []
    with fastbn.thread_limit(2):
        thread = threading.Thread(target=lambda: seen.append(fastbn.get_num_threads()))
        thread.start()
        thread.join()
    assert seen == [4]


@pytest.mark.parametrize("n", [0, -1, 1.5, "2", None])
@pytest.mark.parametrize("function", [fastbn.set_num_threads, lambda n: fastbn.thread_limit(n).__enter__()])
def test_bad_thread_numbers_change_nothing(default_threads, function, n):
    before = fastbn.get_num_threads()
    with pytest.raises(ValueError if isinstance(n, int) else TypeError, match=r"n must be .*>= 1, got"):
        function(n)
    assert fastbn.get_num_threads() == before


def test_any_huge_number_of_threads_is_a_limit_too(backend, default_threads):
    x = np.arange(60.0).reshape(20, 3)
    y, _ = fastbn.batch_norm(x, num_threads=2**70, backend=backend)
    fastbn.set_num_threads(2**40)
    np.testing.assert_array_equal(fastbn.batch_norm(x, backend=backend)[0], y)


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        ({"FASTBN_NUM_THREADS": "3", "OMP_NUM_THREADS": "5"}, (3, "FASTBN_NUM_THREADS")),
        ({"OMP_NUM_THREADS": "5"}, (5, "OMP_NUM_THREADS")),
        ({"OMP_NUM_THREADS": " 4,2 "}, (4, "OMP_NUM_THREADS")),
        ({"FASTBN_NUM_THREADS": ""}, None),
        ({"FASTBN_NUM_THREADS": "99999999999999"}, (2**31 - 1, "FASTBN_NUM_THREADS")),
    ],
)
def test_environment(default_threads, environment, expected):
    for name, value in environment.items():
        default_threads.setenv(name, value)
    assert _dispatch.default_threads() == (expected or min(_dispatch._affinity(), _dispatch._cgroup_quota()))


@pytest.mark.parametrize("value", ["0", "-1", "two", "1.5"])
def test_a_bad_environment_variable_warns_and_is_ignored(default_threads, value):
    default_threads.setenv("FASTBN_NUM_THREADS", value)
    default_threads.setenv("OMP_NUM_THREADS", "6")
    with pytest.warns(RuntimeWarning, match=f"FASTBN_NUM_THREADS must be a whole number >= 1, got '{value}'; ignored"):
        assert fastbn.get_num_threads() == 6
    assert fastbn.get_num_threads() == 6  # without another warning


def test_environment_of_a_real_process(run_python):
    code = "import fastbn; print(fastbn.get_num_threads())"
    assert run_python(code, FASTBN_NUM_THREADS="3", OMP_NUM_THREADS="1").stdout == "3\n"
    assert run_python(code, OMP_NUM_THREADS="2").stdout == "2\n"
    if hasattr(os, "sched_setaffinity"):
        code = "import os; os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})\n" + code
        assert run_python(code).stdout == "1\n"


@pytest.mark.parametrize(
    ("process", "files", "expected"),
    [
        ("0::/\n", {"cpu.max": "150000 100000\n"}, 2),
        ("0::/a/b\n", {"a/b/cpu.max": "400000 100000", "a/cpu.max": "100000 100000", "cpu.max": "max 100000"}, 1),
        ("0::/a/b\n", {"a/b/cpu.max": "50000 100000"}, 1),
        ("0::/\n", {"cpu.max": "max 100000\n"}, None),
        ("0::/elsewhere/seen/from/the/host\n", {"cpu.max": "300000 100000"}, 3),
        ("0::/../..\n", {"cpu.max": "300000 100000"}, 3),
        ("4:cpu,cpuacct:/a\n3:memory:/a\n", {"cpu/a/cpu.cfs_quota_us": "250", "cpu/a/cpu.cfs_period_us": "100"}, 3),
        ("4:cpu:/a\n", {"cpu/a/cpu.cfs_quota_us": "-1", "cpu/a/cpu.cfs_period_us": "100000"}, None),
        ("0::/\n", {"cpu.max": "nonsense"}, None),
        ("0::/\n", {}, None),
        (None, {"cpu.max": "200000 100000"}, 2),
    ],
)
def test_cgroup_quota(tmp_path, process, files, expected):
    for name, text in files.items():
        (tmp_path / "fs" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "fs" / name).write_text(text)
    (tmp_path / "cgroup").write_text(process) if process else None
    count, source = _dispatch._cgroup_quota(tmp_path / "fs", tmp_path / "cgroup")
    assert source == "cgroup quota"
    assert count == expected if expected else count > 10**6


def test_the_default_is_the_least_of_quota_and_affinity(default_threads):
    default_threads.setattr(_dispatch, "_affinity", lambda: (8, "CPU affinity"))
    default_threads.setattr(_dispatch, "_cgroup_quota", lambda: (3, "cgroup quota"))
    assert (_dispatch.thread_count(), _dispatch.thread_source()) == (3, "cgroup quota")


def test_backends():
    available = fastbn.available_backends()
    assert available[-1] == "numpy"
    assert set(available) <= {"cython", "numba", "numpy"}
    for name in available:
        assert _dispatch.kernels(name).__name__.startswith("fastbn.kernels.")
        fastbn.warmup(name)
    assert _dispatch.kernels(None) is _dispatch.kernels("auto") is _dispatch.kernels(available[0])
    fastbn.warmup()


@pytest.fixture
def without(monkeypatch):
    """Makes the named backends impossible to import, and forgets what was loaded."""
    def block(*names):
        loaded = {k: v for k, v in _dispatch._loaded.items() if k not in names}
        monkeypatch.setattr(_dispatch, "_loaded", loaded)
        monkeypatch.setattr(_dispatch, "_auto", None)
        modules = {"cython": [f"_cython_{isa}" for isa in _dispatch.INSTRUCTION_SETS], "numba": ["numba_calls"]}
        for module in (module for name in names for module in modules[name]):
            monkeypatch.setitem(sys.modules, f"fastbn.kernels.{module}", None)
    return block


def test_auto_falls_back_to_numpy_with_one_warning(without, recwarn):
    without("cython", "numba")
    x = np.arange(12.0).reshape(4, 3)
    with pytest.warns(RuntimeWarning, match=r"falls back to its NumPy reference.*slow.*'cython' is not.*'numba' is"):
        y, _ = fastbn.batch_norm(x)
    fastbn.batch_norm(x)
    fastbn.moments(x, backend="auto")
    assert not recwarn.list
    np.testing.assert_array_equal(y, fastbn.batch_norm(x, backend="numpy")[0])
    assert fastbn.available_backends() == ("numpy",)


def test_a_backend_asked_for_by_name_is_there_or_an_error(without):
    without("cython", "numba")
    for name, remedy in (("cython", "reinstall fastbn"), ("numba", r"pip install 'fastbn\[numba\]'")):
        with pytest.raises(fastbn.BackendUnavailableError, match=rf"backend '{name}' is not available .*{remedy}"):
            fastbn.moments(np.ones((3, 2)), backend=name)
        with pytest.raises(ImportError, match=name):
            fastbn.BatchNorm(3, backend=name)
    config = fastbn.show_config(as_dict=True)
    assert config["auto"] == "numpy"
    assert config["instruction_set"] is config["openmp"] is None
    assert "reinstall" in config["backends"]["cython"]["reason"]


def test_show_config(capsys, default_threads):
    default_threads.setenv("FASTBN_NUM_THREADS", "3")
    config = fastbn.show_config(as_dict=True)
    assert capsys.readouterr().out == ""
    assert config["fastbn"] == fastbn.__version__
    assert config["threads"] == {"count": 3, "source": "FASTBN_NUM_THREADS"}
    available = [name for name, state in config["backends"].items() if state["available"]]
    assert tuple(available) == fastbn.available_backends()
    assert all(state["reason"] for name, state in config["backends"].items() if name not in available)
    assert fastbn.show_config() is None
    text = capsys.readouterr().out
    for part in (fastbn.__version__, np.__version__, "backend cython", "backend numba", "OpenMP", "FASTBN_NUM_THREADS"):
        assert part in text


@pytest.mark.parametrize("arguments", [["info"], ["info", "--json"]], ids=" ".join)
def test_info(capsys, arguments):
    assert main(arguments) == 0
    text = capsys.readouterr().out
    if "--json" in arguments:
        assert json.loads(text) == fastbn.show_config(as_dict=True)
    else:
        fastbn.show_config()
        assert text == capsys.readouterr().out


def test_python_m_fastbn(run_python):
    found = json.loads(run_python(None, "-W", "error", "-m", "fastbn", "info", "--json").stdout)
    assert found["fastbn"] == fastbn.__version__
    assert fastbn.__version__ in run_python(None, "-m", "fastbn", "--version").stdout
    usage = run_python(None, "-m", "fastbn", "no-such-command", status=2).stderr
    assert "usage: fastbn" in usage
    assert "info" in usage


def test_import_fastbn_imports_nothing_else(run_python):
    code = "import sys, fastbn; print(*sorted({name.split('.')[0] for name in sys.modules}))"
    imported = run_python(code).stdout.split()
    assert "numpy" in imported
    assert not {"numba", "torch", "sklearn", "matplotlib", "tqdm", "jax", "pandas", "scipy"} & set(imported)


def test_numba_is_imported_only_where_it_is_chosen(run_python):
    if fastbn.available_backends()[0] != "cython":
        pytest.skip("there are no compiled kernels to choose before it")
    code = "import sys, fastbn; fastbn.batch_norm([[1.0], [2.0]]); fastbn.BatchNorm(3); print('numba' in sys.modules)"
    assert run_python(code).stdout == "False\n"


def test_an_unbuilt_source_tree_says_what_to_do(tmp_path):
    package = Path(fastbn.__file__).parent
    for path in package.rglob("*.py"):
        copy = tmp_path / "fastbn" / path.relative_to(package)
        copy.parent.mkdir(parents=True, exist_ok=True)
        copy.write_bytes(path.read_bytes())
    (tmp_path / "setup.py").touch()
    result = subprocess.run(
        [sys.executable, "-c", "import fastbn"], cwd=tmp_path, capture_output=True, text=True, timeout=60, check=False,
        env={k: v for k, v in os.environ.items() if k != "PYTHONPATH"},
    )
    assert result.returncode == 1
    assert "source tree" in result.stderr
    assert "pip install" in result.stderr


def test_plain_arrays_go_the_short_ways(compiled, monkeypatch):
    kernels = _dispatch.kernels(compiled)
    ways = [name for name in vars(kernels) if name.startswith("whole_")]
    answered = {}

    def watched(name, way):
        def call(*args):
            answer = way(*args)
            answered.setdefault(name, []).append(answer is not None)
            return answer
        return call

    for name in ways:
        monkeypatch.setattr(kernels, name, watched(name, getattr(kernels, name)))
    x = np.random.default_rng(0).standard_normal((20, 5), np.float32)
    layer = fastbn.BatchNorm(5, backend=compiled)
    for _ in range(2):
        layer.train()(x)
        layer.backward(x)
        layer.eval()(x)
        layer.load_state_dict(layer.state_dict())
    fastbn.moments(x, backend=compiled)
    assert set(ways) == set(answered)
    assert len(ways) >= 4
    assert all(all(answers) for answers in answered.values()), answered


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
@pytest.mark.parametrize("name", ["numpy", "cython"])
def test_a_fork_amid_another_threads_first_use_of_a_backend(run_python, name):
    """The child would wait forever for the import that it inherited half done."""
    code = f"""
import os, signal, sys, threading, time, warnings
import numpy as np, fastbn
warnings.simplefilter("ignore")
importing = threading.Event()

class Slow:
    def find_spec(name, path=None, target=None):
        if name.startswith("fastbn.kernels."):
            importing.set()
            time.sleep(0.3)

def use():
    fastbn.batch_norm(np.ones((4, 3)), backend={name!r})

sys.meta_path.insert(0, Slow)
other = threading.Thread(target=use)
other.start()
importing.wait()
child = os.fork()
if child == 0:
    signal.alarm(20)
    use()
    os._exit(7)
print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
other.join()
"""
    assert run_python(code).stdout == "7\n"
