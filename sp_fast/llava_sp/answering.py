"""Questions about images in, answers out: one at a time or in batches, with the same tokens."""

from __future__ import annotations

import itertools
import json
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from transformers.generation.streamers import BaseStreamer

from sp_fast.errors import ConfigError, ImageError
from sp_fast.llava_sp.loading import Ready
from sp_fast.llava_sp.processing import IMAGE_TOKEN
from sp_fast.vision import load_image


@dataclass(frozen=True)
class Request:
    """A prompt and its images. Images stand where the prompt has ``<image>``, or before it where it has none.

    Raises:
        ImageError: no such file, or another number of images than the prompt has places.
    """

    prompt: str
    images: tuple[Path, ...] = ()
    id: Any = None

    def __post_init__(self) -> None:
        if self.places not in (0, len(self.images)):
            raise ImageError(
                f"the prompt has {self.places} {IMAGE_TOKEN} and {len(self.images)} images: give one for each, or "
                f"leave {IMAGE_TOKEN} out, and they come first"
            )
        for path in self.images:
            if not path.is_file():
                raise ImageError(f"the image {path} does not exist")

    @property
    def places(self) -> int:
        """How often the prompt says ``<image>``."""
        return self.prompt.count(IMAGE_TOKEN)


@dataclass(frozen=True)
class Answer:
    """What was generated. Lengths are in tokens, image tokens included; times in seconds."""

    id: Any
    prompt: str
    images: list[str]
    text: str
    prompt_tokens: int
    new_tokens: int
    ttft_seconds: float | None  # to the first token of a prompt that is alone in its batch
    seconds: float  # of the whole batch, without decoding images

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self)


@dataclass(frozen=True)
class Settings:
    """How to generate: greedily where the temperature is 0."""

    max_new_tokens: int = 512
    temperature: float = 0.0
    batch_size: int = 8
    seed: int = 0  # of sampling
    chat: bool = True  # the prompt is a question, put into the model's chat template; else it is taken as it is

    def __post_init__(self) -> None:
        if self.max_new_tokens < 1 or self.batch_size < 1:
            raise ConfigError(f"{self.max_new_tokens=} and {self.batch_size=} must be 1 or more".replace("self.", ""))
        if not 0 <= self.temperature < 100:
            raise ConfigError(f"temperature={self.temperature} must be 0 (greedy) or a positive number below 100")


def read_requests(path: Path) -> list[Request]:
    """Of a file of JSON lines: ``prompt``, and optionally ``image`` (a path), ``images`` (several) and ``id``.

    Image paths are relative to the file's folder and stay inside it. Raises ConfigError or ImageError with the number
    of a bad line.
    """
    try:
        lines = path.read_text().splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} cannot be read ({error}): give a file of JSON lines") from error
    found = [_request(path, number, line) for number, line in enumerate(lines, 1) if line.strip()]
    if not found:
        raise ConfigError(f'{path} holds no requests: each line is {{"prompt": "...", "image": "file.jpg"}}')
    return found


def _request(path: Path, number: int, line: str) -> Request:
    where = f"{path}, line {number}"
    try:
        row = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{where} is no JSON ({error})") from error
    if not isinstance(row, dict) or not isinstance(row.get("prompt"), str):
        raise ConfigError(f'{where} has no "prompt": each line is {{"prompt": "...", "image": "file.jpg"}}')
    if unknown := sorted(row.keys() - {"prompt", "image", "images", "id"}):
        raise ConfigError(f"{where} has {unknown[0]!r}, which is none of prompt, image, images, id")
    names = row.get("images", [row["image"]] if row.get("image") is not None else [])
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise ConfigError(f"{where}: images must be a list of paths, not {names!r}")
    folder = path.parent.resolve()
    for name in names:
        if not (folder / name).resolve().is_relative_to(folder):
            raise ConfigError(f"{where}: {name} leads out of {folder}, where the file's images have to be")
    try:
        return Request(row["prompt"], tuple(folder / name for name in names), row.get("id", number))
    except ImageError as error:
        raise ImageError(f"{where}: {error}") from error


