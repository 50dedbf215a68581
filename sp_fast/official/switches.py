"""Which variant a live official model computes, read off the object and not off its source.

The official source chooses by strings in several files that nothing compares: one decides which modules exist, one what
``encode_images`` does with them, one which crops the vision tower returns. Here the modules are recognised by their
names and shapes, the tower is asked for a real image's features, and ``encode_images`` runs on recorders in the place
of the modules, which note what they are fed: the same run of the reference must feed them the same.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from sp_fast.config import SPProjectorConfig
from sp_fast.errors import CheckpointError, OfficialModelError, first_line
from sp_fast.geometry import crop_start
from sp_fast.layout import output_module
from sp_fast.official.live import live
from sp_fast.recognise import PROJECTOR_NAME, recognise
from sp_fast.reference import ReferenceSPProjector

WHOLE_MAP = "336_pooling"
# The tower's crops are centred and grow by this many patches on each side.
CROP_STEPS = {"336_6_tokens": 2, "336_3_tokens": 4, "224": 1}
TOWER_SWITCHES = {
    "conv336_pooling_sfe": WHOLE_MAP,
    "conv336_adptive_pooling_fuse_49": WHOLE_MAP,
    "conv336_3_tokens": "336_3_tokens",
    "conv336_12_tokens": "224",
    "conv224": "224",
}
OTHER_TOWER_SWITCH = "336_6_tokens"
SAME_VARIANT = (
    "the strings `version` or `a` in LlavaMetaModel.__init__ and in encode_images (llava_arch.py) must name the same "
    "variant"
)
TOLERANCE = 1e-4  # of float32 attention and products of small tensors, done in another order at most


class Features(NamedTuple):
    """What a vision tower gave for one image: crops or the map, patch features ``[1, N, C]``; float32 on the CPU."""

    local: list[Tensor] | Tensor
    patches: Tensor


def read_variant(model: nn.Module, encode_images: Callable[..., Tensor]) -> SPProjectorConfig:
    """The configuration of what the model's modules, tower and ``encode_images`` compute.

    ``encode_images`` is the model's method, as a function of ``self`` and images. The tower runs once, on one image.

    Raises:
        OfficialModelError: they disagree, or are none of the official code's; the message says which.
    """
    core = model.get_model()
    shapes = _shapes(core)
    features = _tower_features(core.get_vision_tower())
    grid = math.isqrt(features.patches.shape[1])
    candidates = _candidates(shapes, grid)
    _check_layers(core, next(iter(candidates.values())))
    _check_tower(list(candidates), features, grid)
    given = _Recording(next(iter(candidates.values())))
    try:
        tokens = given.of_official(model, encode_images, features)
    except Exception as error:
        raise OfficialModelError(
            f"the modules are those of {' or '.join(candidates)}, but encode_images fails on them "
            f"({first_line(error)}): {SAME_VARIANT}"
        ) from error
    differences = {}
    for name, config in candidates.items():
        expected = _Recording(config)
        reference = expected.of_reference(core, features.patches)
        difference = expected.difference(given) or _different("encode_images returns", tokens, reference)
        if difference is None:
            return config
        differences[name] = difference
    found = (f"the modules are those of {name}, but {difference}" for name, difference in differences.items())
    raise OfficialModelError(f"{'; '.join(found)}: {SAME_VARIANT}")


def _shapes(core: nn.Module) -> dict[str, tuple[int, ...]]:
    """Official keys of the projector's parameters, without adapters and their wrappers, and their shapes."""
    shapes = {}
    for name in {n.split(".")[0] for n, _ in [*core.named_parameters(), *core.named_buffers()]}:
        if not PROJECTOR_NAME.match(name):
            continue
        part = getattr(core, name)
        if isinstance(part, nn.Parameter):
            shapes[name] = tuple(part.shape)
            continue
        for path, module in _plain_modules(live(core, name), name):
            for key, tensor in [*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)]:
                linear = key == "weight" and hasattr(module, "out_features")  # a quantised weight is packed otherwise
                shapes[f"{path}.{key}"] = (module.out_features, module.in_features) if linear else tuple(tensor.shape)
    return shapes


