"""From a full extractor's weights to a compact one's parameters, one function a kind; the maths in its docstring.

W_q ``[C, D]`` is the weight of a cell q of a convolution, W' what the compact extractor makes of it. Every method
minimises ``sum_q ||M^(1/2) (W_q - W'_q)||^2`` as well as it can, M being the metric's moment: the identity where
weights are all that is known. One convolution at a time is in memory beside the full projector and the result.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from sp_fast import compact_geometry
from sp_fast.compact_base import by_weight
from sp_fast.compact_config import narrows
from sp_fast.compress.full import Full
from sp_fast.compress.metric import Metric
from sp_fast.config import SPProjectorConfig
from sp_fast.extractors import EXTRACTORS

_CELLS, _CHANNELS = 16, 32  # that are unfolded together: copies of some 30 MB at the published widths
_EXACT = 1024  # a shorter side of a matrix up to which all of its singular values are computed
_SPARE, _PASSES, _SEED = 16, 4, 0  # of the randomised ones


@dataclass(frozen=True)
class Spectrum:
    """``kept[i]``: share of the energy that rank i + 1 keeps. ``rank`` was taken; None: the sharing itself."""

    name: str
    kept: list[float]
    rank: int | None

    @property
    def taken(self) -> float:
        """Share of the energy that was kept."""
        return self.kept[-1] if self.rank is None else self.kept[min(self.rank, len(self.kept)) - 1]


@dataclass(frozen=True)
class Fit:
    """Parameters of a compact extractor by name, float32, and what of the weights they keep."""

    parameters: dict[str, Tensor]
    spectra: list[Spectrum]


def bottleneck(full: Full, config: SPProjectorConfig, metric: Metric) -> Fit:
    """The unfolded weight ``[C, cells * D]``, truncated: one subspace of the channels for all cells (``_subspace``)."""
    reduce, lift, spectrum = _subspace(full.kernels(), metric, config.rank)
    narrow = [lift @ kernel for kernel in full.kernels()]
    return Fit({"reduce_weight": reduce} | _packed(full, narrow, "weight"), [spectrum])


def depthwise(full: Full, config: SPProjectorConfig, metric: Metric) -> Fit:
    """Each channel's ``[cells, D]`` is cut to rank 1: its leading singular vectors u, v give ``depth = s^(1/2) u`` and
    ``point = s^(1/2) v``. Found by the eigenvectors of the smaller Gram matrix.

    What channels have in common is not used: a metric changes nothing.
    """
    depths, points, spectra = [], [], []
    for name, kernel in zip(full.names, full.kernels(), strict=True):
        found = [_leading(part.transpose(0, 1).contiguous()) for part in kernel.split(_CHANNELS, dim=1)]
        depth, point, energies = zip(*found, strict=True)
        depths.append(torch.cat(depth).t().contiguous())
        points.append(torch.cat(point).unsqueeze(0))
        spectra.append(Spectrum(name, _shares(sum(energies)), 1))
    return Fit(_packed(full, depths, "depth") | _packed(full, points, "point"), spectra)


def _leading(matrices: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Of ``[n, rows, columns]`` the leading pairs, scaled alike, ``[n, rows]`` and ``[n, columns]``; and the energy of
    each rank, summed over n."""
    wide = matrices.shape[1] < matrices.shape[2]
    tall = matrices.transpose(1, 2) if wide else matrices
    values, vectors = torch.linalg.eigh(tall.transpose(1, 2) @ tall)
    short = vectors[:, :, -1]
    long = (tall @ short.unsqueeze(2)).squeeze(2)
    scale = long.norm(dim=1, keepdim=True).clamp(min=torch.finfo(long.dtype).tiny).sqrt()
    pair = (short * scale, long / scale)
    return *(pair if wide else pair[::-1]), values.clamp(min=0).double().sum(0).flip(0)


