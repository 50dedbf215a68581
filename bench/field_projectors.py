"""The field: every projector by its name on the command line. A further one is a row of PROJECTORS.

A row of this package is a variant, with settings of its configuration where it has any, or quantised:
``"a-name": Spatial("LLaVA-SP, ...", "a-variant", settings={...}, quantization="int8")``.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

from sp_fast.bench import field_counts as counts
from sp_fast.bench import field_peers as peers
from sp_fast.bench.cases import DIRECTIONS, DTYPES
from sp_fast.bench.field_rows import FieldCase, Peer, Published, Spatial
from sp_fast.bench.implementations import YARDSTICK
from sp_fast.bench.plan import TINY, check_names
from sp_fast.bench.shipped import COMPACT_VARIANTS
from sp_fast.compact_config import COMPACT
from sp_fast.config import QUANTIZATIONS
from sp_fast.errors import ConfigError

TINY_SHRINK = 16  # of a Q-Former's own width

LLAVA = "github.com/haotian-liu/LLaVA, llava/model/multimodal_projector/builder.py"
BLIP2 = "BLIP-2 (arXiv:2301.12597), Tab. 2"
_OWN = {"source": "a form of this package's own (sp_fast/variants.py)", "remark": ""}
PROJECTORS: dict[str, Peer | Spatial] = {
    "linear": Peer("linear (LLaVA, Shikra)", peers.linear, counts.linear, LLAVA),
    "llava-mlp": Peer("LLaVA-1.5 MLP", peers.mlp, counts.mlp, LLAVA),
    "deco": Peer(
        "DeCo", peers.DeCo, counts.deco, "DeCo (arXiv:2405.20985): a 2D adaptive average pool before LLaVA-1.5's MLP",
        counts.POOLED, remark="its pool has no parameters; no count is printed in its abstract",
    ),
    "c-abstractor": Peer(
        "Honeybee C-Abstractor", peers.CAbstractor, counts.c_abstractor,
        "github.com/khanrc/honeybee, honeybee/projectors/projectors.py and configs/model_config/c-abs.yaml; blocks: "
        "timm/models/regnet.py, RegStage",
        counts.POOLED,
    ),
    "blip2-qformer": Peer(
        "BLIP-2 Q-Former", peers.QFormer, counts.q_former, "BLIP-2 (arXiv:2301.12597), Sec. 3.1; transformers blip_2",
        peers.QFORMER_QUERIES,
        published=(
            Published(104e6, 1e6, f"{BLIP2}: ViT-L, OPT 2.7B", 1024, 2560),
            Published(107e6, 1e6, f"{BLIP2}: ViT-g, OPT 2.7B", 1408, 2560),
            Published(108e6, 1e6, f"{BLIP2}: ViT-g, OPT 6.7B", 1408, 4096),
            Published(103e6, 1e6, f"{BLIP2}: ViT-L, FlanT5 XL", 1024, 2048),
        ),
        remark="",
    ),
    "instructblip-qformer": Peer(
        "InstructBLIP Q-Former, no instruction", peers.InstructQFormer, counts.q_former,
        "InstructBLIP (arXiv:2305.06500); transformers instructblip", peers.QFORMER_QUERIES, peers.QFormer,
        remark="BLIP-2 (arXiv:2301.12597), Sec. 3.1, prints 188 M for a Q-Former with its text half, the heads of its "
        "first stage among them; without those, and before the projection, 185.7 M are here",
    ),
    "qwen-resampler": Peer(
        "Qwen-VL resampler", peers.QwenVL, counts.resampler, "huggingface.co/Qwen/Qwen-VL, visual.py",
        peers.RESAMPLER_SIDE**2,
        published=(Published(0.08e9, 0.01e9, "Qwen-VL (arXiv:2308.12966), Tab. 1", 1664, 4096, "resampler"),),
        remark="the printed count is the resampler's; the norm and the projection behind it are counted here too",
    ),
    "ldpv2": Peer(
        "MobileVLM V2 LDPv2", peers.LDPv2, counts.ldpv2,
        "github.com/Meituan-AutoML/MobileVLM, mobilevlm/model/vision_projector.py", counts.POOLED,
    ),
    "llava-sp": Spatial("LLaVA-SP crop-dfi, official form", "crop-dfi", YARDSTICK),
    "crop-dfi": Spatial("LLaVA-SP crop-dfi, sp_fast", "crop-dfi"),
    "pool-dfi": Spatial("LLaVA-SP pool-dfi, sp_fast", "pool-dfi"),
    "compact-5m": Spatial("compact-5m, sp_fast", "compact-5m", **_OWN),
    "compact-50m": Spatial("compact-50m, sp_fast", "compact-50m", **_OWN),
    **{
        kind: Spatial(f"{kind}, sp_fast", "crop-dfi", settings={"extractor": kind, **settings}, **_OWN)
        for kind, settings in COMPACT_VARIANTS.items()
        if kind in COMPACT
    },
    **{
        f"crop-dfi-{name}": Spatial(f"LLaVA-SP crop-dfi in {name}, sp_fast", "crop-dfi", quantization=name)
        for name in QUANTIZATIONS
    },
}  # fmt: skip


def field_cases(
    names: Sequence[str],
    directions: Sequence[str],
    batches: Sequence[int],
    dtypes: Sequence[str],
    spatial_width: int | None = None,
    tiny: bool = False,
) -> tuple[FieldCase, ...]:
    """Every projector that is named, or all of them, in every direction, batch and dtype.

    Quantised ones are left out where a backward is asked for, unless they are named.

    Raises:
        ConfigError: a name that is unknown, a backward of quantised weights, or a batch of no images.
    """
    for kind, given, known in (
        ("projector", names, tuple(PROJECTORS)), ("direction", directions, DIRECTIONS),
        ("dtype", dtypes, tuple(DTYPES)),
    ):  # fmt: skip
        check_names(kind, given, known)
    if min(batches) < 1:
        raise ConfigError(f"batch {min(batches)} is no number of images: give 1 or more")
    overrides: dict[str, Any] = {
        **(TINY if tiny else {}),
        **({"spatial_width": spatial_width} if spatial_width else {}),
    }
    trained = any(direction != "forward" for direction in directions)
    frozen = [name for name, row in PROJECTORS.items() if trained and isinstance(row, Spatial) and row.quantization]
    if named := [name for name in names if name in frozen]:
        raise ConfigError(f"{named[0]} has quantised weights, which have no backward: ask for --direction forward")
    chosen = dict.fromkeys(names or (name for name in PROJECTORS if name not in frozen))
    return tuple(
        FieldCase(
            name, PROJECTORS[name].config(overrides), "whole", direction, batch, dtype, TINY_SHRINK if tiny else 1
        )
        for dtype, name, direction, batch in itertools.product(dtypes, chosen, directions, batches)
    )
