"""The tests of kernels under Triton's interpreter: TRITON_INTERPRET=1 python -m pytest tests/interpreter

They have a process of their own, because triton decides at its import whether kernels are interpreted.
"""

import os

import numpy as np
import pytest
import torch
import triton
import triton.language as tl
from triton.runtime import interpreter
from triton.runtime.interpreter import InterpreterError

from tests.interpreter import sanitizer


@triton.jit
def _count(numbers, n):
    for i in range(n):
        tl.store(numbers + i, i)


@pytest.fixture(scope="session", autouse=True)
def _sanitizer():
    if os.environ.get("TRITON_INTERPRET") != "1":
        pytest.fail("tests/interpreter needs TRITON_INTERPRET=1 in the environment", pytrace=False)
    try:
        _count[1,](torch.zeros(4, dtype=torch.int32), 4)
    except InterpreterError as error:  # triton 3.6 uses what numpy 2.4 removed
        pytest.skip(f"triton {triton.__version__} does not fit together with numpy {np.__version__}: {error}")
    sanitizer.install()
    _patch_the_language_once_a_launch()


def _patch_the_language_once_a_launch() -> None:
    """The interpreter patches triton.language anew at every call of a device function: half of all time."""
    patch_lang, launch = interpreter._patch_lang, interpreter.GridExecutor.__call__
    seen = {}

    def patch_once(fn):
        if id(fn.__globals__) not in seen:
            seen[id(fn.__globals__)] = patch_lang(fn)
        return seen[id(fn.__globals__)]

    def launch_anew(self, *args, **kwargs):
        seen.clear()
        return launch(self, *args, **kwargs)

    interpreter._patch_lang, interpreter.GridExecutor.__call__ = patch_once, launch_anew
