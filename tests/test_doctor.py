"""`sp-fast doctor`: this machine from end to end, invented machines through its judgement, and what is printed."""

import io
import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from rich.console import Console

from sp_fast.attention import FLASH
from sp_fast.backend import Backend
from sp_fast.doctor import gather as gathering
from sp_fast.doctor.facts import Compiler, Driver, Facts, Host, KernelsModule, Own, Place, Torch
from sp_fast.doctor.findings import Finding, State
from sp_fast.doctor.gather import gather
from sp_fast.doctor.judge import TOPICS, judge
from sp_fast.doctor.report import print_report
from sp_fast.kernels.device import TYPES

ROOT = Path(__file__).resolve().parent.parent
STATED = ('torchvision>=0.26; extra == "vision"', "torch>=2.11", 'triton>=3.6; platform_system == "Linux"', "transformers>=5.17", "numpy", 'flash-attn; extra == "flash"',
          'nvidia-ml-py; extra == "bench"', 'colorama; platform_system == "Windows"')  # fmt: skip
VERSIONS = {"sp-fast": "0.1.0", "torch": "2.13.0", "triton": "3.7.1", "transformers": "5.23.0", "numpy": "2.4.6",
            "nvidia-ml-py": "13.0"}  # fmt: skip
GIB = 2**30
TRITON = Backend("triton", "auto: on an NVIDIA GPU")
ABSENT = dict.fromkeys(FLASH, "it is not installed") | {"sdpa": None}
CPU = Place("cpu", dict.fromkeys(TYPES, Backend("torch", "auto: the tensors are on cpu")))
H200 = Place("cuda:0", dict.fromkeys(TYPES, TRITON), "NVIDIA H200", 90, 100 * GIB, 140 * GIB)
# A machine with a GPU where nothing is amiss, and one without.
GPU_MACHINE = Facts(
    python="3.11.7",
    own=Own("0.1.0", "0.1.0", ">=3.11", STATED),
    installed={name: (version,) for name, version in VERSIONS.items()},
    torch=Torch("2.13.0+cu130", "13.0"),
    places=(CPU, H200),
    driver=Driver("580.65.06", "13.0", ("NVIDIA H200",)),
    compiler=Compiler("/usr/bin/gcc", "/usr/include/python3.11", True),
    host=Host("EPYC", 16, 128 * GIB, 100 * GIB),
    kernels=KernelsModule(),
    flash=ABSENT,
)
CPU_MACHINE = replace(GPU_MACHINE, torch=Torch("2.13.0+cpu"), places=(CPU,), driver=None)
MACHINES = {"gpu": GPU_MACHINE, "cpu": CPU_MACHINE}


def rows(facts, name):
    return [row for row in judge(facts).findings if row.name == name]


def row(facts, name):
    (found,) = rows(facts, name)
    return found


def with_versions(facts, **versions):
    """None takes a distribution away; underscores stand for hyphens."""
    changed = {name.replace("_", "-"): (version,) for name, version in versions.items() if version}
    gone = {name.replace("_", "-") for name, version in versions.items() if version is None}
    kept = {name: version for name, version in facts.installed.items() if name not in gone}
    return replace(facts, installed=kept | changed)


def run(*words, cwd=ROOT, **environment):
    command = [sys.executable, "-m", "sp_fast", "doctor", *words]
    return subprocess.run(command, cwd=cwd, env=os.environ | environment, capture_output=True, text=True)


# This machine


