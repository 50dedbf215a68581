"""Rows: what a file holds, one row at a time, and which files are refused."""

import json
import pickle
import subprocess
import sys
from types import SimpleNamespace

import pytest

from sp_fast.errors import DataError
from sp_fast.training.rows import open_rows
from tests.train_data import written

ROWS = [
    {"id": 1, "text": 'é 中文 😀 " ] } , {'},
    {"nested": [{"a": [1.5, None, True, "\\"]}]},
    {},
    {"long": "x" * 5000},
]


@pytest.mark.parametrize("name", ["rows.json", "rows.jsonl"])
@pytest.mark.parametrize("ascii_only", [True, False])
def test_rows_are_those_of_the_json_module(tmp_path, monkeypatch, name, ascii_only):
    path = tmp_path / name
    dumped = [json.dumps(row, ensure_ascii=ascii_only) for row in ROWS]
    text = "\r\n \n".join(dumped) if name.endswith("l") else " [\n" + " ,\n\t".join(dumped) + "]\n"
    for mark in (b"", b"\xef\xbb\xbf"):
        path.write_bytes(mark + text.encode())
        for chunk in (1, 3, 64, 1 << 20):  # a chunk may end anywhere
            monkeypatch.setattr("sp_fast.training.rows._CHUNK", chunk)
            rows = open_rows(path)
            assert [rows[i] for i in range(len(rows))] == ROWS
    again = pickle.loads(pickle.dumps(rows))
    assert [again[i] for i in range(len(again))] == ROWS
    assert rows.where(2) == f"{path}, " + ("line 5" if name.endswith("l") else "row 3")


def test_a_json_file_may_hold_lines(tmp_path):
    assert len(open_rows(written(tmp_path / "rows.json", ROWS, lines=True))) == len(ROWS)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "holds no rows"),
        (b"\n \n", "holds no rows"),
        (b"[]", "holds no rows"),
        (b"[{}", "after 1 rows: '' stands where ',' or ']' should"),
        (b"[{} {}]", "at byte 4, after 1 rows: '{' stands where"),
        (b"[{},]", "at byte 4, after 1 rows: Expecting value"),
        (b"[{}, {\"a\": }]", "at byte 5, after 1 rows: Expecting value"),
        (b"[{}, {\"a\": \"", "Unterminated string"),
        (b"[{}] x", "'x' follows the array"),
        (b"[{}, \xff]", "codec can't decode"),
        (b"[{}]\xc3", "unexpected end of data"),
        (b"[" * 100000, "nest|recursion"),
    ],
)  # fmt: skip
def test_broken_arrays_are_refused_with_the_place(tmp_path, content, message):
    path = tmp_path / "rows.json"
    path.write_bytes(content)
    with pytest.raises(DataError, match=message) as caught:
        open_rows(path)
    assert str(path) in str(caught.value)


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (b'{"a": 1', "no JSON"),
        (b"[1]", "JSON list"),
        (b"null", "JSON NoneType"),
        (b'{"a": NaN}', "NaN is no number"),
        (b'{"a": -Infinity}', "-Infinity is no number"),
        (b'{"a": 1, "b": {"c": 1, "c": 2}}', "'c' is said twice"),
        (b'{"a": %s}' % (b"9" * 10000), "no JSON: Exceeds the limit"),
        (b'{"a": "\xff"}', "no UTF-8 at its byte 7"),
        ('{"a": 1}'.encode("utf-16"), "no UTF-8 at its byte 0"),
        (b'{"a": ' + b"[" * 100000, "nested too deeply"),
    ],
)
def test_broken_lines_are_errors_of_their_rows(tmp_path, row, message):
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b'{"id": "good"}\n' + row + b'\n{"id": "too"}\n')
    rows = open_rows(path)
    assert [rows[0], rows[2]] == [{"id": "good"}, {"id": "too"}]
    with pytest.raises(DataError, match=message):
        rows[1]


def test_what_is_wrong_inside_a_row_is_no_error_of_its_array(tmp_path, monkeypatch):
    bad = ["NaN", "12345", '{"a": 1, "a": 2}', f'{{"a": {"9" * 10000}}}', "[[]]", '"text"', "null"]
    path = tmp_path / "rows.json"
    path.write_text(f"[{', '.join(bad)}, {{}}]")
    for chunk in (1, 1 << 20):
        monkeypatch.setattr("sp_fast.training.rows._CHUNK", chunk)
        rows = open_rows(path)
        assert len(rows) == len(bad) + 1
        assert rows[len(bad)] == {}
        for i in range(len(bad)):
            with pytest.raises(DataError):
                rows[i]


