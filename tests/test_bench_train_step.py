"""A training step under the clock: its laps, its memory, its gate."""

import multiprocessing
from concurrent.futures import ProcessPoolExecutor

import pytest
import torch

from sp_fast.bench import train_gate, train_step
from sp_fast.bench.memory import Memory, measure_memory
from sp_fast.bench.timing import Run


class TestStep:
    def test_laps_of_one_name_add_up(self, monkeypatch):
        clock = iter([1.0, 1.002, 1.005, 1.01])
        monkeypatch.setattr(train_step.time, "perf_counter", lambda: next(clock))
        laps = train_step.Laps(torch.device("cpu"))
        laps.start()
        for name in ("optimizer", "forward", "optimizer"):
            laps.lap(name)
        assert laps.parts_ms() == pytest.approx({"optimizer": 7.0, "forward": 3.0})
        assert laps.total_ms() == pytest.approx(10.0)

    def test_the_first_step_is_not_timed(self):
        """It makes the optimizer's states; later runs find them."""
        layer = torch.nn.Linear(2, 2)
        optimizer, seen = torch.optim.AdamW(layer.parameters()), []

        def forward():
            seen.append(len(optimizer.state))
            return (layer(torch.ones(1, 2)),)

        for _ in range(2):
            train_step.step_run(optimizer, forward, lambda z: z[0].sum().backward(), torch.device("cpu")).timed()
        assert seen == [0, 2, 2]

    def test_gradients_that_were_there_are_not_counted_again(self):
        """In a process of its own, as the benchmark has it: this one's heap has holes that other tests left."""
        with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as process:
            found = process.submit(_step_beside_gradients).result()
        assert found.gradients_mib == 64
        assert 90 < found.temporary_mib < 102

    def test_results_without_an_update_judge_nothing(self):
        gate = train_gate.TrainGate("float32", ("fast",), "reference")
        assert gate._wrong_update("fast", None, {}) == "accuracy: no parameter was updated"


def _step_beside_gradients() -> Memory:
    layer, x = torch.nn.Linear(4096, 4096, bias=False), torch.ones(1, 4096)  # 64 MiB
    layer.weight.grad = torch.ones_like(layer.weight)

    def step():
        layer.zero_grad()
        torch.ones(48 * 2**18)  # 48 MiB while there is no gradient
        layer(x).sum().backward()
        torch.ones(96 * 2**18)  # 96 MiB beside one

    return measure_memory(layer, [x], Run(step), lambda: layer(x), "both")
