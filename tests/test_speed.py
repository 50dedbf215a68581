"""The speed that is promised on a CPU, measured at the published widths; minutes, so part of the campaign only."""

import pytest

from sp_fast.bench.verify import Request, verify


@pytest.mark.campaign
def test_speed_at_the_published_widths():
    """Against the official form, in turns, medians of 5: forward 9x, forward and backward 15x, and the forward within
    1.1 times its bare matrix products."""
    report = verify(Request(backward=True, products=True), print)
    forward, backward = report.forward.to_dict(), report.backward.to_dict()
    print(report.to_dict())
    assert report.agrees
    assert forward["speedup"] >= 9
    assert backward["speedup"] >= 15
    assert forward["fast_ms"] <= 1.1 * forward["products_ms"]