def _plain_modules(module: nn.Module, path: str) -> Iterator[tuple[str, nn.Module]]:
    """A module and those in it, with adapters' wrappers seen through."""
    module = getattr(module, "base_layer", module)
    yield path, module
    for name, child in module.named_children():
        yield from _plain_modules(child, f"{path}.{name}")


def _candidates(shapes: dict[str, tuple[int, ...]], grid: int) -> dict[str, SPProjectorConfig]:
    """The variants that have these modules: one, or the two transformer variants, whose keys are the same."""
    pyramids = ("crop", "pool") if any(key.startswith("tfm_") for key in shapes) else (None,)
    try:
        return dict(recognise("the model", shapes, grid, pyramid) for pyramid in pyramids)
    except CheckpointError as error:
        raise OfficialModelError(str(error)) from error


def _check_layers(core: nn.Module, config: SPProjectorConfig) -> None:
    """Of modules that are not called whole, what keys do not tell: strides, pools, activations, further layers."""
    for name, module in ReferenceSPProjector(config, device="meta").named_children():
        if name.startswith("conv_") or name == output_module(config):
            needed, found = dict(_plain_modules(module, name)), dict(_plain_modules(live(core, name), name))
            for path in [*needed, *(path for path in found if path not in needed)]:
                if _layer(found.get(path)) != _layer(needed.get(path)):
                    raise OfficialModelError(
                        f"{path} is {_layer(found.get(path))}, where the official code has {_layer(needed.get(path))}: "
                        "the fast path computes that layer and no other; put it back"
                    )


def _layer(module: nn.Module | None) -> str:
    """As torch prints it; of a linear layer, which is called as it is, only that it is one."""
    if module is None:
        return "nothing"
    if hasattr(module, "out_features"):
        return "a linear layer"
    if isinstance(module, nn.AdaptiveAvgPool2d) and isinstance(module.output_size, int):
        return f"{type(module).__name__}(output_size={(module.output_size,) * 2})"
    return f"{type(module).__name__}({module.extra_repr()})"


def _tower_features(tower: Any) -> Features:
    """The tower's answer to one image of seeded noise."""
    try:
        side = tower.config.image_size
        pixels = torch.rand(1, 3, side, side, generator=torch.Generator().manual_seed(0))
        with torch.no_grad():
            local, patches = tower(pixels.to(tower.device, tower.dtype))
        return Features(
            local.float().cpu() if isinstance(local, Tensor) else [crop.float().cpu() for crop in local],
            patches.float().cpu(),
        )
    except Exception as error:
        raise OfficialModelError(
            f"the vision tower does not encode an image ({first_line(error)}): load it first "
            "(model.get_vision_tower().load_model()), with mm_vision_select_feature 'patch'; it must return crops or "
            "the map, and patch features"
        ) from error


def _check_tower(variants: list[str], features: Features, grid: int) -> None:
    if features.patches.shape[1] != grid * grid:
        raise OfficialModelError(f"the vision tower gives {features.patches.shape[1]} patch features: no square map")
    given = [name for name in (WHOLE_MAP, *CROP_STEPS) if _is_what(name, features, grid)]
    needed = TOWER_SWITCHES.get(variants[0], OTHER_TOWER_SWITCH)  # the same for variants with the same modules
    if needed in given:
        return
    found = f"as for the switch {given[0]!r}" if given else "of no switch of the official code"
    raise OfficialModelError(
        f"the modules are those of {' or '.join(variants)}, for which the tower's switch must be {needed!r}, but the "
        f"vision tower returns {_described(features.local)}, {found}: set `a` in its feature_select "
        f"(clip_encoder.py or siglip_encoder.py) to {needed!r}"
    )


def _described(local: list[Tensor] | Tensor) -> str:
    if isinstance(local, Tensor):
        return f"a map of {' x '.join(map(str, local.shape[1:3]))}"
    return f"{len(local)} crops ({', '.join(' x '.join(map(str, crop.shape[1:3])) for crop in local[:8])})"


