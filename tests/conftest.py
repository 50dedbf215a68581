"""Shared by all tests: one thread, fixed seeds, and uninitialised memory poisoned with NaN."""

import gc
import os
import shutil

import pytest
import torch

torch.set_num_threads(1)  # two test processes share two cores, and waiting threads spin
# The interpreter's tests run in a process of their own: triton decides at import how it runs kernels.
collect_ignore = [] if os.environ.get("TRITON_INTERPRET") == "1" else ["interpreter"]


def pytest_collection_finish():
    """What the imports made stays, and no later collection of garbage looks through it."""
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


@pytest.fixture(scope="session", autouse=True)
def _small_cache(tmp_path_factory):
    """In this process a timer flushes 2 MiB: where a server's cache is of hundreds, that is most of a benchmark."""
    from sp_fast.bench import timing

    size = tmp_path_factory.mktemp("cache") / "size"
    size.write_text("1024K\n")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(timing, "_LLC", size)
        yield


@pytest.fixture
def poisoned():
    """torch.empty and its kin return NaN, so that a result that was never written shows."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    assert torch.utils.deterministic.fill_uninitialized_memory
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture
def local_workers(monkeypatch):
    """The benchmark's workers in this process, with memory for all of them: faults can be planted."""
    from sp_fast.bench import execute, pool
    from tests.bench_helpers import LocalWorker

    for module in (pool, execute):
        monkeypatch.setattr(module, "Worker", LocalWorker)
    monkeypatch.setattr(pool, "available_mib", lambda _: 1e6)
    monkeypatch.setattr(gc, "collect", lambda *_: 0)  # a fifth of a second in a process as full as pytest's


@pytest.fixture(scope="module")
def fewer_batches(tmp_path_factory):
    """Kernels are compiled anew, for fewer batches than ship."""
    from sp_fast.bench import shipped
    from tests.static_cases import FEWER

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRITON_CACHE_DIR", str(tmp_path_factory.mktemp("triton")))
        patch.setattr(shipped, "BATCHES", FEWER)
        yield


@pytest.fixture
def few_steps(monkeypatch):
    """Of compression's least squares, which have tests of their own."""
    from sp_fast.compress import least_squares

    monkeypatch.setattr(least_squares, "STEPS", 2)


@pytest.fixture
def quick_runs(monkeypatch):
    """Runs of training without what other tests look at."""
    from tests.tiny_training import quicken

    quicken(monkeypatch)


@pytest.fixture(scope="session")
def _everything(tmp_path_factory):
    from tests.tiny_training import everything

    return everything(tmp_path_factory.mktemp("everything"))


@pytest.fixture
def training_folder(_everything, tmp_path):
    """A copy of a tiny run's parts, projector and data."""
    return shutil.copytree(_everything, tmp_path, dirs_exist_ok=True)


@pytest.fixture
def few_inputs(monkeypatch):
    """Of a model's benchmark: two judge it, where a tiny model would get eight."""
    from sp_fast.bench import model_subject

    monkeypatch.setattr(model_subject, "seeds_for", lambda _: 2)


@pytest.fixture
def one_input(monkeypatch):
    """Of a projector's training outputs, which the projector's own tests judge on many."""
    from sp_fast.bench import subject

    monkeypatch.setattr(subject, "seeds_for", lambda _: 1)


@pytest.fixture(scope="session")
def finished():
    """A tiny model's records, measured once in this process."""
    from sp_fast.bench import model_subject, pool
    from tests.bench_helpers import LocalWorker
    from tests.bench_model_helpers import measure_everything

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pool, "Worker", LocalWorker)
        patch.setattr(pool, "available_mib", lambda _: 1e6)
        patch.setattr(model_subject, "seeds_for", lambda _: 2)
        return measure_everything()
