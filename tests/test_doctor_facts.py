"""How `sp-fast doctor` finds its facts: distributions, compiler, driver, devices, and what is named `kernels`."""

import stat
import sys
import types
from dataclasses import replace
from importlib.metadata import PackageNotFoundError, requires
from pathlib import Path

import pytest
import torch

from sp_fast.doctor import gather as gathering
from sp_fast.doctor.facts import Driver, KernelsModule, Own, Torch
from sp_fast.kernels.device import CHIPS, pretend

ROOT = Path(__file__).resolve().parent.parent


def script(path, text):
    path.write_text(f"#!{sys.executable}\n{text}")
    path.chmod(path.stat().st_mode | stat.S_IEXEC)
    return path


def test_minima_come_from_the_distribution(monkeypatch):
    found = gathering.own()
    assert found.requirements == tuple(requires("sp_fast"))
    assert any(words.startswith("torch>=") for words in found.requirements)
    assert found.python.startswith(">=3.")

    def missing(name):
        raise PackageNotFoundError(name)

    monkeypatch.setattr(gathering.importlib.metadata, "distribution", missing)
    assert gathering.own() == Own(found.version)


def test_installed_versions_and_doubles(tmp_path, monkeypatch):
    for version in ("9.0", "8.0"):
        info = tmp_path / version / f"Some_Thing-{version}.dist-info"
        info.mkdir(parents=True)
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: Some.Thing\nVersion: {version}\n")
        monkeypatch.syspath_prepend(tmp_path / version)
    found = gathering.installed()
    assert found["some-thing"] == ("8.0", "9.0")
    assert found["sp-fast"]
    assert len(found["numpy"]) == 1


def test_the_compiler_that_triton_would_call(tmp_path, monkeypatch):
    monkeypatch.delenv("CC", raising=False)
    found = gathering.compiler()
    assert (Path(found.command).name, found.error, found.headers) == ("gcc", None, True)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert gathering.compiler() == replace(found, command=None)
    clang = script(tmp_path / "clang", "import sys; sys.exit('clang: fault')")
    assert gathering.compiler() == replace(found, command=str(clang), error="clang: fault")
    monkeypatch.setenv("CC", "gcc -m64")  # triton takes it as one word
    assert "gcc -m64" in gathering.compiler().error
    monkeypatch.setattr(gathering, "TIMEOUT", 0.2)
    monkeypatch.setenv("CC", str(script(tmp_path / "slow", "import time; time.sleep(60)")))
    assert "timed out" in gathering.compiler().error


def test_headers_that_are_missing(tmp_path, monkeypatch):
    monkeypatch.setattr(gathering.sysconfig, "get_paths", lambda scheme: {"include": str(tmp_path)})
    found = gathering.compiler()
    assert not found.headers
    assert "Python.h" in found.error


class Nvml(types.ModuleType):
    """NVIDIA's bindings, with two GPUs or a fault."""

    NVMLError = type("NVMLError", (Exception,), {})
    NVMLError_LibraryNotFound = type("NVMLError_LibraryNotFound", (NVMLError,), {})

    def __init__(self, fault=None):
        super().__init__("pynvml")
        self.fault = fault

    def nvmlInit(self):
        if self.fault:
            raise self.fault

    nvmlSystemGetCudaDriverVersion = staticmethod(lambda: 12080)
    nvmlSystemGetDriverVersion = staticmethod(lambda: "570.124")
    nvmlDeviceGetCount = staticmethod(lambda: 2)
    nvmlDeviceGetHandleByIndex = staticmethod(lambda index: index)
    nvmlDeviceGetName = staticmethod(lambda handle: f"GPU {handle}")


@pytest.mark.parametrize(
    ("fault", "found"),
    [
        (None, Driver("570.124", "12.8", ("GPU 0", "GPU 1"))),
        (Nvml.NVMLError_LibraryNotFound("no"), None),
        (Nvml.NVMLError("Driver/library version mismatch"), Driver(error="Driver/library version mismatch")),
    ],
)
def test_the_driver_from_nvml(fault, found, monkeypatch):
    monkeypatch.setitem(sys.modules, "pynvml", Nvml(fault))
    assert gathering.driver() == found


SMI = """
Driver Version                            : 535.104.05
CUDA Version                              : 12.2

Attached GPUs                             : 1
GPU 00000000:00:04.0
    Product Name                          : Tesla T4
    Product Brand                         : NVIDIA
"""


def test_the_driver_from_its_tool(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "pynvml", None)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert gathering.driver() is None
    script(tmp_path / "nvidia-smi", f"print('''{SMI}''')")
    assert gathering.driver() == Driver("535.104.05", "12.2", ("Tesla T4",))
    script(tmp_path / "nvidia-smi", "import sys; print('Failed to initialize NVML'); sys.exit(18)")
    assert gathering.driver() == Driver(error="Failed to initialize NVML")


def test_gpus_that_torch_reaches(monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (3, 4))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA H200")
    with pretend(CHIPS[90]):
        cpu, gpu = gathering.places()
    assert {choice.name for choice in cpu.backends.values()} == {"torch"}
    assert {choice.name for choice in gpu.backends.values()} == {"triton"}
    assert (gpu.device, gpu.name, gpu.capability, gpu.free, gpu.total) == ("cuda:0", "NVIDIA H200", 90, 3, 4)
    monkeypatch.setattr(torch.version, "hip", "7.0")
    assert gathering.places()[1].capability is None  # 90 would mean another chip


def test_what_torch_says_where_it_finds_no_gpu(monkeypatch):
    def complain():
        __import__("warnings").warn("CUDA initialization: the driver is too old\nand more", stacklevel=1)

    monkeypatch.setattr(torch.cuda, "is_available", complain)
    assert gathering.torch_build() == Torch(
        torch.__version__, torch.version.cuda, torch.version.hip, "CUDA initialization: the driver is too old"
    )


def test_memory_of_the_host():
    found = gathering.host()
    assert found.cpu
    assert found.cores >= 1
    assert 2**27 < found.available < found.total


def test_kernels_is_looked_for_from_the_working_directory(tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    ours = gathering.kernels_module()
    assert (ours.found, ours.runs_code) == (str(ROOT / "kernels"), False)
    (tmp_path / "kernels.py").write_text("raise SystemExit('ran')")
    monkeypatch.chdir(tmp_path)
    assert gathering.kernels_module() == KernelsModule(str(tmp_path / "kernels.py"), True)
    site = tmp_path / "site"
    (site / "kernels").mkdir(parents=True)
    (site / "kernels" / "__init__.py").write_text("raise SystemExit('ran')")
    (site / "kernels-0.18.2.dist-info").mkdir()
    (site / "kernels-0.18.2.dist-info" / "METADATA").write_text(
        "Metadata-Version: 2.1\nName: kernels\nVersion: 0.18.2\n"
    )
    monkeypatch.syspath_prepend(site)
    hidden = gathering.kernels_module()
    assert hidden == KernelsModule(str(tmp_path / "kernels.py"), True, "0.18.2", str(site / "kernels"))
    monkeypatch.chdir(site.parent.parent)
    assert gathering.kernels_module() == replace(hidden, found=str(site / "kernels"))
