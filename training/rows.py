"""Rows of a data file, read one at a time: of a JSON file only the byte ranges of its rows stay in memory.

Worker processes read through the operating system's cache, so a file is in memory once, however many there are.
"""

from __future__ import annotations

import codecs
import json
import os
import re
from array import array
from pathlib import Path
from typing import Any, BinaryIO, Protocol

import numpy as np

from sp_fast.errors import DataError, first_line

MAX_ROW = 1 << 24  # bytes; a conversation has thousands
_CHUNK = 1 << 20
_SPACE = re.compile(r"[ \t\r\n]*")


class Rows(Protocol):
    """A file's rows in order."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> dict[str, Any]:
        """Raises DataError for a row that cannot be read."""

    def where(self, index: int) -> str:
        """The row's place for a message: ``data.jsonl, line 12``, counted from 1."""


def open_rows(path: Path) -> Rows:
    """Of JSON lines, a JSON array, a ``.parquet`` file, or a folder of ``datasets.Dataset.save_to_disk``.

    A broken line of JSON lines is an error of that row, when it is read; a broken array is one of the whole file.

    Raises:
        DataError: no such file, no rows, a broken array, or a format whose package is not installed.
    """
    if path.is_dir() or path.suffix == ".parquet":
        return _open_dataset(path)
    if not path.is_file():
        raise DataError(f"{path} is no file: give JSON, JSON lines, parquet, or a folder of Dataset.save_to_disk")
    try:
        with path.open("rb") as file:
            start = len(codecs.BOM_UTF8) if file.read(3) == codecs.BOM_UTF8 else 0
            file.seek(start)
            begins = next((piece for piece in iter(lambda: file.readline(64), b"") if piece.strip()), b"")
            is_array = path.suffix != ".jsonl" and begins.lstrip().startswith(b"[")
            file.seek(start)
            rows = JsonRows(path, *(_array_index(path, file) if is_array else _line_index(path, file)))
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error}") from error
    if not len(rows):
        raise DataError(f"{path} holds no rows: each is an object with conversations or messages")
    return rows


class JsonRows:
    """Rows that are JSON objects.

    Args:
        spans: ``[rows, 2]`` int64, each row's first byte and the one after its last.
        numbers: ``[rows]`` int64, each row's number for ``where``.
        unit: what is counted, ``line`` or ``row``.
    """

    def __init__(self, path: Path, spans: np.ndarray, numbers: np.ndarray, unit: str) -> None:
        self._path, self._spans, self._numbers, self._unit = path, spans, numbers, unit
        self._file: BinaryIO | None = None

    def __len__(self) -> int:
        return len(self._spans)

    def __getitem__(self, index: int) -> dict[str, Any]:
        start, end = self._spans[index].tolist()
        try:
            if self._file is None:  # in this process, if it was spawned
                self._file = self._path.open("rb")
            return decoded(os.pread(self._file.fileno(), end - start, start))
        except OSError as error:
            raise DataError(f"cannot be read: {error}") from error

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_file": None}

    def where(self, index: int) -> str:
        """Its place for a message."""
        return f"{self._path}, {self._unit} {self._numbers[index]}"


class DatasetRows:
    """Rows of the ``datasets`` package, as they are stored: images stay bytes or paths, and are decoded elsewhere."""

    def __init__(self, path: Path, dataset: Any) -> None:
        self._path, self._dataset = path, dataset.with_format("arrow")

    def __len__(self) -> int:
        return len(self._dataset)

    def __getitem__(self, index: int) -> dict[str, Any]:
        try:
            return self._dataset[index : index + 1].to_pylist()[0]
        except Exception as error:  # readers of damaged files fail in any way
            raise DataError(f"cannot be read: {first_line(error)}") from error

    def where(self, index: int) -> str:
        """Its place for a message."""
        return f"{self._path}, row {index + 1}"


def _open_dataset(path: Path) -> DatasetRows:
    try:
        import datasets
    except ImportError as error:
        raise DataError(
            f'{path} is read by the datasets package, which is not installed: pip install "sp_fast[data]", or give JSON'
        ) from error
    try:
        found = datasets.load_from_disk(str(path)) if path.is_dir() else datasets.Dataset.from_parquet(str(path))
    except Exception as error:  # readers of damaged files fail in any way
        raise DataError(f"{path} cannot be read by the datasets package: {first_line(error)}") from error
    if not isinstance(found, datasets.Dataset):
        raise DataError(f"{path} holds the splits {', '.join(found)}: give the folder of one of them")
    if not len(found):
        raise DataError(f"{path} holds no rows: each has conversations or messages")
    return DatasetRows(path, found)