def _is_what(switch: str, features: Features, grid: int) -> bool:
    """True where the tower's regions are those of a switch, value for value."""
    grid_map = features.patches.unflatten(1, (grid, grid))
    if isinstance(features.local, Tensor):
        return switch == WHOLE_MAP and _different("", features.local, grid_map) is None
    if switch == WHOLE_MAP:
        return False
    step = CROP_STEPS[switch]
    sides = range(2 * step, 2 * step * -(-(grid // 2) // step) + 1, 2 * step)
    # On an odd grid the last crops run past the edge; none of a variant's is among them.
    pairs = [(crop, side) for crop, side in zip(features.local, sides, strict=False) if side <= grid]
    starts = [crop_start(grid, side) for _, side in pairs]
    return len(features.local) == len(sides) and all(
        _different("", crop, grid_map[:, start : start + side, start : start + side]) is None
        for (crop, side), start in zip(pairs, starts, strict=True)
    )


class _Recording:
    """What each module was fed in one run, by the module's official name."""

    def __init__(self, config: SPProjectorConfig) -> None:
        self.fed: dict[str, list[Tensor]] = {}
        self._reference = ReferenceSPProjector(config, device="meta")
        self._recorders = {
            name: _Recorder(name, module, self.fed.setdefault(name, []))
            for name, module in self._reference.named_children()
        }

    def of_official(self, model: nn.Module, encode_images: Callable[..., Tensor], features: Features) -> Tensor:
        """Runs the model's own ``encode_images`` on recorders."""
        core = _StandInCore(model.get_model(), self._recorders, features)
        # A shallow copy, so that the class's own methods work on it.
        stand_in = object.__new__(type(model))
        vars(stand_in).update(vars(model), get_model=lambda: core, get_vision_tower=core.get_vision_tower)
        return encode_images(stand_in, None)

    def of_reference(self, core: nn.Module, patches: Tensor) -> Tensor:
        """Runs the reference on recorders."""
        for name, recorder in self._recorders.items():
            setattr(self._reference, name, recorder)
        for name, _ in self._reference.named_parameters(recurse=False):
            setattr(self._reference, name, nn.Parameter(getattr(core, name).detach().float().cpu()))
        with torch.no_grad():
            return self._reference(patches)

    def difference(self, given: _Recording) -> str | None:
        """How ``given`` differs from this, as it should be; None where it does not."""
        for name in [*self.fed, *(name for name in given.fed if name not in self.fed)]:
            expected, found = self.fed.get(name, []), given.fed.get(name, [])
            if len(expected) != len(found):
                return f"encode_images calls {name} with {len(found)} tensors, where {len(expected)} are needed"
            for a, b in zip(found, expected, strict=True):
                if difference := _different(f"encode_images feeds {name}", a, b):
                    return difference
        return None


class _Recorder(nn.Module):
    """In the place of a module: keeps its inputs, and returns noise of the shape that the module would return.

    Some of the noise is NaN and infinite, so that a missing or additional nan_to_num shows.
    """

    def __init__(self, name: str, module: nn.Module, fed: list[Tensor]) -> None:
        super().__init__()
        self._name, self._shape_of, self._fed = name, [module], fed

    def forward(self, *inputs: Tensor) -> Tensor:
        self._fed += inputs
        shape = self._shape_of[0](*(tensor.to("meta") for tensor in inputs)).shape
        noise = torch.randn(shape, generator=torch.Generator().manual_seed(zlib.crc32(self._name.encode())))
        noise.view(-1)[0], noise.view(-1)[-1] = torch.nan, torch.inf
        return noise


class _StandInCore:
    """In the place of ``get_model()``: recorders for the projector's modules, the features for its tower."""

    def __init__(self, core: nn.Module, recorders: dict[str, _Recorder], features: Features) -> None:
        self._core, self._recorders, self._features = core, recorders, features

    def get_vision_tower(self) -> Callable[..., Features]:
        return lambda _: self._features

    def __getattr__(self, name: str) -> Any:
        if name in self._recorders:
            return self._recorders[name]
        found = getattr(self._core, name)
        return found.detach().float().cpu() if isinstance(found, nn.Parameter) else found


def _different(what: str, found: Tensor, expected: Tensor) -> str | None:
    if found.shape != expected.shape:
        return f"{what} {list(found.shape)}, where {list(expected.shape)} is needed"
    if not torch.allclose(found, expected, rtol=TOLERANCE, atol=TOLERANCE, equal_nan=True):
        return f"{what} other values than are needed, in the right shape {list(found.shape)}"
    return None
