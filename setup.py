"""Packaging: kernels/, bench/ and training/ stand at the top of the repository, but are installed inside sp_fast.

A top-level importable `kernels` would shadow the package of that name that transformers looks for.
"""

import re
from pathlib import Path

from setuptools import find_packages, setup

ROOT = Path(__file__).parent
INSIDE = ("kernels", "bench", "training")

package_dir = {"sp_fast": "sp_fast"}
packages = ["sp_fast", *(f"sp_fast.{name}" for name in find_packages("sp_fast"))]
for folder in INSIDE:
    for path in [ROOT / folder, *(ROOT / folder).rglob("*")]:
        if path.is_dir() and any(path.glob("*.py")):
            name = ".".join(["sp_fast", *path.relative_to(ROOT).parts])
            packages.append(name)
            package_dir[name] = str(path.relative_to(ROOT))

setup(
    name="sp_fast",
    version=re.search(r'"(.+)"', (ROOT / "sp_fast" / "version.py").read_text().split("__version__")[1]).group(1),
    description="LLaVA-SP's projector, number for number, at the speed that the memory allows",
    long_description=(ROOT / "README.md").read_text(),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    license_files=["LICENSE", "NOTICE"],
    python_requires=">=3.11",
    packages=packages,
    package_dir=package_dir,
    package_data={"sp_fast.kernels": ["*.json"], "sp_fast.training": ["recipes/*.yaml", "launch/*.yaml"]},
    entry_points={"console_scripts": ["sp-fast = sp_fast.cli:app"]},
    install_requires=[
        "torch>=2.11",
        "triton>=3.6; platform_system == 'Linux'",
        "transformers>=5.17",
        "peft",
        "accelerate",
        "safetensors",
        "numpy",
        "packaging",
        "pillow",
        "pyyaml",
        "protobuf",  # with sentencepiece, for language models whose tokenizer is a tokenizer.model, as Vicuna's
        "sentencepiece",
        "typer",
        "rich",
        "matplotlib",
    ],
    extras_require={
        "flash": ["flash-attn"],
        "bench": ["nvidia-ml-py", "pytest-benchmark"],
        "data": ["datasets"],
        "deepspeed": ["deepspeed"],
        "dev": ["pytest", "pytest-timeout", "hypothesis", "ruff"],
    },
)
