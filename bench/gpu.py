"""What is worth measuring on a machine with a GPU: parts by worth, the first 15 minutes the most, 25 minutes the whole.

Seconds are estimates for one H200, until one has run them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from sp_fast.bench.cases import DTYPES, STAGES, Case
from sp_fast.bench.implementations import OURS, YARDSTICK
from sp_fast.bench.plan import TINY, implementations, projector_cases
from sp_fast.bench.suite import PROJECTOR, AnyCase, Suite
from sp_fast.variants import OFFICIAL, SHORT

DTYPE = "bfloat16"
HEADLINE = "crop-dfi"
TURNS, TURN_SECONDS = 5, 0.1
PATIENCE_SECONDS = 120.0  # for one answer of a process, a compilation included
MODEL_TURNS, MODEL_PATIENCE_SECONDS = 2, 300.0  # a run is seconds, and a compilation minutes
STRONGEST = ("linear", "matmul")  # of the baselines, by estimate: stages and variants are held against them alone
REHEARSED = ("crop-dfi", "conv336_adptive_pooling_multifuse_q")
SHARE_VARIABLE = "SP_FAST_TEST_SHARE"  # "2/6": the third of six shares of the tests
TRANSFORMERS = ("transformers", "PIL")


@dataclass(frozen=True)
class Setting:
    """Where a part runs; ``tiny`` rehearses it with shapes of milliseconds."""

    device: str
    threads: int
    folder: Path
    tiny: bool = False

    @property
    def overrides(self) -> dict[str, int]:
        """Of the published widths."""
        return TINY if self.tiny else {}


@dataclass(frozen=True)
class Estimate:
    """Seconds: until its processes live, and of each case."""

    start: float
    case: float

    def of(self, cases: int) -> float:
        return self.start + self.case * cases if cases else 0.0


@dataclass(frozen=True)
class Part:
    """Cases to be measured, by worth, and how often."""

    cases: tuple[AnyCase, ...]
    implementations: tuple[str, ...]
    turns: int
    estimate: Estimate
    suite: Suite = PROJECTOR
    patience: float = PATIENCE_SECONDS


@dataclass(frozen=True)
class Checks:
    """Tests, in shares that run side by side."""

    files: tuple[str, ...]
    marker: str
    shares: int
    estimate: Estimate


@dataclass(frozen=True)
class Tuning:
    """Batch buckets whose tiles `sp-fast bench tune` chooses, into a launch table beside the results."""

    batches: tuple[int, ...]
    estimate: Estimate


AnyPart = Part | Checks | Tuning


def _cases(
    setting: Setting, variant: str, stages: Sequence[str], steps: Sequence[tuple[str, int]], dtype: str = DTYPE
) -> list[Case]:
    """Every stage in these directions at these batches, in this order; a rehearsal stops at two batches."""
    batches = sorted({batch for _, batch in steps})[: 2 if setting.tiny else None]
    return [
        case
        for direction, batch in steps
        if batch in batches
        for case in projector_cases([variant], stages, [direction], [batch], [dtype], setting.overrides)
    ]


def _baselines(setting: Setting) -> Part:
    """The headline: the whole projector beside every baseline, forward and training, small batches first."""
    steps = [(direction, batch) for batch in (1, 8, 32, 256) for direction in ("forward", "both")]
    cases = _cases(setting, HEADLINE, ("whole",), steps)
    return Part(tuple(cases), implementations(setting.device, ()), TURNS, Estimate(40, 40))


def _tests(setting: Setting) -> Checks:
    """Accuracy, determinism and contracts: what `make test-gpu` runs. A rehearsal takes others, which need no GPU."""
    if setting.device == "cpu":
        return Checks(("tests/test_geometry.py",), "not gpu and not campaign", 2, Estimate(10, 10))
    return Checks(("tests/test_gpu*.py",), "gpu", 6, Estimate(30, 25))


def _projector(setting: Setting) -> Part:
    """Where the time goes: the convolutions alone, together, then the rest; the whole of each is in ``baselines``."""
    steps = [("forward", 1), ("both", 1), ("forward", 8), ("forward", 32), ("both", 32)]
    cases = _cases(setting, HEADLINE, STAGES[1:], steps)
    return Part(tuple(cases), (OURS, YARDSTICK, *STRONGEST), TURNS, Estimate(30, 5))


def _train(setting: Setting) -> Part:
    """The projector's training step with its optimizer: in the dtype of the other parts, and in float32."""
    from sp_fast.bench.train_cases import FACTORED, projector_steps
    from sp_fast.bench.train_suite import PROJECTOR_STEP

    batches = (1,) if setting.tiny else (1, 16)
    cases = projector_steps([HEADLINE], batches, [DTYPE, "float32"], setting.overrides)
    names = (OURS, FACTORED, YARDSTICK, *STRONGEST)
    return Part(cases, names, TURNS, Estimate(20, 25), PROJECTOR_STEP)


