"""A model from its folder, ready to generate: the device, the number type and the attention are chosen before it loads,
with a reason each."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoProcessor

from sp_fast.attention import VISION_TOWER, Attention, attention_on
from sp_fast.doctor.gather import host
from sp_fast.errors import BackendError, CheckpointError, ResourceError, first_line
from sp_fast.llava_sp.configuration import LlavaSpConfig
from sp_fast.llava_sp.lora import is_adapter
from sp_fast.llava_sp.modeling import LlavaSpForConditionalGeneration
from sp_fast.llava_sp.official_names import PROJECTOR
from sp_fast.llava_sp.processing import LlavaSpProcessor
from sp_fast.quantize import STORED
from sp_fast.recognise import listed
from sp_fast.stored_tensor import StoredTensor
from sp_fast.tensor_files import read_json, stored_tensors

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
COMPILED = Attention("sdpa", "auto: a compiled static cache needs it")


@dataclass(frozen=True)
class Ready:
    """A model in evaluation mode with its processor: what can be asked."""

    model: LlavaSpForConditionalGeneration
    processor: LlavaSpProcessor


@dataclass(frozen=True)
class Loaded(Ready):
    """What can be asked, and why it was loaded as it was."""

    attention: Attention  # of the language model; the tower has VISION_TOWER
    dtype_reason: str


def load_model(
    folder: str | os.PathLike[str],
    *,
    device: str = "cpu",
    dtype: str = "auto",
    attention: str = "auto",
    compiled: bool = False,
) -> Loaded:
    """What ``save_pretrained`` or ``sp-fast convert`` wrote. Nothing is downloaded.

    Args:
        device: "cpu", "cuda" or "cuda:N".
        dtype: of the weights; "auto" takes the files' own, but float32 in place of float16 on a CPU.
        attention: of the language model: "auto", or a name of ``sp_fast.attention.ORDER``, which then has to run.
        compiled: whether it will be given to ``compile_model``.

    Raises:
        CheckpointError: no such folder, an adapter, another model's, one that is not whole, or a quantised projector.
        BackendError: a device, number type or attention that cannot run here.
        ResourceError: the weights do not fit into memory.
    """
    path = Path(folder)
    config = _check_folder(path)
    where = _device(device)
    tensors = stored_tensors(path)[1]
    _check_unquantised(path, config, tensors)
    stored = {str(tensor.dtype).removeprefix("torch.") for tensor in tensors.values() if tensor.dtype}
    kind, reason = _dtype(dtype, stored, where)
    _check_memory(path, sum(math.prod(tensor.shape) for tensor in tensors.values()) * kind.itemsize, where)
    chosen = COMPILED if compiled and attention == "auto" else attention_on(attention, where, kind)
    names = {"text_config": chosen.name, "vision_config": VISION_TOWER.name}
    try:
        model, info = LlavaSpForConditionalGeneration.from_pretrained(
            path, dtype=kind, device_map={"": where}, attn_implementation=names, local_files_only=True,
            output_loading_info=True,
        )  # fmt: skip
        if lost := info["missing_keys"]:  # for which transformers takes random ones
            raise CheckpointError(f"{path} lacks {listed(lost)}: convert or fetch it again")
        processor = AutoProcessor.from_pretrained(path, local_files_only=True)
    except (CheckpointError, BackendError):
        raise
    except (MemoryError, torch.OutOfMemoryError) as error:
        raise ResourceError(f"{path} does not fit into the memory of {where}: choose dtype bfloat16") from error
    except ImportError as error:
        raise BackendError(f"{path} needs a package that is not installed ({first_line(error)})") from error
    except Exception as error:  # damaged files fail in any way
        raise CheckpointError(f"{path} cannot be loaded ({first_line(error)}): convert or fetch it again") from error
    return Loaded(model.eval(), processor, chosen, reason)


def _check_folder(path: Path) -> dict[str, Any]:
    """Its config.json."""
    if not path.is_dir():
        raise CheckpointError(f"{path} is no folder: give a local LLaVA-SP model; nothing is downloaded")
    if is_adapter(path):
        raise CheckpointError(
            f"{path} is an adapter, which is no model on its own: give one that it is merged into (sp-fast train merge "
            "makes one of a run, sp-fast convert --base of an official LoRA folder, merge_and_unload() of PEFT's)"
        )
    try:
        config = read_json(path / "config.json")
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path / 'config.json'} cannot be read ({first_line(error)})") from error
    found = config.get("model_type") if isinstance(config, dict) else None
    if found != LlavaSpConfig.model_type:
        raise CheckpointError(
            f"{path} is of model_type {found!r}, not {LlavaSpConfig.model_type!r}: sp-fast convert makes one from an "
            "official checkpoint"
        )
    return config


def _check_unquantised(path: Path, config: dict[str, Any], tensors: Mapping[str, StoredTensor]) -> None:
    """A language model may be quantised, and a projector by ``SPProjector.quantized``, and each says so; whole numbers
    anywhere else would be read as the weights."""
    odd = [name for name, tensor in tensors.items() if tensor.dtype is None]
    if "quantization_config" in config:
        odd = [name for name in odd if name.startswith(PROJECTOR)]
    projector = config.get("projector_config")
    if isinstance(projector, dict) and projector.get("quantization"):
        odd = [name for name in odd if not (name.startswith(PROJECTOR) and name.endswith(STORED))]
    if odd:
        raise CheckpointError(
            f"{path} is quantised where it must not be, in {listed(odd)}: give the model from before quantisation, or "
            f"one whose quantisation left {PROJECTOR.removesuffix('.')} out"
        )


def _device(name: str) -> torch.device:
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise BackendError(f"device {name!r} cannot be used ({first_line(error)}): choose cpu") from error
    return device


def _dtype(name: str, stored: set[str], device: torch.device) -> tuple[torch.dtype, str]:
    """The type to load in, and why."""
    if name == "auto":
        if len(stored) != 1 or not stored <= DTYPES.keys():
            raise BackendError(f"the files hold {', '.join(sorted(stored))}: choose a dtype of {', '.join(DTYPES)}")
        own = next(iter(stored))
        if own == "float16" and device.type == "cpu":
            return torch.float32, "auto: the files are float16, which CPUs hardly multiply"
        return DTYPES[own], "auto: the files' own"
    if name not in DTYPES:
        raise BackendError(f"dtype={name!r} is unknown; it must be 'auto' or one of {', '.join(DTYPES)}")
    if name == "float16" and device.type == "cpu":
        raise BackendError("dtype='float16' is for GPUs, and CPUs hardly multiply it: use 'float32' or 'bfloat16'")
    return DTYPES[name], "requested"


def _check_memory(path: Path, needed: int, device: torch.device) -> None:
    free = torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else host().available
    if needed > free:
        raise ResourceError(
            f"{path} needs {needed / 2**30:.1f} GiB for its weights, and {device} has {free / 2**30:.1f} GiB free: "
            "choose dtype bfloat16, another device, or close other programs"
        )
