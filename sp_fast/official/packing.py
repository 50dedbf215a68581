"""Official convolutions whose weights lie packed, one run of cells each, and are still theirs.

Each ``weight [D, C, k, k]`` becomes a view of one packed ``[cells, C, D]`` tensor, so nothing is held twice: the
model's optimizer, hooks on parameters and loading go on with the same Parameter objects. State dicts get contiguous
copies, since a file of views can hold the whole packed tensor for each of them, and safetensors refuses views.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from sp_fast.errors import OfficialModelError
from sp_fast.layout import Entry
from sp_fast.official.live import check_untouched, live


class PackedConvolutions:
    """The weights of some convolutions of ``core`` as one tensor, in the order of their cells."""

    def __init__(self, core: nn.Module, entries: list[Entry]) -> None:
        self._core = core
        self._entries = entries
        self._packed: Tensor | None = None
        self._copied = self._warned = False
        self._settle()

    def __getstate__(self) -> dict[str, object]:
        """A copied or loaded model has parameters of its own, which are packed when they are first used."""
        return {**self.__dict__, "_packed": None, "_copied": True}

    def weight(self) -> Tensor:
        """The packed weight ``[cells, C, D]``, whose gradient goes to the convolutions' own parameters.

        Raises:
            OfficialModelError: a convolution that is no longer what it was, or whose weight is not here.
        """
        return _Packed.apply(self, *self._settle())

    def gather(self, weights: tuple[Tensor, ...]) -> Tensor:
        """The packed tensor itself, or a copy of weights that lie in a buffer of somebody else, who may write there."""
        if self._at_home(weights):
            return self._packed.detach()
        if not self._warned:
            self._warned = True
            warnings.warn(
                "the convolutions' weights lie in a buffer of another owner (DeepSpeed, say), which leaves them there: "
                "they are packed anew in every forward, at the cost of one more copy of them",
                stacklevel=2,
            )
        return self._pack(weights)

    def split(self, packed: Tensor) -> Iterator[Tensor]:
        """Views ``[D, C, k, k]`` of a tensor like the packed one, in the convolutions' order."""
        return (entry.view(packed) for entry in self._entries)

    def _settle(self) -> list[nn.Parameter]:
        """The weights, packed where they may be moved."""
        weights = self._weights()
        if not self._at_home(weights) and (self._copied or all(self._is_ours(weight) for weight in weights)):
            self._adopt(weights)
        return weights

    def _adopt(self, weights: list[nn.Parameter]) -> None:
        """Moves the weights into a new packed tensor. Their old places are not written to: others may look at them."""
        with torch.inference_mode(False), torch.no_grad():
            packed = self._allocate(weights)
            for weight, place in zip(weights, self.split(packed), strict=True):
                place.copy_(weight)
                weight.data = place
        self._packed, self._copied = packed, False
        for conv in self._convolutions():
            if _contiguous_weight not in conv._state_dict_hooks.values():
                conv.register_state_dict_post_hook(_contiguous_weight)

    def _pack(self, weights: tuple[Tensor, ...]) -> Tensor:
        packed = self._allocate(weights)
        for weight, place in zip(weights, self.split(packed), strict=True):
            place.copy_(weight)
        return packed

    def _allocate(self, weights: list[nn.Parameter] | tuple[Tensor, ...]) -> Tensor:
        like = weights[0]
        cells = sum(entry.window.cells for entry in self._entries)
        return like.new_empty((cells, like.shape[1], like.shape[0]))

    def _at_home(self, weights: list[nn.Parameter] | tuple[Tensor, ...]) -> bool:
        if self._packed is None or self._packed.device != weights[0].device:
            return False
        return all(
            weight.dtype == place.dtype and weight.data_ptr() == place.data_ptr() and weight.stride() == place.stride()
            for weight, place in zip(weights, self.split(self._packed), strict=True)
        )

    def _is_ours(self, weight: Tensor) -> bool:
        """True where the weight may be moved: it has its storage for itself, or lies in the packed tensor."""
        storage = weight.untyped_storage()
        whole = storage.nbytes() == weight.numel() * weight.element_size()
        return whole or (self._packed is not None and storage.data_ptr() == self._packed.untyped_storage().data_ptr())

    def _convolutions(self) -> list[nn.Conv2d]:
        """The live convolutions; a layer that a call would not reach directly is refused, never passed by."""
        found = []
        for entry in self._entries:
            path = entry.official.removesuffix(".weight")
            root = path.split(".")[0]
            for name, _ in live(self._core, root).named_modules(prefix=root):  # a pool is passed by too
                check_untouched(self._core, name, nn.Conv2d if name == path else nn.Module)
            found.append(live(self._core, path))
        return found

    def _weights(self) -> list[nn.Parameter]:
        convolutions = self._convolutions()
        weights = [conv.weight for conv in convolutions]
        for entry, conv, weight in zip(self._entries, convolutions, weights, strict=True):
            expected = (conv.out_channels, conv.in_channels, *conv.kernel_size)
            if type(weight) is not nn.Parameter or weight.shape != expected:
                raise OfficialModelError(
                    f"{entry.official} is a {type(weight).__name__} of shape {list(weight.shape)}, not a Parameter of "
                    f"shape {list(expected)}: its values are on other devices (ZeRO-3, FSDP), which the fast path does "
                    "not fetch; use ZeRO-2 or DDP, or call restore(model)"
                )
        if len({(weight.dtype, weight.device) for weight in weights}) > 1:
            kinds = ", ".join(sorted({f"{weight.dtype} on {weight.device}" for weight in weights}))
            raise OfficialModelError(f"the convolutions are of several kinds ({kinds}): give them one type and device")
        return weights


class _Packed(torch.autograd.Function):
    """The packed weight as a function of the convolutions' weights."""

    @staticmethod
    def forward(ctx: object, packed: PackedConvolutions, *weights: Tensor) -> Tensor:
        ctx.packed = packed
        return packed.gather(weights)

    @staticmethod
    @once_differentiable
    def backward(ctx: object, grad: Tensor) -> tuple[Tensor | None, ...]:
        wanted = ctx.needs_input_grad[1:]
        return None, *(part if want else None for part, want in zip(ctx.packed.split(grad), wanted, strict=True))


def unpack(core: nn.Module) -> None:
    """Gives every weight that was packed a contiguous storage of its own again, and its state dict no more copies."""
    for module in core.modules():
        for key, hook in list(module._state_dict_hooks.items()):
            if hook is _contiguous_weight:
                del module._state_dict_hooks[key]
                _own(module.weight)


def _own(weight: nn.Parameter) -> None:
    with torch.inference_mode(False), torch.no_grad():
        if not weight.is_contiguous():
            weight.data = weight.data.contiguous()
        if weight.grad is not None:
            weight.grad = weight.grad.contiguous()


def _contiguous_weight(module: nn.Module, state: dict[str, Tensor], prefix: str, _: object) -> None:
    """Puts a contiguous copy of a packed weight into a state dict, except where it is asked for the Parameter."""
    tensor = state[f"{prefix}weight"]
    if tensor is not module.weight and not tensor.is_contiguous():
        state[f"{prefix}weight"] = tensor.contiguous()