def test_lines_are_lines_also_where_the_first_is_an_array(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text('[1]\n{"a": 1}\n')
    rows = open_rows(path)
    assert len(rows) == 2
    assert rows[1] == {"a": 1}


def test_rows_beyond_all_reason_are_refused(tmp_path, monkeypatch):
    monkeypatch.setattr("sp_fast.training.rows.MAX_ROW", 100)
    monkeypatch.setattr("sp_fast.training.rows._CHUNK", 10)
    for name in ("rows.json", "rows.jsonl"):
        with pytest.raises(DataError, match="longer than 100 bytes"):
            open_rows(written(tmp_path / name, [{"a": "x" * 1000}]))
    with pytest.raises(DataError, match="is no file"):
        open_rows(tmp_path / "missing.json")


def test_files_of_the_datasets_package_need_it(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    for path in (tmp_path, tmp_path / "rows.parquet"):
        with pytest.raises(DataError, match=r'pip install "sp_fast\[data\]"'):
            open_rows(path)


def test_files_of_the_datasets_package_are_read_as_they_are_stored(tmp_path, monkeypatch):
    class Dataset(list):
        format = None

        def with_format(self, name):
            self.format = name
            return self

        def __getitem__(self, some):
            assert self.format == "arrow"  # in which images stay encoded
            return SimpleNamespace(to_pylist=lambda: list.__getitem__(self, some))

        @classmethod
        def from_parquet(cls, path):
            return cls() if "empty" in path else cls(ROWS)

    def load_from_disk(path):
        if "broken" in path:
            raise OSError("no such thing")
        return {"train": Dataset(ROWS), "test": Dataset(ROWS)} if "splits" in path else Dataset(ROWS)

    package = SimpleNamespace(Dataset=Dataset, load_from_disk=load_from_disk)
    monkeypatch.setitem(sys.modules, "datasets", package)
    for name in ("whole", "splits", "broken"):
        (tmp_path / name).mkdir()
    for path in (tmp_path / "whole", tmp_path / "rows.parquet"):
        rows = open_rows(path)
        assert [rows[i] for i in range(len(rows))] == ROWS
        assert rows.where(0) == f"{path}, row 1"
    for name, message in (
        ("splits", "the splits train, test"),
        ("broken", "no such thing"),
        ("empty.parquet", "no rows"),
    ):
        with pytest.raises(DataError, match=message):
            open_rows(tmp_path / name)


@pytest.mark.campaign
@pytest.mark.parametrize("name", ["rows.json", "rows.jsonl"])
def test_opening_many_rows_takes_little_memory(tmp_path, name):
    path, rows = tmp_path / name, 200_000
    with path.open("w") as file:
        file.write("[" * name.endswith("n"))
        for i in range(rows):
            file.write(json.dumps({"id": i, "text": "x" * 1100}) + ("\n" if name.endswith("l") else ",\n"))
        file.write("{}]" * name.endswith("n"))
    code = (
        "import re, sys, time; from pathlib import Path; from sp_fast.training.rows import open_rows\n"
        "peak = lambda: int(re.search(r'VmHWM:\\s+(\\d+)', Path('/proc/self/status').read_text())[1])\n"
        "before, start = peak(), time.perf_counter()\n"
        "rows = open_rows(Path(sys.argv[1])); opened = time.perf_counter() - start\n"
        "for i in range(0, len(rows), 100): rows[i]\n"
        "print(len(rows), peak() - before, opened)"
    )
    done = subprocess.run([sys.executable, "-c", code, path], capture_output=True, text=True, check=True)
    found, kib, seconds = done.stdout.split()
    assert int(found) >= rows
    index = rows * 3 * 8 / 1024  # two offsets and a number a row
    print(
        f"\n{name}: {found} rows, {path.stat().st_size >> 20} MiB: opened in {float(seconds):.1f} s, {int(kib) >> 10} MiB more"
    )
    assert int(kib) < 6 * index + 16 * 1024  # arrays that grow, and a window of the file
