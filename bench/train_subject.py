"""The projector's training step, in the process where it lives."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch

from sp_fast.bench.cases import Case
from sp_fast.bench.implementations import EXACT, OURS
from sp_fast.bench.subject import ProjectorJob, ProjectorSubject, backward, gradients
from sp_fast.bench.timing import Run
from sp_fast.bench.train_cases import ADAMW, FACTORED
from sp_fast.bench.train_step import Shadow, step_run
from sp_fast.training.factored import FactoredAdamW

JUDGED_STEPS = 2  # AdamW's first step is the gradient's sign, whatever its betas


@dataclass(frozen=True)
class StepJob(ProjectorJob):
    """What a worker builds. Steps move the weights: every case begins with its own."""

    case: str = ""  # its key

    def build(self) -> StepSubject:
        return StepSubject(self)


class StepSubject(ProjectorSubject):
    """A projector with its optimizer."""

    def __init__(self, job: StepJob) -> None:
        super().__init__(replace(job, implementation=OURS if job.implementation == FACTORED else job.implementation))
        self._job = job
        if job.implementation == FACTORED:
            self.optimizer = FactoredAdamW(self.module.parameters(), self.module, **ADAMW)
        else:
            self.optimizer = torch.optim.AdamW(self.module.parameters(), fused=True, **ADAMW)

    def run(self, case: Case) -> Run:
        """A whole step, its gradients held until the next begins."""
        upstream = self._prepare(case)[2]
        return step_run(self.optimizer, self.forward(case), lambda z: backward(z, upstream), self._device)

    def results(self, case: Case) -> str:
        """Outputs and gradients of the first of a few steps, as float64 has them too; and what the steps made of the
        parameters, beside what AdamW makes of them."""
        found, _ = self._outputs(case)
        if self._job.implementation == EXACT:
            return self._save(case.key, found | self._gradients(case, 0))
        _, function, upstream = self._prepare(case)
        for step in range(JUDGED_STEPS):
            self.optimizer.zero_grad()
            inputs = case.inputs(self._job.seed + step, self._device)
            backward(function(*self._implementation.accept(inputs)), upstream)
            with self._dense_gradients():
                trained = sorted(self._implementation.gradient_keys())
                if step == 0:
                    found |= gradients(self._implementation, self._job.seed)
                    shadow = Shadow({key: self._implementation.parameter(key) for key in trained}, self._job.seed)
                shadow.step({key: self._implementation.gradient(key) for key in trained})
            self.optimizer.step()
        return self._save(case.key, found | shadow.results(lambda key: key.split(".")[0]))

    @contextlib.contextmanager
    def _dense_gradients(self) -> Iterator[None]:
        """Gradients that are never made are made, for whoever judges them."""
        packed = self.optimizer.packed if isinstance(self.optimizer, FactoredAdamW) else []
        for weight in packed:
            weight.grad = self.optimizer.gradient(weight)
        yield
        for weight in packed:
            weight.grad = None
