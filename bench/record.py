"""One result: one dataclass, one JSON line."""

from __future__ import annotations

import json
import math
import tempfile
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from sp_fast.errors import SPFastError

FORMAT = 1  # of a line; a reader refuses lines that it does not know


class RecordError(SPFastError):
    """A result file that cannot be read or written."""


@dataclass(frozen=True)
class Record:
    """One implementation at one case. Figures are None where they were withheld, failed, or cannot be had."""

    benchmark: str  # "projector", "model", "train" or "projectors"
    case: str
    implementation: str
    variant: str
    stage: str
    direction: str
    batch: int
    dtype: str
    grid: int
    vision_width: int
    spatial_width: int
    text_width: int
    device: str
    threads: int
    run: str  # when its run began, and the process that led it
    heat: int  # implementations of one heat of one run took turns: ratios are taken within it
    runs: int = 0
    timer: str | None = None
    ms_p20: float | None = None
    ms_p50: float | None = None
    ms_p80: float | None = None
    flop: int | None = None
    bytes: int | None = None
    tflops: float | None = None
    gbps: float | None = None
    roof_ms: float | None = None  # max of bytes over bandwidth and FLOP over rate, both measured in this run
    serial_ms: float | None = None  # the stages' own roofs, one after another
    roof_share: float | None = None  # roof_ms / ms_p50
    bound: str | None = None
    weights_mib: float | None = None
    saved_mib: float | None = None
    gradients_mib: float | None = None
    temporary_mib: float | None = None
    peak_mib: float | None = None
    energy_mj: float | None = None
    power_w: float | None = None
    sm_mhz: int | None = None
    memory_mhz: int | None = None
    temperature_c: int | None = None
    throttled: bool | None = None
    error: float | None = None  # against float64: largest relative Frobenius norm of an output or gradient
    reference_error: float | None = None  # the official form's, in the same dtype
    withheld: str | None = None  # why no figure is given: it failed, or its results are wrong
    note: str | None = None  # why memory or energy is missing, or what else there is to say
    # of the model's benchmark only
    llm: str | None = None  # a name of model_shapes.LLMS, or a model's folder
    tower: str | None = None
    attention: str | None = None  # the language model's
    mode: str | None = None  # eager or compiled
    image_tokens: int | None = None  # of one image
    prompt_tokens: int | None = None  # of text, beside the image
    new_tokens: int | None = None
    tokens_per_second: float | None = None  # of the whole batch: new ones, or all that a training step takes
    # of training steps only; parts of a step, p50
    forward_ms_p50: float | None = None
    backward_ms_p50: float | None = None
    optimizer_ms_p50: float | None = None  # the update, and letting go of the gradients before
    optimizer_mib: float | None = None  # its states
    lora_rank: int | None = None
    # of the field of projectors only
    parameters: int | None = None
    weight_bytes: int | None = None  # that they take as they are kept
    peaks: dict[str, Any] = field(default_factory=dict)
    environment: dict[str, Any] = field(default_factory=dict)
    format: int = FORMAT

    @property
    def identity(self) -> tuple[str, ...]:
        """What two runs must share for their figures to be compared."""
        widths = (self.grid, self.vision_width, self.spatial_width, self.text_width)
        return (self.benchmark, self.case, self.implementation, self.device.partition(":")[0], *map(str, widths))

    def to_json(self) -> str:
        return json.dumps(_rounded(asdict(self)), allow_nan=False)


def _rounded(value: Any) -> Any:
    """Six significant digits, more than any of them deserves; what is not finite is null, which JSON can hold."""
    if isinstance(value, dict):
        return {key: _rounded(inner) for key, inner in value.items()}
    if not isinstance(value, float):
        return value
    return float(f"{value:.6g}") if math.isfinite(value) else None


def from_json(line: str) -> Record:
    """Raises ValueError for what is no record."""
    values = json.loads(line)
    if not isinstance(values, dict) or values.get("format") != FORMAT:
        raise ValueError(f"no result of format {FORMAT}")
    known = {f.name for f in fields(Record)}
    if unknown := values.keys() - known:
        raise ValueError(f"unknown fields {sorted(unknown)}")
    return Record(**values)


def read_records(path: Path) -> list[Record]:
    """The records of a ``.jsonl`` file, or of all of them in a folder; of repeated ones, the last.

    Raises:
        RecordError: nothing there, or a line that is no record, with its number. A torn last line is left out: a run
            that was killed while it wrote ends so.
    """
    files = sorted(path.glob("*.jsonl")) if path.is_dir() else [path]
    found: dict[tuple, Record] = {}
    for file in files:
        try:
            text = file.read_text()
        except OSError as error:
            raise RecordError(f"{file} cannot be read ({error.strerror}): give a result file or a folder") from error
        lines = text.splitlines()
        for number, line in enumerate(lines, 1):
            try:
                record = from_json(line)
            except (ValueError, TypeError) as error:
                if number == len(lines) and not text.endswith("\n"):
                    continue
                raise RecordError(f"{file}, line {number} is no benchmark result ({error})") from error
            found[(*record.identity, record.heat)] = record
    if not found:
        raise RecordError(f"{path} holds no benchmark results: write one with sp-fast bench projector --out FILE")
    return list(found.values())


class Sink:
    """Appends each record to a file as soon as it is there, so that an interrupted run keeps what it finished."""

    def __init__(self, path: Path | None, append: bool = False, force: bool = False) -> None:
        self.records: list[Record] = []
        self._path = path
        if path is None:
            return
        if path.exists() and not (append or force):
            raise RecordError(f"{path} exists: choose another file, or overwrite it with --force")
        self._replaces = force and not append
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryFile(dir=path.parent):
                pass
            if append and path.exists():  # a line that a killed run did not finish goes
                with path.open("r+b") as file:
                    file.truncate(file.read().rfind(b"\n") + 1)
        except OSError as error:
            raise RecordError(f"{path} cannot be written ({error.strerror}): choose a folder that can") from error

    def add(self, record: Record) -> None:
        self.records.append(record)
        if self._path is not None:
            with self._path.open("w" if self._replaces else "a") as file:
                file.write(record.to_json() + "\n")
            self._replaces = False


def finished(records: Iterable[Record]) -> set[tuple[str, ...]]:
    """Identities that need not be measured again: those with a figure, or with results that were judged right."""
    return {r.identity for r in records if r.withheld is None}
