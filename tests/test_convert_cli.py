"""`sp-fast convert`: the plan, its exit codes, and that a conversion that is killed leaves nothing."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from sp_fast.cli import app
from sp_fast.llava_sp.conversion import Conversion
from tests import official

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture
def folders(tmp_path):
    official.tower_folder(tmp_path / "tower")
    official.full(tmp_path / "source")
    return tmp_path


def run(path, *words, source="source", out="ours"):
    return CliRunner().invoke(app, ["convert", str(path / source), "--out", str(path / out), *map(str, words)])


def test_there_and_back(folders):
    result = run(folders, "--vision-tower", folders / "tower", "--shard-size", "100KB")
    assert result.exit_code == 0, result.output
    assert "full checkpoint, conv336_cropping_sfe_dfi, float16" in result.stdout
    assert "written: " in result.stdout
    result = run(folders, "--to", "official", "--json", source="ours", out="back")
    assert result.exit_code == 0, result.output
    report = json.loads(result.stdout)
    assert (report["to"], report["kind"], report["dtype"]) == ("official", "full", "float16")
    assert {part["name"] for part in report["parts"]} == {"vision tower", "projector", "language model"}
    assert (folders / "back" / "config.json").is_file()


def test_a_dry_run_says_what_would_be_written_and_writes_nothing(folders):
    before = sorted(folders.rglob("*"))
    words = ("--vision-tower", folders / "tower", "--shard-size", "100KB")
    result = run(folders, *words, "--dry-run", "--json")
    assert result.exit_code == 0, result.output
    assert sorted(folders.rglob("*")) == before
    planned = json.loads(result.stdout)
    assert "would write" in run(folders, *words, "--dry-run").stdout
    assert planned == json.loads(run(folders, *words, "--json").stdout)
    for name, size in planned["files"].items():
        if size is not None:
            assert 0 < (folders / "ours" / name).stat().st_size - size < 20_000, name  # the header
    assert sum(part["bytes"] for part in planned["parts"]) == sum(filter(None, planned["files"].values()))
    assert sum(part["parameters"] for part in planned["parts"]) * 2 == sum(part["bytes"] for part in planned["parts"])
    assert planned["peak_memory_estimate_bytes"] > max(filter(None, planned["files"].values()))


def test_errors_are_one_line_and_an_exit_code(folders):
    result = run(folders, "--vision-tower", folders / "tower", source="nothing")
    assert result.exit_code == 1
    assert result.stdout == ""
    assert result.stderr.strip().startswith("sp-fast convert: ")
    assert result.stderr.strip().count("\n") == 0
    for _ in range(2):  # the second time the target is there, which a dry run says too
        result = run(
            folders, "--vision-tower", folders / "tower", "--dry-run" if (folders / "ours").exists() else "--json"
        )
    assert result.exit_code == 1
    assert "--force" in result.stderr
    assert run(folders, "--vision-tower", folders / "tower", "--force").exit_code == 0
    assert run(folders, "--shard-size", "many").exit_code == 1


def test_ctrl_c(folders, monkeypatch):
    seen = []

    def interrupted(tensor):
        seen.append(tensor)
        if len(seen) == 5:
            signal.raise_signal(signal.SIGINT)
        return b""

    before = sorted(folders.rglob("*"))
    monkeypatch.setattr("sp_fast.llava_sp.shards._bytes", interrupted)
    assert run(folders, "--vision-tower", folders / "tower").exit_code == 130
    assert len(seen) == 5
    assert sorted(folders.rglob("*")) == before


SLOW = """
import sys, time
import sp_fast.llava_sp.shards as shards
from sp_fast.cli import app

def slowly(tensor, as_bytes=shards._bytes):
    print("writing", flush=True)
    time.sleep(0.2)
    return as_bytes(tensor)

shards._bytes = slowly
sys.argv[0] = "sp-fast"
app()
"""


def test_a_killed_conversion_leaves_nothing_at_the_target(folders):
    words = [sys.executable, "-c", SLOW, "convert", folders / "source", "--out", folders / "ours"]
    words += ["--vision-tower", folders / "tower"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    before = sorted(folders.iterdir())
    with subprocess.Popen(
        words, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
    ) as process:
        assert process.stdout.readline() == b"writing\n"
        process.kill()
    left = [path.name for path in folders.iterdir() if path not in before]
    assert len(left) == 1
    assert left[0].startswith(".ours.")  # hidden, and not the target


def test_help_states_the_policy_and_is_instant():
    result = CliRunner().invoke(app, ["convert", "--help"], env={"COLUMNS": "200"})
    assert "Rows of the vocabulary are never added or removed" in " ".join(result.stdout.split())
    code = "import sys; from sp_fast.cli import app; sys.exit('torch' in sys.modules or 'transformers' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0


def test_progress_counts_every_byte(folders, monkeypatch):
    seen = []
    write = Conversion.write
    monkeypatch.setattr(Conversion, "write", lambda self, force, advance: write(self, force, seen.append))
    assert run(folders, "--vision-tower", folders / "tower").exit_code == 0
    assert sum(seen) == (folders / "ours" / "model.safetensors").stat().st_size - _header(folders)


def _header(folders):
    with (folders / "ours" / "model.safetensors").open("rb") as file:
        return 8 + int.from_bytes(file.read(8), "little")
