"""A whole model's folder, which loads by itself, from parts and what training made of them; a tensor at a time."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from pathlib import Path

import torch

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
from sp_fast.llava_sp.model_card import licences
from sp_fast.llava_sp.official_names import HEAD_WEIGHT
from sp_fast.llava_sp.packing import cast
from sp_fast.stored_tensor import StoredTensor
from sp_fast.version import __version__

_SHARD_BYTES = 4 * 10**9
_BESIDE = ["config.json", "generation_config.json", "processor_config.json", "tokenizer files", "README.md"]
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


def whole_model(
    run: Path, out: Path, assembly: Assembly, changed: Mapping[str, StoredTensor], dtype: torch.dtype, stage: str
) -> Conversion:
    """What will be written, and where; see ``Conversion.write``.

    Args:
        assembly: what training began with.
        changed: by our names, instead of or beside ``assembly.rest``.
        dtype: of all weights.
    """
    tensors = {name: cast(str(run), name, tensor, dtype) for name, tensor in {**assembly.rest, **changed}.items()}
    if assembly.config.tie_word_embeddings:
        tensors.pop(HEAD_WEIGHT, None)  # the embeddings by another name, perhaps as they were before training
    shards = shard_files(tensors, _SHARD_BYTES)
    plan = Plan(
        to="ours",
        kind=stage,
        variant=assembly.config.projector.pyramid,
        dtype=dtype_name(dtype),
        sources={role: str(path) for role, path in {**assembly.origins, "run": run}.items()},
        out=str(out),
        parts=count_parts(tensors),
        files=planned_files(tensors, shards, _BESIDE),
        peak_memory_estimate_bytes=peak_memory(tensors, shards),
        notes=[],
    )
    beside = partial(_write_beside, assembly, dtype_name(dtype), run)
    return Conversion(plan, tensors, shards, beside, tuple(assembly.origins.values()))


def _write_beside(assembly: Assembly, dtype: str, run: Path, folder: Path) -> None:
    config = assembly.config
    for part in (config, config.text_config, config.vision_config):
        part.dtype = dtype
    config.save_pretrained(folder)
    assembly.generation.save_pretrained(folder)
    assembly.processor.save_pretrained(folder)
    said = "\n".join(f"* {role}: {licence}" for role, licence in licences(assembly.origins).items())
    card = _CARD.format(run=run.name, version=__version__, licences=said)
    (folder / "README.md").write_text(card, encoding="utf-8")
