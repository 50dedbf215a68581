"""SPProjector: the drop-in LLaVA-SP projector on packed weights."""

from __future__ import annotations

import os
from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sp_fast.backend import choose_backend
from sp_fast.config import SPProjectorConfig
from sp_fast.extractors import EXTRACTORS
from sp_fast.integrator import DetailIntegrator, finite_where, init_linear
from sp_fast.interface import ProjectorOutput, check_dtype, check_patch_features


class SPProjector(nn.Module):
    """Patch features of a vision tower to tokens of a language model, LLaVA-SP's way.

        z_small, z_big = extractor(patch_features)            SFE, and the DFI's detail map
        fused = [z_small, attention of z_small over z_big]    DFI
        spatial tokens = Linear(GELU(fused));  patch tokens = Linear(GELU(Linear(patch_features)))

    Args:
        config: what to build; the default is LLaVA-SP-Cropping at its published widths.
        backend: "auto", "torch" or "triton"; see ``backend.reason`` for what was chosen and why.
        device, dtype: of the parameters, as in torch's own modules; ``device="meta"`` allocates nothing.
    """

    def __init__(
        self,
        config: SPProjectorConfig | None = None,
        backend: str = "auto",
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        config = config or SPProjectorConfig()
        factory = {"device": device, "dtype": dtype}
        self.config = config
        self.backend = choose_backend(backend)
        self.extractor = EXTRACTORS[config.extractor](config, **factory)
        self.integrator = DetailIntegrator(config, **factory) if config.attends else None
        self.output = nn.Linear(config.fused_width, config.text_width, bias=config.spatial_bias, **factory)
        init_linear(self.output)
        self.patch_mlp = nn.Sequential(
            nn.Linear(config.vision_width, config.text_width, **factory),
            nn.GELU(),
            nn.Linear(config.text_width, config.text_width, **factory),
        )

    def forward(
        self, patch_features: Tensor, return_attention: bool = False
    ) -> Tensor | tuple[Tensor, Tensor | tuple[Tensor, ...]]:
        """``[B, N, C]`` to ``[B, T + N, H]``: T spatial tokens first, then the N patch tokens.

        With ``return_attention``, also the attention ``[B, T, O]`` over the detail map, or a tuple of them where the
        configuration has several details.

        Raises:
            ValueError: features of another rank, width, grid or dtype, or attention asked of a projector without DFI.
        """
        if return_attention and not self.config.attends:
            raise ValueError("return_attention=True needs a detail integrator, but this projector has none")
        output = self.intermediates(patch_features)
        if not return_attention:
            return output.tokens
        return output.tokens, output.attention[0] if len(output.attention) == 1 else output.attention

    def intermediates(self, patch_features: Tensor) -> ProjectorOutput:
        """The forward with everything that it computes on the way."""
        check_patch_features(patch_features, self.config)
        check_dtype(patch_features, self.output.weight)
        z_small, z_big = self.extractor(patch_features)
        z_small = finite_where("spatial", z_small, self.config)
        z_big = tuple(finite_where("detail", z, self.config) for z in z_big)
        spatial, attention = self.integrate(z_small, z_big)
        tokens = torch.cat([spatial, self.patch_mlp(patch_features)], dim=1)
        return ProjectorOutput(tokens, z_small, z_big, attention)

    def integrate(self, z_small: Tensor, z_big: tuple[Tensor, ...]) -> tuple[Tensor, tuple[Tensor, ...]]:
        """DFI's attention and the output layer: spatial tokens ``[B, T, H]``, and the attention of each detail."""
        fused, attention = z_small, ()
        if self.integrator is not None:
            fused, attention = self.integrator(z_small, z_big)
        return self.output(F.gelu(fused)), attention

    @classmethod
    def from_official(
        cls,
        source: str | os.PathLike[str] | Mapping[str, Tensor],
        grid: int | None = None,
        pyramid: str | None = None,
        *,
        backend: str = "auto",
        device: torch.device | str = "cpu",
        dtype: torch.dtype | None = None,
    ) -> SPProjector:
        """A projector from an official LLaVA-SP checkpoint of any layout: file, folder or state dict.

        The variant is read off keys and shapes. ``grid`` (default 24, or 16 for conv224) and ``pyramid`` (needed for
        the transformer variants) are for what they cannot tell. ``dtype=None`` keeps the checkpoint's own.

        Raises:
            CheckpointError: missing, unexpected, misshaped or non-finite tensors, damaged or unsafe files.
        """
        from sp_fast.checkpoint import load_official

        return load_official(cls, source, grid, pyramid, backend=backend, device=device, dtype=dtype)

    def load_official(self, source: str | os.PathLike[str] | Mapping[str, Tensor]) -> None:
        """Fills this projector, whatever its configuration, from tensors in the official layout.

        Strict in names and shapes; values are cast to the projector's dtype. Raises CheckpointError: for names and
        shapes before anything is changed, for damaged or non-finite data with the tensors before it already filled.
        """
        from sp_fast.checkpoint import load_official_into

        load_official_into(self, source)

    def official_state_dict(self, prefix: str = "model.") -> dict[str, Tensor]:
        """The official layout, bit for bit: contiguous copies of the convolutions, the other tensors shared."""
        from sp_fast.checkpoint import official_state_dict

        return official_state_dict(self, prefix)

    def save_pretrained(self, folder: str | os.PathLike[str], force: bool = False) -> None:
        """Writes config.json and model.safetensors; refuses to overwrite them unless ``force``."""
        from sp_fast.checkpoint import save_pretrained

        save_pretrained(self, folder, force)

    @classmethod
    def from_pretrained(
        cls,
        folder: str | os.PathLike[str],
        *,
        backend: str = "auto",
        device: torch.device | str = "cpu",
        dtype: torch.dtype | None = None,
    ) -> SPProjector:
        """What ``save_pretrained`` wrote. Raises CheckpointError as ``from_official`` does."""
        from sp_fast.checkpoint import load_pretrained

        return load_pretrained(cls, folder, backend=backend, device=device, dtype=dtype)

    def extra_repr(self) -> str:
        return f"backend={self.backend.name} ({self.backend.reason}), {self.config}"
