"""``accelerate`` and ``restore``: the instance's ``encode_images`` is replaced, and nothing else of it.

The fast projector is no child of the model, so names in its state dict stay. It reads the model's own modules and
parameters in every forward, whatever has been wrapped around them since.
"""

from __future__ import annotations

import types
from typing import TypeVar

from torch import Tensor, nn

from sp_fast import layout
from sp_fast.config import SPProjectorConfig
from sp_fast.errors import OfficialModelError
from sp_fast.extractors import WindowedExtractor
from sp_fast.official.live import check_untouched, live
from sp_fast.official.packing import PackedConvolutions, unpack
from sp_fast.official.switches import read_variant
from sp_fast.projector import SPProjector

Model = TypeVar("Model", bound=nn.Module)
WRAPPERS = ("_orig_mod", "module")  # of torch.compile, and of DDP


def accelerate(model: Model, backend: str = "auto") -> Model:
    """Lets a live model of the official LLaVA-SP code encode images with the fast projector; returns the same model.

    ``model`` is the official ``LlavaLlamaForCausalLM`` (or its Mistral or MPT sibling) with its vision tower loaded,
    bare or wrapped by PEFT, DDP or ``torch.compile``. Its modules, parameters, state dict and saving code stay; the
    convolutions' weights are moved, once, into a packed layout that their Parameters are views of. While a packed
    tensor is filled, memory holds it twice; a state dict copies these weights. Call it before the optimizer's first
    step: fused optimizers want their states in the parameters' layout.

    Raises:
        OfficialModelError: no official model, one that is accelerated already, or one whose modules, tower and
            ``encode_images`` are not of one variant. The model is then unchanged.
        BackendError: the backend cannot run on this machine.
    """
    inner = _official(model)
    if _encoder(inner) is not None:
        raise OfficialModelError("the model is accelerated already: call restore(model) first")
    own = vars(inner).get("encode_images", inner.encode_images)
    if not isinstance(own, types.MethodType):
        raise OfficialModelError(f"encode_images was replaced by {own!r}, which cannot be read: put the method back")
    config = read_variant(inner, own.__func__)
    try:
        encoder = FastEncoder(inner.get_model(), config, backend, vars(inner).get("encode_images"))
    except Exception:
        unpack(inner.get_model())
        raise
    inner.encode_images = encoder.encode_images
    return model


def restore(model: Model) -> Model:
    """Takes ``accelerate`` back: the same Parameters in contiguous storages of their own, with their values of now.

    Raises:
        OfficialModelError: a model that is not accelerated.
    """
    inner = _official(model)
    encoder = _encoder(inner)
    if encoder is None:
        raise OfficialModelError("the model is not accelerated: nothing to restore")
    del inner.encode_images
    if encoder.replaced is not None:
        inner.encode_images = encoder.replaced
    unpack(inner.get_model())
    return model


class FastEncoder:
    """What stands in for ``encode_images``. It knows the model's core, and not the model: no cycle keeps that alive."""

    def __init__(
        self, core: nn.Module, config: SPProjectorConfig, backend: str, replaced: types.MethodType | None
    ) -> None:
        self.replaced = replaced
        self._core = core
        self.projector = SPProjector(config, backend, device="meta")
        if config.extractor == "full":
            self.projector.extractor = _OfficialExtractor(core, config)
        self._link()

    def encode_images(self, images: Tensor) -> Tensor:
        """``[B, 3, S, S]`` pixels to ``[B, T + N, H]`` tokens, spatial tokens first."""
        _, patch_features = self._core.get_vision_tower()(images)
        self._link()
        return self.projector(patch_features)

    def _link(self) -> None:
        """Puts the model's modules of now, adapters and all, into the projector."""
        core, config, projector = self._core, self.projector.config, self.projector
        output = layout.output_module(config)
        for path in (output, f"{output}.0"):  # their GELU is computed here
            check_untouched(core, path, nn.Module)
        projector.patch_mlp, projector.output = live(core, "mm_projector"), live(core, f"{output}.1")
        if projector.integrator is not None:
            for part in layout.PARTS:
                for detail in range(len(config.detail_kernels)):
                    name = layout.attention_module(config, part, detail)
                    getattr(projector.integrator, part)[detail] = live(core, name)
        if config.extractor == "transformer":
            for level in range(len(config.levels)):
                projector.extractor.blocks[level] = live(core, layout.level_module(config, level))
                projector.extractor.queries[level] = getattr(core, layout.query_name(config, level))


class _OfficialExtractor(WindowedExtractor):
    """The fast extractor on the model's own convolutions."""

    def __init__(self, core: nn.Module, config: SPProjectorConfig) -> None:
        super().__init__(config, device="meta")
        names = [name for name, _ in self.named_parameters()]
        entries = layout.entries(config, (f"extractor.{name}" for name in names))
        self._packed = [
            PackedConvolutions(core, [entry for entry in entries if entry.ours == f"extractor.{name}"])
            for name in names
        ]
        for name in names:
            setattr(self, name, None)

    def forward(self, patch_features: Tensor, backend: str = "torch") -> Tensor:
        return self.extract(patch_features, [packed.weight() for packed in self._packed], backend)


def _official(model: nn.Module) -> nn.Module:
    """The official model inside its wrappers."""
    inner = model
    while (wrapped := _wrapped(inner)) is not None:
        inner = wrapped
    lacking = [name for name in ("get_model", "encode_images") if not callable(getattr(inner, name, None))]
    if lacking:
        raise OfficialModelError(
            f"{type(inner).__name__} has no {' and no '.join(lacking)}: give a model of the official LLaVA-SP code "
            "(LlavaLlamaForCausalLM); a projector alone is loaded with SPProjector.from_official"
        )
    return inner


def _wrapped(model: nn.Module) -> nn.Module | None:
    if hasattr(model, "get_base_model"):  # PEFT
        return model.get_base_model()
    return next((child for name, child in model.named_children() if name in WRAPPERS), None)


def _encoder(inner: nn.Module) -> FastEncoder | None:
    encoder = getattr(vars(inner).get("encode_images"), "__self__", None)
    return encoder if isinstance(encoder, FastEncoder) else None
