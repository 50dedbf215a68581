"""`sp-fast train score`: a model's answers to the spatial task, in batches as one by one, and what it scored."""

import json
from types import SimpleNamespace

import pytest
import torch
from typer.testing import CliRunner

from sp_fast.cli import app
from sp_fast.errors import ConfigError, DataError, ResourceError
from sp_fast.training.task.answers import answer, read_questions
from sp_fast.training.task.make import Task, make_task
from sp_fast.training.task.words import TYPES
from tests import tiny


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Of two images, their fourteen questions, and a model."""
    folder = tmp_path_factory.mktemp("score")
    make_task(Task(train=1, held_out=2, captions=1, size=64), folder / "task")
    model = tiny.model_of()
    model.save_pretrained(folder / "model")
    tiny.processor_of(model.config).save_pretrained(folder / "model")
    return folder


@pytest.fixture
def model():
    return tiny.model_of()


def said_by(model, folder, **kwargs):
    rows = read_questions(folder / "task")
    return rows, answer(model, tiny.processor_of(model.config), rows, folder / "task", **kwargs)


def longest(rows, kind):
    """Tokens, which are bytes: a space, the longest answer, and four more."""
    return max(len(row["answer"]) for row in rows if row["type"] == kind) + 5


def run(*words):
    return CliRunner().invoke(app, list(map(str, words)))


def test_a_batch_says_what_generate_says(model, folder):
    rows, said = said_by(model, folder, batch_size=3)
    for kind in TYPES:
        asked = [
            {"prompt": row["conversations"][0]["value"].removeprefix("<image>\n"), "image": row["image"]}
            for row in rows
            if row["type"] == kind
        ]
        (folder / "task" / "asked.jsonl").write_text("\n".join(map(json.dumps, asked)))
        words = ("--model", folder / "model", "--batch", folder / "task" / "asked.jsonl", "--batch-size", 1, "--json")
        out = run("generate", *words, "--max-new-tokens", longest(rows, kind))
        alone = [json.loads(line)["text"] for line in out.stdout.splitlines()]
        assert [text for row, text in zip(rows, said, strict=True) if row["type"] == kind] == alone
    assert len(set(said)) > 10  # an answer in another's place would show


def test_questions_that_run_together_are_alike(model, folder, monkeypatch):
    calls, generate, seen = [], model.generate, []

    def watched(**kwargs):
        calls.append((kwargs["max_new_tokens"], kwargs["attention_mask"].sum(1).tolist()))
        return generate(**kwargs)

    monkeypatch.setattr(model, "generate", watched)
    torch.manual_seed(7)
    state = torch.get_rng_state()
    rows, _ = said_by(model, folder, batch_size=2, progress=lambda *done: seen.append(done))
    kinds = [kind for kind in dict.fromkeys(row["type"] for row in rows) for _ in range(1 + (kind == "presence"))]
    assert [most for most, _ in calls] == [longest(rows, kind) for kind in kinds]
    lengths = [length for kind, (_, some) in zip(kinds, calls, strict=True) for length in some if kind == "presence"]
    assert len(lengths) == 4
    assert lengths == sorted(lengths, reverse=True)
    assert seen == [(i, 16) for i in range(1, 17)]
    assert torch.equal(torch.get_rng_state(), state)


def test_what_cannot_be_asked_is_said(model, folder, monkeypatch):
    with pytest.raises(ConfigError, match=r"in training mode, .* call model.eval\(\) first"):
        said_by(model.train(), folder)
    model.eval()
    with pytest.raises(ConfigError, match="batch_size=0"):
        said_by(model, folder, batch_size=0)
    short = tiny.model_of(max_position_embeddings=300)
    with pytest.raises(
        DataError, match=r"question held_out-\d+-\w+ with its image and its answer takes up to 3\d\d tok"
    ):
        said_by(short, folder)
    rows = [{**read_questions(folder / "task")[0], "image": "../model/config.json"}]
    with pytest.raises(DataError, match="leads out of"):
        answer(model, tiny.processor_of(model.config), rows, folder / "task")

    def full(**kwargs):
        raise torch.OutOfMemoryError

    monkeypatch.setattr(model, "generate", full)
    with pytest.raises(
        ResourceError, match="64 questions together do not fit into the memory of cpu: choose a smaller"
    ):
        said_by(model, folder)


def change(rows, **changes):
    return json.dumps([row | changes for row in rows])


@pytest.mark.parametrize(
    "broken",
    [
        lambda rows: "[",
        lambda rows: "{}x",
        lambda rows: '["a"]',
        lambda rows: change(rows, type="size"),
        lambda rows: change(rows, type="box", answer="left"),
        lambda rows: change(rows, conversations=[]),
        lambda rows: json.dumps([{k: v for k, v in row.items() if k != "id"} for row in rows]),
    ],
)
def test_what_is_no_task_is_said_before_the_model_loads(broken, folder, tmp_path):
    (tmp_path / "held_out.json").write_text(broken(read_questions(folder / "task")))
    out = run("train", "score", "--model", tmp_path / "nowhere", "--task", tmp_path)
    assert out.exit_code == 1
    assert "sp-fast train score: " in out.stderr
    assert "holds no questions of the spatial task" in out.stderr
    assert "give a folder that sp-fast train make-task has made" in out.stderr


@pytest.fixture
def oracle(monkeypatch):
    """Says what is right, and always no."""

    def answers(ready, requests, settings):
        for request in requests:
            rows = json.loads((request.images[0].parents[2] / "held_out.json").read_text())
            (right,) = [row["answer"] for row in rows if row["id"] == request.id]
            yield SimpleNamespace(text="No." if right == "yes" else right)

    monkeypatch.setattr("sp_fast.llava_sp.answering.answer", answers)


def test_the_command(folder, oracle, tmp_path):
    words = (
        "train",
        "score",
        "--model",
        folder / "model",
        "--task",
        folder / "task",
        "--out",
        tmp_path / "a" / "b.jsonl",
    )
    out = run(*words, "--json")
    assert out.exit_code == 0, out.output
    found = json.loads(out.stdout)["types"]
    assert list(found) == list(TYPES)
    assert {kind: one["accuracy"] for kind, one in found.items()} == dict.fromkeys(TYPES, 1.0) | {"presence": 0.0}
    assert found["presence"]["chance"] == {"uniform": 0.25, "constant": 0.0}
    assert {one["n"] for one in found.values()} == {2}
    lines = [json.loads(line) for line in (tmp_path / "a" / "b.jsonl").read_text().splitlines()]
    for line, row in zip(lines, read_questions(folder / "task"), strict=True):
        right = row["answer"] != "yes"
        said = row["answer"] if right else "No."
        assert line == {"id": row["id"], "type": row["type"], "expected": row["answer"], "said": said, "right": right}
    assert list((tmp_path / "a").iterdir()) == [tmp_path / "a" / "b.jsonl"]

    before = (tmp_path / "a" / "b.jsonl").read_text()
    out = run(*words)
    assert (out.exit_code, out.stdout) == (1, "")
    assert "is there already: write to another file, or overwrite it with --force" in out.stderr
    assert (tmp_path / "a" / "b.jsonl").read_text() == before
    out = run(*words, "--force", "--images", 1)
    assert out.exit_code == 0
    assert all(text in out.stdout for text in (*TYPES, "100.0%", "0.0%", "25.0%", "11.1%"))
    assert "cpu, float32 (auto: the files' own), attention" in out.stderr
    assert (tmp_path / "a" / "b.jsonl").read_text() == "".join(before.splitlines(keepends=True)[:8])
    for place, message in ((tmp_path, "is a folder: name a file in it"), ("/dev/null/a", "cannot be written")):
        out = run(*words[:-1], place, "--force")
        assert out.exit_code == 1
        assert message in out.stderr


def test_an_interruption_writes_nothing(folder, tmp_path, monkeypatch):
    def interrupt(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr("sp_fast.llava_sp.answering.answer", interrupt)
    words = ("--model", folder / "model", "--task", folder / "task", "--out", tmp_path / "a.jsonl")
    assert run("train", "score", *words).exit_code == 130
    assert not list(tmp_path.iterdir())
