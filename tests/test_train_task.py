"""The spatial task: what it shows, asks and answers, found again in the pixels."""

import hashlib
import itertools
import json
import re
from collections import Counter, defaultdict

import numpy as np
import pytest
from PIL import Image

from sp_fast.training.task.drawing import mask_of
from sp_fast.training.task.make import Task, make_task
from sp_fast.training.task.sample import make_sample
from sp_fast.training.task.scene import goals
from sp_fast.training.task.scoring import iou, score
from sp_fast.training.task.words import ANSWERS, QUESTIONS, SHAPES, TYPES, vocabulary, words_of
from tests import task_checker
from tests.task_files import SPLITS, questions, read


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    out = tmp_path_factory.mktemp("task") / "out"
    make_task(Task(seed=1, train=10, held_out=300, captions=20), out)
    return out


@pytest.fixture(scope="module")
def seen(folder):
    """By image, what its pixels show."""
    return {path.relative_to(folder).as_posix(): task_checker.regions(path) for path in folder.rglob("images/*/*.png")}


def test_every_answer_is_in_the_pixels(folder, seen):
    rows = read(folder, "held_out")
    assert Counter(row["type"] for row in rows) == dict.fromkeys(TYPES, 300) | {"presence": 600}
    for row, (image, text, said) in zip(rows, questions(rows), strict=True):
        things, size = seen[image]
        assert said == row["answer"]
        found = task_checker.answer(row["type"], text, things, size)
        if row["type"] == "box":
            edges = [float(edge) for edge in said.strip("[]").split(", ")]
            assert edges == [round(edge / size, 2) for edge in found]
            assert iou(np.array(edges), np.array(found) / size) > 0.6
        else:
            assert found == said, row["id"]


def test_presence_is_asked_in_pairs(folder):
    """One is there and one is not; neither number, place nor name in the file tells which."""
    pairs = defaultdict(list)
    for row in read(folder, "held_out"):
        if row["type"] == "presence":
            pairs[row["image"]].append(row)
    assert len(pairs) == 300
    for number, pair in enumerate(pairs.values()):
        assert [row["id"] for row in pair] == [f"held_out-{number:06}-presence-{i}" for i in (1, 2)]
        assert {row["answer"] for row in pair} == {"yes", "no"}
    first = [pair[0]["answer"] for pair in pairs.values()]
    assert abs(first.count("yes") - 150) < 4 * (300 / 4) ** 0.5
    alike = sum(a == b for a, b in itertools.pairwise(first))
    assert abs(alike - 150) < 4 * (300 / 4) ** 0.5  # in no fixed turn


def test_rows_of_training_have_each_type_once_in_any_order(folder, seen):
    first = set()
    for row in read(folder, "train"):
        types = []
        for image, text, said in questions([row]):
            (kind,) = [
                kind for kind, phrasings in QUESTIONS.items() if any(re.fullmatch(pattern(p), text) for p in phrasings)
            ]
            assert kind == "box" or task_checker.answer(kind, text, *seen[image]) == said
            types.append(kind)
        assert sorted(types) == sorted(TYPES)
        first.add(types[0])
        assert [turn["value"].startswith("<image>\n") for turn in row["conversations"]] == [True] + 13 * [False]
    assert len(first) > 2


def pattern(phrasing):
    """Of a phrasing about one or two words."""
    return re.sub(r"\\{\w+\\}", r"(\\w+ )?\\w+", re.escape(phrasing))


def test_captions_name_everything_in_reading_order(folder, seen):
    for image, _, said in questions(read(folder, "captions")):
        things, size = seen[image]
        parts = re.findall(r"a (\w+) (\w+) at the (\w+(?: \w+)?)(?=,| and|$)", said)
        places = ANSWERS["position"]
        expected = sorted(
            ((thing.colour, thing.shape, task_checker.place_of(thing, size)) for thing in things),
            key=lambda part: places.index(part[2]),
        )
        assert parts == expected
        assert 2 <= len(parts) <= 5


