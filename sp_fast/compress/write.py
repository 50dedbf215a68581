"""What a compression writes: a projector's folder, or a whole model's with the other parts as they were."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor

from sp_fast.compress.source import Source
from sp_fast.llava_sp.new_folder import check_target, new_folder
from sp_fast.projector import SPProjector
from sp_fast.stored_tensor import StoredTensor
from sp_fast.version import __version__

if TYPE_CHECKING:
    from sp_fast.llava_sp.assemble import Assembly

_SHARD_BYTES = 4 * 10**9
_CARD = """{own}
## Compressed

The projector of this model is not the original's: sp_fast {version} made it from that by `sp-fast compress`, as
`extractor={extractor}`, `quantization={quantization}`. {fit}Vision tower and language model are as they were.
"""


def check_out(out: Path, force: bool, sources: Sequence[Path]) -> None:
    """Raises CheckpointError where the folder may not be written: it is there, or what is read lies in it."""
    check_target(out, force, sources)


def write(source: Source, projector: SPProjector, out: Path, force: bool, say: Callable[[str], Any]) -> None:
    """Writes the folder, whole or not at all.

    Raises:
        CheckpointError: it may not be written.
        ResourceError: the disk is too small.
    """
    check_out(out, force, [source.path])
    say(f"writing {out}")
    own = sum(tensor.numel() * tensor.itemsize for tensor in projector.state_dict().values())
    if source.assembly is None:
        with new_folder(out, own) as folder:
            projector.save_pretrained(folder)
        return
    from sp_fast.llava_sp.shards import plan_shards, size_in_bytes, write_shards

    tensors = source.assembly.rest | _stored(projector)
    with new_folder(out, sum(map(size_in_bytes, tensors.values()))) as folder:
        write_shards(folder, tensors, plan_shards(tensors, _SHARD_BYTES))
        _write_beside(source.assembly, source.path, projector, folder, out.resolve().name)


def _stored(projector: SPProjector) -> dict[str, StoredTensor]:
    from sp_fast.llava_sp.official_names import PROJECTOR

    def stored(tensor: Tensor) -> StoredTensor:
        return StoredTensor(tuple(tensor.shape), tensor.dtype, lambda: tensor)

    return {PROJECTOR + name: stored(tensor) for name, tensor in projector.state_dict().items()}


def _write_beside(assembly: Assembly, path: Path, projector: SPProjector, folder: Path, name: str) -> None:
    """``folder`` is hidden until it takes its place, where it has this name."""
    config = copy.deepcopy(assembly.config)
    config.take_projector(projector.config)
    config.save_pretrained(folder)
    assembly.generation.save_pretrained(folder)
    assembly.processor.save_pretrained(folder)
    card = path / "README.md"
    text = card.read_text(encoding="utf-8") if card.is_file() else f"# {name}\n"
    made = projector.config
    fit = "Nothing was fitted: its weights are the original's, rounded. " if made.extractor == "full" else ""
    words = {"extractor": made.extractor, "quantization": made.quantization, "fit": fit}
    said = _CARD.format(own=text, version=__version__, **words)
    (folder / "README.md").write_text(said, encoding="utf-8")
