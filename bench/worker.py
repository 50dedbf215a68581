"""One implementation in a process of its own, so that its memory and its time are its own; driven over a pipe."""

from __future__ import annotations

import contextlib
import gc
import multiprocessing
import signal
import sys
import threading
from collections.abc import Iterator
from multiprocessing.connection import Connection
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from sp_fast.bench.energy import Energy, Meter
from sp_fast.bench.memory import Memory, measure_memory, release
from sp_fast.bench.roofline import Peaks, measure_peaks
from sp_fast.bench.timing import TIMERS, Run, Times
from sp_fast.errors import ResourceError, SPFastError

PATIENCE_SECONDS = 1200.0  # for one answer: the official form's backward takes minutes on a small CPU
CLOSE_SECONDS = 2.0  # that a process is given to end by itself


class Subject(Protocol):
    """What is measured. Its other methods can be asked for too, by name."""

    module: nn.Module

    def inputs(self, case: Any) -> tuple[Tensor, ...]: ...

    def forward(self, case: Any) -> Any: ...

    def run(self, case: Any) -> Run: ...


class Job(Protocol):
    """Picklable, and builds the subject in the worker's process."""

    implementation: str
    device: str

    def build(self) -> Subject: ...


class Worker:
    """The parent's end of a process. An error that the child meets is raised here, as the package's own or as a
    RuntimeError; the child then waits for the next question."""

    def __init__(self, name: str, threads: int, patience: float = PATIENCE_SECONDS) -> None:
        self.name = name
        self._patience = patience
        self._job: Job | None = None
        context = multiprocessing.get_context("spawn")
        self._pipe, other = context.Pipe()
        self._process = context.Process(target=_serve, args=(name, threads, other), daemon=True)
        with _interrupts_ignored():  # inherited: Ctrl-C is for the parent, which stops its workers
            self._process.start()
        other.close()

    def build(self, job: Job) -> Worker:
        """Builds another subject in place of the last, unless it is the same."""
        if job != self._job:
            self._job = None
            self.ask("build", job)
            self._job = job
        return self

    def forget(self) -> None:
        """The subject's memory is given back."""
        self._job = None
        self.ask("forget")

    def ask(self, question: str, *arguments: Any) -> Any:
        """The answer of a method of the child's end, or of its subject."""
        try:
            self._pipe.send((question, *arguments))
            if not self._pipe.poll(self._patience):
                self._process.kill()
                raise ResourceError(f"the {self.name} process gave no answer to {question!r} in {self._patience:.0f} s")
            answer = self._pipe.recv()
        except (EOFError, OSError):
            self._process.join()
            raise ResourceError(
                f"the {self.name} process died (exit code {self._process.exitcode}; -9 is usually a machine out of "
                "memory): close other programs, or use a smaller batch"
            ) from None
        if isinstance(answer, Exception):
            raise answer
        return answer

    @property
    def alive(self) -> bool:
        return self._process.is_alive()

    def close(self) -> None:
        """Asks the process to end; one that is busy is ended."""
        self._pipe.close()
        self._process.join(CLOSE_SECONDS)
        if self._process.is_alive():
            self._process.kill()
        self._process.join()

    def __enter__(self) -> Worker:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


@contextlib.contextmanager
def _interrupts_ignored() -> Iterator[None]:
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    handler = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, handler)


def _serve(name: str, threads: int, pipe: Connection) -> None:
    torch.set_num_threads(threads)
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False  # float32 is float32 for everyone
    gc.freeze()  # what the imports left need not be looked through before every measurement of memory
    served = Served()
    with contextlib.suppress(EOFError, OSError):  # the parent is gone
        while True:
            question, *arguments = pipe.recv()
            try:
                answer = served.answer(question, *arguments)
            except SPFastError as error:
                answer = error
            except Exception as error:  # noqa: BLE001, any failure must reach the parent, which raises it
                answer = RuntimeError(f"{name}: {type(error).__name__}: {error}")
            pipe.send(answer)


class Served:
    """The child's end: what can be asked of any subject."""

    def __init__(self) -> None:
        self.subject: Any = None
        self._timer: Any = None
        self._meter: Any = None

    def answer(self, question: str, *arguments: Any) -> Any:
        method = getattr(self, question, None) or getattr(self.subject, question)
        try:
            return method(*arguments)
        finally:
            if torch.cuda.is_initialized() and question != "time":  # nobody sits on memory while others run
                torch.cuda.empty_cache()

    def peaks(self, device: str, dtypes: tuple[str, ...], shrink: int) -> Peaks:
        """The machine's limits; needs no subject."""
        return measure_peaks(torch.device(device), dtypes, shrink)

    def build(self, job: Job) -> None:
        self.forget()
        device = torch.device(job.device)
        if device.type == "cuda":
            torch.cuda.set_device(device)  # events and streams are those of the current one
        self.subject = job.build()
        self._timer, self._meter = TIMERS[device.type](device), Meter(device)

    def forget(self) -> None:
        """Gives the subject's memory back."""
        self.subject = self._timer = None
        if "torch._dynamo" in sys.modules:  # compiled code holds on to what it was compiled for
            torch.compiler.reset()
        release(torch.device("cuda") if torch.cuda.is_initialized() else torch.device("cpu"))

    def capture(self, case: Any) -> bool:
        """Whether the case can be replayed as a graph; it is kept for ``time`` and ``energy``."""
        return self._timer.capture(case.key, self.subject.run(case))

    def time(self, case: Any, seconds: float, most: int, graph: bool = False) -> Times:
        """Single runs, at most ``most``, for about ``seconds``."""
        return self._timer.time(case.key, self.subject.run(case), seconds, most, graph)

    def memory(self, case: Any) -> Memory:
        """Of one run."""
        self._timer.release()
        subject = self.subject
        forward = subject.forward(case)
        optimizer = getattr(subject, "optimizer", None)  # of a subject that trains
        run = subject.run(case)
        return measure_memory(subject.module, subject.inputs(case), run, forward, case.direction, optimizer)

    def energy(self, case: Any, seconds: float, graph: bool = False) -> Energy:
        """A run's, over about ``seconds``; of what ``time`` has timed."""
        return self._meter.measure(self._timer.replay(case.key) if graph else self.subject.run(case), seconds)