def test_this_machine():
    result = run("--json")
    assert result.returncode == 0, result.stdout + result.stderr
    report = json.loads(result.stdout)
    assert report["ok"] is True
    assert all(set(found) == {"topic", "name", "found", "state", "remedy"} for found in report["findings"])
    assert {found["topic"] for found in report["findings"]} == set(TOPICS)
    found = {row["name"]: row["found"] for row in report["findings"]}
    assert found["torch"].startswith(torch.__version__)
    for name in ("python", "sp_fast", "triton", "transformers", "peft", "accelerate", "safetensors", "numpy",
                 "nvidia-ml-py", "torch build", "host", "NVIDIA driver", "C compiler", "Python headers",
                 "kernels module", "flash packages", "projector on cpu", "language model on cpu",
                 "vision tower"):  # fmt: skip
        assert found[name], name
    assert found["projector on cpu"] == "torch for float32, bfloat16, float16: auto: the tensors are on cpu"
    assert found["language model on cpu"].startswith("sdpa for float32, bfloat16, float16")


@pytest.fixture(scope="module")
def broken(tmp_path_factory):
    """Where torch cannot be imported, `kernels` is a stranger's, the placeholder is installed, and CC is nothing."""
    folder = tmp_path_factory.mktemp("broken")
    (folder / "torch").mkdir()
    (folder / "torch" / "__init__.py").write_text("raise ImportError('libcudart.so.13: cannot open shared object')")
    (folder / "kernels").mkdir()
    (folder / "kernels" / "__init__.py").write_text("raise SystemExit('the stranger ran')")
    (folder / "flash_attn_interface").mkdir()
    (folder / "flash_attn_interface" / "__init__.py").write_text("raise SystemExit('the placeholder ran')")
    info = folder / "flash_attn_interface-0.0.1.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: flash-attn-interface\nVersion: 0.0.1\n")
    (info / "top_level.txt").write_text("flash_attn_interface\n")
    path = f"{folder}{os.pathsep}{ROOT}"
    return folder, run("--json", cwd=folder, PYTHONPATH=path, CC=str(folder / "none"))


def test_a_broken_environment_is_examined_all_the_same(broken):
    _, result = broken
    assert result.returncode == 1
    assert "Traceback" not in result.stderr
    report = json.loads(result.stdout)
    assert report["ok"] is False
    found = {row["name"]: row for row in report["findings"]}
    assert [name for name, row in found.items() if row["state"] == "problem"] == ["torch"]
    assert "cannot be imported: ImportError: libcudart.so.13: cannot open shared object" in found["torch"]["found"]
    assert found["torch"]["remedy"] == (
        'pip install --force-reinstall "torch>=2.11" --index-url https://download.pytorch.org/whl/cpu'
    )
    assert found["transformers"]["state"] == "ok"
    assert not any("could not" in row["found"] for row in found.values())


def test_a_strangers_kernels_is_found_and_not_run(broken):
    folder, result = broken
    found = {row["name"]: row for row in json.loads(result.stdout)["findings"]}["kernels module"]
    assert found["state"] == "note"
    assert found["found"] == f"{folder / 'kernels'} is not Hugging Face's package, but transformers runs it"
    assert found["remedy"] == f"rename {folder / 'kernels'}, or start python elsewhere or with -P"


def test_the_placeholder_is_found_and_not_run(broken):
    _, result = broken
    found = {row["name"]: row for row in json.loads(result.stdout)["findings"]}["flash-attn-interface"]
    assert found["state"] == "note"
    assert "empty placeholder" in found["found"]
    assert found["remedy"] == "pip uninstall -y flash-attn-interface"


def test_a_compiler_that_fails_on_a_machine_without_gpu_is_a_note(broken):
    folder, result = broken
    found = {row["name"]: row for row in json.loads(result.stdout)["findings"]}["C compiler"]
    assert found["state"] == "note"
    assert str(folder / "none") in found["found"]
    assert found["found"].endswith("only needed with an NVIDIA GPU")


# Invented machines


@pytest.mark.parametrize("name", MACHINES)
def test_healthy_machines_have_no_problem_and_no_note(name):
    report = judge(MACHINES[name])
    assert report.ok
    assert [row for row in report.findings if row.state is not State.OK or row.remedy] == []


