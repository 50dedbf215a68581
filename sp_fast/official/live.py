"""The official model's modules as they are now: inside PEFT's wrappers, and with whatever was hooked on to them."""

from __future__ import annotations

from torch import nn

from sp_fast.errors import OfficialModelError
from sp_fast.integrator import is_untouched


def live(module: nn.Module, path: str) -> nn.Module:
    """The module at ``path`` that a call would reach: of PEFT's ModulesToSaveWrapper, the copy that is active."""
    for name in path.split("."):
        module = getattr(module, name)
        if type(module).__name__ == "ModulesToSaveWrapper":
            active = module.active_adapter
            active = active if isinstance(active, str) else next(iter(active), None)
            saved = not module.disable_adapters and active in module.modules_to_save
            module = module.modules_to_save[active] if saved else module.original_module
    return module


def check_untouched(core: nn.Module, path: str, kind: type[nn.Module]) -> None:
    """Raises OfficialModelError where the layer at ``path``, which the fast path computes without calling it, is not of
    that very kind (``nn.Module``: of any), or a call of it would do more."""
    module = live(core, path)
    if not is_untouched(module) or kind not in (nn.Module, type(module)):
        raise OfficialModelError(
            f"{path} is a {type(module).__name__} that does more than the official layer (an adapter, a forward hook, "
            "a replaced forward, as with device_map over several devices), which the fast path would pass by: take "
            "that off, or call restore(model)"
        )
