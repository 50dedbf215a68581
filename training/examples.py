"""Samples for the trainer, and batches of them: each is used whole, or named as bad."""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeVar

import numpy as np
import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import Dataset

from sp_fast.errors import DataError, SPFastError
from sp_fast.training.conversation import Conversation, read_conversation, sample_id
from sp_fast.training.encoding import IGNORED, Encoder
from sp_fast.training.images import ImageFolder
from sp_fast.training.rows import Rows, open_rows

#: Of rows read and rows there are.
Progress = Callable[[int, int], None]
T = TypeVar("T")
_EVERY = 1000  # rows between two words about progress
_NAMED = 5  # bad samples that an error of many names


@dataclass(frozen=True)
class Example:
    """A sample: ``[L]`` int64 ids and labels (-100 where not supervised), ``[images, 3, S, S]`` float32 pixels."""

    id: str
    input_ids: Tensor
    labels: Tensor
    pixel_values: Tensor
    truncated: bool


@dataclass(frozen=True)
class BadSample:
    """A sample that cannot be used, its place in the data, and why."""

    id: str
    where: str
    reason: str

    def __str__(self) -> str:
        name = self.id if self.id == self.where else f"{self.id} ({self.where})"
        return f"sample {name}: {self.reason}"


class Examples(Dataset):
    """Samples of data files, read when they are asked for.

    Making it reads every row once, for fields, roles, numbers of images and whether their files are there; nothing is
    decoded or tokenised. What is wrong beyond that shows when a sample is read.

    Args:
        files: one after the other; whatever ``open_rows`` takes.
        image_folder: where the paths of images begin, which they cannot leave.
        bad_samples: ``stop`` raises DataError for them, ``skip`` leaves out those found at the start (``bad``) and
            returns the others as BadSample.
        progress: told now and then how many rows were read.

    Attributes:
        sizes: ``[samples]`` int32, about how many tokens each has, images included.
        has_images: ``[samples]`` bool.
        bad: what is left out.

    Raises:
        DataError: a file or folder that cannot be read, or bad samples where they stop the run.
    """

    def __init__(
        self,
        files: Sequence[Path],
        image_folder: Path,
        encoder: Encoder,
        bad_samples: Literal["stop", "skip"] = "stop",
        progress: Progress | None = None,
    ) -> None:
        self._rows: list[Rows] = [open_rows(path) for path in files]
        self._starts = np.cumsum([0, *map(len, self._rows)])
        self._folder, self._encoder, self._stops = ImageFolder(image_folder), encoder, bad_samples == "stop"
        self.bad: list[BadSample] = []
        self._look_through(progress)
        if self.bad and self._stops:
            named = "\n".join(f"  {bad}" for bad in self.bad[:_NAMED])
            raise DataError(
                f"{len(self.bad)} of {self._starts[-1]} samples cannot be used:\n{named}\n"
                "`sp-fast train check-data` lists all; repair them, or leave them out with --bad-samples skip"
            )

    def __len__(self) -> int:
        return len(self._order)

    def __getitem__(self, index: int) -> Example | BadSample:
        found = self._attempt(int(self._order[operator.index(index)]), self._example)
        if isinstance(found, BadSample) and self._stops:
            raise DataError(
                f"{found}; `sp-fast train check-data` lists all such samples: repair them, or leave them out with "
                "--bad-samples skip, with which the run goes on"
            )
        return found

    def _look_through(self, progress: Progress | None) -> None:
        total = int(self._starts[-1])
        good, has_images = np.zeros(total, bool), np.zeros(total, bool)
        sizes = np.zeros(total, np.int32)
        for index in range(total):
            found = self._attempt(index, self._measured)
            if isinstance(found, BadSample):
                self.bad.append(found)
            else:
                good[index], (sizes[index], has_images[index]) = True, found
            if progress and (index + 1 == total or not (index + 1) % _EVERY):
                progress(index + 1, total)
        self._order, self.sizes, self.has_images = np.flatnonzero(good), sizes[good], has_images[good]

    def _attempt(self, index: int, use: Callable[[Conversation], T]) -> T | BadSample:
        """What is made of a row of all files together, or why nothing is."""
        file = int(np.searchsorted(self._starts, index, side="right")) - 1
        rows, at = self._rows[file], index - int(self._starts[file])
        where, row = rows.where(at), None
        try:
            row = rows[at]
            return use(read_conversation(row, where))
        except SPFastError as error:
            return BadSample(sample_id(row, where), where, str(error))

    def _measured(self, conversation: Conversation) -> tuple[int, bool]:
        """Its size, and whether it has images, where nothing is wrong at first sight."""
        self._encoder.check(conversation)
        for source in conversation.images:
            if isinstance(source, str):
                self._folder.find(source)
        return self._encoder.estimate(conversation), bool(conversation.images)

    def _example(self, conversation: Conversation) -> Example:
        encoded = self._encoder.encode(conversation)
        processor = self._encoder.processor.image_processor
        if conversation.images:
            images = [self._folder.load(source) for source in conversation.images]
            pixels = processor(images=images, return_tensors="pt")["pixel_values"]
        else:
            pixels = torch.empty(0, 3, processor.crop_size["height"], processor.crop_size["width"])
        ids, labels = torch.tensor(encoded.input_ids), torch.tensor(encoded.labels)
        return Example(conversation.id, ids, labels, pixels, encoded.truncated)


@dataclass(frozen=True)
class Collator:
    """Samples to a batch, padded on the right.

    Args:
        image_size: S, in pixels.
    """

    pad_token_id: int
    image_size: int

    def __call__(self, samples: Sequence[Example | BadSample]) -> dict[str, Any]:
        """``input_ids``, ``attention_mask`` and ``labels`` ``[B, L]`` int64, ``pixel_values`` ``[images, 3, S, S]``
        float32 of all samples in order, ``ids`` of the samples, and ``skipped``, those of the bad ones.

        Bad samples are not in the batch; where all are bad, one row of padding stands for them, without any label.

        Raises:
            DataError: samples without any supervised token, which would train nothing.
        """
        good = [sample for sample in samples if isinstance(sample, Example)]
        skipped = [str(sample) for sample in samples if isinstance(sample, BadSample)]
        if good and not any((sample.labels[1:] != IGNORED).any() for sample in good):
            raise DataError(f"no supervised token in the batch of samples {', '.join(sample.id for sample in good)}")
        ids = [sample.input_ids for sample in good] or [torch.tensor([self.pad_token_id])]
        labels = [sample.labels for sample in good] or [torch.tensor([IGNORED])]
        no_pixels = torch.empty(0, 3, self.image_size, self.image_size)
        return {
            "input_ids": pad_sequence(ids, batch_first=True, padding_value=self.pad_token_id),
            "attention_mask": pad_sequence([torch.ones_like(row) for row in ids], batch_first=True),
            "labels": pad_sequence(labels, batch_first=True, padding_value=IGNORED),
            "pixel_values": torch.cat([no_pixels, *(sample.pixel_values for sample in good)]),
            "ids": [sample.id for sample in good],
            "skipped": skipped,
        }