@pytest.mark.parametrize(
    ("package", "version", "found", "remedy"),
    [
        ("transformers", "5.16.9", "5.16.9, but >=5.17 is needed", 'pip install "transformers>=5.17"'),
        ("transformers", None, "not installed (>=5.17 is needed)", 'pip install "transformers>=5.17"'),
        ("numpy", None, "not installed (any version is needed)", 'pip install "numpy"'),
        ("triton", "3.5.1", "3.5.1, but >=3.6 is needed", 'pip install "triton>=3.6"'),
        ("triton", None, "not installed (>=3.6 is needed)", 'pip install "triton>=3.6"'),
    ],
)
def test_an_old_or_missing_package(package, version, found, remedy):
    facts = with_versions(GPU_MACHINE, **{package: version})
    assert row(facts, package) == Finding(package, found, State.PROBLEM, remedy)
    assert not judge(facts).ok
    without_gpu = row(with_versions(CPU_MACHINE, **{package: version}), package)
    assert without_gpu.state is (State.NOTE if package == "triton" else State.PROBLEM)


@pytest.mark.parametrize("version", ["5.17", "5.17.0", "6.0", "5.18.0.dev0"])
def test_new_enough_packages(version):
    facts = with_versions(GPU_MACHINE, transformers=version)
    assert row(facts, "transformers") == Finding("transformers", f"{version} (>=5.17)")


def test_torchs_own_word_counts_for_its_version():
    assert row(GPU_MACHINE, "torch").found == "2.13.0+cu130 (>=2.11)"
    old = replace(GPU_MACHINE, torch=Torch("2.10.1+cu128", "12.8"))
    assert row(old, "torch").state is State.PROBLEM


def test_what_is_optional_or_for_another_system_is_not_asked_for():
    assert row(with_versions(GPU_MACHINE, nvidia_ml_py=None), "nvidia-ml-py").state is State.NOTE
    assert rows(GPU_MACHINE, "colorama") == []


def test_an_old_python():
    found = row(replace(GPU_MACHINE, python="3.10.4"), "python")
    assert (found.state, found.found) == (State.PROBLEM, "3.10.4, but >=3.11 is needed")


def test_a_bare_checkout_skips_minima():
    facts = with_versions(replace(GPU_MACHINE, own=Own("0.1.0")), transformers="4.0", peft=None)
    found = row(facts, "sp_fast")
    assert (found.state, found.remedy) == (State.NOTE, "pip install .")
    assert "not installed as a distribution" in found.found
    assert row(facts, "transformers") == Finding("transformers", "4.0")
    assert row(facts, "peft").state is State.NOTE
    assert row(facts, "torch").found == "2.13.0+cu130"
    assert judge(facts).ok
    missing = replace(facts, torch=None, failures={"torch": "ModuleNotFoundError: No module named 'torch'"})
    assert row(missing, "torch").state is State.PROBLEM


def test_a_checkout_beside_another_installation():
    found = row(replace(GPU_MACHINE, own=Own("0.2.0", "0.1.0", ">=3.11", STATED)), "sp_fast")
    assert (found.state, found.found) == (State.NOTE, "0.2.0, beside an installed 0.1.0, whose minima are checked")


@pytest.mark.parametrize(
    ("machine", "cuda", "index"),
    [("cpu", None, "cpu"), ("gpu", "13.2", "cu130"), ("gpu", "12.4", "cu126"), ("gpu", None, "cu130")],
)
def test_missing_torch_and_the_build_that_suits_the_machine(machine, cuda, index):
    facts = with_versions(MACHINES[machine], torch=None)
    if machine == "gpu":
        facts = replace(facts, driver=replace(facts.driver, cuda=cuda))
    error = "ModuleNotFoundError: No module named 'torch'"
    facts = replace(facts, torch=None, places=(), failures={"torch": error, "places": error})
    remedy = f'pip install "torch>=2.11" --index-url https://download.pytorch.org/whl/{index}'
    assert row(facts, "torch") == Finding("torch", f"not installed ({error})", State.PROBLEM, remedy)
    report = judge(facts)
    assert not report.ok
    assert not any("could not" in found.found for found in report.findings)