def test_no_question_tells_anothers_answer(folder, seen):
    by_image = defaultdict(list)
    for row, (image, text, _) in zip(rows := read(folder, "held_out"), questions(rows), strict=True):
        by_image[image].append((row["type"], text))
    for image, asked in by_image.items():
        named = [kind for name, text in asked for kind in task_checker.KIND.findall(text) if name != "count"]
        assert len(named) == len(set(named)) == 6
        texts = dict(asked)
        colour, shape = task_checker.counted(texts["count"])
        assert not any(colour in (None, kind[0]) and shape in (None, kind[1]) for kind in named)
        coloured = task_checker.coloured(texts["colour"], *seen[image])
        assert (coloured.colour, coloured.shape) not in named


def test_answers_are_balanced(folder):
    described = json.loads((folder / "task.json").read_text())
    wanted = [goals(0, "train", index) for index in range(2000)]
    for kind, answers in ANSWERS.items():
        found = described["types"][kind]
        assert set(found["answers"]) == set(answers)
        assert max(found["answers"].values()) - min(found["answers"].values()) <= 1
        assert found["held_out"] == 300
        assert sum(found["answers"].values()) == 300 * found["together"]
        if kind != "presence":
            assert found["together"] == 1
            assert found["chance"] == pytest.approx(
                {"uniform": 1 / len(answers), "constant": -(-300 // len(answers)) / 300}
            )
        of_many = Counter(one[kind] for one in wanted)
        assert max(of_many.values()) <= 2000 / len(answers) + 1
        assert min(of_many.values()) >= 2000 / len(answers) - 1
        turns = {
            tuple(one[kind] for one in wanted[start : start + len(answers)]) for start in range(0, 180, len(answers))
        }
        assert len(turns) > 1  # the order that is shuffled is another in each
    assert described["types"]["presence"]["together"] == 2
    assert described["types"]["presence"]["chance"] == {"uniform": 0.25, "constant": 0}
    assert described["types"]["box"]["answers"] is None
    assert described["types"]["box"]["chance"]["uniform"] is None
    assert 0 < described["types"]["box"]["chance"]["constant"] < 0.05


def test_every_kind_and_third_is_asked_about(folder):
    texts = [text for row in read(folder, "held_out") for _, text, _ in questions([row])]
    assert len({kind for text in texts for kind in task_checker.KIND.findall(text)}) == 24
    thirds = Counter(
        found[1] for text in texts if (found := re.search(r"at the ([\w ]+?)(?: of the image)?[?.]", text))
    )
    assert set(thirds) == set(ANSWERS["position"])
    assert min(thirds.values()) > 15  # of 33


def prior(pairs):
    """Of the second half of (text, answer), the share that the first half's most frequent answer to a text gets right,
    and how many that are."""
    half = len(pairs) // 2
    seen = defaultdict(Counter)
    for text, said in pairs[:half]:
        seen[text][said] += 1
    tested = [(text, said) for text, said in pairs[half:] if text in seen]
    right = sum(seen[text].most_common(1)[0][0] == said for text, said in tested)
    return right / len(tested), len(tested)


def held_to_chance(pairs, answers):
    """By four standard deviations of guessing."""
    share, n = prior(pairs)
    even = 1 / len(answers)
    assert share <= even + 4 * (even * (1 - even) / n) ** 0.5, (share, even, n)
    return share


def test_the_words_alone_tell_nothing(folder):
    rows = read(folder, "held_out")
    for kind, answers in ANSWERS.items():
        asked = [row for row in rows if row["type"] == kind]
        words = [(word, said) for _, text, said in questions(asked) for word in set(words_of(text))]
        held_to_chance(words, answers)
        held_to_chance([(text, said) for _, text, said in questions(asked)], answers)


@pytest.mark.campaign
def test_the_words_alone_tell_nothing_of_many():
    pairs = {kind: [] for kind in TYPES}
    for index in range(6000):
        for one in make_sample(0, "train", index, 64).questions:
            pairs[one.type].append((one.text, one.answer))
    for kind, answers in ANSWERS.items():
        print(
            f"\n{kind}: {held_to_chance(pairs[kind], answers):.3f} from the text, {1 / len(answers):.3f} by chance",
            end="",
        )


def test_small_things_are_many(seen):
    extents = np.array([t.right - t.left for name, (things, _) in seen.items() if "held_out" in name for t in things])
    assert extents.min() == 10
    assert extents.max() == 24
    assert 0.3 < (extents <= 13).mean() < 0.6


def test_the_total_of_things_does_not_tell_the_count(folder, seen):
    """Of the others, there are as many whatever is counted. (Presence has both answers in the same image.)"""
    others = defaultdict(list)
    for row in read(folder, "held_out"):
        if row["type"] == "count":
            others[row["answer"]].append(len(seen[row["image"]][0]) - int(row["answer"]))
    everything = np.concatenate(list(others.values()))
    assert set(everything) == set(range(everything.min(), everything.min() + 5))
    for group in others.values():
        assert abs(np.mean(group) - everything.mean()) < 4 * everything.std() / len(group) ** 0.5


def test_the_vocabulary_is_what_is_said(folder):
    texts = [
        turn["value"].removeprefix("<image>\n")
        for s in SPLITS
        for row in read(folder, s)
        for turn in row["conversations"]
    ]
    assert {word for text in texts for word in words_of(text)} == set(vocabulary())
    assert json.loads((folder / "task.json").read_text())["vocabulary"] == vocabulary()
    assert len(vocabulary()) < 120


def test_a_seed_and_a_split_mean_something_of_their_own():
    drawn = [[make_sample(seed, split, i, 64) for i in range(4)] for seed in (0, 1) for split in SPLITS]
    assert len({one.pixels.tobytes() for some in drawn for one in some}) == 24
    assert len({tuple(q.text + q.answer for one in some for q in one.questions) for some in drawn}) == 6
    said = [(one.text, one.answer) for i in range(20) for one in make_sample(0, "train", i, 96).questions]
    # Python's generator is the same in every version. Another digest is another task: count its format up.
    assert hashlib.sha256(repr(said).encode()).hexdigest()[:16] == "e56f4d42703c7a7b"


def test_splits_share_no_stream_of_chance():
    """Beyond the answers, which have their own: one in 34 images would count the same thing."""
    counted = {split: [count_of(make_sample(0, split, i, 64)) for i in range(20)] for split in ("train", "held_out")}
    assert sum(a == b for a, b in zip(*counted.values(), strict=True)) < 4


def count_of(sample):
    (text,) = [one.text for one in sample.questions if one.type == "count"]
    return task_checker.counted(text)


@pytest.mark.parametrize("size", [64, 97, 336])
def test_other_sizes_hold_the_same_promises(size, tmp_path):
    for index in range(4):
        sample = make_sample(2, "held_out", index, size)
        Image.fromarray(sample.pixels).save(tmp_path / "one.png")
        things, side = task_checker.regions(tmp_path / "one.png")
        assert side == size
        for one in sample.questions:
            found = task_checker.answer(one.type, one.text, things, size)
            assert found == one.answer or (
                one.type == "box" and score("box", str([e / size for e in found]), one.answer)
            )


@pytest.mark.parametrize("shape", SHAPES)
def test_shapes_reach_their_edges(shape):
    for extent in range(5, 80):
        mask = mask_of(shape, extent)
        assert mask.shape == (extent, extent)
        assert all(edge.any() for edge in (mask[0], mask[-1], mask[:, 0], mask[:, -1]))
        assert (mask == mask[:, ::-1]).all()
        assert task_checker._shape(mask) == shape
