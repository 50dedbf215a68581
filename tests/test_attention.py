"""Which attention is chosen, with invented packages and GPUs, and how packages are told apart."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from sp_fast.attention import FLASH, ORDER, find_attention, resolve_attention
from sp_fast.errors import BackendError

ROOT = Path(__file__).resolve().parent.parent
FA4, FA3, FA2 = "flash_attention_4", "flash_attention_3", "flash_attention_2"


def resolve(requested="auto", *installed, device="cuda", capability=90, dtype=torch.bfloat16, sdpa=None):
    """With these flash packages installed, on an H100 unless told otherwise."""
    available = {name: None if name in installed else f"{name} is absent" for name in FLASH} | {"sdpa": sdpa}
    return resolve_attention(requested, device=device, capability=capability, dtype=dtype, available=available)


def test_the_order():
    assert ORDER == (FA4, FA3, FA2, "sdpa", "eager")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    ("capability", "chosen"),
    [
        (75, ("sdpa", "sdpa", "sdpa", "sdpa")),
        (80, (FA2, FA2, FA2, "sdpa")),
        (86, (FA2, FA2, FA2, "sdpa")),
        (89, (FA2, FA2, FA2, "sdpa")),
        (90, (FA4, FA3, FA2, "sdpa")),
        (100, (FA4, FA2, FA2, "sdpa")),
        (103, (FA4, FA2, FA2, "sdpa")),
        (110, (FA4, FA2, FA2, "sdpa")),
        (120, (FA2, FA2, FA2, "sdpa")),
        (121, (FA2, FA2, FA2, "sdpa")),
    ],
)
def test_auto_takes_the_best_that_is_installed_and_suits_the_gpu(capability, chosen, dtype):
    for installed, name in zip(((FA4, FA3, FA2), (FA3, FA2), (FA2,), ()), chosen, strict=True):
        found = resolve("auto", *installed, capability=capability, dtype=dtype)
        assert found.name == name, installed
        assert found.reason.startswith("auto: ")
        assert capability / 10 == float(found.reason.split("compute capability ")[1].split(" ")[0].rstrip(",")), found


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float8_e4m3fn])
def test_no_flash_for_other_types(dtype):
    found = resolve("auto", *FLASH, dtype=dtype)
    assert found == ("sdpa", f"auto: {dtype} is neither torch.bfloat16 nor torch.float16")
    for name in FLASH:
        with pytest.raises(BackendError, match=f"{name}.*{dtype} is neither.*use attention='auto'"):
            resolve(name, *FLASH, dtype=dtype)


@pytest.mark.parametrize("device", ["cpu", "mps"])
def test_no_flash_elsewhere(device):
    assert resolve("auto", *FLASH, device=device, capability=None) == ("sdpa", f"auto: the model is on {device}")
    with pytest.raises(BackendError, match=f"the model is on {device}"):
        resolve(FA2, *FLASH, device=device, capability=None)
    with pytest.raises(BackendError, match=f"the model is on {device}"):  # to install it would not help
        resolve(FA2, device=device, capability=None)


def test_no_flash_on_another_makers_gpu():
    assert resolve("auto", *FLASH, capability=None) == ("sdpa", "auto: the GPU is not NVIDIA's")


def test_sdpa_says_whose_kernels_run():
    assert "torch's own flash or cuDNN kernel" in resolve("auto").reason


def test_eager_where_the_model_has_no_sdpa():
    assert resolve("auto", sdpa="the model has no sdpa") == ("eager", "auto: the model has no sdpa")
    assert resolve("auto", FA2, sdpa="the model has no sdpa").name == FA2


@pytest.mark.parametrize("name", ORDER)
def test_a_forced_choice_is_taken(name):
    assert resolve(name, *FLASH) == (name, "requested")


@pytest.mark.parametrize("name", FLASH)
def test_a_forced_choice_that_is_not_installed_fails(name):
    others = [other for other in FLASH if other != name]
    with pytest.raises(
        BackendError, match=f"attention='{name}' was requested, but {name} is absent: use attention='auto'"
    ):
        resolve(name, *others)


@pytest.mark.parametrize(
    ("name", "capability", "runs"),
    [(FA4, 80, False), (FA4, 90, True), (FA4, 120, True), (FA3, 75, False), (FA3, 80, True), (FA3, 90, True),
     (FA3, 100, False), (FA3, 120, False), (FA2, 75, False), (FA2, 80, True), (FA2, 120, True)],
)  # fmt: skip
def test_a_forced_choice_is_held_to_what_the_package_accepts(name, capability, runs):
    if runs:
        assert resolve(name, *FLASH, capability=capability).name == name
    else:
        with pytest.raises(BackendError, match=rf"{name}.*compute capability {capability // 10}\.{capability % 10}"):
            resolve(name, *FLASH, capability=capability)


def test_a_forced_sdpa_that_the_model_lacks_fails():
    with pytest.raises(BackendError, match="'sdpa' was requested, but the model has no sdpa"):
        resolve("sdpa", sdpa="the model has no sdpa")
    assert resolve("eager", sdpa="the model has no sdpa") == ("eager", "requested")


@pytest.mark.parametrize("name", ["flash", "flash_attention_1", "", "AUTO"])
def test_an_unknown_name_fails(name):
    with pytest.raises(
        BackendError, match=f"attention='{name}' is unknown; it must be 'auto' or one of flash_att.*eager"
    ):
        resolve(name, *FLASH)


def distribution(site, name, version, files):
    """As pip leaves it: the files, and metadata that lists them. Importing any of them would be noticed."""
    for path, text in files.items():
        (site / path).parent.mkdir(parents=True, exist_ok=True)
        (site / path).write_text(text)
    info = site / f"{name.replace('-', '_')}-{version}.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
    (info / "RECORD").write_text("".join(f"{path},,\n" for path in files))


EXPLODES = "raise SystemExit('imported')\n"
REAL = {
    "flash-attn": {"flash_attn/__init__.py": EXPLODES, "flash_attn/cute/interface.py": EXPLODES},
    "flash-attn-3": {"flash_attn_interface.py": EXPLODES + "def flash_attn_func(): ...\n"},
    "flash-attn-4": {"flash_attn/cute/__init__.py": EXPLODES},
    "flash-attn-interface": {"flash_attn_interface/__init__.py": '__version__ = "0.0.1"\n'},
}


@pytest.mark.parametrize(
    ("packages", "there"),
    [
        ({}, set()),
        ({"flash-attn": "2.8.3"}, {FA2}),
        ({"flash_attn": "2.8.3+cu12torch2.9cxx11abiTRUE"}, {FA2}),
        ({"flash-attn": "2.3.2"}, set()),
        ({"flash-attn-4": "4.0.0b36"}, {FA4}),
        ({"flash-attn": "2.8.3", "flash-attn-4": "4.0.0b36"}, {FA2, FA4}),
        ({"flash_attn_3": "3.0.0"}, {FA3}),
        ({"flash-attn-interface": "0.0.1"}, set()),
        ({"flash-attn-3": "3.0.0", "flash-attn-interface": "0.0.1"}, set()),
    ],
)
def test_packages_are_told_apart_without_importing_them(packages, there, tmp_path, monkeypatch):
    for name, version in packages.items():
        distribution(tmp_path, name, version, REAL[name.replace("_", "-")])
    monkeypatch.syspath_prepend(tmp_path)
    found = find_attention()
    assert list(found) == [*FLASH, "sdpa"]
    assert {name for name, missing in found.items() if missing is None} == there | {"sdpa"}
    placeholder = "flash-attn-interface" in packages
    assert ("an empty placeholder (pip uninstall -y flash-attn-interface)" in str(found[FA3])) is placeholder
    if packages.get("flash-attn") == "2.3.2":
        assert found[FA2].startswith("flash-attn 2.3.2 is older than 2.3.3 (pip install flash-attn")
    elif FA2 not in there:
        assert found[FA2].startswith("flash-attn is not installed (pip install flash-attn")


def test_a_placeholder_that_comes_later_hides_nothing(tmp_path, monkeypatch):
    for name in ("flash-attn-interface", "flash-attn-3"):
        distribution(tmp_path / name, name, "1.0", REAL[name])
        monkeypatch.syspath_prepend(tmp_path / name)
    assert find_attention()[FA3] is None


def test_a_folder_of_that_name_is_no_package(tmp_path, monkeypatch):
    """A clone of the repository beside a script, say."""
    (tmp_path / "flash_attn").mkdir()
    monkeypatch.syspath_prepend(tmp_path)
    assert find_attention()[FA2].startswith("flash-attn is not installed")


def test_transformers_sees_the_same_packages(tmp_path):
    """By its public functions, on a machine with a GPU, where only FlashAttention-4 and the placeholder are there."""
    for name, version in (("flash-attn-4", "4.0.0b36"), ("flash-attn-interface", "0.0.1")):
        distribution(tmp_path, name, version, REAL[name])
    code = """
import json, torch
torch.cuda.is_available = lambda: True
from transformers.utils import is_flash_attn_2_available, is_flash_attn_3_available, is_flash_attn_4_available
from sp_fast.attention import find_attention
ours = [missing is None for name, missing in find_attention().items() if name != "sdpa"]
print(json.dumps([ours, [is_flash_attn_4_available(), is_flash_attn_3_available(), is_flash_attn_2_available()]]))
"""
    environment = {**os.environ, "PYTHONPATH": f"{tmp_path}{os.pathsep}{ROOT}"}
    result = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    ours, theirs = json.loads(result.stdout)
    assert ours == theirs == [True, False, False]


def test_it_stays_light():
    code = "import sys, sp_fast.attention; sp_fast.attention.find_attention(); assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)