def test_a_cpu_build_beside_a_gpu():
    facts = replace(GPU_MACHINE, torch=Torch("2.13.0+cpu"), places=(CPU,))
    remedy = 'pip install --force-reinstall "torch>=2.11" --index-url https://download.pytorch.org/whl/cu130'
    assert row(facts, "torch build") == Finding("torch build", "for the CPU, beside NVIDIA H200", State.PROBLEM, remedy)


def test_a_cuda_build_without_a_gpu():
    found = row(replace(CPU_MACHINE, torch=Torch("2.13.0+cu130", "13.0")), "torch build")
    assert found.state is State.NOTE
    assert found.remedy.endswith("whl/cpu")


@pytest.mark.parametrize(
    ("built", "driver", "found", "remedy"),
    [
        ("13.0", "12.4", "the driver supports CUDA up to 12.4", "whl/cu126, or install a newer NVIDIA driver"),
        ("12.6", "11.8", "the driver supports CUDA up to 11.8", "install a newer NVIDIA driver"),
        ("12.8", "12.4", "CUDA unknown error", "torch.cuda.init()"),
    ],
)
def test_a_gpu_that_torch_does_not_see(built, driver, found, remedy):
    facts = replace(
        GPU_MACHINE, torch=Torch("2.13.0", built, None, "CUDA unknown error"), places=(CPU,), visible_devices="0",
        driver=Driver("550", driver, ("NVIDIA H200",)),
    )  # fmt: skip
    problem = row(facts, "torch build")
    assert problem.state is State.PROBLEM
    assert found in problem.found
    assert remedy in problem.remedy
    assert (built == "12.6") is ("pip" not in problem.remedy) or built == "12.8"


def test_a_gpu_that_fails_when_torch_asks_it():
    error = "RuntimeError: CUDA error: out of memory"
    facts = replace(GPU_MACHINE, places=(), failures={"places": error})
    assert row(facts, "torch build").found.endswith(error)
    assert row(facts, "places").state is State.NOTE


@pytest.mark.parametrize("value", ["", "-1"])
def test_hidden_gpus_are_a_note(value):
    found = row(replace(GPU_MACHINE, places=(CPU,), visible_devices=value), "torch build")
    assert (found.state, found.remedy) == (State.NOTE, "unset CUDA_VISIBLE_DEVICES")


def test_a_build_for_rocm():
    found = row(replace(CPU_MACHINE, torch=Torch("2.13.0+rocm7", None, "7.0")), "torch build")
    assert found.state is State.NOTE
    assert "ROCm 7.0" in found.found


def test_a_driver_that_does_not_answer():
    facts = replace(GPU_MACHINE, places=(CPU,), driver=Driver(error="Driver/library version mismatch"))
    found = row(facts, "NVIDIA driver")
    assert found.state is State.PROBLEM
    assert "restart the machine" in found.remedy
    assert row(facts, "torch build").remedy is None  # no advice to take the CPU's build
    assert row(replace(facts, torch=Torch("2.13.0+cpu")), "NVIDIA driver").state is State.NOTE


def test_no_compiler():
    facts = replace(GPU_MACHINE, compiler=Compiler(None, "/usr/include/python3.11", True))
    found = row(facts, "C compiler")
    assert (found.state, found.remedy) == (State.PROBLEM, "apt-get install gcc (dnf install gcc), or set CC")
    assert not judge(facts).ok
    without = replace(facts, places=(CPU,), driver=None)
    assert row(without, "C compiler").state is State.NOTE
    assert judge(without).ok
    assert not judge(replace(facts, driver=None)).ok  # torch sees the GPU, as in a container without NVML
    assert not judge(replace(facts, places=(CPU,))).ok  # the driver does


