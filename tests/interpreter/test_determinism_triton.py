"""The same bits again on the Triton kernels, as in tests/test_determinism.py."""

import pytest

from tests.test_determinism import check


@pytest.mark.parametrize(("repeats", "processes"), [(2, 1), pytest.param(50, 5, marks=pytest.mark.campaign)])
def test_not_a_bit_differs(repeats, processes):
    check("triton", repeats, processes)
