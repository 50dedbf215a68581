"""sp_fast: the LLaVA-SP projector, number for number, at the speed that the memory allows.

Its names are loaded on first use, so that importing the package (and ``sp-fast --help``) does not import torch.
"""

from __future__ import annotations

import importlib
from pathlib import Path

from sp_fast.version import __version__

# kernels/, bench/ and training/ stand at the top of the repository but are imported (and installed) as sp_fast.kernels
# and so on: a top-level importable `kernels` would shadow Hugging Face's package of that name. In a source checkout
# the repository's root therefore joins this package's search path.
_root = Path(__file__).resolve().parent.parent
if not (Path(__file__).parent / "kernels").is_dir() and (_root / "kernels" / "windowed_matmul.py").is_file():
    __path__.append(str(_root))

_HOMES = {
    "SPProjectorConfig": "sp_fast.config",
    "SPProjector": "sp_fast.projector",
    "ReferenceSPProjector": "sp_fast.reference",
    "CheckpointError": "sp_fast.errors",
    "compile_model": "sp_fast.llava_sp.compile",
}

__all__ = [
    "CheckpointError",
    "ReferenceSPProjector",
    "SPProjector",
    "SPProjectorConfig",
    "__version__",
    "compile_model",
]


def __getattr__(name: str) -> object:
    if name in _HOMES:
        return getattr(importlib.import_module(_HOMES[name]), name)
    raise AttributeError(f"module 'sp_fast' has no attribute {name!r}")


def __dir__() -> list[str]:
    return __all__
