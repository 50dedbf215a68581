"""`sp-fast bench static`, the command: what it prints, its exit codes, and how it ends."""

import json
import multiprocessing
import re

import pytest
import triton
from typer.testing import CliRunner

from sp_fast.bench import shipped, static
from sp_fast.bench.static import judge, to_json
from sp_fast.cli import app
from sp_fast.kernels.device import Chip
from tests.static_cases import judged_once, planted, shipped_for

pytestmark = pytest.mark.usefixtures("fewer_batches")


def bench(*arguments):
    return CliRunner().invoke(app, ["bench", "static", *arguments])


@pytest.fixture
def small(monkeypatch):
    """Two quick kernels in place of all."""
    found = [shipped_for(90, 1, kernel=kernel) for kernel in ("windowed_matmul_reduce", "spatial_attend_fwd")]
    monkeypatch.setattr(shipped, "configurations", lambda *_: found)
    return found


def test_the_command_without_a_breach(small):
    """With a real process."""
    small.pop()
    result = bench("--json")
    assert result.exit_code == 0, result.output
    values = json.loads(result.stdout)
    assert values["environment"]["triton"] == triton.__version__
    (reduce,) = values["configurations"]
    assert (reduce["kernel"], reduce["chip"], reduce["dtype"]) == ("windowed_matmul_reduce", 90, "bfloat16")
    assert "crop-dfi" in reduce["variants"]
    assert 1 in reduce["buckets"]
    assert reduce["registers"] > 0 == reduce["spills"]
    assert any(opcode.startswith("LDG") for opcode in reduce["loops"][0])
    assert (reduce["bytes_in_flight"], reduce["breaches"]) == (None, [])


def test_the_command_with_breaches(small, monkeypatch):
    """They are listed last, by name."""
    monkeypatch.setattr(static, "judge_all", lambda found, console: list(map(judge, found)))  # in this process
    attend = small[1]
    small[1:] = [planted(attend, chip=Chip(90, 1024)), planted(attend, {"BLOCK_K": 48})]
    result = bench()
    assert result.exit_code == 1, result.output
    *_, no_room, no_code, last = result.stdout.splitlines()
    with_attention = "crop-dfi+pool-dfi+compact-50m+depthwise+grouped+separable+nested"
    label = f"spatial_attend_fwd sm_90 bfloat16 {with_attention}, B=1 (bucket 1 2 4 8 16 32 64 large)"
    assert re.match(rf"{re.escape(label)}: \d+ bytes of shared memory, where a block on sm_90 has 1024:", no_room)
    assert no_code.startswith(f"{label}: it does not compile: ")
    assert last == "3 configurations, 2 breaches"


def test_ctrl_c_leaves_no_process(small, monkeypatch):
    def interrupted(futures):
        raise KeyboardInterrupt

    monkeypatch.setattr(static, "as_completed", interrupted)
    small.pop()
    result = bench()
    assert (result.exit_code, result.stdout) == (130, "")
    assert multiprocessing.active_children() == []


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--chip", "91"), "'91' is no chip; known: 80, 86, 89, 90, 100, 120"),
        (("--dtype", "bf16"), "'bf16' is no dtype; did you mean 'bfloat16'?; known: float32, bfloat16, float16"),
    ],
)
def test_unknown_names_are_exit_code_2(arguments, message):
    result = bench(*arguments)
    assert result.exit_code == 2
    assert message in result.stderr
    assert result.stdout == ""


def test_nothing_is_compiled_in_the_interpreter(monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    result = bench("--chip", "90")
    assert result.exit_code == 2
    assert "TRITON_INTERPRET=1 interprets kernels, and compiles none: unset it" in result.stderr


def test_json_has_what_does_not_compile():
    found = judged_once(planted(shipped_for(90, 1), {"BLOCK_D": 96}))
    (values,) = json.loads(to_json([found], {}))["configurations"]
    assert "registers" not in values
    assert len(values["breaches"]) == 1