def test_no_headers():
    facts = replace(GPU_MACHINE, compiler=Compiler("/usr/bin/gcc", "/usr/include/python3.11", False, "Python.h: no"))
    found = row(facts, "Python headers")
    assert (found.state, found.remedy) == (
        State.PROBLEM, "apt-get install python3.11-dev (dnf install python3.11-devel)",
    )  # fmt: skip
    assert row(facts, "C compiler").state is State.OK  # only one thing is to be mended
    elsewhere = replace(facts, compiler=Compiler("/usr/bin/gcc", "/usr/include/python3.11", False))
    assert row(elsewhere, "Python headers").state is State.OK


def test_a_compiler_that_fails():
    facts = replace(GPU_MACHINE, compiler=Compiler("ccache gcc", "/usr/include/python3.11", True, "No such file"))
    found = row(facts, "C compiler")
    assert found.state is State.PROBLEM
    assert "ccache gcc compiles no Python module: No such file" in found.found
    assert "export CC=gcc" in found.remedy


@pytest.mark.parametrize(
    ("kernels", "found", "state"),
    [
        (KernelsModule(), "none", State.OK),
        (KernelsModule("/site/kernels", True, "0.18.2", "/site/kernels"), "Hugging Face's, 0.18.2", State.OK),
        (KernelsModule(None, False, "0.18.2", "/site/kernels"), "Hugging Face's, 0.18.2", State.OK),
        (KernelsModule("/me/kernels", False), "every installed package goes before", State.OK),
        (KernelsModule("/me/kernels", True), "/me/kernels is not Hugging Face's package", State.NOTE),
        (
            KernelsModule("/me/kernels", True, "0.18.2", "/site/kernels"),
            "/me/kernels hides Hugging Face's 0.18.2",
            State.PROBLEM,
        ),
    ],
)
def test_what_is_named_kernels(kernels, found, state):
    result = row(replace(GPU_MACHINE, kernels=kernels), "kernels module")
    assert found in result.found
    assert result.state is state
    assert (result.remedy is None) is (state is State.OK)


def test_leftovers_of_triton_and_torch():
    facts = with_versions(GPU_MACHINE, pytorch_triton="3.4.0")
    found = row(facts, "triton leftovers")
    assert (found.state, found.found) == (State.PROBLEM, "triton and pytorch-triton are installed into one folder")
    assert found.remedy == 'pip uninstall -y triton pytorch-triton; pip install "triton>=3.6"'
    assert row(with_versions(CPU_MACHINE, pytorch_triton="3.4.0"), "triton leftovers").state is State.NOTE
    facts = replace(GPU_MACHINE, installed={**GPU_MACHINE.installed, "torch": ("2.13.0", "2.11.0")})
    assert row(facts, "torch leftovers").found == "2.13.0 and 2.11.0 are on the path, the first is imported"


@pytest.mark.parametrize(
    ("triton", "numpy", "noted"), [("3.6.0", "2.4.0", True), ("3.6.0", "2.3.5", False), ("3.7.1", "2.5.0", False)]
)
def test_the_interpreter_and_numpy(triton, numpy, noted):
    facts = with_versions(CPU_MACHINE, triton=triton, numpy=numpy)
    found = rows(facts, "triton's interpreter")
    assert [f.state for f in found] == [State.NOTE] * noted
    assert judge(facts).ok


def test_devices_and_what_is_chosen_on_them():
    slow = Backend("torch", "auto: the GPU has compute capability 7.5, below 8.0")
    t4 = Place("cuda:1", dict.fromkeys(TYPES, slow), "Tesla T4", 75, 10 * GIB, 16 * GIB)
    facts = replace(GPU_MACHINE, places=(CPU, H200, t4), flash=ABSENT | {"flash_attention_3": None})
    assert row(facts, "cuda:0").found == "NVIDIA H200, compute capability 9.0, 100.0 of 140.0 GiB free"
    assert row(facts, "projector on cuda:0").state is State.OK
    assert row(facts, "projector on cuda:0").found.startswith("triton for float32, bfloat16, float16: auto")
    assert row(facts, "projector on cuda:1").state is State.NOTE
    assert [found.found.split(":")[0] for found in rows(facts, "language model on cuda:0")] == [
        "sdpa for float32", "flash_attention_3 for bfloat16, float16",
    ]  # fmt: skip
    assert "below 8.0" in rows(facts, "language model on cuda:1")[1].found
    assert row(facts, "vision tower").found.startswith("sdpa: ")


