"""Official checkpoints, whatever their form: the tensors by name, unread, and where each part came from."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sp_fast.errors import CheckpointError
from sp_fast.llava_sp.lora import adapted, is_adapter
from sp_fast.llava_sp.official_config import read_config
from sp_fast.llava_sp.official_names import LANGUAGE, TOWER, Parts, split, tower_tensors
from sp_fast.stored_tensor import StoredTensor
from sp_fast.tensor_files import read_file, stored_tensors

KINDS = {
    "full": "a whole model",
    "projector": "a projector on its own",
    "lora": "LoRA adapters and a projector",
}
_NON_LORA = "non_lora_trainables.bin"


@dataclass(frozen=True)
class Official:
    """An official checkpoint with what it stands on."""

    kind: str
    #: files or folders by role, for messages, licences and the report
    origins: dict[str, Path]
    #: by official key without prefix
    projector: dict[str, StoredTensor]
    #: language model and tower, by our names; adapters are merged as they are read
    rest: dict[str, StoredTensor]
    image_newline: StoredTensor | None
    #: the checkpoint's own config.json, {} where there is none
    facts: dict[str, Any]
    #: what happened that a reader of the result should know
    notes: tuple[str, ...]

    @property
    def source(self) -> Path:
        """The checkpoint's folder."""
        return folder_of(self.origins["checkpoint"])

    @property
    def language_folder(self) -> Path:
        """Where the language model's config.json and tokenizer lie."""
        return folder_of(self.origins.get("language model", self.origins["checkpoint"]))

    @property
    def where(self) -> str:
        """For messages."""
        return " with ".join(map(str, self.origins.values()))


def folder_of(path: Path) -> Path:
    """The path itself, or a file's folder."""
    return path.parent if path.is_file() else path


def read_official(source: Path, base: Path | None, vision_tower: Path | None) -> Official:
    """Reads names, shapes and types of an official checkpoint; what it is, is read off its files.

    Where parts overlap, the checkpoint's own tensors hold, then the vision tower's folder, then the base.

    Raises:
        CheckpointError: no such files, damaged ones, or a part that is missing or given for nothing.
    """
    folder = folder_of(source)
    lora = is_adapter(folder)
    parts, where = _own_parts(folder / _NON_LORA if lora else source, lora)
    has_language = any(name.startswith(f"{LANGUAGE}layers.") for name in parts.rest)
    kind = "lora" if lora else "full" if has_language else "projector"
    origins = {"checkpoint": source}
    rest: dict[str, StoredTensor] = {}
    notes: list[str] = []
    if kind == "full":
        if base is not None:
            raise CheckpointError(f"{where} holds a language model itself: leave out --base {base}")
    elif base is None:
        raise CheckpointError(f"{where} is {KINDS[kind]}: give the language model that it was trained on with --base")
    else:
        origins["language model"] = base
        below = _parts(base)
        rest |= below.rest
        if below.projector:
            notes.append(f"the projector in {base.name} is not used: the checkpoint has its own")
    if vision_tower is not None:
        rest = {k: v for k, v in rest.items() if not k.startswith(TOWER)}
        if any(name.startswith(TOWER) for name in parts.rest):
            notes.append(f"of {vision_tower.name} only config.json is used: the checkpoint has a tower's weights")
        else:
            origins["vision tower"] = vision_tower
            rest |= tower_tensors(*stored_tensors(vision_tower))
    rest |= parts.rest
    if not any(name.startswith(TOWER) for name in rest):
        raise CheckpointError(f"{where} holds no vision tower: give its folder with --vision-tower")
    if lora:
        rest |= adapted(folder, rest)
    return Official(kind, origins, parts.projector, rest, parts.image_newline, _facts(folder, kind), tuple(notes))


def _own_parts(path: Path, lora: bool) -> tuple[Parts, str]:
    if lora and not path.is_file():
        raise CheckpointError(f"{path.parent} holds an adapter, but no {path.name}, where its projector is: fetch it")
    return _parts(path), str(path)


def _parts(path: Path) -> Parts:
    """Of a file, or of a folder's weights."""
    if path.is_dir() and read_if_there(path).get("model_type") == "llava_sp":
        raise CheckpointError(f"{path} is no official checkpoint but one of sp_fast: convert it with --to official")
    where, tensors = (str(path), read_file(path)) if path.name == _NON_LORA else stored_tensors(path)
    return split(where, tensors)


def _facts(folder: Path, kind: str) -> dict[str, Any]:
    if kind == "full":
        return read_config(folder / "config.json", "give the folder that the model was saved in, with its config.json")
    return read_if_there(folder)


def read_if_there(folder: Path) -> Mapping[str, Any]:
    """A folder's config.json, {} where there is none."""
    path = folder / "config.json"
    return read_config(path, "") if path.exists() else {}
