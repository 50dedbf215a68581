"""Quantised packed weights: how a weight ``[cells, C, D]`` is stored in one byte or half a byte an element.

    weight[q, k, d] = scale[q, group(k), d] * value[q, d, k]

    int8    value in -127 .. 127                          one scale a (cell, output)
    fp8     value of e4m3: 4 significant bits, to 448     one scale a (cell, output)
    int4    value in -7 .. 7, stored as value + 8         one scale a group of 128 channels of a (cell, output)

``values`` are ``[cells, D, K]``, a row of channels contiguous: K = C, or C / 2 bytes of int4, each with channel k in
its low half and C / 2 + k in its high one, so that both halves of a tile of bytes meet contiguous channels. A group is
64 neighbouring bytes. ``scales`` are ``[cells, groups, D]`` float32: published weights have scales of 1e-5, which
float16 does not, and 4 bytes are what an asynchronous copy takes at least. Groups of 128 so cost what groups of 64
would with scales of 16 bits: 1/16 of int4's values.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True)
class Scheme:
    """How values are stored.

    ``encode`` takes numbers ``[..., channels of a byte, K]`` in units of their scale and gives bytes ``[..., K]``;
    ``decode`` writes numbers ``[..., C]`` of float32 or float64 into its second argument.
    """

    name: str
    dtype: torch.dtype
    channels: int  # of a stored byte
    largest: float  # value
    group: int | None  # bytes of a row that share a scale; None: all
    encode: Callable[[Tensor], Tensor]
    decode: Callable[[Tensor, Tensor], object]

    def group_bytes(self, stored: int) -> int:
        """Bytes of a row of ``stored`` bytes that share a scale."""
        return min(self.group or stored, stored)

    def shapes(self, cells: int, width: int, depth: int) -> tuple[tuple[int, int, int], tuple[int, int, int]]:
        """Of values and scales of a weight ``[cells, C, D]``."""
        stored = width // self.channels
        return (cells, depth, stored), (cells, -(-stored // self.group_bytes(stored)), depth)


def _encode_int8(numbers: Tensor) -> Tensor:
    return numbers.squeeze(-2).round().clamp(-127, 127).to(torch.int8)


def _decode_int8(values: Tensor, out: Tensor) -> None:
    out.copy_(values)


def _encode_fp8(numbers: Tensor) -> Tensor:
    return numbers.squeeze(-2).clamp(-448, 448).to(torch.float8_e4m3fn)


def _decode_fp8(values: Tensor, out: Tensor) -> None:
    """Sign, exponent and mantissa moved to where float16 has them, whose exponent counts from 15 and not from 7. On a
    CPU that is 20 times as fast as torch's own conversion, number by number."""
    bits = values.view(torch.int8).to(torch.int16)
    out.copy_(bits.bitwise_left_shift_(7).bitwise_and_(-0x4080).view(torch.float16)).mul_(256)


def _encode_int4(numbers: Tensor) -> Tensor:
    low, high = (numbers.round().clamp(-7, 7) + 8).to(torch.uint8).unbind(-2)
    return low | high << 4


def _decode_int4(values: Tensor, out: Tensor) -> None:
    low, high = out.unflatten(-1, (2, -1)).unbind(-2)
    low.copy_(values & 15)
    high.copy_(values >> 4)
    out.sub_(8)


INT8 = Scheme("int8", torch.int8, 1, 127, None, _encode_int8, _decode_int8)
FP8 = Scheme("fp8", torch.float8_e4m3fn, 1, 448, None, _encode_fp8, _decode_fp8)
INT4 = Scheme("int4", torch.uint8, 2, 7, 64, _encode_int4, _decode_int4)
SCHEMES = {scheme.dtype: scheme for scheme in (INT8, FP8, INT4)}  # a stored type says its scheme


def quantize_cells(weight: Tensor, scheme: Scheme) -> tuple[Tensor, Tensor]:
    """Values and scales of a weight ``[cells, C, D]`` whose C the scheme's channels of a byte divide.

    The largest element of a group is represented exactly, to rounding; each other one to half a step.
    """
    numbers = weight.float().transpose(1, 2).contiguous().unflatten(2, (scheme.channels, -1))
    stored = numbers.shape[3]
    group = scheme.group_bytes(stored)
    largest = F.pad(numbers.abs().amax(2), (0, -stored % group)).unflatten(2, (-1, group)).amax(3)
    scales = largest / scheme.largest
    scales = torch.where(scales == 0, 1.0, scales)  # NaN stays NaN, for whoever looks
    values = scheme.encode(numbers / spread(scales, group, stored).unsqueeze(2))
    return values, scales.transpose(1, 2).contiguous()


def dequantize_cells(values: Tensor, scales: Tensor, out: Tensor) -> Tensor:
    """The weight as it is stored, ``[cells, D, C]``, written into ``out`` of float32 or float64, which is returned."""
    scheme, stored = SCHEMES[values.dtype], values.shape[2]
    scheme.decode(values, out)
    each = spread(scales.to(out.dtype).transpose(1, 2), scheme.group_bytes(stored), stored).unsqueeze(2)
    out.unflatten(2, (scheme.channels, stored)).mul_(each)
    return out


def spread(scales: Tensor, group: int, stored: int) -> Tensor:
    """Scales ``[cells, D, groups]`` of every stored byte, ``[cells, D, K]``; one that all share is not repeated."""
    return scales if scales.shape[2] == 1 else scales.repeat_interleave(group, dim=2)[:, :, :stored]
