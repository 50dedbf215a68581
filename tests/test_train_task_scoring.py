"""Scores of the spatial task against cases made by hand."""

import numpy as np
import pytest

from sp_fast.errors import DataError
from sp_fast.training.task.scoring import Said, chance, score, summary


@pytest.mark.parametrize(
    ("kind", "expected", "said", "right"),
    [
        ("position", "top left", " Top  left.", 1),
        ("position", "top left", "top", 0),
        ("position", "left", "it is left", 0),
        ("relation", "above", "ABOVE!", 1),
        ("count", "1", "-1", 0),
        ("count", "3", "3", 1),
        ("count", "3", "33", 0),
        ("colour", "red", "", 0),
        ("presence", "yes", "Yes,", 1),
        ("presence", "yes", "no", 0),
        ("box", "[0.00, 0.00, 0.50, 0.50]", "[0, 0, 0.5, 0.25]", 1),  # an IoU of one half
        ("box", "[0.00, 0.00, 0.50, 0.50]", "[0, 0, 0.5, 0.24]", 0),
        ("box", "[0.00, 0.00, 0.50, 0.50]", "[0.25, 0, 0.75, 0.5]", 0),  # of a third
        ("box", "[0.10, 0.20, 0.30, 0.40]", "It is 0.1 0.2 0.3 0.4", 1),
        ("box", "[0.10, 0.20, 0.30, 0.40]", "[0.1, 0.2, 0.3]", 0),
        ("box", "[0.10, 0.20, 0.30, 0.40]", "[0.1, 0.2, 0.3, 0.4, 0.5]", 0),
        ("box", "[0.10, 0.20, 0.30, 0.40]", "[0.3, 0.4, 0.1, 0.2]", 0),  # its edges the other way round
        ("box", "[0.10, 0.20, 0.30, 0.40]", "[0.1, 0.2, 0.1, 0.4]", 0),
        ("box", "[0.10, 0.20, 0.30, 0.40]", "0 0 " + "9" * 400 + " 1", 0),
        ("box", "[0.10, 0.20, 0.30, 0.40]", "-" + "9" * 400 + " 0 " + "9" * 400 + " 1", 0),
        ("box", "[0.10, 0.20, 0.30, 0.40]", "no box", 0),
        ("box", "[0.50, 0.50, 0.60, 0.60]", "[0.1, 0.1, 0.2, 0.2]", 0),  # both differences are negative
    ],
)
def test_scores(kind, expected, said, right):
    assert score(kind, expected, said) == right


def test_scores_of_what_is_no_question():
    with pytest.raises(DataError, match="'size' is no type of question: it can be position, relation"):
        score("size", "1", "1")
    with pytest.raises(DataError, match="'size' is no type"):
        chance("size", [["1"]])
    with pytest.raises(DataError, match="'size' is no type"):
        summary([Said("size", "a", "1", "1")])
    with pytest.raises(DataError, match="the expected box 'left' is none"):
        score("box", "left", "[0, 0, 1, 1]")
    for edges in ("[0.3, 0.1, 0.1, 0.4]", "[0.1, 0.4, 0.3, 0.2]"):
        with pytest.raises(DataError, match="give four numbers, left, top, right, bottom"):
            score("box", edges, "[0, 0, 1, 1]")


def test_a_summary_by_hand():
    rows = [
        Said("relation", "a", "left", "left"),
        Said("relation", "b", "left", "above"),
        Said("relation", "c", "below", "below"),
        Said("relation", "d", "left", "Left."),
        Said("box", "a", "[0.10, 0.10, 0.20, 0.20]", "[0.10, 0.10, 0.20, 0.20]"),
        Said("box", "b", "[0.11, 0.10, 0.21, 0.20]", "nothing"),
        Said("box", "c", "[0.70, 0.70, 0.90, 0.90]", "[0.1, 0.1, 0.2, 0.2]"),
        Said("position", "a", "top", "top"),
    ]
    found = summary(iter(rows))
    assert list(found) == ["position", "relation", "box"]
    assert found["relation"] == (0.75, (0.25, 0.75), 4)
    assert found["position"] == (1.0, (1 / 9, 1.0), 1)
    assert found["box"] == (pytest.approx(1 / 3), (None, pytest.approx(2 / 3)), 3)
    assert summary([]) == {}


def test_a_pair_counts_as_one_and_only_where_both_are_right():
    pairs = {"a": ("yes", "no"), "b": ("yes", "yes"), "c": ("no", "no"), "d": ("no", "yes")}
    rows = [Said("presence", image, "yes", first) for image, (first, _) in pairs.items()]
    rows += [Said("presence", image, "no", second) for image, (_, second) in pairs.items()]
    assert summary(rows) == {"presence": (0.25, (0.25, 0.0), 4)}
    rows.append(Said("presence", "e", "Yes", "yes"))  # alone
    assert summary(rows) == {"presence": (0.4, (pytest.approx(0.3), 0.2), 5)}
    rows.append(Said("presence", "e", "yes", "no"))
    assert summary(rows) == {"presence": (0.2, (0.25, 0.2), 5)}
    with pytest.raises(DataError, match="are of one image: ask for one box of each"):
        chance("box", [["[0, 0, 1, 1]"], ["[0, 0, 1, 1]", "[0, 0, 0.5, 1]"]])


def test_the_best_constant_box_is_that_of_a_slow_search():
    rng = np.random.default_rng(0)
    corners, extents = rng.integers(0, 40, (60, 2)) / 100, rng.choice([0.2, 0.24, 0.3], (60, 1))
    boxes = np.concatenate([corners, corners + extents], 1).round(2)
    best = 0
    for extent in (0.2, 0.24, 0.3):
        for left in np.arange(0, 1 - extent + 1e-9, 0.02):
            for top in np.arange(0, 1 - extent + 1e-9, 0.02):
                wide = (np.minimum(boxes[:, 2], left + extent) - np.maximum(boxes[:, 0], left)).clip(0)
                high = (np.minimum(boxes[:, 3], top + extent) - np.maximum(boxes[:, 1], top)).clip(0)
                area = (boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1])
                best = max(best, np.mean(wide * high / (area + extent**2 - wide * high) >= 0.5))
    texts = [f"[{', '.join(f'{edge:.2f}' for edge in box)}]" for box in boxes]
    assert chance("box", [[text] for text in texts]) == (None, pytest.approx(best))
    assert best > 3 / 60
