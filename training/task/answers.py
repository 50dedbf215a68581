"""A model's answers to the held-out questions of the spatial task."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from sp_fast.errors import ConfigError, DataError, ResourceError, first_line
from sp_fast.llava_sp import answering
from sp_fast.llava_sp.answering import Request, Settings, prompt_tokens
from sp_fast.llava_sp.loading import Ready
from sp_fast.llava_sp.modeling import LlavaSpForConditionalGeneration
from sp_fast.llava_sp.processing import LlavaSpProcessor
from sp_fast.training.images import ImageFolder
from sp_fast.training.task.scoring import Accuracy, Said, summary

#: Tokens after the longest expected answer: its end, and a few of a model that says more, which is then seen.
_BEYOND = 4

#: A question, as ``held_out.json`` has it.
Row = Mapping[str, Any]
#: Of questions answered and all of them.
Progress = Callable[[int, int], None]


def read_questions(folder: Path, images: int | None = None) -> list[Row]:
    """The held-out questions of a made task: all, or those about its first so many images.

    Raises:
        DataError: the folder holds none, or what could not be scored.
    """
    path = folder / "held_out.json"
    try:
        rows = json.loads(path.read_text(encoding="utf-8"))
        for row in rows:
            _question(row)
            row["id"]
        summarise(rows, [row["answer"] for row in rows])
        chosen = set(list(dict.fromkeys(row["image"] for row in rows))[:images])
    except (OSError, ValueError, KeyError, TypeError, IndexError) as error:
        raise DataError(
            f"{path} holds no questions of the spatial task ({type(error).__name__}: {first_line(error)}): give a "
            "folder that sp-fast train make-task has made"
        ) from error
    return [row for row in rows if row["image"] in chosen]


def answer(
    model: LlavaSpForConditionalGeneration,
    processor: LlavaSpProcessor,
    rows: Sequence[Row],
    folder: Path,
    batch_size: int = 64,
    progress: Progress | None = None,
) -> list[str]:
    """What a model says to each question, greedily, in the order of ``rows``.

    It is what ``sp-fast generate`` prints, but cut off a few tokens after the longest answer expected of the type.

    Args:
        model: in evaluation mode, on any device. Nothing of it is changed, nor is torch's random state.
        rows: as ``read_questions`` gives them.
        folder: what the paths of images begin at, and do not leave.
        batch_size: questions that run together; they are of one type and of like length, and so end together.

    Raises:
        ConfigError: a model in training mode, or a batch size below 1.
        DataError: an image that is not in the folder, or a question with its answer beyond the model's context.
        ImageError: an image that cannot be decoded.
        ResourceError: a batch does not fit into the device's memory.
    """
    if model.training:
        raise ConfigError("the model is in training mode, where dropout changes what it says: call model.eval() first")
    ready, images = Ready(model, processor), ImageFolder(folder)
    requests = [Request(_question(row), (images.find(row["image"]),), row["id"]) for row in rows]
    lengths = [prompt_tokens(ready, request, chat=True) for request in requests]
    said: dict[int, str] = {}
    for kind in dict.fromkeys(row["type"] for row in rows):
        asked = [i for i, row in enumerate(rows) if row["type"] == kind]
        asked.sort(key=lambda i: -lengths[i])  # the longest first: what does not fit shows at once
        settings = Settings(_most_tokens(processor, (rows[i]["answer"] for i in asked)), batch_size=batch_size)
        if (needed := lengths[asked[0]] + settings.max_new_tokens) > model.config.context:
            raise DataError(
                f"question {requests[asked[0]].id} with its image and its answer takes up to {needed} tokens, but the "
                f"language model's context is {model.config.context}: ask one with a longer context"
            )
        try:
            for i, found in zip(asked, answering.answer(ready, [requests[i] for i in asked], settings), strict=True):
                said[i] = found.text
                if progress:
                    progress(len(said), len(rows))
        except torch.OutOfMemoryError as error:
            raise ResourceError(
                f"{batch_size} questions together do not fit into the memory of {model.device}: choose a smaller batch"
            ) from error
    return [said[i] for i in range(len(rows))]


def summarise(rows: Iterable[Row], said: Iterable[str]) -> dict[str, Accuracy]:
    """Scores by type of what was said to each question; see ``scoring.summary``.

    Raises:
        DataError: no such type, or an expected box that is none.
    """
    return summary(Said(row["type"], row["image"], row["answer"], text) for row, text in zip(rows, said, strict=True))


def _question(row: Row) -> str:
    """With ``<image>`` in its place."""
    return row["conversations"][0]["value"]


def _most_tokens(processor: LlavaSpProcessor, answers: Iterable[str]) -> int:
    """That an answer may take. It follows a space, as in the chat templates."""
    texts = [f" {text}" for text in set(answers)]
    return max(map(len, processor.tokenizer(texts, add_special_tokens=False)["input_ids"])) + _BEYOND