def decoded(raw: bytes) -> dict[str, Any]:
    """A row's JSON object. Raises DataError for anything else, and for what JSON readers disagree on: names that are
    said twice, NaN and infinity."""
    try:
        row = _STRICT.decode(raw.decode("utf-8"))
    except UnicodeDecodeError as error:
        raise DataError(f"is no UTF-8 at its byte {error.start}") from error
    except RecursionError as error:
        raise DataError("is nested too deeply") from error
    except ValueError as error:
        raise DataError(f"is no JSON: {first_line(error)}") from error
    if not isinstance(row, dict):
        raise DataError(f"is a JSON {type(row).__name__}, not an object with conversations or messages")
    return row


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"{next(name for name in names if names.count(name) > 1)!r} is said twice")
    return found


def _no_constant(name: str) -> None:
    raise ValueError(f"{name} is no number of JSON")


_STRICT = json.JSONDecoder(object_pairs_hook=_object, parse_constant=_no_constant)
# To find where rows end: what is wrong inside one is found when it is read.
_LENIENT = json.JSONDecoder(parse_int=str, parse_float=str)


def _line_index(path: Path, file: BinaryIO) -> tuple[np.ndarray, np.ndarray, str]:
    spans, numbers, number, start = array("q"), array("q"), 0, file.tell()
    while line := file.readline(MAX_ROW):
        number += 1
        if len(line) == MAX_ROW:
            raise DataError(f"{path}, line {number} is longer than {MAX_ROW:,} bytes: is it JSON lines?")
        if line.strip():
            spans.extend((start, start + len(line)))
            numbers.append(number)
        start += len(line)
    return np.array(spans, np.int64).reshape(-1, 2), np.array(numbers, np.int64), "line"


def _array_index(path: Path, file: BinaryIO) -> tuple[np.ndarray, np.ndarray, str]:
    spans, window = array("q"), _Window(file)
    try:
        window.expect("[")
        more = window.peek() != "]" or window.expect("]") != "]"
        while more:
            window.peek()
            start = window.byte
            window.skip_value()
            spans.extend((start, window.byte))
            more = window.expect(",", "]") == ","
        if rest := window.peek():
            raise DataError(f"{rest!r} follows the array")
    except (DataError, UnicodeDecodeError, RecursionError) as error:
        raise DataError(
            f"{path} is no JSON array: at byte {window.byte}, after {len(spans) // 2} rows: {first_line(error)}"
        ) from error
    return np.array(spans, np.int64).reshape(-1, 2), np.arange(1, len(spans) // 2 + 1), "row"


class _Window:
    """A UTF-8 file as text, a part of which is in memory; ``byte`` is where ``text[at]`` stands in the file."""

    def __init__(self, file: BinaryIO) -> None:
        self._file, self._decode = file, codecs.getincrementaldecoder("utf-8")().decode
        self.text, self.at, self.byte, self.ended = "", 0, file.tell(), False

    def peek(self) -> str:
        """The next character that is no white space, which it moves to; at the end the empty string."""
        while True:
            self._move(_SPACE.match(self.text, self.at).end())
            if self.at < len(self.text) or self.ended:
                return self.text[self.at : self.at + 1]
            self._more()

    def expect(self, *marks: str) -> str:
        """Moves past the next of these characters, and returns it."""
        found = self.peek()
        if found not in marks:
            raise DataError(f"{found!r} stands where {' or '.join(map(repr, marks))} should")
        self._move(self.at + 1)
        return found

    def skip_value(self) -> None:
        """Moves past a JSON value, which may end beyond what is in memory."""
        while True:
            try:
                end, wrong = _LENIENT.raw_decode(self.text, self.at)[1], ""
            except json.JSONDecodeError as error:
                end, wrong = len(self.text), error.msg
            if not wrong and (end < len(self.text) or self.ended):  # a number may go on in what follows
                return self._move(end)
            if self.ended:
                raise DataError(wrong)
            if len(self.text) - self.at > MAX_ROW:
                raise DataError(f"{wrong or 'no end'}, or the row is longer than {MAX_ROW:,} bytes")
            self._more()

    def _more(self) -> None:
        chunk = self._file.read(max(_CHUNK, len(self.text) - self.at))
        self.text, self.at = self.text[self.at :] + self._decode(chunk, final=not chunk), 0
        self.ended = not chunk

    def _move(self, to: int) -> None:
        self.byte += len(self.text[self.at : to].encode())
        self.at = to
