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
    _describe_each_type_once()


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


def _describe_each_type_once() -> None:
    """Every result of every operation spells out its type anew, number by number of its shape: a third of all time."""
    np_dtype, same_block = interpreter._get_np_dtype, tl.block_type.__eq__
    make_block, make_tensor = tl.block_type.__init__, tl.tensor.__init__
    np_dtypes, blocks, tensors = {}, {}, {}

    def np_dtype_once(dtype):
        if dtype.name not in np_dtypes:
            np_dtypes[dtype.name] = np_dtype(dtype)
        return np_dtypes[dtype.name]

    def block_once(self, element_ty, shape):
        key = (element_ty.name, *(getattr(side, "value", side) for side in shape))
        if key not in blocks:
            make_block(self, element_ty, shape)
            blocks[key] = dict(vars(self))
        vars(self).update(blocks[key], element_ty=element_ty)

    def tensor_once(self, handle, type):
        if type.name not in tensors:
            make_tensor(self, handle, type)
            tensors[type.name] = dict(vars(self))
        vars(self).update(tensors[type.name], handle=handle, type=type)

    def same_block_at_once(self, other):
        if isinstance(other, tl.block_type) and self.shape is other.shape:
            return self.element_ty == other.element_ty
        return same_block(self, other)

    interpreter._get_np_dtype = np_dtype_once
    tl.block_type.__init__, tl.tensor.__init__ = block_once, tensor_once
    tl.block_type.__eq__ = same_block_at_once
