"""Which official variant a set of tensors is, and what is wrong with it where it is none.

The table of variants.py gives every variant's exact set of keys, so a checkpoint is recognised by equality, never by
its most likely reading: one lost tensor must not turn six tokens into five.
"""

from __future__ import annotations

import functools
import math
import re
from collections.abc import Container, Iterable, Mapping

from sp_fast import geometry
from sp_fast.compact_config import COMPACT
from sp_fast.config import SPProjectorConfig
from sp_fast.errors import CheckpointError
from sp_fast.extractors import EXTRACTORS
from sp_fast.reference import ReferenceSPProjector
from sp_fast.stored_tensor import StoredTensor
from sp_fast.variants import OFFICIAL, REFUSED

PREFIXES = ("base_model.", "module.", "model.")
PROJECTOR_NAME = re.compile(r"(conv_|tfm_|CM_|window_|mm_projector|query_|key_projector|value_projector)")
# The rest of a full LLaVA-SP model; any other name is an error.
_REST_OF_MODEL = re.compile(
    r"(layers|embed_tokens|norm|lm_head|vision_tower|image_newline|vision_resampler|rotary_emb)\b"
)
# What the official trainer keeps in a mid-run checkpoint-N/mm_projector.bin: names containing one of these.
_KEPT_MID_RUN = ("mm_projector", "vision_resampler", "conv_CM", "conv_4", "CM_P", "conv_linear")
_LISTED = 12

Shapes = Mapping[str, tuple[int, ...]]


def projector_names(where: str, names: Iterable[str]) -> dict[str, str]:
    """The projector's tensors among a checkpoint's names: key without prefix -> full name.

    Raises:
        CheckpointError: a name that belongs neither to the projector nor to the rest of the model, or the same key
            under two prefixes.
    """
    found: dict[str, str] = {}
    unknown = []
    for name in names:
        key = name
        while prefix := next((p for p in PREFIXES if key.startswith(p)), None):
            key = key[len(prefix) :]
        if PROJECTOR_NAME.match(key):
            if key in found:
                raise CheckpointError(f"{where} holds {key} twice, as {found[key]} and as {name}: keep one")
            found[key] = name
        elif not _REST_OF_MODEL.match(key):
            unknown.append(name)
    if any(name.startswith("extractor.") for name in unknown):
        raise CheckpointError(f"{where} is not in the official layout but in this package's own: use from_pretrained")
    if unknown:
        raise CheckpointError(f"{where} holds unexpected tensors: {listed(unknown)}")
    return found


def recognise(where: str, shapes: Shapes, grid: int | None, pyramid: str | None) -> tuple[str, SPProjectorConfig]:
    """The official name and the configuration of a checkpoint, from its keys (without prefix) and shapes.

    Raises:
        CheckpointError: no official variant has these keys; the message lists what the nearest one has and lacks.
    """
    _refuse_leftovers(where, shapes)
    fitting = [name for name in OFFICIAL if variant_keys(name) == shapes.keys()]
    if not fitting:
        raise CheckpointError(f"{where}: {_diagnosis(set(shapes))}")
    if pyramid is not None:
        by_keys = " or ".join(fitting)
        fitting = [name for name in fitting if OFFICIAL[name]["pyramid"] == pyramid]
        if not fitting:
            raise CheckpointError(f"{where} is {by_keys} by its keys, which contradicts pyramid={pyramid!r}")
    if len(fitting) > 1:
        raise CheckpointError(
            f"{where} can be {' or '.join(fitting)}: their keys are the same, so say which: "
            "pyramid='crop' (tfm336) or pyramid='pool' (tfm336_adptive_pooling)"
        )
    config = _configure(where, fitting[0], shapes, {} if grid is None else {"grid": grid})
    if official_keys(config) != shapes.keys():
        raise CheckpointError(f"{where} is {fitting[0]}, whose last level is not pooled: it has no grid of {grid}")
    return fitting[0], config


@functools.cache
def official_keys(config: SPProjectorConfig) -> frozenset[str]:
    """All keys of a configuration in the official layout, without prefix."""
    return frozenset(ReferenceSPProjector(config, device="meta").state_dict())


def variant_keys(variant: str) -> frozenset[str]:
    """All keys of an official variant, without prefix."""
    return official_keys(SPProjectorConfig.variant(variant))


def check_size(where: str, config: SPProjectorConfig, shapes: Shapes) -> None:
    """Raises CheckpointError for a configuration that is far from what the tensors fill, before it is built.

    Even without data absurd lengths overflow, and absurdly many modules take memory and time. What is merely missing or
    misshaped is named later.
    """
    c, d, h = config.vision_width, config.spatial_width, config.text_width
    blocks = len(config.levels) * config.transformer_layers if config.extractor == "transformer" else 0
    if config.extractor in COMPACT:
        spatial = sum(map(math.prod, EXTRACTORS[config.extractor].shapes(config).values()))
    else:
        spatial = c * d * (0 if blocks else geometry.spatial_cells(config) + geometry.detail_cells(config))
    needed = spatial + blocks * c * c + config.attends * d * d + h * (config.fused_width + c + h)
    held = sum(math.prod(shape) for shape in shapes.values())
    if needed > 10 * held or blocks > len(shapes):
        raise CheckpointError(
            f"{where} asks for a projector of widths, kernels or layers that its {len(shapes)} tensors of {held} "
            "elements are far from filling: give the file of the whole projector, or fetch it again"
        )


