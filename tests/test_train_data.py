"""Data: files to rows, rows to conversations, samples to batches."""

import json
import pickle

import pytest
import torch
from torch.utils.data import DataLoader

from sp_fast.errors import DataError, ImageError
from sp_fast.training.check_data import check_data
from sp_fast.training.conversation import Message, read_conversation, sample_id
from sp_fast.training.encoding import Encoder
from sp_fast.training.examples import BadSample, Collator, Example, Examples
from sp_fast.training.images import ImageFolder
from tests import tiny
from tests.train_data import written


def sample(i, image=True):
    asked = "<image>\nWhat is this?" if image else "Why?"
    turns = [{"from": "human", "value": asked}, {"from": "gpt", "value": f"It is {'x' * (i % 7)} number {i}."}]
    return {"id": f"sample {i}", "conversations": turns} | ({"image": f"{i % 3}.png"} if image else {})


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    found = tmp_path_factory.mktemp("images")
    for i in range(3):
        tiny.image(i).save(found / f"{i}.png")
    (found / "broken.png").write_bytes((found / "0.png").read_bytes()[:200])
    return found


@pytest.fixture(scope="module")
def encoder():
    return Encoder(tiny.processor_of(tiny.config_of()), "vicuna_v1", 512)


def llava(*turns, **fields):
    return fields | {"conversations": [{"from": role, "value": text} for role, text in turns]}


def chat(*turns, **fields):
    return fields | {"messages": [{"role": role, "content": content} for role, content in turns]}


H, G, A, U = "human", "gpt", "assistant", "user"


