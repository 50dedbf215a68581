"""Tables, figure and checks of a study, on invented results."""

import json

import pytest
from typer.testing import CliRunner

from sp_fast.cli import app
from sp_fast.errors import TrainingError
from sp_fast.training.study.conduct import Progressing
from sp_fast.training.study.results import Results, read_lines
from sp_fast.training.study.study import Job
from sp_fast.training.study.summary import summarise

CHANCE = {"position": (1 / 9, 0.12), "presence": (0.25, 0.0), "box": (None, 0.02)}


def line(arm, seed, *shares):
    """Of position, presence and boxes."""
    types = {
        kind: {"accuracy": share, "chance": {"uniform": uniform, "constant": constant}, "n": 100}
        for share, (kind, (uniform, constant)) in zip(shares, CHANCE.items(), strict=True)
    }
    counts = {"projector": 5000, "spatial": 0 if arm == "mlp" else 4000}
    return {
        "arm": arm, "seed": seed, "types": types, "mean": sum(shares) / 3, "parameters": counts, "fingerprint": {},
        "seconds": {"pretrain": 10.0, "finetune": 20.0},
    }  # fmt: skip


LINES = [
    line("crop", 1, 0.6, 0.7, 0.2),
    line("mlp", 0, 0.4, 0.5, 0.1),
    line("crop", 0, 0.5, 0.7, 0.1),
    line("mlp", 1, 0.3, 0.6, 0.1),
    line("sliding", 2, 0.3, 0.3, 0.0),
]


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "results.jsonl").write_text("".join(json.dumps(one) + "\n" for one in LINES))
    return tmp_path


def show(folder, *words):
    return CliRunner().invoke(app, ["train", "study-show", str(folder), *words])


def test_means_spreads_and_differences_by_hand(folder):
    out = show(folder, "--format=json")
    assert out.exit_code == 0, out.output
    found = json.loads(out.stdout)
    assert found["chance"] == pytest.approx({"position": 0.12, "presence": 0.25, "box": 0.02, "mean": 0.13})
    assert [arm["arm"] for arm in found["arms"]] == ["mlp", "crop", "sliding"]  # as ARMS has them
    crop = found["arms"][1]
    assert crop["seeds"] == [0, 1]
    assert crop["shares"]["position"] == {"mean": 0.55, "deviation": pytest.approx(0.1 / 2**0.5), "by_seed": [0.5, 0.6]}
    assert crop["beyond_mlp"]["position"] == {"mean": pytest.approx(0.2), "deviation": pytest.approx(0.2 / 2**0.5)}
    assert found["arms"][2]["beyond_mlp"] == {}  # it shares no seed with mlp
    assert found["arms"][2]["shares"]["box"]["deviation"] is None


def test_tables_say_the_same(folder):
    text = show(folder, "--format=md").stdout
    assert "|  | position | presence | box | mean | seeds | parameters | spatial |\n| --- |" in text
    assert "| guessing | 12.0 | 25.0 | 2.0 | 13.0 | - | - | - |" in text
    assert "| crop | 55.0 ± 7.1 | 70.0 ± 0.0 | 15.0 ± 7.1 | 46.7 ± 4.7 | 2 | 5,000 | 4,000 |" in text
    assert "| sliding | 30.0 | 30.0 | 0.0 | 20.0 | 1 | 5,000 | 4,000 |" in text
    assert "| crop | +20.0 ± 14.1 | +15.0 ± 7.1 | +5.0 ± 7.1 |" in text
    assert "| sliding | - | - | - | - |" in text
    table = show(folder).stdout
    assert all(words in table for words in ("55.0 ± 7.1", "beyond mlp", "+20.0 ± 14.1", "yes: the best arm, crop,"))


def test_the_figure_has_a_dot_a_seed(folder):
    assert show(folder).exit_code == 0
    first = (folder / "study.svg").read_bytes()
    assert all(name in first for name in (b"position", b"presence", b"box", b"mean", b"sliding"))
    assert show(folder).exit_code == 0
    assert (folder / "study.svg").read_bytes() == first
    shorter = "".join(json.dumps(one) + "\n" for one in LINES[1:])
    (folder / "results.jsonl").write_text(shorter)
    assert show(folder).exit_code == 0
    assert (folder / "study.svg").read_bytes().count(b"<use") == first.count(b"<use") - 4  # a dot of each column


def test_the_trade_off_is_of_the_type_that_tells_arms_apart(folder):
    assert show(folder).exit_code == 0
    drawn = (folder / "parameters.svg").read_text()
    assert all(f"<!-- {name} -->" in drawn for name in ("presence", "mean", "mlp", "crop", "sliding"))
    assert not any(f"<!-- {name} -->" in drawn for name in ("position", "box"))


@pytest.mark.parametrize(
    ("lines", "learnt", "apart"),
    [
        (LINES, True, True),
        ([line("crop", 0, 0.5, 0.49, 0.1)], False, True),  # presence below twice a quarter
        ([line("crop", 0, 0.5, 0.5, 0.1), line("pool", 0, 0.2, 0.5, 0.1)], True, True),
        ([line("crop", 0, 0.96, 0.6, 0.1), line("pool", 0, 0.95, 0.5, 0.1)], True, False),
        ([line("crop", 0, 0.96, 0.6, 0.1), line("pool", 0, 0.94, 0.5, 0.1)], True, True),
        # the best by its mean over types, which is beyond guessing on one alone
        ([line("crop", 0, 1.0, 0.4, 0.03), line("pool", 0, 0.3, 0.5, 0.1)], False, True),
    ],
)
def test_both_checks(lines, learnt, apart):
    checks = summarise(lines).checks()
    assert [check.holds for check in checks] == [learnt, apart]
    assert set(checks[0].by_type) == set(CHANCE)


def test_nothing_to_show(tmp_path):
    out = show(tmp_path)
    assert (out.exit_code, "there is no result yet" in out.stderr) == (1, True)
    (tmp_path / "results.jsonl").write_text('{"arm": "crop"}\n')
    out = show(tmp_path)
    assert (out.exit_code, "line 1 is no result" in out.stderr) == (1, True)


def test_a_line_is_added_after_one_that_was_cut_off(tmp_path):
    path = tmp_path / "results.jsonl"
    results = Results(path, {"images": 8})
    results.add(LINES[0])
    with path.open("a") as file:
        file.write('{"arm": "mlp", "se')
    assert len(read_lines(path)) == 1
    again = Results(path, {"images": 8})
    again.add(LINES[1])
    assert [one["arm"] for one in read_lines(path)] == ["crop", "mlp"]
    assert again.done == {Job("crop", 1), Job("mlp", 0)}
    with pytest.raises(TrainingError, match=r"results of another study: images was 8 and is 16. Give another --out"):
        Results(path, {"images": 16})


def test_the_time_left_is_that_of_the_runs_before(tmp_path):
    from rich.console import Console

    results = Results(tmp_path / "results.jsonl", {})
    with Progressing(results, 5, 4, 2, Console(stderr=True), lambda job: None) as watcher:
        watcher.started(Job("crop", 1))
        assert watcher.time_left() == ""
        watcher.finished(Job("crop", 1), LINES[0])
        assert watcher.time_left() == "0:00:45 left"  # three runs of 30 s on two workers
        watcher.started(Job("mlp", 0))
        watcher.failed(Job("mlp", 0), "why")
        assert watcher.time_left() == "0:00:30 left"
    assert watcher.failures == {Job("mlp", 0): "why"}
