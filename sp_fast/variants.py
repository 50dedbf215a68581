"""The official code's variants as configurations, and the leftovers in it that cannot be one.

The official source names a variant by a string that two files must agree on; here each string is one row of data.
"""

from __future__ import annotations

from typing import Any

SIX = (4, 8, 12, 16, 20, 24)
_MULTI_DETAIL = {"detail_kernel": (12, 9, 5), "detail_values": (0, 0, 2)}  # the mid branch uses the small one's values
_TRANSFORMER = {"extractor": "transformer", "detail_kernel": None, "spatial_width": 1024}

OFFICIAL: dict[str, dict[str, Any]] = {
    "conv336": {"pyramid": "crop", "detail_kernel": None},
    "conv336_cropping_sfe_dfi": {"pyramid": "crop"},
    "conv336_pooling_sfe": {"pyramid": "pool", "detail_kernel": None},
    "conv336_adptive_pooling_fuse_49": {"pyramid": "pool"},
    "conv336_3_tokens": {"pyramid": "crop", "kernel_sizes": (8, 16, 24), "detail_kernel": None},
    "conv336_12_tokens": {"pyramid": "crop", "kernel_sizes": tuple(range(2, 25, 2)), "detail_kernel": None},
    "conv336_24": {"pyramid": "crop", "kernel_sizes": (24,), "detail_kernel": None},
    "conv224": {"pyramid": "crop", "kernel_sizes": tuple(range(2, 17, 2)), "detail_kernel": None, "grid": 16},
    "conv336_conv_49": {"pyramid": "crop", "kernel_sizes": (), "detail_kernel": 12, "map_size": 24},
    "conv336_crop_multifuse_q": {"pyramid": "crop", "detail_fusion": "concat", **_MULTI_DETAIL},
    "conv336_adptive_pooling_multifuse_q": {
        "pyramid": "pool", "map_size": 24, "detail_fusion": "sum", "nan_to_num": ("logits",), "spatial_bias": True,
        **_MULTI_DETAIL,
    },
    "tfm336": {"pyramid": "crop", **_TRANSFORMER},
    "tfm336_adptive_pooling": {"pyramid": "pool", "map_size": 24, **_TRANSFORMER},
}  # fmt: skip

# Short names for the command line; "sliding" is the paper's Tab. 5, for which no official code was published, "mlp"
# LLaVA-1.5's mlp2x_gelu: what spatial tokens are held against.
SHORT: dict[str, dict[str, Any]] = {
    "crop": OFFICIAL["conv336"],
    "crop-dfi": OFFICIAL["conv336_cropping_sfe_dfi"],
    "pool": OFFICIAL["conv336_pooling_sfe"],
    "pool-dfi": OFFICIAL["conv336_adptive_pooling_fuse_49"],
    "sliding": {"pyramid": "sliding", "detail_kernel": None},
    "sliding-dfi": {"pyramid": "sliding"},
    "mlp": {"extractor": "none"},
    # At most so many parameters beside the patch MLP, at the published widths: 4.5 M and 47.1 M.
    "compact-5m": {"pyramid": "crop", "extractor": "resampled", "rank": 64, "spatial_width": 256},
    "compact-50m": {"pyramid": "crop", "extractor": "bottleneck", "rank": 48},
}

VARIANTS: dict[str, dict[str, Any]] = {**SHORT, **OFFICIAL}

REFUSED: dict[str, str] = {
    "conv_block": "stacks of convolutions and BatchNorm: its checkpoints cannot be whole, since the official LoRA save "
    "keeps parameters only and loses BatchNorm's running statistics",
    "conv336_CM": "it widens the patch features to twice the width that its own mm_projector takes, so the official "
    "forward always fails with a shape error",
}