@pytest.mark.parametrize(
    ("row", "messages", "images"),
    [
        (llava((H, "Hi"), (G, "Ho"), image=None), [(U, "Hi"), (A, "Ho")], ()),
        (llava((H, "<image>\nHi"), (G, "Ho"), image="a.jpg"), [(U, "<image>\nHi"), (A, "Ho")], ("a.jpg",)),
        (llava((H, " Hi \n<image>"), (G, " Ho "), image="a.jpg"), [(U, "<image>\nHi"), (A, " Ho ")], ("a.jpg",)),
        (llava((H, "<image>"), (G, "Ho"), image=["a.jpg"]), [(U, "<image>"), (A, "Ho")], ("a.jpg",)),
        (llava((H, "A <image>, <image>?"), (G, "Ho"), image=["a", "b"]), [(U, "A <image>, <image>?"), (A, "Ho")], ("a", "b")),
        (llava((G, "Well"), (H, "Hi"), (G, "Ho")), [(U, "Hi"), (A, "Ho")], ()),
        (llava(("system", "S"), (G, "Well"), (H, "Hi"), (G, "Ho")), [("system", "S"), (U, "Hi"), (A, "Ho")], ()),
        (llava(("system", "S"), (H, "Hi"), (G, "Ho")), [("system", "S"), (U, "Hi"), (A, "Ho")], ()),
        (llava((H, "1"), (G, "2"), (H, "3 <image>"), (G, ""), image="c"), [(U, "1"), (A, "2"), (U, "<image>\n3"), (A, "")], ("c",)),
        (chat((U, "Hi <image>"), (A, "Ho"), images=["a"]), [(U, "Hi <image>"), (A, "Ho")], ("a",)),
        (
            chat((U, [{"type": "text", "text": "Hi"}, {"type": "image"}, {"type": "text", "text": "!"}]), (A, "Ho"),
                 images=[{"path": "a", "bytes": None}], conversations=None),
            [(U, "<image>\nHi!"), (A, "Ho")], ("a",),
        ),
        (chat((U, [{"type": "image"}] * 2), (A, [{"type": "text", "text": "Ho"}]), images=[{"bytes": b"x"}, "b"]),
         [(U, "<image>\n<image>\n"), (A, "Ho")], (b"x", "b")),
    ],
)  # fmt: skip
def test_both_formats_are_understood(row, messages, images):
    found = read_conversation(row | {"unknown": object()}, "file.json, row 1")
    assert found.messages == tuple(Message(*message) for message in messages)
    assert found.images == images
    assert found.id == "file.json, row 1"


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        ("a b", "a b"),
        (7, "7"),
        (None, "here"),
        ("", "here"),
        (True, "here"),
        ([], "here"),
        ("a\nb", "here"),
        ("\x1b[2J", "here"),
    ],
)
def test_ids(value, expected):
    assert sample_id({"id": value}, "here") == expected
    assert read_conversation(llava((H, "Hi"), (G, "Ho"), id=value), "here").id == expected


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({}, "neither: a sample has one of conversations or messages"),
        (llava((H, "Hi"), (G, "Ho"), messages=[]), "conversations and messages"),
        ({"conversations": {}}, "conversations is {}: give a list"),
        ({"messages": ["Hi"]}, "a message is 'Hi': give an object"),
        (llava((H, "Hi"), ("bot", "Ho")), "from of a message is 'bot': it can be human, gpt, system"),
        (chat((U, "Hi"), ([], "Ho")), r"role of a message is \[\]: it can be user, assistant, system"),
        (llava((H, "Hi"), (G, None)), "value of a message is None: give text"),
        (chat((U, "Hi"), (A, 7)), "content of a message is 7: give text"),
        (chat((U, [{"type": "video"}]), (A, "Ho")), "of type 'video': it can be image or text"),
        (chat((U, [{"text": "Hi"}]), (A, "Ho")), "of type None: it can be image or text"),
        (chat((U, ["Hi"]), (A, "Ho")), "a part of content is 'Hi': give an object"),
        (llava((H, "Hi \ud83d"), (G, "Ho")), r"has '\\ud83d', half of a character, at 3"),
        (llava(("system", "S")), "no answer at its end"),
        (llava((H, "Hi")), "no answer at its end"),
        (llava((H, "Hi"), (G, "Ho"), (H, "Hi")), "no answer at its end"),
        (llava((H, "Hi"), (H, "Hi"), (G, "Ho")), "of the user stands where one of the assistant should"),
        (llava((G, "Ho"), (G, "Ho"), (H, "Hi"), (G, "Ho")), "of the assistant stands where one of the user should"),
        (llava((H, "Hi"), (G, "Ho"), ("system", "S"), (G, "Ho")), "of the system stands where one of the user should"),
        (chat((A, "Ho"), (U, "Hi"), (A, "Ho")), "of the assistant stands where one of the user should"),
        (llava((H, "<image>"), (G, "Ho")), "text has 1 <image> and it has 0 images"),
        (llava((H, "<image>"), (G, "Ho"), image=["a", "b"]), "text has 1 <image> and it has 2 images"),
        (llava((H, "<image>"), (G, "Ho"), image="a", images=["a"]), "image and images"),
        (llava((H, "<image>"), (G, "Ho"), image=7), "an image is 7: give a path"),
        (chat((U, "<image>"), (A, "Ho"), images=[{"path": None}]), "an image is None: give a path"),
    ],
)
def test_rows_of_another_shape_are_refused(row, message):
    with pytest.raises(DataError, match=message):
        read_conversation(row, "here")


def test_messages_become_what_the_chat_template_makes_of_their_parts():
    processor = tiny.processor_of(tiny.config_of())
    row = chat(
        (U, [{"type": "text", "text": "Hi"}, {"type": "image"}, {"type": "text", "text": "!"}]), (A, "Ho"), images=["a"]
    )
    flat = [{"role": m.role, "content": m.text} for m in read_conversation(row, "").messages]
    assert processor.apply_chat_template(flat) == processor.apply_chat_template(row["messages"])


def test_images_are_paths_or_bytes(folder):
    images = ImageFolder(folder)
    content = (folder / "1.png").read_bytes()
    assert images.load("1.png").tobytes() == images.load(content).tobytes() == tiny.image(1).tobytes()
    with pytest.raises(ImageError, match="an image of 100 bytes cannot be read"):
        images.load(content[:100])
    tiny.image(0, 2, 8001).save(folder / "thin.png")
    with pytest.raises(ImageError, match="2x8001 pixels would be padded to more than 64,000,000"):
        images.load("thin.png")