def test_flash_packages():
    facts = with_versions(GPU_MACHINE, flash_attn="2.3.0", flash_attn_4="4.0.0b36", flash_attn_interface="0.0.1")
    facts = replace(facts, flash=ABSENT | {"flash_attention_4": None, "flash_attention_2": "flash-attn is too old"})
    assert row(facts, "flash-attn-4") == Finding("flash-attn-4", "4.0.0b36")
    assert row(facts, "flash-attn").state is State.NOTE
    assert "2.3.0, but it cannot be used: flash-attn is too old" in row(facts, "flash-attn").found
    assert row(facts, "flash-attn-interface").remedy == "pip uninstall -y flash-attn-interface"
    assert (
        rows(facts, "flash packages") == rows(with_versions(facts, flash_attn_interface=None), "flash packages") == []
    )
    assert rows(facts, "flash-attn-3") == []


# Crashes


def test_a_judgement_that_crashes_is_a_problem():
    def brittle(facts):
        yield Finding("never", "seen")
        raise KeyError("an invented fault")

    def bare(facts):
        raise ModuleNotFoundError("No module named 'packaging'", name="packaging")

    report = judge(CPU_MACHINE, {"a": (brittle,), "b": (bare,)})
    assert report.findings == [
        Finding("brittle", "could not be judged: KeyError: 'an invented fault'", State.PROBLEM),
        Finding("bare", "could not be judged: ModuleNotFoundError: No module named 'packaging'", State.PROBLEM, "pip install packaging"),
    ]  # fmt: skip
    assert not report.ok


def test_a_source_that_crashes_is_a_note(monkeypatch):
    def broken():
        raise OSError("an invented fault\nwith a second line")

    monkeypatch.setattr(gathering, "SOURCES", {"python": lambda: "3.11.7", "host": broken, "driver": broken})
    facts = gather()
    assert facts.failures == dict.fromkeys(("host", "driver"), "OSError: an invented fault")
    report = judge(facts)
    assert Finding("host", "could not be found out: OSError: an invented fault", State.NOTE) in report.findings
    assert rows(facts, "NVIDIA driver") == []  # "none" would be a guess


def test_nothing_known_at_all_is_no_crash():
    report = judge(Facts(python="3.11.7"))
    assert not any("could not be judged" in found.found for found in report.findings)


# What is printed


def test_the_table_names_everything_and_commands_can_be_copied():
    facts = replace(GPU_MACHINE, torch=Torch("2.13.0+cpu"), places=(CPU,), kernels=KernelsModule("/a[b]/kernels", True))
    text = io.StringIO()
    print_report(judge(facts), Console(file=text, width=80))
    lines = text.getvalue().splitlines()
    remedy = 'pip install --force-reinstall "torch>=2.11" --index-url https://download.pytorch.org/whl/cu130'
    assert f"torch build: {remedy}" in lines
    assert any(
        line.strip().startswith("kernels module note /a[b]/kernels") for line in map(" ".join, map(str.split, lines))
    )
    assert "kernels module: rename /a[b]/kernels, or start python elsewhere or with -P" in lines
    assert lines[-1] == "Needed here, but missing or wrong: torch build"
    for found in judge(facts).findings:
        assert any(
            line.split()[: len(found.name.split()) + 1] == [*found.name.split(), found.state] for line in lines
        ), found
    text = io.StringIO()
    print_report(judge(GPU_MACHINE), Console(file=text, width=80))
    assert text.getvalue().splitlines()[-1] == "Nothing needed is missing"
