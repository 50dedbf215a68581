"""Made spatial tasks, read back."""

import json

SPLITS = ("train", "held_out", "captions")


def read(folder, split):
    """The rows of one of a task's data files."""
    return json.loads((folder / f"{split}.json").read_text())


def questions(rows):
    """(image, question, answer) of rows in LLaVA's format."""
    for row in rows:
        turns = [turn["value"].removeprefix("<image>\n") for turn in row["conversations"]]
        assert [turn["from"] for turn in row["conversations"]] == ["human", "gpt"] * (len(turns) // 2)
        for text, answer in zip(turns[::2], turns[1::2], strict=True):
            yield row["image"], text, answer