def test_samples_are_read_whole(tmp_path, folder, encoder):
    files = [written(tmp_path / "a.json", [sample(i, i % 3 > 0) for i in range(5)]),
             written(tmp_path / "b.jsonl", [sample(i) for i in range(5, 7)])]  # fmt: skip
    told = []
    examples = Examples(files, folder, encoder, progress=lambda done, total: told.append((done, total)))
    assert told == [(7, 7)]
    assert len(examples) == 7
    assert examples.has_images.tolist() == [i % 3 > 0 or i > 4 for i in range(7)]
    processor = encoder.processor
    for i in range(7):
        row, found = sample(i, examples.has_images[i]), examples[i]
        images = [tiny.image(i % 3)] * len(found.pixel_values)
        messages = [{"role": m.role, "content": m.text} for m in read_conversation(row, "").messages]
        inputs = processor(text=processor.apply_chat_template(messages), images=images or None, return_tensors="pt")
        assert found.id == f"sample {i}"
        torch.testing.assert_close(found.input_ids, inputs["input_ids"][0], rtol=0, atol=0)
        if images:
            torch.testing.assert_close(found.pixel_values, inputs["pixel_values"], rtol=0, atol=0)
        text = sum(len(message["content"]) for message in messages)
        assert examples.sizes[i] == text // 4 + encoder.image_tokens * len(images)
    assert found.pixel_values.dtype == torch.float32
    with pytest.raises(IndexError):
        examples[7]


BAD = {
    "missing": {"image": "missing.png"},
    "outside": {"image": "../secret.png"},
    "two": {"image": ["0.png", "1.png"]},
    "none": {"conversations": []},
    "ends": {"conversations": [{"from": "human", "value": "<image>"}, {"from": "gpt", "value": "It ends.</s>"}]},
}


def test_bad_samples_stop_the_run_at_its_start_by_id(tmp_path, folder, encoder):
    rows = [sample(0)] + [sample(i) | {"id": name} | change for i, (name, change) in enumerate(BAD.items())]
    path = written(tmp_path / "rows.jsonl", rows)
    with pytest.raises(DataError, match="5 of 6 samples cannot be used(.|\n)*check-data") as caught:
        Examples([path], folder, encoder)
    assert all(name in str(caught.value) for name in BAD)
    examples = Examples([path], folder, encoder, "skip")
    assert len(examples) == len(examples.sizes) == len(examples.has_images) == 1
    assert [(bad.id, bad.where) for bad in examples.bad] == [
        (name, f"{path}, line {i + 2}") for i, name in enumerate(BAD)
    ]
    none = Examples([written(tmp_path / "bad.jsonl", rows[1:])], folder, encoder, "skip")
    with pytest.raises(DataError, match="no folder"):
        Examples([path], folder / "no", encoder)
    assert (len(none), len(none.bad)) == (0, 5)  # for check-data; a run refuses it


def test_what_shows_late_stops_or_is_skipped_too(tmp_path, folder):
    long = sample(1) | {"id": "long", "image": "0.png"}
    long["conversations"][0]["value"] += "x" * 600
    path = written(tmp_path / "rows.json", [sample(0) | {"id": "broken", "image": "broken.png"}, sample(1), long])
    encoder = Encoder(tiny.processor_of(tiny.config_of()), None, 512)
    stopping, skipping = (Examples([path], folder, encoder, what) for what in ("stop", "skip"))
    for i, name, reason in ((0, "broken", "cannot be read as an image"), (2, "long", "no supervised token")):
        with pytest.raises(DataError, match=f"sample {name} .*row {i + 1}.*{reason}.*check-data"):
            stopping[i]
        assert isinstance(skipping[i], BadSample)
        assert (skipping[i].id, skipping[i].where) == (name, f"{path}, row {i + 1}")
    report = check_data(skipping)
    assert (report.samples, report.good, [bad.id for bad in report.bad]) == (3, 1, ["broken", "long"])
    collate = Collator(0, 32)
    batch = collate([skipping[i] for i in range(3)])
    assert batch["ids"] == ["sample 1"]
    assert [said.split()[1] for said in batch["skipped"]] == ["broken", "long"]
    only_bad = collate([skipping[0]])
    assert (only_bad["labels"] == -100).all()
    assert only_bad["input_ids"].shape == only_bad["attention_mask"].shape == only_bad["labels"].shape == (1, 1)
    assert only_bad["pixel_values"].shape == (0, 3, 32, 32)
    assert only_bad["skipped"][0].startswith("sample broken")


