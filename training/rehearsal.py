"""A step on tensors without data: the model's own code runs, on shapes alone, and every byte that it would take counts.

No formula of activations to go wrong with another language model, attention or checkpointing: a 7B model's step takes
seconds, and no memory.
"""

from __future__ import annotations

import copy
import weakref
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from sp_fast.attention import VISION_TOWER
from sp_fast.llava_sp.configuration import LlavaSpConfig
from sp_fast.llava_sp.modeling import LlavaSpForConditionalGeneration
from sp_fast.projector import SPProjector
from sp_fast.training.flops import core_of
from sp_fast.training.recipe import Recipe
from sp_fast.training.stage import dtype_of, prepare

TOWER = "vision tower"
_COPIES = "copies for autocast"  # of trained weights, in the type that is computed in
_BACKWARD = "backward"


class Held(NamedTuple):
    """Bytes beyond weights and gradients, of a batch of so many samples and tokens of each: what the forward leaves for
    the backward, by part, and how much more there is at the worst moment."""

    saved: dict[str, int]
    temporary: int
    batch: tuple[int, int]


def shapes_of(stage: str, recipe: Recipe, config: LlavaSpConfig) -> nn.Module:
    """The model as the stage trains it, on the meta device."""
    config = copy.deepcopy(config)
    config._attn_implementation = {"vision_config": VISION_TOWER.name, "text_config": _attention(recipe)}
    with torch.device("meta"):
        model = LlavaSpForConditionalGeneration(config).to(dtype_of(recipe))
        model.model.multi_modal_projector = SPProjector(config.projector, dtype=torch.float32)
        return prepare(model, stage, recipe)


def rehearse(model: nn.Module, recipe: Recipe) -> Held:
    """Forward and backward of one batch, the longest that the recipe allows, on gradients that are there already, as in
    steps that are accumulated; as on a CPU, whose operators keep about what a GPU's do.

    Args:
        model: of ``shapes_of``; it is of no other use afterwards.
    """
    core, dtype = core_of(model), dtype_of(recipe)
    with FakeTensorMode(allow_non_fake_inputs=True):
        _materialise(model)
        ledger = _Ledger([*model.parameters(), *model.buffers(), *_gradients(model)])
        model.train()
        with ledger, _phases(core, ledger), _places_unchecked(core):
            batch = _batch(recipe, core.config)
            with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
                loss = model(**batch).loss
            saved = +ledger.live
            ledger.phase = _BACKWARD
            loss.backward()
    return Held(dict(saved), ledger.peak - saved.total(), tuple(batch["input_ids"].shape))


class _Ledger(TorchDispatchMode):
    """Bytes of the storages that are alive, by the phase that made them; ``known`` ones do not count."""

    def __init__(self, known: Iterable[Tensor]) -> None:
        super().__init__()
        self.phase, self.live, self.peak = f"saved: {TOWER}", Counter(), 0
        self._parameters = {t.untyped_storage()._cdata for t in known}
        self._known = set(self._parameters)

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        found = func(*args, **(kwargs or {}))
        copies = func is torch.ops.aten._to_copy.default and args[0].untyped_storage()._cdata in self._parameters
        for tensor in tree_leaves(found):
            if isinstance(tensor, Tensor):
                self._note(tensor.untyped_storage(), _COPIES if copies and self.phase != _BACKWARD else self.phase)
        return found

    def _note(self, storage: torch.UntypedStorage, phase: str) -> None:
        key, size = storage._cdata, storage.nbytes()
        if key in self._known:
            return
        self._known.add(key)
        self.live[phase] += size
        self.peak = max(self.peak, self.live.total())
        weakref.finalize(storage, self._forget, key, phase, size)

    def _forget(self, key: int, phase: str, size: int) -> None:
        self._known.discard(key)
        self.live[phase] -= size


@contextmanager
def _phases(core: LlavaSpForConditionalGeneration, ledger: _Ledger) -> Iterator[None]:
    """The parts run one after the other: each begins a phase, once."""
    starts = {
        core.model.multi_modal_projector: "projector",
        core.get_input_embeddings(): "language model",
        core.lm_head: "logits and loss",
    }

    def begins(phase: str) -> Callable[..., None]:
        return lambda *_: setattr(ledger, "phase", f"saved: {phase}")

    hooks = [module.register_forward_pre_hook(begins(phase)) for module, phase in starts.items()]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


@contextmanager
def _places_unchecked(core: LlavaSpForConditionalGeneration) -> Iterator[None]:
    """Without data there are no image tokens to count."""
    core.model._check_places = lambda *_: None
    try:
        yield
    finally:
        del core.model._check_places


def _materialise(model: nn.Module) -> None:
    """Parameters and buffers from the meta device to the CPU that is pretended, with gradients; ties are cut."""
    for module in model.modules():
        for tensors in (module._parameters, module._buffers):
            for name, tensor in tensors.items():
                tensors[name] = None if tensor is None else _empty(tensor)


def _empty(tensor: Tensor) -> Tensor:
    found = torch.empty_like(tensor, device="cpu")
    if isinstance(tensor, nn.Parameter):
        found = nn.Parameter(found, tensor.requires_grad)
        found.grad = torch.empty_like(found) if tensor.requires_grad else None
    return found


def _gradients(model: nn.Module) -> list[Tensor]:
    return [parameter.grad for parameter in model.parameters() if parameter.grad is not None]


def _batch(recipe: Recipe, config: LlavaSpConfig) -> dict[str, Tensor]:
    """Rows as long as the recipe allows, with an image each where one fits."""
    length, side = min(recipe.max_length, config.context), config.vision_config.image_size
    images = recipe.batch_size if length >= config.image_seq_length else 0
    ids = torch.zeros(recipe.batch_size, length, dtype=torch.int64)
    return {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "labels": ids.clone(),
        "pixel_values": torch.zeros(images, 3, side, side),
    }


def _attention(recipe: Recipe) -> str:
    """What runs without a GPU, and saves what the recipe's attention saves."""
    return "eager" if recipe.attention == "eager" else "sdpa"
