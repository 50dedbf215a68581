"""What a run that goes on has to have in common with its beginning; files are told by their contents."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

from sp_fast.llava_sp.assemble import Assembly
from sp_fast.training.recipe import Recipe

# Of a recipe, what may change; the files that paths lead to are compared below.
FREE = {
    "output", "workers", "logging_steps", "save_steps", "save_total_limit", "tensorboard", "bad_samples",
    "data", "image_folder", "model", "language_model", "vision_tower", "projector", "tokenizer", "template",
    "deepspeed",
}  # fmt: skip
_COMPARED = 256  # numbers of each frozen tensor


def fingerprint(stage: str, recipe: Recipe, assembly: Assembly, samples: int) -> dict[str, Any]:
    """As JSON holds it. Images, and the projector that training began with, are in none: that is in the checkpoint."""
    values = {name: value for name, value in recipe.to_dict().items() if name not in FREE}
    return {
        "stage": stage, **values, "samples": samples, "data": [[path.name, file_digest(path)] for path in recipe.data],
        "frozen weights": weights(assembly), "model": described(assembly),
    }  # fmt: skip


def weights(assembly: Assembly) -> str:
    """Of the beginning of every frozen tensor: that tells models apart, and reading all of them would take a minute."""
    found = hashlib.sha256()
    for name, tensor in sorted(assembly.rest.items()):
        first = tensor.load().flatten()[:_COMPARED].float().numpy()
        found.update(repr((name, tensor.shape, str(tensor.dtype))).encode() + first.tobytes())
    return found.hexdigest()[:16]


def described(assembly: Assembly) -> str:
    """Of everything but weights: configurations, words, preprocessing, chat template."""
    processor = assembly.processor
    parts = [
        assembly.config.to_dict(),
        processor.image_processor.to_dict(),
        sorted(processor.tokenizer.get_vocab().items()),
        processor.chat_template,
    ]
    return _short(json.dumps(_plain(parts), sort_keys=True, default=str).encode())


def _plain(value: Any) -> Any:
    """Without what changes with a release of transformers."""
    if isinstance(value, dict):
        return {str(k): _plain(v) for k, v in value.items() if k not in ("transformers_version", "_name_or_path")}
    return [_plain(one) for one in value] if isinstance(value, (list, tuple)) else value


def file_digest(path: Path) -> str:
    """Of a folder of tables their names and sizes, as they can be large."""
    if path.is_dir():
        return _short(repr(sorted((one.name, one.stat().st_size) for one in path.rglob("*"))).encode())
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()[:16]


def _short(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()[:16]
