"""The models side by side, on the same weights wherever they share a part."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from transformers import GenerationConfig, LlavaForConditionalGeneration, PreTrainedModel

from sp_fast.bench import implementations
from sp_fast.bench.model_cases import EXACT, LLAVA, SP_FAST, SP_REFERENCE
from sp_fast.bench.model_exact import widen
from sp_fast.bench.model_shapes import ModelShape
from sp_fast.bench.weights import random_tensor, random_weights
from sp_fast.checkpoint import reference_state_dict
from sp_fast.llava_sp import LlavaSpForConditionalGeneration
from sp_fast.stored_tensor import StoredTensor

Weights = Mapping[str, StoredTensor]
PROJECTOR = "multi_modal_projector"


def build_model(
    implementation: str, shape: ModelShape, dtype: torch.dtype, device: torch.device, seed: int
) -> PreTrainedModel:
    """A model that generates greedily and never stops by itself: ``sp_fast``, ``sp_reference``, ``llava``, or the first
    in float64, ``exact``."""
    model, weights = base_model(shape, dtype, device, seed)
    model = MODELS[implementation](model, shape, weights, device).eval()
    model.generation_config = GenerationConfig(do_sample=False, eos_token_id=None, pad_token_id=0)
    return model


def base_model(
    shape: ModelShape, dtype: torch.dtype, device: torch.device, seed: int
) -> tuple[LlavaSpForConditionalGeneration, Weights]:
    """LLaVA-SP, and its projector's weights apart, as the reference has them: every implementation takes them."""
    if shape.folder is None:
        return _random_model(shape, dtype, device, seed)
    model = LlavaSpForConditionalGeneration.from_pretrained(shape.folder, dtype=dtype).to(device)
    return model, _stored(reference_state_dict(getattr(model.model, PROJECTOR)))


def _random_model(
    shape: ModelShape, dtype: torch.dtype, device: torch.device, seed: int
) -> tuple[LlavaSpForConditionalGeneration, Weights]:
    """Every parameter from its name and the seed, the same in all processes; the projector's are given apart."""
    with _default_dtype(dtype), device, _Unfilled():
        model = LlavaSpForConditionalGeneration(shape.config())
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if PROJECTOR not in name:
                parameter.copy_(random_tensor(name, tuple(parameter.shape), seed, device))
    return model, random_weights(shape.config().projector, seed, dtype, device)


def _stored(tensors: Mapping[str, Tensor]) -> Weights:
    return {key: StoredTensor(tuple(t.shape), t.dtype, lambda t=t: t) for key, t in tensors.items()}


def _with_projector(name: str) -> object:
    """LLaVA-SP with one of the projector's implementations."""

    def make(
        model: LlavaSpForConditionalGeneration, shape: ModelShape, weights: Weights, device: torch.device
    ) -> LlavaSpForConditionalGeneration:
        put_projector(model, name, shape, weights, device)
        return model

    return make


def put_projector(
    model: LlavaSpForConditionalGeneration, name: str, shape: ModelShape, weights: Weights, device: torch.device
) -> implementations.Implementation:
    """One of the projector's implementations in place of the model's own."""
    setattr(model.model, PROJECTOR, None)  # what it was built with goes before the other comes
    implementation = implementations.IMPLEMENTATIONS[name](shape.config().projector, weights, device)
    setattr(model.model, PROJECTOR, implementation.module)
    return implementation


def _exact(
    model: LlavaSpForConditionalGeneration, shape: ModelShape, weights: Weights, device: torch.device
) -> LlavaSpForConditionalGeneration:
    model = _with_projector(implementations.EXACT)(model, shape, weights, device)
    widen_parts(model)
    return model


def widen_parts(model: LlavaSpForConditionalGeneration) -> None:
    """All but the projector in float64."""
    for part in (model.model.vision_tower, model.model.language_model, model.lm_head):
        widen(part)


def _llava(
    model: LlavaSpForConditionalGeneration, shape: ModelShape, weights: Weights, device: torch.device
) -> LlavaForConditionalGeneration:
    """transformers' own LLaVA-1.5 around the same tower and language model; its MLP is that of the patch tokens."""
    implementations.sum_in_float32()
    with torch.device("meta"):
        llava = LlavaForConditionalGeneration(shape.llava_config())
    llava.model.vision_tower, llava.model.language_model = model.model.vision_tower, model.model.language_model
    llava.lm_head = model.lm_head
    mlp = getattr(llava.model, PROJECTOR).to(model.dtype).to_empty(device=device)
    with torch.no_grad():
        for place, layer in (("0", mlp.linear_1), ("2", mlp.linear_2)):
            layer.weight.copy_(weights[f"mm_projector.{place}.weight"].load())
            layer.bias.copy_(weights[f"mm_projector.{place}.bias"].load())
    return llava


MODELS = {
    SP_FAST: _with_projector(implementations.OURS),
    SP_REFERENCE: _with_projector(implementations.YARDSTICK),
    LLAVA: _llava,
    EXACT: _exact,
}


@contextlib.contextmanager
def _default_dtype(dtype: torch.dtype) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


class _Unfilled(TorchFunctionMode):
    """Random initialisation, minutes of a large model, is left out: weights come from a seed afterwards."""

    def __torch_function__(
        self, function: object, types: object, args: tuple = (), kwargs: dict | None = None
    ) -> object:
        if function in (Tensor.normal_, Tensor.uniform_, Tensor.erfinv_, nn.init.normal_, nn.init.uniform_):
            return args[0] if args else (kwargs or {})["tensor"]
        return function(*args, **(kwargs or {}))
