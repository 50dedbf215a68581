"""Small projectors of every compact kind."""

from sp_fast import SPProjector, SPProjectorConfig
from tests.helpers import randomised

SMALL = SPProjectorConfig(  # a full one
    grid=6, kernel_sizes=(2, 4, 6), detail_kernel=4, vision_width=16, spatial_width=8, text_width=24
)
KINDS = {
    "bottleneck": {"rank": 4},
    "depthwise": {},
    "grouped": {"groups": 4},
    "separable": {"rank": 6},
    "nested": {"rank": 5},
    "resampled": {"rank": 4, "base_kernel": 4},
}
PYRAMIDS = {
    "crop": {"kernel_sizes": (2, 4, 6, 8, 10, 12)},
    "pool": {"kernel_sizes": (2, 4, 6, 8, 10, 12)},
    "sliding": {"sliding_windows": (2, 2), "map_size": 12},
}


def compact(kind, pyramid="crop", **overrides):
    """A configuration on 12x12 patches, with a strided detail convolution that overlaps itself."""
    detail = 6 if pyramid == "sliding" else 8
    widths = {"vision_width": 16, "spatial_width": 8, "text_width": 24}
    fields = {"grid": 12, "detail_kernel": detail, "detail_stride": 2, **widths, **KINDS[kind], **PYRAMIDS[pyramid]}
    return SPProjectorConfig(**{"extractor": kind, "pyramid": pyramid, **fields, **overrides})


def build(kind, pyramid="crop", dtype=None, seed=0, backend="torch", **overrides):
    """A projector of that configuration, random throughout."""
    return randomised(SPProjector(compact(kind, pyramid, **overrides), backend, dtype=dtype), seed).eval()
