"""Every sample read as a run would read it, before the run."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

from torch.utils.data import DataLoader, Dataset

from sp_fast.training.encoding import IGNORED
from sp_fast.training.examples import BadSample, Examples, Progress

_READ_TOGETHER = 32  # samples that a worker reports at a time


class _Figures(NamedTuple):
    images: int
    tokens: int
    supervised: int
    truncated: bool


@dataclass(frozen=True)
class Report:
    """What a data set holds. Tokens are counted after truncation, image tokens included; ``longest`` is a sample's."""

    samples: int
    good: int
    with_images: int
    text_only: int
    images: int
    truncated: int
    tokens: int
    supervised_tokens: int
    longest: int
    bad: tuple[BadSample, ...]

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self)


def check_data(examples: Examples, workers: int = 0, progress: Progress | None = None) -> Report:
    """Reads every sample whole, its images too, and lists those that cannot be used.

    Args:
        examples: made with ``bad_samples="skip"``; those found at the start are listed as well.
        workers: processes that read.
        progress: told now and then how many samples were read.
    """
    found: list[_Figures | BadSample] = []
    loader = DataLoader(_Summaries(examples), batch_size=_READ_TOGETHER, num_workers=workers, collate_fn=list)
    for some in loader:
        found += some
        if progress:
            progress(len(found), len(examples))
    good = [one for one in found if isinstance(one, _Figures)]
    bad = [*examples.bad, *(one for one in found if isinstance(one, BadSample))]
    return _report(good, bad)


def _report(good: Sequence[_Figures], bad: Sequence[BadSample]) -> Report:
    with_images = sum(one.images > 0 for one in good)
    return Report(
        samples=len(good) + len(bad),
        good=len(good),
        with_images=with_images,
        text_only=len(good) - with_images,
        images=sum(one.images for one in good),
        truncated=sum(one.truncated for one in good),
        tokens=sum(one.tokens for one in good),
        supervised_tokens=sum(one.supervised for one in good),
        longest=max((one.tokens for one in good), default=0),
        bad=tuple(bad),
    )


class _Summaries(Dataset):
    """Of samples only what is counted, so that workers send little."""

    def __init__(self, examples: Examples) -> None:
        self._examples = examples

    def __len__(self) -> int:
        return len(self._examples)

    def __getitem__(self, index: int) -> _Figures | BadSample:
        found = self._examples[index]
        if isinstance(found, BadSample):
            return found
        supervised = int((found.labels[1:] != IGNORED).sum())
        return _Figures(len(found.pixel_values), len(found.input_ids), supervised, found.truncated)