def grouped(full: Full, config: SPProjectorConfig, metric: Metric) -> Fit:
    """Outputs of group g are explained by its own channels: ``W'_q[g, g] = M[g, g]^-1 M[g, :] W_q[:, g]``, a regression
    of the other channels on these; with weights alone the blocks as they are.

    The energy that is kept is that of the blocks in the full weights.
    """
    channels = torch.arange(config.vision_width).tensor_split(config.groups)
    outputs = torch.arange(config.spatial_width).tensor_split(config.groups)
    regress = [torch.linalg.solve(metric.moment[c][:, c], metric.moment[c]).float() for c in channels]
    blocks, inside, total = [], 0.0, 0.0
    for kernel in full.kernels():
        own = torch.stack([matrix @ kernel[:, :, d] for matrix, d in zip(regress, outputs, strict=True)])
        blocks.append(own.transpose(0, 1))  # cells first, as they are packed
        inside += sum(
            _energy(kernel[:, c[0] : c[-1] + 1, d[0] : d[-1] + 1]) for c, d in zip(channels, outputs, strict=True)
        )
        total += _energy(kernel)
    packed = {name: weight.transpose(0, 1).contiguous() for name, weight in _packed(full, blocks, "weight").items()}
    return Fit(packed, [Spectrum("inside the groups", [inside / (total or 1.0)], None)])


def separable(full: Full, config: SPProjectorConfig, metric: Metric) -> Fit:
    """Each kernel, unfolded to ``[width * C, height * D]``, truncated at the rank: ``across`` and ``down`` are its
    singular vectors, each with the root of the singular values. With a metric, M^(1/2) is multiplied into the channels
    first and taken out of ``across`` again.

    Large matrices get Halko's randomised subspace iteration, seeded; its spectrum ends at the rank.
    """
    across, down, spectra = [], [], []
    root, inverse = metric.root.float(), metric.inverse_root.float()
    for name, w, kernel in zip(full.names, full.windows, full.kernels(), strict=True):
        c, d = kernel.shape[1:]
        unfolded = torch.empty(w.width, c, w.height, d)
        for row, cells in enumerate(kernel.unflatten(0, (w.height, w.width))):
            unfolded[:, :, row] = root @ cells
        u, s, v = _singular(unfolded.view(w.width * c, w.height * d), config.rank)
        spectra.append(Spectrum(name, _shares(s**2, _energy(unfolded)), config.rank))
        spare = config.rank - len(s[: config.rank])
        u, v = (F.pad(x[:, : config.rank] * s[: config.rank].sqrt(), (0, spare)) for x in (u, v))
        across.append(inverse @ u.unflatten(0, (w.width, c)))
        down.append(v.unflatten(0, (w.height, d)).transpose(1, 2).contiguous())
    return Fit(_packed(full, across, "across") | _packed(full, down, "down"), spectra)


def _singular(matrix: Tensor, rank: int) -> tuple[Tensor, Tensor, Tensor]:
    """U, s, V of a matrix, at least ``rank`` of them if there are as many."""
    if min(matrix.shape) <= max(_EXACT, 2 * rank) and min(matrix.shape) <= 4 * _EXACT:
        u, s, vt = torch.linalg.svd(matrix, full_matrices=False)
        return u, s, vt.t()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(_SEED)
        return torch.svd_lowrank(matrix, min(rank + _SPARE, *matrix.shape), _PASSES)


def nested(full: Full, config: SPProjectorConfig, metric: Metric) -> Fit:
    """A cell of the shared kernel is the mean of the cells that it stands for, in the levels and details that reach it:
    the least squares of all of them. Where there is a rank, the result is truncated as in ``bottleneck``.

    The mean is the same in every metric.
    """
    side = config.levels[-1][0] * config.levels[-1][1]
    shared = torch.zeros(side, config.vision_width, config.spatial_width)
    counts, total = torch.zeros(side), 0.0
    for w, kernel in zip(full.windows, full.kernels(), strict=True):
        order = torch.tensor(compact_geometry.nest_order(config, w.height, w.width))
        shared.index_add_(0, order, kernel)
        counts[order] += 1
        total += _energy(kernel)
    shared /= counts[:, None, None]
    weighed = shared * counts.sqrt()[:, None, None]
    sharing = Spectrum("shared by the levels", [_energy(weighed) / (total or 1.0)], None)
    return _narrowed({"shared_weight": shared}, [weighed], config, metric, sharing)