def example(name, length, images, said=True):
    labels = torch.full((length,), -100)
    labels[-1] = 7 if said else -100
    labels[0] = 7  # which no token predicts
    return Example(name, torch.arange(1, length + 1), labels, torch.full((images, 3, 4, 4), float(length)), False)


def test_batches_are_padded_on_the_right():
    batch = Collator(3, 4)([example("a", 3, 1), example("b", 5, 0), example("c", 2, 2)])  # 3 is in the data too
    assert batch["input_ids"].tolist() == [[1, 2, 3, 3, 3], [1, 2, 3, 4, 5], [1, 2, 3, 3, 3]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1, 0, 0], [1, 1, 1, 1, 1], [1, 1, 0, 0, 0]]
    assert batch["labels"][0].tolist() == [7, -100, 7, -100, -100]
    assert batch["pixel_values"][:, 0, 0, 0].tolist() == [3, 2, 2]
    assert batch["ids"] == ["a", "b", "c"]
    assert batch["skipped"] == []
    text = Collator(9, 4)([example("b", 5, 0)])["pixel_values"]
    assert text.shape == (0, 3, 4, 4)
    assert text.dtype == torch.float32


def test_a_batch_without_any_supervised_token_fails_by_id():
    with pytest.raises(DataError, match="no supervised token in the batch of samples a, b"):
        Collator(9, 4)([example("a", 3, 1, said=False), example("b", 5, 0, said=False)])
    Collator(9, 4)([example("a", 3, 1, said=False), example("b", 5, 0)])


def test_workers_read_what_one_process_reads(tmp_path, folder, encoder):
    examples = Examples([written(tmp_path / "rows.json", [sample(i, i % 2 > 0) for i in range(12)])], folder, encoder)
    examples[0]  # so that a file is open already
    collate, batches = Collator(0, 32), {}
    for workers in (0, 2):
        batches[workers] = list(DataLoader(examples, batch_size=5, num_workers=workers, collate_fn=collate))
    for one, other in zip(batches[0], batches[2], strict=True):
        assert one.keys() == other.keys()
        assert all(torch.equal(one[k], other[k]) if torch.is_tensor(one[k]) else one[k] == other[k] for k in one)
    again = pickle.loads(pickle.dumps(examples))  # as a spawned worker gets it
    assert torch.equal(again[3].input_ids, examples[3].input_ids)


@pytest.mark.campaign
def test_spawned_workers_read_what_one_process_reads(tmp_path, folder, encoder):
    examples = Examples([written(tmp_path / "rows.json", [sample(i, i % 2 > 0) for i in range(12)])], folder, encoder)
    loader = DataLoader(examples, batch_size=None, num_workers=2, multiprocessing_context="spawn")
    found = list(loader)
    assert [one.id for one in found] == [f"sample {i}" for i in range(12)]
    assert all(torch.equal(one.input_ids, examples[i].input_ids) for i, one in enumerate(found))
    assert all(torch.equal(one.pixel_values, examples[i].pixel_values) for i, one in enumerate(found))


def test_the_report_counts_what_is_there(tmp_path, folder, encoder):
    rows = [sample(i, i % 2 > 0) for i in range(7)] + [sample(9) | {"id": "gone", "image": "gone.png"}]
    rows[0]["conversations"][1]["value"] = "x" * 600
    rows[1] |= {"image": ["0.png", "1.png"]}
    rows[1]["conversations"][0]["value"] = "<image> or <image>?"
    examples = Examples([written(tmp_path / "rows.jsonl", rows)], folder, encoder, "skip")
    told = []
    report = check_data(examples, workers=2, progress=lambda done, total: told.append((done, total)))
    assert told == [(7, 7)]
    assert report == check_data(examples)
    read = [examples[i] for i in range(7)]
    assert report.to_dict() | {"bad": [bad.id for bad in report.bad]} == {
        "samples": 8, "good": 7, "with_images": 3, "text_only": 4, "images": 4, "truncated": 1, "longest": 512,
        "tokens": sum(len(one.input_ids) for one in read),
        "supervised_tokens": sum(int((one.labels >= 0).sum()) for one in read), "bad": ["gone"],
    }  # fmt: skip
    json.dumps(report.to_dict())
