"""The baselines are what their names say, and our stages are the projector's own."""

import weakref

import pytest
import torch

from sp_fast import SPProjector
from sp_fast.bench import implementations
from sp_fast.bench.cases import Case
from sp_fast.bench.implementations import BASELINES, Compiled, Reference, baselines_on
from sp_fast.bench.plan import implementations as chosen
from sp_fast.bench.subject import ProjectorJob
from sp_fast.errors import ConfigError
from tests.bench_helpers import LocalWorker, cases_of, measure
from tests.compact_forms import KINDS, compact
from tests.helpers import ALL_VARIANTS, small

pytestmark = pytest.mark.usefixtures("local_workers")


def test_baselines_of_a_device():
    assert baselines_on(torch.device("cpu")) == ("reference", "channels_last", "linear", "matmul", "compiled")
    assert baselines_on(torch.device("cuda")) == BASELINES
    assert chosen("cpu", ()) == ("fast", *baselines_on(torch.device("cpu")))
    assert chosen("cpu", ("linear", "linear")) == ("linear",)
    with pytest.raises(ConfigError, match="is no implementation of its own on cpu"):
        chosen("cpu", ("channels_last_benchmark",))
    with pytest.raises(ConfigError, match="did you mean 'linear'"):
        chosen("cpu", ("linaer",))


def test_cudnn_is_told_what_each_baseline_wants(monkeypatch):
    """One process, one switch."""
    for name, wanted in (("reference", False), ("reference_benchmark", True), ("channels_last_benchmark", True)):
        monkeypatch.setattr(torch.backends.cudnn, "benchmark", not wanted)
        worker = LocalWorker(name, 1)
        case = cases_of()[0]
        job = ProjectorJob(name, case.config, torch.float32, "cpu", 0, None)
        worker.build(job)
        assert torch.backends.cudnn.benchmark is wanted


def test_baselines_hold_the_weights_their_names_say():
    case = cases_of()[0]
    built = {}
    for name in ("channels_last", "linear", "matmul", "reference"):
        worker = LocalWorker(name, 1).build(ProjectorJob(name, case.config, torch.float32, "cpu", 0, None))
        built[name] = worker._served.subject.module.conv_CM.weight
    c, d = case.config.vision_width, case.config.spatial_width
    assert built["reference"].is_contiguous()
    assert built["channels_last"].is_contiguous(memory_format=torch.channels_last)
    assert not built["channels_last"].is_contiguous()
    assert built["linear"].shape == (d, 256 * c)
    assert built["matmul"].shape == (256 * c, d)
    assert built["matmul"].is_contiguous()
    assert built["linear"].is_contiguous()
    torch.testing.assert_close(
        built["linear"].view(d, 16, 16, c).permute(0, 3, 1, 2), built["reference"], rtol=0, atol=0
    )
    torch.testing.assert_close(built["matmul"].t(), built["linear"], rtol=0, atol=0)


@pytest.mark.parametrize("name", ["linear", "matmul", "channels_last"])
def test_a_baseline_never_holds_its_weights_twice(name, monkeypatch):
    """Convolutions are replaced one by one: at most one of them is there in both forms."""
    live, most = weakref.WeakSet(), []
    flat, init = implementations._FlatConv.__init__, torch.nn.Conv2d.__init__

    def made(self, *arguments, **named):
        init(self, *arguments, **named)
        live.add(self)

    monkeypatch.setattr(torch.nn.Conv2d, "__init__", made)
    monkeypatch.setattr(
        implementations._FlatConv, "__init__", lambda self, *a, **n: most.append(len(live)) or flat(self, *a, **n)
    )
    case = cases_of()[0]
    LocalWorker(name, 1).build(ProjectorJob(name, case.config, torch.float32, "cpu", 0, None))
    assert most == ([] if name == "channels_last" else [7, 6, 5, 4, 3, 2, 1])


def test_compiled_is_compiled(monkeypatch):
    compiled = []
    monkeypatch.setattr(torch, "compile", lambda f, dynamic: compiled.append((f.__name__, dynamic)) or f)
    records, *_ = measure(cases_of(stages=("whole", "mlp")), ["compiled", "reference"], turns=1)
    assert compiled == [("whole", False), ("mlp", False)]
    assert issubclass(Compiled, Reference)
    assert [r.withheld for r in records] == [None] * 4


@pytest.mark.parametrize("variant", ALL_VARIANTS)
def test_fast_stages_are_the_projectors_own(variant):
    """Spatial features, detail maps and spatial tokens as intermediates() has them."""
    config = small(variant)
    case = Case(variant, config, "whole", "forward", 2, "float32")
    subject = LocalWorker("fast", 1).build(ProjectorJob("fast", config, torch.float32, "cpu", 0, None))._served.subject
    fast, projector = subject._implementation, subject.module
    assert isinstance(projector, SPProjector)
    (x,) = case.inputs(0, torch.device("cpu"))
    with torch.no_grad():
        expected = projector.intermediates(x)
        if config.levels:
            torch.testing.assert_close(fast.spatial(x)[0], expected.z_small)
        details = fast.detail(x) if config.detail_kernels else ()
        for got, z in zip(details, expected.z_big if config.attends else (expected.z_small,), strict=False):
            torch.testing.assert_close(got, z)
        if config.spatial_tokens:
            torch.testing.assert_close(
                fast.tail(expected.z_small, *expected.z_big)[0], expected.tokens[:, : config.spatial_tokens]
            )
        torch.testing.assert_close(fast.mlp(x)[0], expected.tokens[:, config.spatial_tokens :])


@pytest.mark.parametrize(
    "kind", [kind if kind == "depthwise" else pytest.param(kind, marks=pytest.mark.campaign) for kind in KINDS]
)
def test_compact_projectors_are_measured_whole(kind):
    """Forward and backward pass the gate, ours and the baselines'."""
    config = compact(kind, **dict.fromkeys(("vision_width", "spatial_width", "text_width"), 32))  # elements enough
    cases = [Case(kind, config, "whole", direction, 4, "float32") for direction in ("forward", "both")]
    records, *_ = measure(cases, ["fast", "reference", "linear"], turns=1)
    assert [record.withheld for record in records] == [None] * 6
