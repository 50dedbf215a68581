"""The mutation campaign itself: what its operators change, what it samples, and that a survivor is never overlooked."""

import ast
import io

import pytest
from rich.console import Console

from tests.mutation.campaign import ROOT, SCHEDULE, TARGETS, all_mutants, campaign, main, run_tests, sample, stale
from tests.mutation.explained import EXPLAINED
from tests.mutation.operators import OPERATORS, mutants

EXAMPLES = {
    "comparison": ("if a < b >= c: x", "if a <= b >= c: x", "if a < b > c: x"),
    "comparison: identity": ("x = a is None", "x = a is not None"),
    "arithmetic": ("x = (a + b) // c", "x = (a + b) * c", "x = (a - b) // c"),
    "arithmetic: in place": ("x -= é", "x += é"),
    "dropped term": ("x = (a + b * c) % d", "x = (a + b * c)", "x = (a) % d", "x = ((b * c)) % d", "x = (a + b) % d", "x = (a + c) % d"),
    "sign": ("x = f(-a, 0.5, 0.0)", "x = f(a, 0.5, 0.0)", "x = f(-a, -0.5, 0.0)", "x = f(-a, 0.5, 1.0)"),
    "axis": ("x = f(a, axis=1, dim=0)", "x = f(a, axis=0, dim=0)", "x = f(a, axis=1, dim=1)"),
    "off by one": ("x = a[3]", "x = a[4]", "x = a[2]"),
    "off by one: slice": ("x = a[b:]", "x = a[b + 1:]"),
    "off by one: pointer": ("x = tl.load(p + q, mask=m)", "x = tl.load((p + q) + 1, mask=m)"),
    "swapped": ("x = a - (b + c)", "x = (b + c) - a"),
    "swapped: branches": ("x = tl.where(a, b + c, d) if e else f", "x = f if e else tl.where(a, b + c, d)", "x = tl.where(a, d, b + c) if e else f"),
    "swapped: factors": ("x = tl.dot(f(a), b, c)", "x = tl.dot(b, f(a), c)"),
    "swapped arguments": ("f(a, 1, b + c, d)", "f(1, a, b + c, d)"),
    "swapped arguments: of a launch": ("x = {'T': t, 'O': len(o), 'BLOCK_M': m}", "x = {'T': len(o), 'O': t, 'BLOCK_M': m}"),
    "mask": ("x = f(p, mask=(a & b)[:, None])", "x = f(p, mask=(a)[:, None])", "x = f(p, mask=(b)[:, None])", "x = f(p, mask=(a & b)[:, None] | True)"),
    "mask: condition": ("x = a < b and c", "x = (a < b)", "x = c"),
    "boolean": ("x = f(not a, ~b, True)", "x = f(a, ~b, True)", "x = f(not a, b, True)", "x = f(not a, ~b, False)"),
    "boolean: condition": ("if a and b: x", "if a or b: x", "if (not (a and b)): x"),
    "transpose": ("x = tl.trans(w) @ b.t() @ c.mT", "x = w @ b.t() @ c.mT", "x = tl.trans(w) @ b @ c.mT", "x = tl.trans(w) @ b.t() @ c"),
    "extreme": ("x = tl.minimum(a, min(b, c))", "x = tl.maximum(a, min(b, c))", "x = tl.minimum(a, max(b, c))"),
    "dropped statement": ("x = b\nx += a\nx = f(x)\ng(x)", "x = b\npass\nx = f(x)\ng(x)", "x = b\nx += a\npass\ng(x)", "x = b\nx += a\nx = f(x)\npass"),
    "dropped statement: early": ("def f():\n    return", "def f():\n    pass"),
}  # fmt: skip


def test_every_operator_has_an_example():
    assert {name.split(":")[0] for name in EXAMPLES} == set(OPERATORS)


@pytest.mark.parametrize("name", EXAMPLES)
def test_an_operator_changes_only_its_place(name):
    before, *expected = EXAMPLES[name]
    operator = name.split(":")[0]
    found = [mutant for mutant in mutants("x.py", before) if mutant.operator == operator]
    assert sorted(mutant.source for mutant in found) == sorted(expected)


LEFT_OUT = '''
"""1 + 1"""
from a import b
__all__ = ["a", "b"]
Plan = tuple[int | None, ...]
TILE_BYTES = 8 * 1024


@cache(1)
def f(x: int | None, STAGES: tl.constexpr = None) -> int | None:
    """2 - 1"""
    registers = 255 if x else None
    block_c = min(16, x)
    for t in tl.range(x, num_stages=2 * STAGES):
        y = zip(x, x, strict=True)
    raise ValueError(f"{1 + 1}" "0" % 1)


@dataclass
class Window:
    """3 - 1"""

    width: int | None
'''


def test_what_changes_no_result_is_left_out():
    assert [m.before for m in mutants("x.py", LEFT_OUT)] == []


