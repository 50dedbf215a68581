"""README.md of a converted model: what it is, what it was made from, and whose licences hold."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from sp_fast.llava_sp.sources import KINDS, folder_of
from sp_fast.version import __version__

if TYPE_CHECKING:
    from sp_fast.llava_sp.configuration import LlavaSpConfig
    from sp_fast.llava_sp.conversion import Plan

_FILES = ("LICENSE", "LICENSE.txt", "LICENSE.md", "LICENCE", "USE_POLICY.md")
_LONGEST = 200
_CARD = """---
library_name: transformers
pipeline_tag: image-text-to-text
tags:
- llava_sp
{licence}---

# {name}

LLaVA-SP, `{variant}`: {spatial} spatial tokens and {patches} patch tokens for each image. Converted by sp_fast
{version} from {kind} of the official code, in {dtype}.

```python
import torch
import sp_fast.llava_sp
from transformers import AutoModelForImageTextToText, AutoProcessor

model = AutoModelForImageTextToText.from_pretrained("{name}", dtype="auto")
processor = AutoProcessor.from_pretrained("{name}")
```

| part | parameters | from |
|---|---|---|
{parts}

The vocabulary has the rows that the language model had: none was added or removed. `<image>` is token {image} of the
tokenizer; the model puts the image's tokens in its place and never looks its row up.
{notes}
## Licences

What the files say of the weights' licences:

{licences}

Whoever uses this model is bound by the terms of all parts.
"""


class Licence(NamedTuple):
    """What a part's files say: the licence's name in the README's front matter, and licence files by first line."""

    named: str | None
    files: dict[str, str]

    def __str__(self) -> str:
        said = [f"`{self.named}` (README.md)"] if self.named else []
        said += [f"{file}: “{line}”" for file, line in self.files.items()]
        return "; ".join(said) or "unknown: its files do not say"


def licences(origins: Mapping[str, Path]) -> dict[str, Licence]:
    """By role, what the folders of the sources say."""
    return {f"{role} ({folder_of(path).name})": _licence(folder_of(path)) for role, path in origins.items()}


def model_card(plan: Plan, config: LlavaSpConfig, found: Mapping[str, Licence]) -> str:
    """The text of README.md."""
    named = {licence.named for licence in found.values()}
    common = f"license: {named.pop()}\n" if len(named) == 1 and None not in named else ""
    roles = {role: Path(path).name for role, path in plan.sources.items()}
    return _CARD.format(
        licence=common,
        name=Path(plan.out).name,
        variant=plan.variant,
        spatial=config.projector.spatial_tokens,
        patches=config.projector.patch_tokens,
        version=__version__,
        kind=KINDS[plan.kind],
        dtype=plan.dtype,
        parts="\n".join(
            f"| {part.name} | {part.parameters:,} | {roles.get(part.name, roles['checkpoint'])} |"
            for part in plan.parts
        ),
        image=config.image_token_id,
        notes="".join(f"\n* {note}" for note in plan.notes) + "\n" * bool(plan.notes),
        licences="\n".join(f"* {role}: {licence}" for role, licence in found.items()),
    )


def _licence(folder: Path) -> Licence:
    return Licence(_front_matter(folder / "README.md"), {f: line for f in _FILES if (line := _first_line(folder / f))})


def _front_matter(path: Path) -> str | None:
    text = _text(path)
    block = re.match(r"---\s*\n(.*?)\n---", text, re.DOTALL)
    found = block and re.search(r"^license:[ \t]*[\"']?([\w.+-]{1,60})", block[1], re.MULTILINE)
    return found[1] if found else None


def _first_line(path: Path) -> str | None:
    return next((line.strip()[:_LONGEST] for line in _text(path).splitlines() if line.strip()), None)


def _text(path: Path) -> str:
    if not path.is_file():
        return ""
    with path.open(encoding="utf-8", errors="replace") as file:
        return file.read(2**16)
