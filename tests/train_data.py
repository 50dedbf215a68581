"""Data files for the tests of training."""

import json


def written(path, rows, lines=None):
    """A JSON file, of lines where its name says so."""
    lines = path.suffix == ".jsonl" if lines is None else lines
    path.write_text("\n".join(map(json.dumps, rows)) + "\n" if lines else json.dumps(rows, indent=1), encoding="utf-8")
    return path