def answer(
    ready: Ready, requests: Iterable[Request], settings: Settings, streamer: BaseStreamer | None = None
) -> Iterator[Answer]:
    """Answers in the order of the requests, batch by batch; a streamer is for a single one.

    A prompt that leaves less than ``max_new_tokens`` of the context runs alone: its batch would have no more either.

    Raises:
        ConfigError: a prompt as long as the model's context, or longer, before anything runs.
        ImageError: an image that cannot be read.
    """
    requests, config = list(requests), ready.model.config
    lengths = [prompt_tokens(ready, request, settings.chat) for request in requests]
    for request, length in zip(requests, lengths, strict=True):
        try:
            config.check_prompt(length)
        except ConfigError as error:
            raise ConfigError(_of(request, error)) from error
    if settings.temperature:
        torch.manual_seed(settings.seed)
    fits = [length + settings.max_new_tokens <= config.context for length in lengths]
    for fit, alike in itertools.groupby(zip(fits, requests, strict=True), key=lambda pair: pair[0]):
        for batch in batches((request for _, request in alike), settings.batch_size if fit else 1):
            yield from _answer(ready, batch, settings, streamer)


def batches(requests: Iterable[Request], size: int) -> Iterator[list[Request]]:
    """As they run together."""
    requests = iter(requests)
    while batch := list(itertools.islice(requests, size)):
        yield batch


def _answer(
    ready: Ready, batch: Sequence[Request], settings: Settings, streamer: BaseStreamer | None
) -> Iterator[Answer]:
    model, processor = ready.model, ready.processor
    texts, images = [prompt_text(ready, request, settings.chat) for request in batch], _images(batch)
    inputs = processor(text=texts, images=images or None, return_tensors="pt", padding=True, padding_side="left")
    inputs = inputs.to(model.device, model.dtype)  # whole numbers stay what they are
    length = inputs["input_ids"].shape[1]
    sampling = (
        {"do_sample": True, "temperature": settings.temperature} if settings.temperature else {"do_sample": False}
    )
    clock = _Clock(streamer)
    if model.device.type == "cuda":
        torch.cuda.synchronize(model.device)
    start = time.perf_counter()
    ids = model.generate(
        **inputs, **sampling, streamer=clock if len(batch) == 1 else None,
        max_new_tokens=min(settings.max_new_tokens, model.config.context - length),
    )  # fmt: skip
    ids = ids[:, length:].cpu()  # which waits for the device
    seconds = time.perf_counter() - start
    prompts = inputs["attention_mask"].sum(1).tolist()
    for request, row, tokens in zip(batch, ids, prompts, strict=True):
        text = processor.decode(row, skip_special_tokens=True).strip()
        first = None if clock.first is None else clock.first - start
        names = [str(path) for path in request.images]
        yield Answer(request.id, request.prompt, names, text, tokens, _until_end(model, row), first, seconds)


def prompt_text(ready: Ready, request: Request, chat: bool) -> str:
    """What the tokenizer gets."""
    if not chat or ready.processor.chat_template is None:
        return request.prompt if request.places else IMAGE_TOKEN * len(request.images) + request.prompt
    content: str | list[dict[str, str]] = request.prompt
    if not request.places:
        content = [*({"type": "image"} for _ in request.images), {"type": "text", "text": request.prompt}]
    message = [{"role": "user", "content": content}]
    return ready.processor.apply_chat_template(message, add_generation_prompt=True)


def prompt_tokens(ready: Ready, request: Request, chat: bool) -> int:
    """Length of a prompt, image tokens included, without its images being read."""
    processor = ready.processor
    text = processor.tokenizer(processor.separated(prompt_text(ready, request, chat)))["input_ids"]
    return len(text) + len(request.images) * (ready.model.config.image_seq_length - 1)


def _images(batch: Sequence[Request]) -> list[Image.Image]:
    found = []
    for request in batch:
        for path in request.images:
            try:
                found.append(load_image(path))
            except ImageError as error:
                raise ImageError(_of(request, error)) from error
    return found


def _of(request: Request, error: Exception) -> str:
    return str(error) if request.id is None else f"request {request.id}: {error}"


def _until_end(model: Any, row: Tensor) -> int:
    """New tokens of a row, the end of text included, the padding after it not."""
    ends = model.generation_config.eos_token_id
    ends = set(ends) if isinstance(ends, list) else {ends}
    return next((i for i, token in enumerate(row.tolist(), 1) if token in ends), len(row))


@dataclass
class _Clock(BaseStreamer):
    """Notes when the first token is there, and hands everything on."""

    inner: BaseStreamer | None
    first: float | None = None
    _prompt_seen: bool = field(default=False, repr=False)

    def put(self, value: Tensor) -> None:
        if self._prompt_seen and self.first is None:
            self.first = time.perf_counter()
        self._prompt_seen = True
        if self.inner is not None:
            self.inner.put(value)

    def end(self) -> None:
        if self.inner is not None:
            self.inner.end()