def _model_part(setting: Setting, mode: str, stages: Sequence[str], estimate: Estimate) -> Part:
    """A whole 7B LLaVA-SP, official form and ours, and LLaVA-1.5; one prompt."""
    from sp_fast.bench.model_cases import IMPLEMENTATIONS, Lengths, attentions_on, model_cases
    from sp_fast.bench.model_shapes import ModelShape
    from sp_fast.bench.model_suite import MODEL

    shape, lengths = ModelShape("7b", "clip-l-336"), Lengths()
    if setting.tiny:
        shape, lengths = ModelShape("tiny", "tiny"), Lengths(8, 4)
    # compile_model takes sdpa; a flash package's attention breaks its graphs
    asked = ["sdpa" if mode == "compiled" else "auto"]
    attentions = {DTYPE: tuple(attentions_on(setting.device, DTYPE, asked))}
    cases = model_cases([shape], stages, [1], [DTYPE], attentions, [mode], lengths)
    return Part(cases, IMPLEMENTATIONS, MODEL_TURNS, estimate, MODEL, MODEL_PATIENCE_SECONDS)


def _model(setting: Setting) -> Part:
    """Time to the first token and of a decoded one, as transformers runs them."""
    return _model_part(setting, "eager", ("ttft", "decode", "prefill"), Estimate(60, 10))


def _train_model(setting: Setting) -> Part:
    """A LoRA step of a whole 7B LLaVA-SP on 16 prompts of 640 tokens, every activation kept."""
    from sp_fast.bench.model_cases import attentions_on
    from sp_fast.bench.model_shapes import ModelShape
    from sp_fast.bench.train_cases import MODEL_IMPLEMENTATIONS, MODES, model_steps
    from sp_fast.bench.train_suite import MODEL_STEP

    shape = ModelShape("tiny", "tiny") if setting.tiny else ModelShape("7b", "clip-l-336")
    [attention] = attentions_on(setting.device, DTYPE, ["auto"])
    cases = model_steps(shape, [1 if setting.tiny else 16], [DTYPE], attention, MODES[0], 8 if setting.tiny else 58)
    return Part(cases, MODEL_IMPLEMENTATIONS, MODEL_TURNS, Estimate(30, 90), MODEL_STEP, MODEL_PATIENCE_SECONDS)


def _tune(setting: Setting) -> Tuning:
    """Tiles of the weight stream. A CPU has none."""
    return Tuning(() if setting.device == "cpu" else (1, 8), Estimate(0, 75))


def _compiled(setting: Setting) -> Part:
    """The same model in compiled regions, the decode step as a CUDA graph."""
    return _model_part(setting, "compiled", ("ttft", "decode"), Estimate(30, 120))


def _variants(setting: Setting) -> Part:
    """The pooling pyramid, without and with the detail integrator."""
    cases = [
        *_cases(setting, "pool", ("whole",), [("forward", 1)]),
        *_cases(setting, "pool-dfi", ("whole",), [("forward", 1), ("both", 1)]),
    ]
    return Part(tuple(cases), (OURS, YARDSTICK, *STRONGEST), TURNS, Estimate(20, 8))


def _accuracy(setting: Setting) -> Part:
    """Every variant and dtype at the published widths, outputs and gradients; nothing is timed."""
    variants = REHEARSED if setting.tiny else (*OFFICIAL, *(name for name in SHORT if name.startswith("sliding")))
    found = [projector_cases(variants, ["whole"], ["both"], [2], [dtype], setting.overrides) for dtype in DTYPES]
    return Part(tuple(case for cases in found for case in cases), (OURS, YARDSTICK), 0, Estimate(20, 8))


PARTS: dict[str, Callable[[Setting], AnyPart]] = {
    "baselines": _baselines,
    "tests": _tests,
    "projector": _projector,
    "train": _train,
    "model": _model,
    "train_model": _train_model,
    "tune": _tune,
    "compiled": _compiled,
    "variants": _variants,
    "accuracy": _accuracy,
}
#: What is measured unless parts are named: the tests judge every variant too, at small widths.
CAMPAIGN = tuple(name for name in PARTS if name != "accuracy")
#: Modules beyond those that every part imports.
NEEDS = {
    "tests": ("pytest", "peft", "accelerate", *TRANSFORMERS),
    "model": TRANSFORMERS,
    "train_model": ("peft", *TRANSFORMERS),
    "compiled": TRANSFORMERS,
}
