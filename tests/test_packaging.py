"""Installed or from a checkout, and with or without Hugging Face's `kernels`, everything imports as it should."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
SOURCES = ("sp_fast", "kernels", "bench", "training", "setup.py", "pyproject.toml", "README.md", "LICENSE", "NOTICE")

USE = """
import sys
from transformers import LlamaForCausalLM, Trainer
import sp_fast.kernels.windowed_matmul as op
from sp_fast import SPProjector, SPProjectorConfig
import sp_fast.bench.accuracy, torch
config = SPProjectorConfig(vision_width=4, spatial_width=4, text_width=4)
assert SPProjector(config)(torch.randn(1, 576, 4)).shape == (1, 582, 4)
assert "kernels.windowed_matmul" not in sys.modules
print(op.__file__)
"""
WITH_OTHER = "import kernels\nprint(kernels.__file__)\n"
WITHOUT_OTHER = "assert getattr(sys.modules.get('kernels'), '__file__', None) is None\nprint(None)\n"


@pytest.fixture(scope="module")
def installed(tmp_path_factory):
    """`pip install .` of a copy of the sources, into a folder of its own; needs no network."""
    source, target = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("site")
    for name in SOURCES:
        path = ROOT / name
        if path.is_dir():
            shutil.copytree(path, source / name, ignore=shutil.ignore_patterns("__pycache__"))
        elif path.is_file():
            shutil.copy(path, source / name)
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-index", "--no-build-isolation"]
    subprocess.run([*command, "--target", str(target), str(source)], check=True, capture_output=True, text=True)
    return target


@pytest.fixture(scope="module")
def other_kernels(tmp_path_factory):
    """A package named `kernels` that belongs to somebody else."""
    site = tmp_path_factory.mktemp("other")
    (site / "kernels").mkdir()
    (site / "kernels" / "__init__.py").write_text("__version__ = '0.0.1'\n")
    return site


def python(code, cwd, *path, safe=False):
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(map(str, path)), "PYTHONDONTWRITEBYTECODE": "1"}
    words = [sys.executable, *(["-P"] if safe else []), "-c", code]
    result = subprocess.run(words, cwd=cwd, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    return result.stdout.split()[-2:]


STARTS = ["root first on the path", "root on PYTHONPATH", "installed", "installed, from the root"]
# Each takes 5 s: beside the other daily (all other tests run without), every pair in the campaign.
DAILY = [("installed", True)]
PAIRS = [
    pytest.param(mode, other, marks=[] if (mode, other) in DAILY else [pytest.mark.campaign])
    for mode in STARTS
    for other in (False, True)
]


@pytest.mark.parametrize(("mode", "other"), PAIRS)
def test_kernels_never_clash(mode, other, installed, other_kernels, tmp_path):
    from_root = mode in ("root first on the path", "installed, from the root")
    home = installed if mode.startswith("installed") else ROOT
    extra = [other_kernels] if other else []
    code = USE + (WITH_OTHER if other else WITHOUT_OTHER)
    # From the root, "" comes first on the path, so the checkout wins over what is installed, unless -P leaves "" out.
    ours, theirs = python(code, ROOT if from_root else tmp_path, home, *extra, safe=mode == "installed, from the root")
    assert Path(ours).is_relative_to(home)
    assert theirs == (str(other_kernels / "kernels" / "__init__.py") if other else "None")


def test_the_installed_package_is_whole_and_keeps_to_itself(installed, tmp_path):
    assert {p.name for p in installed.iterdir() if p.is_dir()} >= {"sp_fast", "bin"}
    assert not (installed / "kernels").exists()
    assert not (installed / "bench").exists()
    assert (installed / "sp_fast" / "kernels" / "launch_table.json").is_file()
    for folder in ("kernels", "bench"):
        expected = {p.relative_to(ROOT / folder) for p in (ROOT / folder).rglob("*.py")}
        found = {p.relative_to(installed / "sp_fast" / folder) for p in (installed / "sp_fast" / folder).rglob("*.py")}
        assert found == expected
    environment = {**os.environ, "PYTHONPATH": str(installed)}
    for command in ([str(installed / "bin" / "sp-fast")], [sys.executable, "-m", "sp_fast"]):
        result = subprocess.run([*command, "--version"], cwd=tmp_path, env=environment, capture_output=True, text=True)
        assert result.returncode == 0, result.stderr
        assert result.stdout.strip() == __import__("sp_fast").__version__


def test_installed_verify_starts_its_workers(installed, tmp_path):
    """The worker processes find the package too; too little width for CLIP's features is said by the parent."""
    code = """
from pathlib import Path
import torch
from sp_fast import SPProjectorConfig
from sp_fast.bench.cases import Case
from sp_fast.bench.subject import ProjectorJob
from sp_fast.bench.worker import Worker
if __name__ == "__main__":
    config = SPProjectorConfig(vision_width=4, spatial_width=4, text_width=4)
    with Worker("fast", threads=1) as worker:
        worker.build(ProjectorJob("fast", config, torch.float32, "cpu", 0, Path(".")))
        case = Case("x", config, "whole", "forward", 1, "float32")
        print("ms", worker.ask("time", case, 0.0, 1).ms[0])
"""
    (tmp_path / "use.py").write_text(code)
    environment = {**os.environ, "PYTHONPATH": str(installed)}
    result = subprocess.run([sys.executable, "use.py"], cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert float(result.stdout.split()[1]) > 0


@pytest.mark.parametrize("module", ["sp_fast", "sp_fast.cli", "sp_fast.config", "sp_fast.geometry"])
def test_light_modules_do_not_import_torch(module):
    code = f"import sys, {module}\nassert 'torch' not in sys.modules and 'transformers' not in sys.modules\nprint(1, 2)"
    python(code, ROOT)


def imports(folder):
    """Every import line of our own modules in a folder, as (file name, line)."""
    for path in (ROOT / folder).rglob("*.py"):
        for line in map(str.strip, path.read_text().splitlines()):
            if line.startswith(("from sp_fast", "import sp_fast")):
                yield path.name, line


def test_imports_run_one_way():
    """kernels <- sp_fast <- bench, training; only the command line looks up, and only when a command runs."""
    inside, upward = list(imports("kernels")), list(imports("sp_fast"))
    assert inside
    assert upward
    assert all(line.split()[1].startswith("sp_fast.kernels.") for _, line in inside), inside
    up = [name for name, line in upward if "bench" in line or "training" in line]
    assert set(up) == {"cli.py"}, upward


def test_an_unknown_attribute_is_an_attribute_error():
    import sp_fast

    assert set(sp_fast.__all__) == set(dir(sp_fast))
    assert all(getattr(sp_fast, name) is not None for name in sp_fast.__all__)
    with pytest.raises(AttributeError, match="nothing"):
        _ = sp_fast.nothing
