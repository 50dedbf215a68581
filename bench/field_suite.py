"""The field for the core: each projector is a case of its own, alone in its process while it is measured."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from pathlib import Path
from typing import Any

from sp_fast.bench import budget
from sp_fast.bench.accuracy import relative_error
from sp_fast.bench.cases import DTYPES
from sp_fast.bench.counts import Count
from sp_fast.bench.field_projectors import PROJECTORS
from sp_fast.bench.field_rows import FieldCase, Peer
from sp_fast.bench.field_subject import BUILT, PLAIN, FieldJob
from sp_fast.bench.gate import Gate, GateError, Results
from sp_fast.bench.implementations import EXACT, OURS, YARDSTICK
from sp_fast.bench.memory import MIB
from sp_fast.bench.suite import Needs, ProjectorSuite


class SpatialGate(Gate):
    """Ours by the accuracy rule: the official form's results, its yardstick, come with float64's."""

    def __init__(self, dtype: str) -> None:
        super().__init__(dtype, (BUILT,), YARDSTICK)

    def expect(self, case: FieldCase, exact: Results | Exception) -> None:
        if not isinstance(exact, Exception):
            plain = {name.removeprefix(PLAIN): exact.pop(name) for name in list(exact) if name.startswith(PLAIN)}
            if wrong := self._noise({name: relative_error(plain[name], exact[name]) for name in exact}):
                exact = GateError(f"the official form: {wrong}")
            self._yardstick[case.exact] = plain
        super().expect(case, exact)


class FieldSuite(ProjectorSuite):
    """Projectors side by side. They do not take turns, as no ratio between them is quoted."""

    ours, yardstick, exact = "", BUILT, EXACT  # nobody is in every heat

    def weights(self, case: FieldCase) -> Hashable:
        return case.variant, case.config, case.dtype

    def job(self, case: FieldCase, device: str, seed: int, folder: Path) -> FieldJob:
        dtype = DTYPES[case.dtype]
        return FieldJob(EXACT, case.config, dtype, device, seed, folder, projector=case.variant, shrink=case.shrink)

    def gate(self, case: FieldCase) -> Gate:
        """What has no other form in its own dtype keeps half of its digits."""
        row = PROJECTORS[case.variant]
        if isinstance(row, Peer) or row.implementation != OURS:
            return Gate(case.dtype, (), BUILT)
        return SpatialGate(case.dtype)

    def needs(self, cases: Sequence[FieldCase], implementations: Sequence[str]) -> Needs:
        """Estimates: weights; a few rows of each width; gradients; float64 of a peer whole, of LLaVA-SP one convolution
        at a time beside nothing."""
        first, batch = cases[0], max(case.batch for case in cases)
        row, shape = PROJECTORS[first.variant], first.shape
        backward = any(case.direction != "forward" for case in cases)
        held = row.weight_bytes(first) / MIB
        rows = batch * shape.patches * (4 * shape.vision + 4 * shape.text) / MIB
        if isinstance(row, Peer):
            running = held * backward + 4 * rows
            exact = budget.PROCESS_MIB + 8 * (row.parameters(first) * (1 + backward) / MIB + 2 * rows)
        else:
            running = budget.running_mib(first.config, first.dtype, batch, backward)
            widened = budget.exact_mib(first.config, first.dtype, batch, backward) - held
            exact = max(widened, budget.idle_mib(first.config, first.dtype) + running)
        return Needs(
            f"{first.variant} in {first.dtype} at batch {batch}", held + budget.PROCESS_MIB, running, exact,
            "choose fewer --projector, a smaller --spatial-width or --batch, or bfloat16",
        )  # fmt: skip

    def fields(self, case: FieldCase, name: str) -> dict[str, Any]:
        row = PROJECTORS[case.variant]
        return super().fields(case, name) | {
            "benchmark": "projectors", "image_tokens": row.image_tokens(case), "parameters": row.parameters(case),
            "weight_bytes": row.weight_bytes(case),
        }  # fmt: skip

    def steps(self, case: FieldCase, name: str) -> list[Count]:
        return [PROJECTORS[case.variant].count(case)]

    def parts(self, case: FieldCase, name: str) -> list[Count]:
        return self.steps(case, name)


FIELD = FieldSuite()
