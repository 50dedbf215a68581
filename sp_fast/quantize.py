"""Weight-only quantisation of the packed weights: a projector for inference, of half the bytes or a quarter.

Any extractor can be quantised that names its packed weights in ``packed`` and multiplies them with ``packed_matmul``.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from sp_fast.config import SPProjectorConfig
from sp_fast.errors import ConfigError, SPFastError
from sp_fast.kernels.quantized import SCHEMES, Scheme, dequantize_cells, quantize_cells
from sp_fast.kernels.windowed_matmul import windowed_matmul
from sp_fast.kernels.windowed_matmul_quantized import windowed_matmul_quantized

if TYPE_CHECKING:
    from sp_fast.projector import SPProjector

#: Of a configuration's ``quantization``.
BY_NAME = {scheme.name: scheme for scheme in SCHEMES.values()}
#: Names of a quantised weight's buffers. Values are named by their scheme, so that no other's are taken for them.
SCALES, VALUES = "stored_scales", {name: f"{name}_values" for name in BY_NAME}
STORED = (SCALES, *VALUES.values())
_PIECE_ELEMENTS = 2**24  # of a weight at a time: copies in float32 of all of it would be gigabytes


class QuantizedWeight(nn.Module):
    """A packed weight ``[cells, C, D]`` of one scheme, in two buffers; kernels/quantized.py says what they hold.

    ``int8_values`` are int8, ``fp8_values`` and ``int4_values`` bits as uint8; ``stored_scales`` the bits of float32 as
    int32. As integers they stay what they are where a module is cast: ``half()`` converts every buffer of floating
    point.
    """

    def __init__(self, scheme: Scheme, cells: int, width: int, depth: int, device: torch.device | None = None) -> None:
        super().__init__()
        self.scheme = scheme
        values, scales = scheme.shapes(cells, width, depth)
        dtype = torch.int8 if scheme.dtype == torch.int8 else torch.uint8
        self.register_buffer(VALUES[scheme.name], torch.empty(values, dtype=dtype, device=device))
        self.register_buffer(SCALES, torch.empty(scales, dtype=torch.int32, device=device))

    @classmethod
    @torch.no_grad()
    def of(cls, weight: Tensor, scheme: Scheme, name: str = "the weight") -> QuantizedWeight:
        """Of a weight ``[cells, C, D]``.

        Raises:
            ConfigError: int4 of an odd number of channels.
            SPFastError: NaN or infinite values.
        """
        cells, width, depth = weight.shape
        if width % scheme.channels:
            raise ConfigError(
                f"quantization={scheme.name!r} stores {scheme.channels} channels a byte, and {name} has {width}: "
                "take 'int8' or 'fp8', or an even width"
            )
        found = cls(scheme, cells, width, depth, weight.device)
        step = max(1, _PIECE_ELEMENTS // (width * depth))
        for cell in range(0, 0 if weight.is_meta else cells, step):
            piece = slice(cell, cell + step)
            values, scales = quantize_cells(weight[piece], scheme)
            if not scales.isfinite().all():
                raise SPFastError(f"{name} holds NaN or infinite values, which cannot be quantised: mend it first")
            found.values[piece].view(torch.uint8).copy_(values.view(torch.uint8))
            found.scales[piece].copy_(scales)
        return found

    @property
    def _bits(self) -> Tensor:
        return getattr(self, VALUES[self.scheme.name])

    @property
    def values(self) -> Tensor:
        """``[cells, D, C]``, or ``[cells, D, C / 2]`` of int4, in the op's type; a view."""
        return self._bits.view(self.scheme.dtype)

    @property
    def scales(self) -> Tensor:
        """``[cells, groups, D]`` float32; a view."""
        return self.stored_scales.view(torch.float32)

    @torch.no_grad()
    def dequantized(self, dtype: torch.dtype | None = None) -> Tensor:
        """The weight ``[cells, C, D]``: exact in float64, rounded once in narrower types."""
        cells, depth, stored = self.values.shape
        width = stored * self.scheme.channels
        weight = torch.empty(cells, width, depth, dtype=dtype, device=self._bits.device)
        step = max(1, _PIECE_ELEMENTS // (width * depth))
        for cell in range(0, 0 if weight.is_meta else cells, step):
            piece = slice(cell, min(cell + step, cells))
            wide = torch.promote_types(weight.dtype, torch.float32)
            out = torch.empty(piece.stop - cell, depth, width, dtype=wide, device=weight.device)
            weight[piece] = dequantize_cells(self.values[piece], self.scales[piece], out).transpose(1, 2)
        return weight

    def is_finite(self) -> bool:
        """False where a file was damaged: scales or fp8 values that are NaN or infinite."""
        pieces = self._bits.split(64) if self.scheme.dtype.is_floating_point else ()
        return bool(self.scales.isfinite().all()) and all(bool((bits & 0x7F).ne(0x7F).all()) for bits in pieces)

    def requires_grad_(self, requires_grad: bool = True) -> QuantizedWeight:
        """Raises SPFastError where gradients are asked for: there are none."""
        if requires_grad:
            raise SPFastError(untrainable(self.scheme.name))
        return self

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> QuantizedWeight:
        """Moved to other devices, never cast: ``type(torch.float16)`` would take the bits for numbers."""

        def moved(bits: Tensor) -> Tensor:
            found = fn(bits)
            return found if found.dtype == bits.dtype else bits.to(found.device)

        return super()._apply(moved, recurse)

    def _load_from_state_dict(self, state_dict: dict[str, Tensor], prefix: str, *rest: Any) -> None:
        """Tensors of another type are an error of ``load_state_dict``, which would cast them: their bits are lost."""
        given = {name: state_dict.get(prefix + name, bits).dtype for name, bits in self.named_buffers()}
        cast = [name for name, bits in self.named_buffers() if given[name] != bits.dtype]
        *_, problems = rest
        problems += [
            f"{prefix}{name} is {given[name]} where {self.get_buffer(name).dtype} is expected: give the tensors as "
            "they were saved, without a cast"
            for name in cast
        ]
        if not cast:
            super()._load_from_state_dict(state_dict, prefix, *rest)

    def extra_repr(self) -> str:
        """For print: scheme and shape."""
        return f"{self.scheme.name}, {tuple(self.values.shape)}"


PackedWeight = Tensor | QuantizedWeight


def packed_matmul(rows: Tensor, weights: Sequence[PackedWeight], windows: Sequence[int], backend: str) -> Tensor:
    """``windowed_matmul`` on packed weights of either kind; one extractor's are all of one."""
    if not isinstance(weights[0], QuantizedWeight):
        return windowed_matmul(rows, weights, windows, backend)
    values, scales = [weight.values for weight in weights], [weight.scales for weight in weights]
    return windowed_matmul_quantized(rows, values, scales, windows, backend)


def quantize_extractor(extractor: nn.Module, name: str) -> None:
    """Puts quantised weights in the place of an extractor's packed ones. Its other weights, which stand before them and
    which no gradient reaches, are frozen.

    Raises:
        ConfigError: it has none, or an odd width for int4.
    """
    packed = [name for name in getattr(extractor, "packed", ()) if getattr(extractor, name, None) is not None]
    if not packed:
        raise ConfigError(
            f"quantization={name!r} is for packed weights, which extractor={extractor.config.extractor!r} has none of: "
            "leave quantization out, or take another extractor"
        )
    for place in packed:
        weight = QuantizedWeight.of(getattr(extractor, place), BY_NAME[name], f"extractor.{place}")
        delattr(extractor, place)
        extractor.add_module(place, weight)
    for parameter in extractor.parameters():
        parameter.requires_grad = False


def quantize(projector: SPProjector, scheme: str) -> SPProjector:
    """A projector whose packed weights are quantised, the rest copied; the one given stays as it is.

    Args:
        scheme: "int8", "fp8" (e4m3), or "int4" (groups of 128 channels).
    Raises:
        ConfigError: an unknown scheme, an extractor without packed weights, an odd width for int4, a projector that is
            quantised already.
        SPFastError: weights that are NaN or infinite.
    """
    config = projector.config
    if config.quantization is not None:
        raise ConfigError(
            f"the projector is quantised to {config.quantization} already, and {scheme} of that would add two errors: "
            "quantise the original, or projector.dequantized()"
        )
    made = _copied(projector, replace(config, quantization=str(scheme)))
    quantize_extractor(made.extractor, scheme)
    return made


def dequantize(projector: SPProjector) -> SPProjector:
    """A projector with the same numbers as ordinary weights, of the other parameters' type: one that can be trained,
    exported and quantised anew. Only float64 holds them exactly; float32 rounds once.

    Raises:
        ConfigError: it is not quantised.
    """
    if projector.config.quantization is None:
        raise ConfigError("the projector is not quantised: there is nothing to dequantise")
    made = _copied(projector, replace(projector.config, quantization=None))
    dtype = next(made.parameters()).dtype
    for name, weight in list(made.extractor.named_children()):
        if isinstance(weight, QuantizedWeight):
            delattr(made.extractor, name)
            made.extractor.register_parameter(name, nn.Parameter(weight.dequantized(dtype)))
    made.extractor.requires_grad_()
    return made


def _copied(projector: SPProjector, config: SPProjectorConfig) -> SPProjector:
    """A deep copy with another configuration in every place of the old one, and with the packed weights themselves:
    copies of them would be thrown away."""
    extractor = projector.extractor
    packed = [getattr(extractor, name, None) for name in getattr(extractor, "packed", ())]
    return copy.deepcopy(projector, {id(projector.config): config, **{id(weight): weight for weight in packed}})


def untrainable(scheme: str) -> str:
    """Why quantised weights are not trained, and the way out."""
    return (
        f"the packed weights are quantised to {scheme} and cannot be trained: train projector.dequantized() and "
        "quantise the result"
    )
