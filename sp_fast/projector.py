"""SPProjector: the drop-in LLaVA-SP projector on packed weights."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sp_fast.backend import Backend, check_backend, choose_backend
from sp_fast.compact_config import COMPACT, COMPACT_FIELDS
from sp_fast.config import NAN_PLACES, SPProjectorConfig
from sp_fast.errors import SPFastError
from sp_fast.extractors import EXTRACTORS
from sp_fast.integrator import NORM_EPS, DetailIntegrator, finite_where, init_linear, is_plain
from sp_fast.interface import ProjectorOutput, check_dtype, check_patch_features
from sp_fast.kernels.autocast import autocast_dtype
from sp_fast.kernels.token_head import token_head
from sp_fast.quantize import dequantize, quantize, quantize_extractor, untrainable


class SPProjector(nn.Module):
    """Patch features of a vision tower to tokens of a language model, LLaVA-SP's way.

        z_small, z_big = split(extractor(patch_features))     SFE, and the DFI's detail map
        fused = [z_small, attention of z_small over z_big]    DFI
        spatial tokens = Linear(GELU(fused));  patch tokens = Linear(GELU(Linear(patch_features)))

    Without an extractor (the variant "mlp") the patch tokens are all there is, as in LLaVA-1.5.

    Args:
        config: what to build; the default is LLaVA-SP-Cropping at its published widths.
        backend: "auto" (Triton kernels for features on an NVIDIA GPU), "torch" or "triton"; see ``backend.reason``.
        device, dtype: of the parameters, as in torch's own modules; ``device="meta"`` allocates nothing.

    Raises:
        BackendError: a backend that this machine, or in the forward these features, cannot run.
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
        self._requested = check_backend(backend)
        self.extractor = EXTRACTORS[config.extractor](config, **factory)
        if config.quantization is not None:
            quantize_extractor(self.extractor, config.quantization)
        self.integrator = DetailIntegrator(config, **factory) if config.attends else None
        self.output = None
        if config.spatial_tokens:
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
        tokens, _, attention = self._run(patch_features)
        if not return_attention:
            return tokens
        return tokens, attention[0] if len(attention) == 1 else attention

    def intermediates(self, patch_features: Tensor) -> ProjectorOutput:
        """The forward with everything that it computes on the way."""
        tokens, z, attention = self._run(patch_features)
        return ProjectorOutput(tokens, *self._parts(z), attention)

    def integrate(self, z: Tensor) -> tuple[Tensor, tuple[Tensor, ...]]:
        """DFI's attention and the output layer, on spatial features and detail maps ``[B, T + sum of O, D]``.

        Returns the spatial tokens ``[B, T, H]``, and the attention of each detail.

        Raises:
            ValueError: the projector has no spatial tokens.
        """
        if self.output is None:
            raise ValueError("extractor='none' gives no spatial tokens to integrate: call the projector itself")
        if self._backend_for(z).name == "triton" and is_plain(self):
            return token_head(z, None, **self._head_arguments(with_patches=False))
        z_small, z_big = self._parts(z)
        fused, attention = z_small, ()
        if self.integrator is not None:
            fused, attention = self.integrator(z_small, z_big)
        return self.output(F.gelu(fused)), attention

    @property
    def backend(self) -> Backend:
        """What runs on features of the parameters' device and type. Raises BackendError as the forward would."""
        return self._backend_for(next(self.parameters()))

    def _backend_for(self, tensor: Tensor) -> Backend:
        dtype = tensor.dtype
        if dtype != torch.float64:  # which autocast leaves alone
            dtype = autocast_dtype(tensor.device) or dtype
        return choose_backend(self._requested, tensor.device, dtype)

    def _run(self, patch_features: Tensor) -> tuple[Tensor, Tensor, tuple[Tensor, ...]]:
        """Tokens, what the extractor gave, attention."""
        check_patch_features(patch_features, self.config)
        if self.output is None or self.config.quantization:  # others' extractors look at weights that FSDP has gathered
            check_dtype(patch_features, next(self.parameters()))
        backend = self._backend_for(patch_features).name
        z = self.extractor(patch_features, backend)
        if self.output is None:  # two products, which are cuBLAS's on every backend
            return self.patch_mlp(patch_features), z, ()
        if backend == "triton" and is_plain(self):
            tokens, attention = token_head(z, patch_features, **self._head_arguments(with_patches=True))
            return tokens, z, attention
        spatial, attention = self.integrate(z)
        return torch.cat([spatial, self.patch_mlp(patch_features)], dim=1), z, attention

    def _parts(self, z: Tensor) -> tuple[Tensor, tuple[Tensor, ...]]:
        """Spatial features and detail maps, finite where the configuration says so."""
        config = self.config
        if not config.attends:
            return finite_where(self._spatial_place(), z, config), ()
        z_small, *z_big = z.split([config.spatial_tokens, *self._detail_outputs()], dim=1)
        return finite_where("spatial", z_small, config), tuple(finite_where("detail", z, config) for z in z_big)

    def _spatial_place(self) -> str:
        """Where nan_to_num applies to what gives the spatial tokens: without levels that is a detail map."""
        return "spatial" if self.config.levels else "detail"

    def _detail_outputs(self) -> list[int]:
        return [side * side for side in self.config.detail_sides] if self.config.attends else []

    def _head_arguments(self, with_patches: bool) -> dict[str, Any]:
        """What token_head takes beside features."""
        return {
            "details": self._detail_outputs(),
            "projections": [] if self.integrator is None else self.integrator.projections(),
            "output": (self.output.weight, self.output.bias),
            "patch_mlp": [t for i in (0, 2) for t in (self.patch_mlp[i].weight, self.patch_mlp[i].bias)]
            if with_patches
            else [],
            "concat": self.config.detail_fusion == "concat",
            "finite": [place in self.config.nan_to_num for place in (self._spatial_place(), *NAN_PLACES[1:])],
            "eps": NORM_EPS,
        }

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
        """The official layout, bit for bit: contiguous copies of the convolutions, the other tensors shared.

        Raises CheckpointError for a compact projector, which has none: see ``expanded``.
        """
        from sp_fast.checkpoint import official_state_dict

        return official_state_dict(self, prefix)

    def expanded(self) -> SPProjector:
        """The full projector that equals this compact one, with weights of its own: what an official checkpoint is
        written from, ``expanded().official_state_dict()``. It is as large as the full one: 3.7 GB in float32 at the
        published widths.

        Raises:
            ValueError: the projector is not compact, or is quantised.
        """
        if self.config.extractor not in COMPACT:
            raise ValueError(
                f"extractor={self.config.extractor!r} is not compact, and has nothing to expand: use the projector "
                "itself"
            )
        if self.config.quantization is not None:
            raise ValueError(f"the weights are quantised to {self.config.quantization}: expand projector.dequantized()")
        config = replace(self.config, extractor="full", **dict.fromkeys(COMPACT_FIELDS))
        full = SPProjector(config, self._requested, device="meta")
        with torch.no_grad():
            names = [name for name, _ in full.extractor.named_parameters()]
            dense = dict(zip(names, self.extractor.dense_weights(), strict=True))
        state = {name: t.clone() for name, t in self.state_dict().items() if not name.startswith("extractor.")}
        state |= {f"extractor.{name}": weight.contiguous() for name, weight in dense.items()}
        full.load_state_dict(state, assign=True)
        for name, parameter in self.named_parameters():
            if not name.startswith("extractor."):
                full.get_parameter(name).requires_grad = parameter.requires_grad
        return full.train(self.training)

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

    def quantized(self, scheme: str) -> SPProjector:
        """A copy for inference whose packed weights are "int8", "fp8" (e4m3) or "int4".

        Raises:
            ConfigError: an unknown scheme, or a projector that cannot have it, or has one.
        """
        return quantize(self, scheme)

    def dequantized(self) -> SPProjector:
        """A copy of a quantised projector with the same numbers as ordinary weights, of the other parameters' type.

        Raises:
            ConfigError: it is not quantised.
        """
        return dequantize(self)

    def requires_grad_(self, requires_grad: bool = True) -> SPProjector:
        """As torch's. Raises SPFastError where quantised weights are to be trained; single layers still can be."""
        if requires_grad and self.config.quantization is not None:
            raise SPFastError(untrainable(self.config.quantization))
        return super().requires_grad_(requires_grad)

    def extra_repr(self) -> str:
        return f"backend={self.backend.name} ({self.backend.reason}), {self.config}"
