"""LLaVA-SP's official form in float64, in the memory of its largest convolution: weights are made when they are met."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sp_fast import ReferenceSPProjector, SPProjectorConfig
from sp_fast.bench.implementations import Exact, Weights
from sp_fast.stored_tensor import StoredTensor


class Streamed(Exact):
    """Exact, which holds no convolution's weights."""

    def __init__(self, config: SPProjectorConfig, weights: Weights, device: torch.device) -> None:
        self._dtype, self._met = torch.float64, {}
        self.module = ReferenceSPProjector(config, device="meta", dtype=torch.float64)
        for name, conv in list(self.module.named_modules()):
            if isinstance(conv, nn.Conv2d):
                key = f"{name}.weight"
                streamed = _StreamedConv(weights[key], conv.stride)
                streamed.register_forward_hook(lambda conv, x, z, key=key: self._cut(key, conv, x[0], z))
                self.module.set_submodule(name, streamed)
        self.module.to_empty(device=device).eval()
        with torch.no_grad():
            for key, parameter in self.module.named_parameters():
                parameter.copy_(weights[key].load())


class _StreamedConv(nn.Module):
    """A convolution without bias, in the place of nn.Conv2d."""

    def __init__(self, stored: StoredTensor, stride: tuple[int, ...]) -> None:
        super().__init__()
        self._stored, self.stride = stored, stride

    @property
    def weight(self) -> Tensor:
        """Its shape alone, for its gradient."""
        return torch.empty(self._stored.shape, device="meta")

    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            return F.conv2d(x, self._stored.load().double(), stride=self.stride)
