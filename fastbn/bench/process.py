"""The parent's handle on the processes of the sides. None of them outlives a `with Processes(...)` block."""

from __future__ import annotations

import contextlib
import multiprocessing
import multiprocessing.resource_tracker
import signal
from collections.abc import Iterator
from types import TracebackType
from typing import Any

from numpy.typing import NDArray

from fastbn.bench.cases import Case
from fastbn.bench.worker import serve

PREPARE_LIMIT = 300.0  # seconds; filling large arrays, compiling
RUN_LIMIT = 120.0  # seconds; one round of one side


class WorkerError(RuntimeError):
    """A side failed, died or hangs; the message says which."""


class Worker:
    """One process, hosting one side or several."""

    def __init__(self, labels: tuple[str, ...], threads: int) -> None:
        context = multiprocessing.get_context("spawn")
        self.connection, theirs = context.Pipe()
        self.process = context.Process(target=serve, args=(theirs, labels, threads), daemon=True)
        with interrupts_held_back():
            self.process.start()
        theirs.close()

    def ask(self, *question: Any, limit: float) -> Any:
        """Send a question and wait for the answer, at most `limit` seconds."""
        try:
            self.connection.send(question)
            if not self.connection.poll(limit):
                self.close()
                raise WorkerError(f"no answer within {limit:.0f} s; its process was ended")
            good, answer = self.connection.recv()
        except (EOFError, OSError):
            self.process.join(5)
            code = self.process.exitcode
            self.close()
            raise WorkerError(f"its process died, exit status {code}") from None
        if not good:
            raise WorkerError(answer)
        return answer

    def close(self) -> None:
        """End the process, whatever it is doing."""
        self.process.kill()
        self.process.join()
        self.connection.close()

    @property
    def closed(self) -> bool:
        return self.connection.closed


class Processes:
    """The workers, each started when it is first needed and again after it died.

    Labels joined in `together` share a process, and so its arrays.
    """

    def __init__(self, threads: int, together: tuple[str, ...] = ()) -> None:
        self.threads = threads
        self.together = together
        self.workers: dict[tuple[str, ...], Worker] = {}

    def __enter__(self) -> Processes:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None,
    ) -> None:
        for worker in self._alive():
            worker.close()

    def _alive(self) -> list[Worker]:
        return [worker for worker in self.workers.values() if not worker.closed]

    def _worker(self, label: str) -> Worker:
        labels = self.together if label in self.together else (label,)
        if labels not in self.workers or self.workers[labels].closed:
            self.workers[labels] = Worker(labels, self.threads)
        return self.workers[labels]

    def versions(self, label: str) -> dict[str, str]:
        answer: dict[str, str] = self._worker(label).ask("versions", limit=PREPARE_LIMIT)
        return answer

    def prepare(self, label: str, case: Case) -> float | None:
        seconds: float | None = self._worker(label).ask("prepare", label, case, limit=PREPARE_LIMIT)
        return seconds

    def run(self, label: str, calls: int, times: int) -> list[float]:
        seconds: list[float] = self._worker(label).ask("run", label, calls, times, limit=RUN_LIMIT)
        return seconds

    def result(self, label: str) -> list[NDArray[Any]]:
        arrays: list[NDArray[Any]] = self._worker(label).ask("result", label, limit=PREPARE_LIMIT)
        return arrays

    def forget(self) -> None:
        """Free the arrays of all workers."""
        for worker in self._alive():
            with contextlib.suppress(WorkerError):
                worker.ask("forget", limit=RUN_LIMIT)


@contextlib.contextmanager
def interrupts_held_back() -> Iterator[None]:
    """Processes started in here never see Ctrl-C: it goes to the parent alone, which then ends them. A start is not
    interrupted half way; what came amid it is raised behind it."""
    if not hasattr(signal, "pthread_sigmask"):
        yield
        return
    multiprocessing.resource_tracker.ensure_running()  # starting it would let interrupts through again
    came: list[int] = []
    raises = signal.getsignal(signal.SIGINT) is signal.default_int_handler
    if raises:  # here, too, for what a thread of some library receives, which does not block it
        signal.signal(signal.SIGINT, lambda number, frame: came.append(number))
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
        if raises:
            signal.signal(signal.SIGINT, signal.default_int_handler)
        if came:
            raise KeyboardInterrupt
