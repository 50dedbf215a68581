"""What others wrap around a projector, as in tests/test_wrapping.py, on the Triton kernels."""

import pytest

pytest.register_assert_rewrite("tests.test_wrapping")

from tests import test_wrapping  # noqa: E402
from tests.test_wrapping import *  # noqa: E402, F403

# An interpreted step takes a while: those in which it matters what calls the kernels, and when.
JOBS = ["ddp, static graph", "ddp, accumulation", "fsdp of parts", "fsdp of parts in float16"]


@pytest.fixture(scope="module")
def backend():
    return "triton"


@pytest.fixture(scope="module")
def jobs():
    return JOBS


@pytest.mark.campaign  # on plain torch every day
@pytest.mark.parametrize("job", JOBS)
def test_two_processes(failures, job):
    test_wrapping.test_two_processes(failures, job)