def resampled(full: Full, config: SPProjectorConfig, metric: Metric) -> Fit:
    """A kernel K that is spread over a level's bins by averaging's adjoint, A^T K, misses the weights W least where
    ``(sum A A^T) K = sum A W``, summed over the levels that share K: for equal bins the sum of the weights in a bin.
    Where there is a rank, the result is truncated as in ``bottleneck``. K is the same in every metric.
    """
    averaging = EXTRACTORS["resampled"](config, device="meta").averaging
    levels = len(config.levels)
    sums: dict[int, tuple[Tensor, Tensor]] = {}  # of each kernel, the two sides
    total = 0.0
    for i, (w, kernel) in enumerate(zip(full.windows, full.kernels(), strict=True)):
        a = averaging(w)
        left, right = a @ a.t(), torch.einsum("kn,ncd->kcd", a.float(), kernel)
        own = max(0, i - levels + 1)
        sums[own] = (sums[own][0] + left, sums[own][1].add_(right)) if own in sums else (left, right)
        total += _energy(kernel)
    kernels, weighed = [], []
    for left, right in sums.values():
        values, vectors = torch.linalg.eigh(left)
        seen = values > values[-1] * len(left) * torch.finfo(values.dtype).eps
        inverse = vectors[:, seen] / values[seen] @ vectors[:, seen].t()
        kernels.append(torch.einsum("jk,kcd->jcd", inverse.float(), right))
        root = vectors[:, seen] * values[seen].sqrt() @ vectors[:, seen].t()
        weighed.append(torch.einsum("jk,kcd->jcd", root.float(), kernels[-1]))
    sharing = Spectrum("one kernel, resampled", [sum(map(_energy, weighed)) / (total or 1.0)], None)
    weights = {"spatial_weight": kernels.pop(0)} if levels else {}
    if kernels:
        weights["detail_weight"] = torch.cat(kernels)
    return _narrowed(weights, weighed, config, metric, sharing)


def _narrowed(
    weights: dict[str, Tensor], weighed: list[Tensor], config: SPProjectorConfig, metric: Metric, sharing: Spectrum
) -> Fit:
    """The same weights behind a shared 1x1 convolution, where the configuration has one; ``weighed`` are such that what
    is missed of them is missed of the full weights."""
    if not narrows(config):
        return Fit(weights, [sharing])
    reduce, lift, spectrum = _subspace(weighed, metric, config.rank)
    narrow = {name: lift @ weight for name, weight in weights.items()}
    return Fit({"reduce_weight": reduce} | narrow, [sharing, spectrum])


def _subspace(kernels: Iterable[Tensor], metric: Metric, rank: int) -> tuple[Tensor, Tensor, Spectrum]:
    """V, the leading eigenvectors ``[C, rank]`` of the C x C Gram matrix ``M^(1/2) (sum_q W_q W_q^T) M^(1/2)``.

    ``W'_q = (M^(-1/2) V) (V^T M^(1/2) W_q)`` is the best of rank r for all cells together (Eckart and Young). Returns
    the two factors as ``[rank, C]``, for features and for weights.
    """
    gram: Tensor | None = None
    for kernel in kernels:
        for cells in kernel.split(_CELLS):
            unfolded = cells.transpose(0, 1).flatten(1)
            product = (unfolded @ unfolded.t()).double()
            gram = product if gram is None else gram.add_(product)
    values, vectors = torch.linalg.eigh(metric.root @ gram @ metric.root)
    leading = vectors.flip(1)[:, :rank].t()
    reduce, lift = (leading @ matrix for matrix in (metric.inverse_root, metric.root))
    spectrum = Spectrum("channels", _shares(values.flip(0).clamp(min=0)), rank)
    return reduce.float().contiguous(), lift.float().contiguous(), spectrum


def _packed(full: Full, parts: list[Tensor], role: str) -> dict[str, Tensor]:
    """What belongs to each convolution as the packed parameters ``spatial_<role>`` and ``detail_<role>``."""
    names = [f"{part}_{role}" for part, there in _parts(full.config) if there]
    return dict(zip(names, by_weight(full.windows, parts), strict=True))


def _parts(config: SPProjectorConfig) -> list[tuple[str, bool]]:
    return [("spatial", bool(config.levels)), ("detail", bool(config.detail_kernels))]


def _energy(weight: Tensor) -> float:
    return float(weight.square().sum(dtype=torch.float64))


def _shares(energies: Tensor, total: float | None = None) -> list[float]:
    """Of energies in descending order, the share of the first, of the first two, ..."""
    total = float(energies.sum()) if total is None else total
    return (energies.double().cumsum(0) / (total or 1.0)).clamp(max=1).tolist()


METHODS: dict[str, Callable[[Full, SPProjectorConfig, Metric], Fit]] = {
    "bottleneck": bottleneck,
    "depthwise": depthwise,
    "grouped": grouped,
    "separable": separable,
    "nested": nested,
    "resampled": resampled,
}