def check_whole(
    where: str,
    expected: Shapes,
    tensors: Mapping[str, StoredTensor],
    way_out: str,
    integers: Container[str] = (),
) -> None:
    """Raises CheckpointError unless the tensors are the expected ones, all of them, each of its shape and a float, but
    for those that are to be ``integers``."""
    problems = []
    if missing := expected.keys() - tensors.keys():
        problems.append(f"missing {listed(missing)}")
    if unexpected := tensors.keys() - expected.keys():
        problems.append(f"unexpected {listed(unexpected)}")
    both = [key for key in expected if key in tensors]
    problems += [
        f"{key} has shape {list(tensors[key].shape)} where {list(expected[key])} is expected"
        for key in both
        if tensors[key].shape != expected[key]
    ][:4]
    if quantised := [key for key in both if tensors[key].dtype is None and key not in integers]:
        problems.append(f"not floating-point: {listed(quantised)} (give the checkpoint before quantisation)")
    if problems:
        raise CheckpointError(f"{where}: {'; '.join(problems)}: {way_out}")


def listed(names: Iterable[str]) -> str:
    """The first names of a list, sorted, and how many more there are."""
    names = sorted(names)
    more = f" and {len(names) - _LISTED} more" if len(names) > _LISTED else ""
    return ", ".join(names[:_LISTED]) + more


def _configure(where: str, variant: str, shapes: Shapes, overrides: dict[str, int]) -> SPProjectorConfig:
    """The variant with the checkpoint's own widths and detail kernels."""
    ranks = {"mm_projector.0.weight": 2, "mm_projector.2.weight": 2}
    ranks |= {key: 4 for key in shapes if key.startswith("conv_") and not key.startswith("conv_linear")}
    for key, rank in ranks.items():
        if len(shapes[key]) != rank or 0 in shapes[key]:
            raise CheckpointError(f"{where}: {key} has shape {list(shapes[key])}, not {rank} lengths above 0")
    widths = {"vision_width": shapes["mm_projector.0.weight"][1], "text_width": shapes["mm_projector.2.weight"][0]}
    convs = [key for key, rank in ranks.items() if rank == 4]
    widths["spatial_width"] = shapes[convs[0]][0] if convs else widths["vision_width"]
    details = [name for name in ("conv_CM", "conv_small", "conv_mid", "conv_huge") if f"{name}.weight" in shapes]
    kernels = tuple(shapes[f"{name}.weight"][2] for name in details)
    if kernels:
        widths["detail_kernel"] = kernels
    try:
        config = SPProjectorConfig.variant(variant, **{**widths, **overrides})
    except ValueError as error:
        raise CheckpointError(f"{where}, read as {variant}: {error}") from error
    check_size(where, config, shapes)
    return config


def _refuse_leftovers(where: str, shapes: Shapes) -> None:
    if any(re.match(r"conv_\d+\.0\.", key) or "running_mean" in key for key in shapes):
        raise CheckpointError(f"{where} is a conv_block checkpoint, which is not supported: {REFUSED['conv_block']}")
    if any(key.startswith("CM_") for key in shapes):
        raise CheckpointError(f"{where} is a conv336_CM checkpoint, which is not supported: {REFUSED['conv336_CM']}")


def _diagnosis(keys: set[str]) -> str:
    """Why these keys are no official variant."""
    if not any(key.startswith("mm_projector") for key in keys):
        return "no mm_projector tensors: this is no LLaVA-SP projector; give the file that holds it"
    if kept := _mid_run(keys):
        losses = "; ".join(f"as {name} it lost {listed(lost)}" for name, lost in kept.items())
        return (
            "this is no whole projector but what the official trainer writes during a run (checkpoint-N/"
            f"mm_projector.bin), which drops spatial weights: {losses}. Use the file of the run's end (model.bin or "
            "non_lora_trainables.bin)"
        )
    if all(key.startswith("mm_projector") for key in keys):
        return (
            "only mm_projector tensors: a LLaVA projector, or what extract_mm_projector keeps; spatial weights are "
            "gone. If LLaVA-1.5's own is meant: SPProjector(SPProjectorConfig.variant('mlp')).load_official(...), and "
            "save_pretrained for the command line"
        )
    nearest = min(OFFICIAL, key=lambda name: len(variant_keys(name) ^ keys))
    missing, unexpected = variant_keys(nearest) - keys, keys - variant_keys(nearest)
    problems = [f"missing {listed(missing)}"] * bool(missing) + [f"unexpected {listed(unexpected)}"] * bool(unexpected)
    return f"no official variant has these tensors; against {nearest}, the nearest: {'; '.join(problems)}"


def _mid_run(keys: set[str]) -> dict[str, set[str]]:
    """The variants whose mid-run save has exactly these keys (mm_projector and more), and what each has lost."""
    if all(key.startswith("mm_projector") for key in keys):
        return {}
    found = {}
    for name in OFFICIAL:
        whole = variant_keys(name)
        kept = {key for key in whole if any(part in key for part in _KEPT_MID_RUN)}
        if kept == keys:
            found[name] = set(whole - kept)
    return found
