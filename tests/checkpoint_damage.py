"""Kinds of damage to a whole checkpoint, by name: each takes the damaged checkpoint and an older one of the same run.

Each leaves something under a checkpoint's name that is newer than the older one, and must not be resumed from.
"""

from __future__ import annotations

import json
import os
import shutil
from functools import partial

from sp_fast.training import manifest

MANIFEST = "manifest.json"
FILES = ("trained.safetensors", "optimizer.pt", "scheduler.pt", "rng_state.pth", "trainer_state.json")


def removed(name, new, old):
    (new / name).unlink()


def cut(name, new, old, keep):
    os.truncate(new / name, int(keep * (new / name).stat().st_size))


def one_byte_short(name, new, old):
    os.truncate(new / name, (new / name).stat().st_size - 1)


def bit_flipped(name, new, old, where):
    content = bytearray((new / name).read_bytes())
    content[int(where * (len(content) - 1))] ^= 1
    (new / name).write_bytes(content)


def of_the_older(name, new, old):
    assert (new / name).read_bytes() != (old / name).read_bytes()
    shutil.copy(old / name, new / name)


def zeros(name, new, old):
    content = bytearray((new / name).read_bytes())
    middle = len(content) // 2
    assert any(content[middle : middle + 64])
    content[middle : middle + 64] = bytes(64)
    (new / name).write_bytes(content)


def longer(name, new, old):
    with (new / name).open("ab") as file:
        file.write(b"\0")


def folder_instead(name, new, old):
    (new / name).unlink()
    (new / name).mkdir()


def link_instead(name, new, old):
    (new / name).rename(new.parent / f"kept-{name}")
    (new / name).symlink_to(new.parent / f"kept-{name}")


def pipe_instead(name, new, old):
    (new / name).unlink()
    os.mkfifo(new / name)


def exchanged(new, old):
    aside = new / "aside"
    (new / "optimizer.pt").rename(aside)
    (new / "scheduler.pt").rename(new / "optimizer.pt")
    aside.rename(new / "scheduler.pt")


def extra(name, new, old):
    (new / name).write_text("x")


def extra_folder(new, old):
    (new / "global_step6").mkdir()


def extra_link(new, old):
    (new / "latest").symlink_to(old)


def file_renamed(new, old):
    (new / "optimizer.pt").rename(new / "optimizer.bin")


def moved_inwards(new, old):
    (new / "more").mkdir()
    (new / "optimizer.pt").rename(new / "more" / "optimizer.pt")


def edited(change, new, old):
    content = json.loads((new / MANIFEST).read_text())
    change(content)
    (new / MANIFEST).write_text(json.dumps(content, indent=1) + "\n")


def written_anew(change, new, old):
    """By someone who knows how its hash is taken."""
    found = manifest.verify(new)
    facts, files = vars(found.facts).copy(), dict(found.files)
    change(facts, files)
    text = manifest._text(manifest.Manifest(manifest.Facts(**facts), found.folders, files))
    (new / MANIFEST).write_text(text)


def manifest_of(text, new, old):
    (new / MANIFEST).write_text(text)


def spaces(new, old):
    (new / MANIFEST).write_text((new / MANIFEST).read_text() + "\n")


def renamed(new, old):
    new.rename(new.with_name("checkpoint-9"))


def the_older_under_its_name(new, old):
    shutil.rmtree(new)
    shutil.copytree(old, new)


def half_copied(new, old):
    for name in sorted(path.name for path in new.iterdir())[3:]:
        (new / name).unlink()


def emptied_folder(new, old):
    shutil.rmtree(new)
    new.mkdir()


def file_instead_of_folder(new, old):
    shutil.rmtree(new)
    new.write_text("gone")


def link_to_the_older(new, old):
    shutil.rmtree(new)
    new.symlink_to(old)


def link_to_itself(new, old):
    new.rename(new.parent / "kept")
    new.symlink_to(new.parent / "kept")


def broken_link(new, old):
    shutil.rmtree(new)
    new.symlink_to(new.parent / "nowhere")


def of_each(name, damage, files=FILES, **kwargs):
    return {f"{file} {name}": partial(damage, file, **kwargs) for file in files}


ALL = (*FILES, MANIFEST)
EDITS = {
    "format": lambda m: m.update(format=2),
    "format text": lambda m: m.update(format="1"),
    "no format": lambda m: m.pop("format"),
    "step": lambda m: m["facts"].update(step=7),
    "world size": lambda m: m["facts"].update(world_size=2),
    "fingerprint": lambda m: m["facts"]["fingerprint"].update(data="b"),
    "versions": lambda m: m["facts"]["versions"].update(torch="1.0"),
    "unknown fact": lambda m: m["facts"].update(more=1),
    "folders": lambda m: m["folders"].append("more"),
    "bytes": lambda m: m["files"]["optimizer.pt"].update(bytes=1),
    "hash": lambda m: m["files"]["optimizer.pt"].update(sha256="0" * 64),
    "file left out": lambda m: m["files"].pop("optimizer.pt"),
    "own hash": lambda m: m.update(sha256="0" * 64),
    "no own hash": lambda m: m.pop("sha256"),
    "more": lambda m: m.update(more=1),
    "files no table": lambda m: m.update(files=["optimizer.pt"]),
}
DAMAGES = {
    **of_each("removed", removed, ALL),
    **of_each("emptied", cut, ALL, keep=0),
    **of_each("cut in half", cut, ALL, keep=0.5),
    **of_each("one byte short", one_byte_short, ALL),
    **of_each("bit flipped first", bit_flipped, ALL, where=0),
    **of_each("bit flipped midway", bit_flipped, ALL, where=0.5),
    **of_each("bit flipped late", bit_flipped, ALL, where=0.97),
    **of_each("of the older checkpoint", of_the_older, ALL),
    **of_each("with zeros", zeros, ALL),
    **of_each("longer", longer, ALL),
    **of_each("a folder", folder_instead, ALL),
    **of_each("a link", link_instead, ALL),
    **of_each("a pipe", pipe_instead, ALL),
    "files exchanged": exchanged,
    "a file more": partial(extra, "pytorch_model.bin"),
    "a hidden file more": partial(extra, ".nfs01"),
    "a folder more": extra_folder,
    "a link more": extra_link,
    "a file renamed": file_renamed,
    "a file moved inwards": moved_inwards,
    **{f"manifest edited: {name}": partial(edited, change) for name, change in EDITS.items()},
    "manifest anew: step": partial(written_anew, lambda facts, files: facts.update(step=5)),
    "manifest anew: file left out": partial(written_anew, lambda facts, files: files.pop("optimizer.pt")),
    "manifest anew: file outside": partial(
        written_anew, lambda facts, files: files.update({"../x": files["optimizer.pt"]})
    ),
    "manifest with a line more": spaces,
    "manifest no JSON": partial(manifest_of, "{"),
    "manifest a list": partial(manifest_of, "[]"),
    "manifest a number": partial(manifest_of, "1"),
    "manifest nested deeply": partial(manifest_of, "[" * 100_000),
    "manifest too long": partial(manifest_of, " " * 3_000_000 + "{}"),
    "folder renamed to a later step": renamed,
    "older checkpoint under its name": the_older_under_its_name,
    "half copied": half_copied,
    "folder emptied": emptied_folder,
    "a file in its place": file_instead_of_folder,
    "a link to the older in its place": link_to_the_older,
    "a link to itself in its place": link_to_itself,
    "a broken link in its place": broken_link,
}
