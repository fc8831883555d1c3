"""Ctrl-C at any moment. In a long call: KeyboardInterrupt, the layer as a whole batch leaves it, and the next call is
right. In `fastbn demo`, `bench` and `accuracy`, once they are imported: exit status 130, no traceback, no file, no
process left."""

import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

import fastbn
from reliability import FULL, work
from reliability.system import children

SHAPE = (40_000, 64)  # 10 MB: outputs from the pool
PATIENCE = 60  # seconds
COMMANDS = {
    "fastbn demo": ["demo"],
    "fastbn accuracy": ["accuracy", "--quick", "--sides", "fastbn"],
    "fastbn bench": ["bench", "--quick", "--peers", "numpy", "--plot", "plot.png", "--markdown", "page.md"],
}


def run(tally, scale):
    random.seed(5)
    in_calls(tally, work.compiled(scale), max(20, round(1000 * scale)))
    times = round(12 * scale) if scale >= FULL else 0
    for i in range(times):
        for name, words in COMMANDS.items():
            in_command(tally, name, words)
        tally.progress(i / times)


def in_calls(tally, backends, times):
    """A layer sees two batches in turn and, with momentum 1, remembers the last: half an update would show."""
    rng = np.random.default_rng(1)
    batches = [rng.normal(i, 1 + i, SHAPE).astype(np.float32) for i in range(2)]
    signal.signal(signal.SIGALRM, signal.default_int_handler)
    for backend in backends:
        layer = fastbn.BatchNorm(SHAPE[1], momentum=1, backend=backend)
        expected = [step(layer, batches) for _ in range(2)]
        for _ in range(times):
            signal.setitimer(signal.ITIMER_REAL, random.uniform(1e-4, 0.02), 0.5)  # again: a destructor may swallow one
            try:
                while True:
                    step(layer, batches)
            except KeyboardInterrupt:
                signal.setitimer(signal.ITIMER_REAL, 0)
            tally.count("interrupted loops of calls")
            last = expected[(layer.num_batches_tracked - 1) % 2]
            tally.expect(state(layer) == last[:2], f"{backend}: a layer half updated")
        for _ in range(2):
            now = layer.num_batches_tracked % 2
            tally.expect(step(layer, batches) == expected[now], f"{backend}: a wrong answer after an interrupt")


def step(layer, batches):
    x = batches[layer.num_batches_tracked % 2]
    y = layer(x)
    grad_x = layer.backward(x)
    return *state(layer), hash(y[::1000].tobytes()), hash(grad_x[::1000].tobytes())


def state(layer):
    return layer.running_mean.tobytes(), layer.running_var.tobytes()


def in_command(tally, name, words):
    with tempfile.TemporaryDirectory() as folder:
        process = subprocess.Popen(
            [sys.executable, "-P", "-m", "fastbn", *words], cwd=folder, start_new_session=True,
            env=os.environ | {"PYTHONPATH": str(Path(fastbn.__file__).parents[1])},
            stdout=subprocess.DEVNULL, stderr=subprocess.PIPE,
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # a shell's background job ignores it
        )
        try:
            begun(process, name)
            time.sleep(random.uniform(0, 2))
            os.killpg(process.pid, signal.SIGINT)  # as a terminal does it: to all of them
            error = process.communicate(timeout=PATIENCE)[1].decode()
        except subprocess.TimeoutExpired:
            error = "it hangs"
        left = [file.name for file in Path(folder).iterdir()]
        alone = no_process_left(process.pid)
    tally.count(f"interrupted runs of {name}")
    clean = process.returncode == 130 and error.endswith("interrupted\n")
    tally.expect(clean, f"{name}: exit status {process.returncode}, {error}")
    tally.expect("Traceback" not in error, f"{name}: a traceback: {error}")
    tally.expect(not left, f"{name}: left {left}")
    tally.expect(alone, f"{name}: left a process")


def begun(process, name):
    """Wait until its imports are done: the demo shows its bar, the others have started a worker."""
    deadline = time.monotonic() + PATIENCE
    if name == "fastbn demo":
        process.stderr.peek(1)
    while name != "fastbn demo" and len(children(process.pid)) < 2 and time.monotonic() < deadline:
        time.sleep(0.01)


def no_process_left(group):
    for _ in range(200):
        try:
            os.killpg(group, 0)
        except ProcessLookupError:
            return True
        time.sleep(0.01)
    os.killpg(group, signal.SIGKILL)
    return False
