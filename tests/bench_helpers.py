"""A worker without a process, tiny plans, planted faults, records by hand: the benchmark's own logic in milliseconds."""

import torch

from sp_fast.bench import implementations
from sp_fast.bench.execute import blank_record
from sp_fast.bench.implementations import IMPLEMENTATIONS, baselines_on
from sp_fast.bench.plan import TINY, projector_cases
from sp_fast.bench.record import Record
from sp_fast.bench.roofline import Peaks
from sp_fast.bench.run import Bench, Plan, Progress
from sp_fast.bench.worker import Served
from sp_fast.errors import SPFastError


class LocalWorker:
    """The interface of Worker, in this process."""

    def __init__(self, name, threads, patience=60.0):
        self.name, self.alive, self._served, self._job = name, True, Served(), None

    def build(self, job):
        if job != self._job:
            self.ask("build", job)
            self._job = job
        return self

    def forget(self):
        self._job = None
        self.ask("forget")

    def ask(self, question, *arguments):
        try:
            return self._served.answer(question, *arguments)
        except SPFastError:
            raise
        except Exception as error:
            raise RuntimeError(f"{self.name}: {type(error).__name__}: {error}") from error

    def close(self):
        self.alive = False

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.close()


def record(implementation="fast", ms=10.0, *, spread=0.02, stage="whole", direction="forward", batch=1, heat=0, **more):
    """A finished record; ``spread`` is the distance of p20 and p80 from p50."""
    timed = {} if ms is None else {"ms_p20": ms * (1 - spread), "ms_p50": ms, "ms_p80": ms * (1 + spread), "runs": 5}
    values = {
        "benchmark": "projector", "case": f"crop-dfi.{stage}.{direction}.b{batch}.float32", "implementation": implementation,
        "variant": "crop-dfi", "stage": stage, "direction": direction, "batch": batch, "dtype": "float32", "device": "cpu",
        "threads": 2, "run": "now-1", "heat": heat, "grid": 24, "vision_width": 1024, "spatial_width": 512, "text_width": 4096, "environment": {"machine": "a machine", "torch": "2.13", "commit": "abc"},
        "weights_mib": 100.0, "saved_mib": 1.0, "gradients_mib": 0.0, "temporary_mib": 5.0, "peak_mib": 500.0,
        "flop": 10**9, "bytes": 10**8, "tflops": 0.1, "gbps": 10.0, "roof_ms": 5.0, "roof_share": 0.5, "bound": "memory",
        "peaks": {"read_gbps": 20.0, "copy_gbps": 22.0, "tflops": {"float32": 0.2, "bfloat16": 0.3}}, **timed, **more,
    }  # fmt: skip
    return Record(**values)


PEAKS = Peaks(20.0, 22.0, {"float32": 0.1, "bfloat16": 0.1, "float16": 0.1})
EAGER = ("fast", *(name for name in baselines_on(torch.device("cpu")) if name != "compiled"))


def cases_of(variant="crop-dfi", stages=("whole",), directions=("forward",), batches=(1,), dtypes=("float32",)):
    return projector_cases([variant], stages, directions, batches, dtypes, TINY)


def measure(cases, names=EAGER, **options):
    records, said = [], []
    options = {"turns": 2, "turn_seconds": 0.0, **options}
    plan = Plan(tuple(cases), tuple(names), **options)
    blank = blank_record(plan, {"commit": "abc"})
    bench = Bench(plan, PEAKS, blank, records.append, Progress(0, lambda *what: said.append(what)))
    bench.run()
    return records, bench, said


def faulty(monkeypatch, name, change):
    """Plants a fault into one implementation's whole stage."""

    class Faulty(IMPLEMENTATIONS[name]):
        def whole(self, patch_features):
            return change(super().whole(patch_features))

    monkeypatch.setitem(implementations.IMPLEMENTATIONS, name, Faulty)


FAULTS = {
    "one wrong token": lambda out: (torch.cat([out[0][:, :1] * 1.001, out[0][:, 1:]], dim=1),),
    "tokens in another order": lambda out: (out[0].flip(1),),
    "zeros": lambda out: (out[0] * 0,),
    "NaN": lambda out: (out[0] * float("nan"),),
    "a last token that is not written": lambda out: (torch.cat([out[0][:, :-1], out[0][:, -1:] * 0], dim=1),),
}


def watch(monkeypatch, answers=None):
    """Every question asked of a worker; ``answers`` maps (name, question) to what is answered, or raised, instead."""
    asked, answers = [], answers or {}
    original = LocalWorker.ask

    def ask(self, question, *arguments):
        asked.append((self.name, question))
        answer = answers.get((self.name, question), answers.get(question))
        if isinstance(answer, Exception):
            raise answer
        return original(self, question, *arguments) if answer is None else answer

    monkeypatch.setattr(LocalWorker, "ask", ask)
    return asked
