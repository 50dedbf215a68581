"""A finished run to a whole model, which loads by itself: the parts it began with, its projector, its adapters merged.

One tensor is in memory at a time, whatever the size of the model.
"""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from pathlib import Path

import torch

from sp_fast.errors import TrainingError
from sp_fast.llava_sp.assemble import Assembly
from sp_fast.llava_sp.conversion import (
    Conversion,
    Plan,
    count_parts,
    dtype_name,
    peak_memory,
    planned_files,
    shard_files,
)
from sp_fast.llava_sp.lora import adapted
from sp_fast.llava_sp.model_card import licences
from sp_fast.llava_sp.official_names import PROJECTOR
from sp_fast.llava_sp.packing import cast
from sp_fast.tensor_files import stored_tensors
from sp_fast.training.result import ADAPTER_FOLDER, FINISHED, MODEL_FOLDER, PROJECTOR_FOLDER
from sp_fast.training.run import read_parts, read_run
from sp_fast.version import __version__

_WRAPPED = "base_model.model."  # in front of our names, in PEFT's
_SHARD_BYTES = 4 * 10**9


def plan_merge(run: Path, out: Path, dtype: torch.dtype | None = None) -> Conversion:
    """What will be written; see ``Conversion.write``.

    Args:
        run: the folder of a finished run.
        dtype: of all weights; None: as frozen weights were in training.

    Raises:
        TrainingError: no finished run, or one that needs no merging.
        CheckpointError: parts of it, or of what it began with, are missing, damaged or another's.
    """
    if not (run / FINISHED).is_file():
        raise TrainingError(f"{run} holds no finished run: start its command again, which goes on, and merge then")
    if (run / MODEL_FOLDER).is_dir():
        raise TrainingError(f"{run / MODEL_FOLDER} is a whole model already: nothing is to be merged")
    stage, recipe = read_run(run)
    # The template of a first stage is not one to ask with.
    recipe = replace(recipe, template=recipe.template if stage == "finetune" else None)
    assembly = read_parts(recipe)
    kind = dtype or getattr(torch, recipe.dtype)
    adapter = run / ADAPTER_FOLDER
    changed = adapted(adapter, assembly.rest, _our_name) if adapter.is_dir() else {}
    _, own = stored_tensors(run / PROJECTOR_FOLDER)
    tensors = assembly.rest | changed | {PROJECTOR + name: tensor for name, tensor in own.items()}
    tensors = {name: cast(str(run), name, tensor, kind) for name, tensor in tensors.items()}
    shards = shard_files(tensors, _SHARD_BYTES)
    plan = Plan(
        to="ours",
        kind=stage,
        variant=assembly.config.projector.pyramid,
        dtype=dtype_name(kind),
        sources={role: str(path) for role, path in {**assembly.origins, "run": run}.items()},
        out=str(out),
        parts=count_parts(tensors),
        files=planned_files(tensors, shards, ["config.json", "processor_config.json", "tokenizer files", "README.md"]),
        peak_memory_estimate_bytes=peak_memory(tensors, shards),
        notes=[],
    )
    beside = partial(_write_beside, assembly, dtype_name(kind), run)
    return Conversion(plan, tensors, shards, beside, (run, *assembly.origins.values()))


def _our_name(where: str, name: str) -> str:
    return name.removeprefix(_WRAPPED)


def _write_beside(assembly: Assembly, dtype: str, run: Path, folder: Path) -> None:
    config = assembly.config
    for part in (config, config.text_config, config.vision_config):
        part.dtype = dtype
    config.save_pretrained(folder)
    assembly.generation.save_pretrained(folder)
    assembly.processor.save_pretrained(folder)
    said = "\n".join(f"* {role}: {licence}" for role, licence in licences(assembly.origins).items())
    card = _CARD.format(name=folder.name, run=run.name, version=__version__, licences=said)
    (folder / "README.md").write_text(card, encoding="utf-8")


_CARD = """---
library_name: transformers
pipeline_tag: image-text-to-text
tags:
- llava_sp
---

# LLaVA-SP of the run {run}

Trained by sp_fast {version}; `import sp_fast.llava_sp` tells transformers' auto classes about it.

## Licences

What the files say of the licences of the weights that training began with:

{licences}

Whoever uses this model is bound by the terms of all parts, and of the data.
"""
