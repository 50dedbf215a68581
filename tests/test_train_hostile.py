"""Hostile samples: each is named or loads, none hangs, none leaves its folder, none ends in another error."""

import contextlib
import re
import signal
from pathlib import Path

import pytest

from sp_fast.errors import DataError
from sp_fast.training import images
from sp_fast.training.check_data import check_data
from sp_fast.training.encoding import Encoder
from sp_fast.training.examples import BadSample, Examples
from tests import tiny
from tests.hostile_samples import plant


@pytest.fixture(scope="module")
def planted(tmp_path_factory):
    folder = tmp_path_factory.mktemp("h") / "images"
    folder.mkdir()
    return folder, plant(folder)


@pytest.fixture
def opened(monkeypatch):
    """Every path that was opened as an image."""
    found = []
    load = images.load_image
    monkeypatch.setattr(images, "load_image", lambda path: (found.append(path), load(path))[1])
    return found


@contextlib.contextmanager
def within(seconds):
    def late(*_):
        raise TimeoutError(f"more than {seconds} s")

    previous = signal.signal(signal.SIGALRM, late)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, previous)


def peak_mib():
    return int(re.search(r"VmHWM:\s+(\d+)", Path("/proc/self/status").read_text())[1]) >> 10


def run(cases, folder, opened, path):
    """How many samples were used, and how many named; both ways of dealing with bad ones have to agree."""
    encoder = Encoder(tiny.processor_of(tiny.config_of()), "vicuna_v1", 512)
    path.write_bytes(b"\n".join(case.line for case in cases) + b"\n")
    with within(60):
        examples = Examples([path], folder, encoder, "skip")
        read = [examples[i] for i in range(len(examples))]
        report = check_data(examples)
    late = [one for one in read if isinstance(one, BadSample)]
    bad = {bad.where: bad for bad in [*examples.bad, *late]}
    assert report.good + len(bad) == report.samples == len(cases)
    assert sorted(bad) == sorted(one.where for one in report.bad)
    assert all(Path(name).is_relative_to(folder) for name in opened)
    for number, case in enumerate(cases, 1):
        where = f"{path}, line {number}"
        found = bad.get(where)
        assert case.good is None or case.good == (found is None), (case.name, found)
        if found is not None:
            assert found.id in (case.name, where)
            assert found.reason.isprintable(), case.name
            stops(case, folder, encoder, path.with_name("one.jsonl"))
    return report.good, len(bad)


def stops(case, folder, encoder, path):
    path.write_bytes(b"\n" + case.line + b"\n")
    with within(20), pytest.raises(DataError) as caught:
        Examples([path], folder, encoder)[0]
    assert f"{path}, line 2" in str(caught.value)
    assert "check-data" in str(caught.value)


def test_hostile_samples_are_named_or_load(planted, opened, tmp_path):
    folder, cases = planted
    some = [case for i, case in enumerate(cases) if i % 8 == 0 or case.name.startswith("path")]
    run(some, folder, opened, tmp_path / "data.jsonl")


@pytest.mark.campaign
def test_all_hostile_samples_are_named_or_load(planted, opened, tmp_path):
    folder, cases = planted
    before = peak_mib()
    good, bad = run(cases, folder, opened, tmp_path / "data.jsonl")
    memory = peak_mib() - before
    print(f"\n{len(cases)} hostile samples: {bad} named, {good} loaded, {memory} MiB at the peak; no hang, no escape")
    assert len(cases) >= 200
    assert memory < 1024
