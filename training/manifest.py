"""What a checkpoint consists of: written into it last, and held against it before anything is read from it.

A checkpoint is whole when its folder holds the files that its manifest lists, byte for byte, and nothing else. The
manifest guards itself with its own hash. That finds damage and mix-ups, not a forger, who can compute hashes too:
nothing in a checkpoint is ever loaded as code.
"""

from __future__ import annotations

import hashlib
import json
import os
import stat
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

from sp_fast.errors import TrainingError, first_line
from sp_fast.tensor_files import read_json

MANIFEST = "manifest.json"
FORMAT = 1
_USE_ANOTHER = "resume from another checkpoint"


@dataclass(frozen=True)
class Facts:
    """Of the run that wrote a checkpoint. ``fingerprint`` is whatever has to stay as it was, as JSON holds it."""

    step: int
    world_size: int
    fingerprint: dict[str, Any]
    versions: dict[str, str]


class Entry(NamedTuple):
    """A file of a checkpoint."""

    bytes: int
    sha256: str


@dataclass(frozen=True)
class Manifest:
    """Of a whole checkpoint; names are relative to its folder."""

    facts: Facts
    folders: tuple[str, ...]
    files: Mapping[str, Entry]


def write_manifest(folder: Path, facts: Facts) -> Manifest:
    """Lists and hashes every file of a folder, and syncs all of it to the disk: files, manifest and folders.

    Raises:
        OSError: a file that cannot be read, written or synced; the folder is then no checkpoint.
        TrainingError: a link or a device in the folder.
    """
    folders, paths = _tree(folder)
    files = {name: _entry(path, sync=True) for name, path in paths.items()}
    manifest = Manifest(facts, tuple(folders), files)
    with (folder / MANIFEST).open("w", encoding="ascii") as file:
        file.write(_text(manifest))
        file.flush()
        os.fsync(file.fileno())
    for name in (*folders, "."):
        sync_folder(folder / name)
    return manifest


def verify(folder: Path) -> Manifest:
    """The manifest of a checkpoint whose every file is as it was written.

    Raises:
        TrainingError: what is missing, too much, too short or changed; a manifest that cannot be read, was edited, is
            of another format, or belongs to another folder.
    """
    try:
        manifest = _read(folder)
        _check_names(folder, manifest)
        _check_contents(folder, manifest)
    except OSError as error:
        raise TrainingError(f"{folder} cannot be read ({error}): mend that, or {_USE_ANOTHER}") from error
    return manifest


def sync_folder(folder: Path) -> None:
    """Leaves the names in a folder on the disk. Raises OSError."""
    handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _read(folder: Path) -> Manifest:
    if not stat.S_ISDIR(folder.lstat().st_mode):
        _refuse(folder, "it is no folder")
    path = folder / MANIFEST
    try:
        if not stat.S_ISREG(path.lstat().st_mode):
            _refuse(folder, f"{MANIFEST} is no regular file")
    except FileNotFoundError:
        _refuse(folder, f"it has no {MANIFEST}, so its save did not end, or was not ours")
    try:
        content = read_json(path)
        written_as = content["format"]
        if written_as == FORMAT:
            files = {name: Entry(entry["bytes"], entry["sha256"]) for name, entry in content["files"].items()}
            manifest = Manifest(Facts(**content["facts"]), tuple(content["folders"]), files)
            if path.read_bytes() != _text(manifest).encode():  # its own hash among the rest
                _refuse(folder, f"{MANIFEST} was edited or damaged")
    except (ValueError, LookupError, TypeError, AttributeError) as error:
        if isinstance(error, TrainingError):
            raise
        _refuse(folder, f"{MANIFEST} is damaged ({first_line(error)})")
    if written_as != FORMAT:
        _refuse(folder, f"{MANIFEST} has format {written_as!r:.40}, and this sp_fast reads {FORMAT}: use its version")
    if folder.name != f"checkpoint-{manifest.facts.step}":
        _refuse(folder, f"it was written as checkpoint-{manifest.facts.step}: give it that name back")
    return manifest


def _check_names(folder: Path, manifest: Manifest) -> None:
    folders, paths = _tree(folder)
    for kind, listed, there in (("file", manifest.files, paths), ("folder", manifest.folders, folders)):
        if missing := sorted(set(listed) - set(there)):
            _refuse(folder, f"the {kind} {missing[0]} is missing")
        if unlisted := sorted(set(there) - set(listed)):
            _refuse(folder, f"the {kind} {unlisted[0]!r} does not belong to it")


def _check_contents(folder: Path, manifest: Manifest) -> None:
    for name, entry in manifest.files.items():  # all sizes first: that takes no time
        if (size := (folder / name).lstat().st_size) != entry.bytes:
            _refuse(folder, f"{name} has {size:,} bytes where {entry.bytes:,} were written")
    for name, entry in manifest.files.items():
        if _entry(folder / name) != entry:
            _refuse(folder, f"{name} is not what was written: its hash differs")


def _tree(folder: Path) -> tuple[list[str], dict[str, Path]]:
    """Folders and files below a folder by relative name, the manifest left out; links are never followed."""
    folders: list[str] = []
    files: dict[str, Path] = {}
    for root, inner, names in os.walk(folder, onerror=_raise):
        for path in (Path(root, name) for name in (*inner, *names)):
            name, mode = path.relative_to(folder).as_posix(), path.lstat().st_mode
            if stat.S_ISDIR(mode):
                folders.append(name)
            elif not stat.S_ISREG(mode):
                _refuse(folder, f"{name} is a link or a device, which a checkpoint never holds")
            elif name != MANIFEST:
                files[name] = path
    return sorted(folders), dict(sorted(files.items()))


def _entry(path: Path, sync: bool = False) -> Entry:
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
        if sync:
            os.fsync(file.fileno())
        return Entry(file.tell(), digest)


def _text(manifest: Manifest) -> str:
    """The file, with its own hash in its last field."""
    content: dict[str, Any] = {
        "format": FORMAT,
        "facts": asdict(manifest.facts),
        "folders": list(manifest.folders),
        "files": {name: entry._asdict() for name, entry in manifest.files.items()},
    }
    content["sha256"] = hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
    return json.dumps(content, indent=1) + "\n"


def _refuse(folder: Path, problem: str) -> NoReturn:
    raise TrainingError(f"{folder} is no whole checkpoint, as {problem}; {_USE_ANOTHER}")


def _raise(error: OSError) -> NoReturn:
    raise error