@pytest.fixture(scope="module")
def by_file():
    return all_mutants(ROOT, TARGETS)


def test_every_mutant_is_python_and_lists_the_lines_that_it_changes(by_file):
    for file, found in by_file.items():
        original = (ROOT / file).read_text()
        statements, before = ast.parse(original).body, original.splitlines()
        assert len(found) >= 5, file
        for mutant in found:
            assert mutant.before != mutant.after, mutant.key
            lines = mutant.source.splitlines()
            longer = len(lines) - len(before)
            (own,) = (s for s in statements if s.lineno <= mutant.line <= s.end_lineno)
            ast.parse("\n".join(lines[own.lineno - 1 : own.end_lineno + longer]))
            assert lines[: own.lineno - 1] == before[: own.lineno - 1]
            assert lines[own.end_lineno + longer :] == before[own.end_lineno :]


def test_every_kernel_has_a_target():
    files = {str(path.relative_to(ROOT)) for path in (ROOT / "kernels").glob("*.py")}
    assert files - SCHEDULE == {file for file in TARGETS if file.startswith("kernels/")}, "a row in campaign.TARGETS?"
    assert files >= SCHEDULE


def test_a_sample_is_its_seeds(by_file):
    first = sample(by_file, 0, 70)
    assert first == sample(dict(reversed(by_file.items())), 0, 70) != sample(by_file, 1, 70)
    assert len(first) == len({(m.file, m.source) for m in first}) == 70
    assert {m.file for m in first} == set(TARGETS)
    assert set(sample(by_file, 0, 20)) < set(first)


def test_no_explanation_is_stale(by_file):
    assert stale(EXPLAINED, by_file) == []


FILE, TESTS = "kernels/tiny.py", "tests/test_tiny.py"


@pytest.fixture
def tiny(tmp_path, monkeypatch):
    """A project of one function, whose test is blind to equality, and what a campaign of it needs."""
    monkeypatch.setenv("PYTEST_DISABLE_PLUGIN_AUTOLOAD", "1")  # which take as long to load as all else together
    monkeypatch.setenv("PYTEST_PLUGINS", "pytest_timeout")
    for name, text in {
        FILE: "def reaches(a, b):\n    return not a < b\n",
        TESTS: "from kernels.tiny import reaches\n\n\ndef test_reaches():\n    assert reaches(2, 1) > reaches(1, 2)\n",
    }.items():
        (tmp_path / name).parent.mkdir()
        (tmp_path / name).write_text(text)
    console = Console(file=io.StringIO(), width=200)
    return console.file, {"root": tmp_path, "targets": {FILE: [TESTS]}, "console": console}


SURVIVOR = (FILE, "comparison", "return not a < b", "return not a <= b")


def test_a_survivor_fails_the_campaign_unless_it_is_explained(tiny):
    output, options = tiny
    assert campaign(0, 99, explained={}, **options) == 1
    assert "SURVIVED" in output.getvalue()
    assert "test_tiny.py::test_reaches" in output.getvalue()
    assert "2 mutants of 2, 1 killed, 0 explained, 1 survived" in output.getvalue()
    gone = (FILE, "comparison", "return a > b", "return a >= b")
    assert campaign(0, 99, explained={SURVIVOR: "equals are equal", gone: "was"}, **options) == 0
    assert "explained: equals are equal" in output.getvalue()
    assert f"stale explanation, no such mutant: {gone}" in output.getvalue()
    assert (options["root"] / FILE).read_text().endswith("return not a < b\n")  # only copies are mutated


def test_tests_that_fail_without_a_mutant_are_said(tiny):
    output, options = tiny
    (options["root"] / TESTS).write_text("def test_never():\n    assert False\n")
    assert campaign(0, 1, explained={}, **options) == 2
    assert f"The tests of {FILE} fail without a mutant" in output.getvalue()


@pytest.mark.parametrize(
    ("body", "limits", "killer"),
    [
        ("while True: pass", {"limit": 2}, "timeout: 2 s of the processor"),
        ("import time; time.sleep(60)", {"wall": 3}, "timeout: 3 s"),
        ("import os; os._exit(7)", {}, "crash: exit code 7"),
        ("1 +", {}, TESTS),
    ],
)
def test_timeouts_and_crashes_are_named(tiny, body, limits, killer):
    root = tiny[1]["root"]
    (root / TESTS).write_text(f"def test_it():\n    {body}\n")
    assert run_tests(root, [TESTS], **limits)[0] == killer


def test_the_sample_is_listed(capsys):
    assert main(["--list", "--count", "3", "--file", "sp_fast/geometry.py"]) == 0
    assert capsys.readouterr().out.count("sp_fast/geometry.py:") == 3


@pytest.mark.campaign
def test_a_mutant_of_one_file():
    assert campaign(0, 1, files=["sp_fast/geometry.py"]) == 0


@pytest.mark.campaign
def test_campaign():
    assert campaign(seed=0, count=60) == 0
