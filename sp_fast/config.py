"""SPProjectorConfig: everything that varies between LLaVA-SP projectors, validated, nothing hard-coded."""

from __future__ import annotations

import difflib
import operator
from dataclasses import asdict, dataclass, fields
from typing import Any

from sp_fast.compact_config import COMPACT, COMPACT_FIELDS, resolve_compact
from sp_fast.errors import ConfigError
from sp_fast.variants import REFUSED, SIX, VARIANTS

PYRAMIDS = ("crop", "pool", "sliding")
EXTRACTORS = ("full", "transformer", "none", *COMPACT)
FUSIONS = ("concat", "sum")
NAN_PLACES = ("spatial", "detail", "logits")
QUANTIZATIONS = ("int8", "fp8", "int4")
# Of what is written, where None: files and result lines from before stay equal.
_LEFT_OUT = (*COMPACT_FIELDS, "quantization")


@dataclass(frozen=True)
class SPProjectorConfig:
    """A LLaVA-SP projector: Spatial Feature Extractor (SFE), Detail Feature Integrator (DFI), output layer, patch MLP.

    Or the patch MLP alone, which is LLaVA-1.5's projector.

    Lengths are counted in patches of the vision tower's square map. ``None`` means the rule given beside the field;
    after construction every field holds its resolved value. Frozen, hashable, and ``from_dict(to_dict())`` is equal.

    Raises:
        ConfigError: a combination that cannot be built; the message names the field, its value and what would do.
    """

    #: spatial features from centred crops, adaptive average pools, or equal windows that tile the map (Tab. 5)
    pyramid: str = "crop"
    #: one spatial token each, from a convolution of that size. None: (4, 8, 12, 16, 20, 24), or () for "sliding";
    #: () with a detail kernel: the detail map itself gives the tokens
    kernel_sizes: tuple[int, ...] | None = None
    #: rows and columns of windows where the pyramid is "sliding"; tokens run left to right, then top to bottom
    sliding_windows: tuple[int, int] = (3, 2)
    #: side of the detail convolution, several of them for the multi-detail variants, or None for no DFI (Tab. 6)
    detail_kernel: int | tuple[int, ...] | None = 16
    detail_stride: int = 2
    #: how the attended features of several details join: side by side, or added
    detail_fusion: str = "concat"
    #: for each detail, whose value projection it uses. None: its own (official multi-detail code: (0, 0, 2))
    detail_values: tuple[int, ...] | None = None
    #: side of the centred square that pools, sliding windows and the detail convolution see.
    #: None: the largest crop where the pyramid is "crop", else the whole grid
    map_size: int | None = None
    grid: int = 24
    vision_width: int = 1024
    spatial_width: int = 512
    text_width: int = 4096
    #: bias of the spatial output layer. None: the official code's (only with a DFI on the crop pyramid, single detail)
    spatial_bias: bool | None = None
    #: where NaN becomes 0 and infinities the largest finite number. None: everywhere where there is a DFI
    nan_to_num: tuple[str, ...] | None = None
    #: "full": convolutions; "transformer": encoder-decoder blocks with one learned query a token (Tab. 3);
    #: "none": no spatial tokens, LLaVA-1.5's own projector; kernel_sizes is then () and detail_kernel None; or a
    #: compact form of the convolutions (compact.py): "bottleneck", "depthwise", "grouped", "separable", "nested",
    #: "resampled"
    extractor: str = "full"
    transformer_layers: int = 4
    transformer_heads: int = 8
    transformer_dropout: float = 0.1
    #: channels that a shared 1x1 convolution narrows the patch features to ("bottleneck", which needs it; "nested" and
    #: "resampled": None is no such convolution), or channels between two passes ("separable"; None: spatial_width)
    rank: int | None = None
    #: equal groups of channels that do not mix ("grouped", which needs it)
    groups: int | None = None
    #: side of the one kernel that all regions are averaged to ("resampled"). None: 8, or the largest region's
    base_kernel: int | None = None
    #: how the packed weights are stored for inference: "int8", "fp8" (e4m3) or "int4"; see sp_fast.quantize
    quantization: str | None = None

    def __post_init__(self) -> None:
        _choice("pyramid", self.pyramid, PYRAMIDS)
        _choice("extractor", self.extractor, EXTRACTORS)
        _choice("detail_fusion", self.detail_fusion, FUSIONS)
        _choice("quantization", self.quantization, (None, *QUANTIZATIONS))
        for name in ("grid", "detail_stride", "vision_width", "spatial_width", "text_width"):
            self._set(name, _positive(name, getattr(self, name)))
        if self.kernel_sizes is None:
            self._set("kernel_sizes", () if self.pyramid == "sliding" or self.extractor == "none" else SIX)
        for name in ("kernel_sizes", "sliding_windows"):
            self._set(name, _integers(name, getattr(self, name)))
        if isinstance(self.detail_kernel, (tuple, list)):
            kernels = _integers("detail_kernel", self.detail_kernel)
            self._set("detail_kernel", kernels if len(kernels) > 1 else kernels[0] if kernels else None)
        elif self.detail_kernel is not None:
            self._set("detail_kernel", _positive("detail_kernel", self.detail_kernel))
        self._resolve_absent()
        self._resolve_map()
        self._check_levels()
        self._check_detail()
        self._check_transformer()
        for name in COMPACT_FIELDS:
            if getattr(self, name) is not None:
                self._set(name, _positive(name, getattr(self, name)))
        for name, value in resolve_compact(self).items():
            self._set(name, value)

    def _set(self, name: str, value: object) -> None:
        object.__setattr__(self, name, value)

    def _resolve_absent(self) -> None:
        """Without an extractor the defaults of what it would read give way; what was asked for is refused."""
        if self.extractor != "none":
            return
        for name, absent in {"pyramid": "crop", "kernel_sizes": (), "detail_kernel": None}.items():
            value = getattr(self, name)
            if value not in (absent, getattr(SPProjectorConfig, name)):
                raise ConfigError(
                    f"extractor='none' has no spatial tokens, which {name}={value!r} is for: leave {name} out, or "
                    "take another extractor"
                )
            self._set(name, absent)

    def _resolve_map(self) -> None:
        if self.map_size is None:
            crops = self.kernel_sizes if self.pyramid == "crop" else ()
            self._set("map_size", max(crops, default=self.grid))
        self._set("map_size", _positive("map_size", self.map_size))
        if self.map_size > self.grid:
            raise ConfigError(
                f"the map of side {self.map_size} does not fit the {self.grid}x{self.grid} grid: kernel sizes and "
                f"map_size go up to grid={self.grid}; set grid= to the vision tower's own (24 for 336 px at patch 14)"
            )

    def _check_levels(self) -> None:
        sizes = self.kernel_sizes
        if self.pyramid == "sliding":
            if sizes:
                raise ConfigError(f"pyramid='sliding' takes sliding_windows, not kernel_sizes={sizes}: leave it out")
            if len(self.sliding_windows) != 2:
                raise ConfigError(f"sliding_windows={self.sliding_windows} is not (rows, columns), e.g. (3, 2)")
            if any(self.map_size % n for n in self.sliding_windows):
                raise ConfigError(
                    f"sliding_windows={self.sliding_windows} cannot tile a map of side {self.map_size} with equal "
                    f"windows: choose rows and columns that divide it, or set map_size to a side that they divide"
                )
            return
        if list(sizes) != sorted(set(sizes)):
            raise ConfigError(f"kernel_sizes={sizes} must ascend without repeats: their order is the token order")
        limit = self.map_size if self.pyramid == "pool" else self.grid
        if sizes and sizes[-1] > limit:
            raise ConfigError(f"kernel size {sizes[-1]} is larger than the {limit}x{limit} map that it should cover")
        if not sizes and self.detail_kernel is None and self.extractor != "none":
            raise ConfigError(
                "kernel_sizes=() without a detail_kernel gives no spatial tokens: name at least one, or say "
                "extractor='none' for patch tokens alone"
            )

    def _check_detail(self) -> None:
        kernels = self.detail_kernels
        for kernel in kernels:
            if kernel > self.map_size:
                raise ConfigError(
                    f"detail_kernel={kernel} does not fit the map of side {self.map_size} that the detail convolution "
                    f"sees: choose 1 to {self.map_size}, or a larger map_size"
                )
        if not self.levels and len(kernels) > 1:
            raise ConfigError(f"kernel_sizes=() takes its tokens from one detail map, not from {len(kernels)}")
        attended = len(kernels) if self.attends else 0
        values = range(attended) if self.detail_values is None else _integers("detail_values", self.detail_values, 0)
        self._set("detail_values", tuple(values))
        if len(self.detail_values) != attended or max(self.detail_values, default=-1) >= attended:
            raise ConfigError(
                f"detail_values={self.detail_values} must name, for each of the {attended} details that are attended "
                "to, the detail (counted from 0) whose value projection it uses"
            )
        if self.nan_to_num is None:
            self._set("nan_to_num", NAN_PLACES if self.attends else ())
        if not isinstance(self.nan_to_num, (tuple, list)):
            raise ConfigError(f"nan_to_num={self.nan_to_num!r} must be a list of {', '.join(NAN_PLACES)}")
        for place in self.nan_to_num:
            _choice("nan_to_num", place, NAN_PLACES)
        self._set("nan_to_num", tuple(place for place in NAN_PLACES if place in self.nan_to_num))
        if self.spatial_bias is None:
            self._set("spatial_bias", self.attends and self.pyramid == "crop" and len(kernels) == 1)
        if not isinstance(self.spatial_bias, bool):
            raise ConfigError(f"spatial_bias={self.spatial_bias!r} must be True, False or None")

    def _check_transformer(self) -> None:
        for name in ("transformer_layers", "transformer_heads"):
            self._set(name, _positive(name, getattr(self, name)))
        if not isinstance(self.transformer_dropout, (int, float)) or not 0 <= self.transformer_dropout < 1:
            raise ConfigError(f"transformer_dropout={self.transformer_dropout!r} is no probability in [0, 1)")
        if self.extractor != "transformer":
            return
        if self.spatial_width != self.vision_width:
            raise ConfigError(
                f"extractor='transformer' keeps the vision width: spatial_width must be {self.vision_width}, "
                f"not {self.spatial_width}"
            )
        if self.vision_width % self.transformer_heads:
            raise ConfigError(
                f"transformer_heads={self.transformer_heads} does not divide vision_width={self.vision_width}"
            )
        if self.pyramid == "sliding":
            raise ConfigError("extractor='transformer' has crops and pools: pyramid must be 'crop' or 'pool'")
        if self.detail_kernel is not None:
            raise ConfigError("extractor='transformer' has no detail convolution: set detail_kernel=None")

    @property
    def levels(self) -> tuple[tuple[int, int], ...]:
        """Height and width of each spatial convolution, in token order."""
        if self.pyramid == "sliding":
            rows, columns = self.sliding_windows
            return ((self.map_size // rows, self.map_size // columns),) * (rows * columns)
        return tuple((k, k) for k in self.kernel_sizes)

    @property
    def detail_kernels(self) -> tuple[int, ...]:
        """The detail convolutions' kernel sizes; () where there is no DFI."""
        if self.detail_kernel is None:
            return ()
        return (self.detail_kernel,) if isinstance(self.detail_kernel, int) else self.detail_kernel

    @property
    def detail_sides(self) -> tuple[int, ...]:
        """Side of each detail map: ``(map_size - kernel) // stride + 1``."""
        return tuple((self.map_size - k) // self.detail_stride + 1 for k in self.detail_kernels)

    @property
    def attends(self) -> bool:
        """True where spatial tokens attend to detail maps (paper, DFI)."""
        return bool(self.levels) and self.detail_kernel is not None

    @property
    def spatial_tokens(self) -> int:
        """T, the number of spatial tokens an image; without levels those of the one detail map, if there is one."""
        return len(self.levels) or sum(side * side for side in self.detail_sides)

    @property
    def patch_tokens(self) -> int:
        """N, the number of patch tokens an image."""
        return self.grid**2

    @property
    def fused_width(self) -> int:
        """Width of the spatial output layer's input; 0 where there is no such layer."""
        if not self.spatial_tokens:
            return 0
        if not self.attends:
            return self.spatial_width
        return self.spatial_width * (1 + (len(self.detail_kernels) if self.detail_fusion == "concat" else 1))

    def to_dict(self) -> dict[str, Any]:
        """Plain types for JSON; ``from_dict`` gives an equal configuration back.

        Without the compact fields and the quantisation where None: other projectors are written as before.
        """
        values = {name: list(v) if isinstance(v, tuple) else v for name, v in asdict(self).items()}
        return {name: v for name, v in values.items() if v is not None or name not in _LEFT_OUT}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> SPProjectorConfig:
        """Raises ConfigError for a name that is no field, with the nearest one."""
        names = [f.name for f in fields(cls)]
        for name in values:
            if name not in names:
                near = difflib.get_close_matches(str(name), names, n=1)
                raise ConfigError(f"{name!r} is no field of SPProjectorConfig{_hint(near)}")
        return cls(**values)

    @classmethod
    def variant(cls, name: str, **overrides: Any) -> SPProjectorConfig:
        """A configuration by official string (``"conv336_cropping_sfe_dfi"``) or short name (``"crop-dfi"``).

        Raises ConfigError for unknown names, and for the official leftovers that cannot work, with the reason.
        """
        if name in REFUSED:
            raise ConfigError(f"{name} is not supported: {REFUSED[name]}")
        if name not in VARIANTS:
            near = difflib.get_close_matches(name, VARIANTS, n=1)
            raise ConfigError(f"{name!r} is no variant{_hint(near)}; known: {', '.join(VARIANTS)}")
        return cls.from_dict({**VARIANTS[name], **overrides})


def _hint(near: list[str]) -> str:
    return f"; did you mean {near[0]!r}?" if near else ""


def _choice(name: str, value: object, allowed: tuple[str, ...]) -> None:
    if value in allowed:
        return
    if isinstance(value, str) and value in REFUSED:
        raise ConfigError(f"{name}={value!r} is not supported: {REFUSED[value]}")
    raise ConfigError(f"{name}={value!r} is unknown; it must be one of {', '.join(map(repr, allowed))}")


def _positive(name: str, value: object) -> int:
    number = _index(value)
    if number is None or number < 1:
        raise ConfigError(f"{name}={value!r} must be a positive integer")
    return number


def _integers(name: str, values: object, least: int = 1) -> tuple[int, ...]:
    if not isinstance(values, (tuple, list)):
        raise ConfigError(f"{name}={values!r} must be a list of integers")
    numbers = tuple(_index(value) for value in values)
    if any(number is None or number < least for number in numbers):
        raise ConfigError(f"{name}={tuple(values)} must hold integers of {least} or more")
    return numbers


def _index(value: object) -> int | None:
    """Any integer type as int; None for everything else, booleans too."""
    if isinstance(value, bool) or not hasattr(value, "__index__"):
        return None
    return operator.index(value)
