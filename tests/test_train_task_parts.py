"""The spatial task's own tower and language model: what they are taught with, and that they learn."""

import json
from dataclasses import replace
from random import Random

import numpy as np
import pytest
import torch
from transformers import AutoTokenizer, CLIPVisionModel, Qwen2ForCausalLM
from typer.testing import CliRunner

from sp_fast.cli import app
from sp_fast.errors import DataError
from sp_fast.llava_sp.assemble import assemble
from sp_fast.training.task import parts
from sp_fast.training.task import tower as tower_module
from sp_fast.training.task.drawing import mask_of
from sp_fast.training.task.fit import Lessons
from sp_fast.training.task.language import (
    Documents,
    _accuracy,
    make_language_model,
    read,
    reading_loss,
    teach_reading,
)
from sp_fast.training.task.parts import SCALES, make_parts
from sp_fast.training.task.reading import make_scene, questions
from sp_fast.training.task.sample import make_sample
from sp_fast.training.task.scene import compose_crowd
from sp_fast.training.task.tokenizer import make_tokenizer
from sp_fast.training.task.tower import labelled_image, loss, make_tower, normalised, teach_seeing
from sp_fast.training.task.words import COLOURS, PLACES, SHAPES, Kind

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def tokenizer():
    return make_tokenizer()


class TestTokenizer:
    @pytest.mark.parametrize("split", ["train", "held_out", "captions"])
    def test_the_tasks_texts_are_few_tokens_and_come_back(self, tokenizer, split):
        for index in range(20):
            for asked in make_sample(0, split, index, 96).questions:
                text = f"{asked.text}\n{asked.answer}"
                ids = tokenizer(text, add_special_tokens=False)["input_ids"]
                assert tokenizer.decode(ids) == text
                assert tokenizer.unk_token_id not in ids
                words = [tokenizer.decode([i]) for i in ids]
                assert max(map(len, words)) > 1
                assert not any(len(w) == 1 and w.isalpha() and w != "a" for w in words)

    def test_kinds_and_places_are_one_token(self, tokenizer):
        for word in (*(f"{c} {s}" for c in COLOURS for s in SHAPES), *PLACES):
            assert len(tokenizer(word, add_special_tokens=False)["input_ids"]) == 1

    def test_other_text_is_spelled(self, tokenizer):
        text = "Zebra, 3.5 %!\tA red circles?"
        assert tokenizer.decode(tokenizer(text, add_special_tokens=False)["input_ids"]) == text

    def test_it_survives_saving(self, tokenizer, tmp_path):
        tokenizer.save_pretrained(tmp_path)
        again = AutoTokenizer.from_pretrained(tmp_path)
        text = "Where is the red circle?\ntop left"
        assert again(text)["input_ids"] == tokenizer(text)["input_ids"]
        assert again.chat_template == tokenizer.chat_template


class TestReading:
    def test_answers_are_those_of_the_scene(self):
        """Each type answered again from the question's words alone."""
        seen = set()
        for number in range(300):
            rng = Random(number)
            scene = make_scene(rng)
            for question, answer in questions(rng, scene, 6):
                seen.add(_answered(question, scene, answer))
        assert seen == {"position", "relation", "count", "colour", "presence", "description"}

    def test_a_document_shows_its_scene(self, tokenizer):
        """Every kind stands with its place, and answers alone are supervised."""
        made = Documents.make(tokenizer, 0, range(8), CPU)
        for row in range(8):
            scene = make_scene(Random(f"0/reading/{row}"))
            shown = {tuple(tokenizer.decode([i]) for i in pair) for pair in made.things[row].tolist() if any(pair)}
            assert {(str(kind), place) for place, kind in scene} == {s for s in shown if s[0] != "<pad>"}
            said = tokenizer.decode(made.input_ids[row][made.labels[row] != -100])
            asked = tokenizer.decode(made.input_ids[row][made.labels[row] == -100])
            assert said.count("</s>") == sum(asked.count(mark) for mark in "?.") > 0
        assert made.mask.shape[1] == 1 + made.things.shape[1] + made.input_ids.shape[1]

    def test_padding_is_not_looked_at(self, tokenizer):
        model = make_language_model(tokenizer, 16, 1, 2, 256, 0).eval()
        made = Documents.make(tokenizer, 0, range(6), CPU)
        pad = tokenizer.pad_token_id
        nowhere = (made.things == pad).all(-1, keepdim=True)
        assert nowhere.any()
        other = replace(made, things=made.things.masked_fill(nowhere, 20))
        there = made.input_ids != pad
        with torch.no_grad():
            torch.testing.assert_close(read(model, other)[there], read(model, made)[there])
            assert not torch.equal(read(model, replace(other, mask=torch.ones_like(other.mask))), read(model, made))

    def test_an_answer_is_right_as_a_whole(self, tokenizer, monkeypatch):
        made = Documents.make(tokenizer, 0, range(4), CPU)
        model = make_language_model(tokenizer, 16, 1, 2, 256, 0)
        answers = int((made.labels == tokenizer.eos_token_id).sum())
        perfect = torch.nn.functional.one_hot(made.labels.clamp(min=0), len(tokenizer)).float()
        spoiled = perfect.clone()
        first = int((made.labels[0] != -100).nonzero()[0])
        spoiled[0, first : first + 2] = 0  # of one answer, two tokens at most
        for logits, wrong in ((perfect, 0), (spoiled, 1)):
            monkeypatch.setattr("sp_fast.training.task.language.read", lambda *_, logits=logits: logits)
            assert _accuracy(model, made) == pytest.approx(1 - wrong / answers)

    def test_it_learns(self, tokenizer):
        model = make_language_model(tokenizer, 32, 2, 2, 256, 0)
        before = reading_loss(model, Documents.make(tokenizer, 1, range(16), CPU)).item()
        told = []
        known = teach_reading(model, tokenizer, Lessons(30, 8, 3e-3), 0, lambda *now: told.append(now))
        assert reading_loss(model, Documents.make(tokenizer, 1, range(16), CPU)).item() < 0.6 * before
        assert told[-1][:2] == (30, 30)
        assert 0 <= known["reading"] <= 1
        assert not model.training

    def test_keys_begin_equal_to_queries(self, tokenizer):
        model = make_language_model(tokenizer, 16, 2, 2, 256, 0)
        for layer in model.model.layers:
            assert torch.equal(layer.self_attn.q_proj.weight, layer.self_attn.k_proj.weight)


class TestSeeing:
    def test_labels_are_what_patches_show(self):
        """Judged pixel by pixel: a labelled patch has the thing's colour in it, an unlabelled one next to nothing."""
        size, patch = 96, 8
        things = compose_crowd(Random("3/tower/5"), size, 12)
        _, labels = labelled_image(3, 5, size, patch)
        shown = np.zeros((size, size, 2), int)
        for thing in things:
            left, top, right, bottom = thing.box
            where = shown[top:bottom, left:right]
            where[mask_of(thing.kind.shape, thing.extent)] = (
                1 + COLOURS.index(thing.kind.colour), 1 + SHAPES.index(thing.kind.shape),
            )  # fmt: skip
        for number, (*label, row, column) in enumerate(labels):
            assert (row, column) == divmod(number, size // patch)
            pixels = shown[row * patch : (row + 1) * patch, column * patch : (column + 1) * patch].reshape(-1, 2)
            kinds, counts = np.unique(pixels[pixels[:, 0] > 0], axis=0, return_counts=True)
            if any(label):
                assert counts[(kinds == label).all(1)] == counts.max() > patch**2 / 10
            else:
                assert counts.max(initial=0) <= patch**2 / 10

    def test_pixels_are_normalised_as_the_model_does(self, tokenizer, tmp_path):
        pixels, _ = labelled_image(0, 0, 32, 8)
        make_tower(16, 2, 2, 8, 32, 0).save_pretrained(tmp_path / "tower")
        make_language_model(tokenizer, 16, 1, 2, 256, 0).save_pretrained(tmp_path / "language")
        tokenizer.save_pretrained(tmp_path / "language")
        processor = assemble(tmp_path / "language", tmp_path / "tower", "mlp").processor
        expected = processor.image_processor(images=[pixels], return_tensors="pt")["pixel_values"]
        torch.testing.assert_close(normalised(torch.from_numpy(pixels)[None]), expected)

    def test_it_learns(self):
        tower = make_tower(32, 2, 2, 8, 32, 0)
        losses = []
        known = teach_seeing(tower, 64, Lessons(60, 8, 3e-3), 0, lambda i, n, loss: losses.append(loss))
        assert losses[-1] < 0.5 * losses[0]
        assert set(known) == {"colour", "shape", "row", "column"}
        assert not tower.training

    def test_a_blind_tower_is_told_no_place(self):
        """Wherever patches lie, it is taught the same."""
        seen = []
        for moved in (0, 1):
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(tower_module, "labelled_image", lambda *args, moved=moved: _moved(*args, moved))
                tower = make_tower(32, 2, 2, 8, 32, 0)
                assert set(teach_seeing(tower, 4, Lessons(3, 2, 3e-3), 0, places=False)) == {"colour", "shape"}
            seen.append(tower.state_dict())
        assert all(torch.equal(tensor, seen[1][name]) for name, tensor in seen[0].items())

    @pytest.mark.parametrize("wrong", range(4))
    def test_the_loss_is_that_of_every_label(self, wrong):
        labels = torch.tensor([[[3, 1, 0, 2], [0, 0, 1, 1]]])
        logits = [60.0 * torch.nn.functional.one_hot(some, 7) for some in labels.unbind(-1)]
        assert loss(logits, labels) < 1e-6
        labels[..., wrong] = labels[..., wrong].flip(1) + 1
        assert loss(logits, labels) > 20


class TestParts:
    @pytest.fixture
    def tiny(self):
        short = Lessons(2, 2, 1e-3)
        return replace(SCALES["tiny"], tower=(16, 2, 2), images=2, seeing=short, language=(16, 1, 2), reading=short)

    def test_parts_make_a_model(self, tmp_path, tiny, monkeypatch):
        monkeypatch.setitem(parts.SCALES, "tiny", tiny)
        result = CliRunner().invoke(
            app, ["train", "make-parts", "--out", str(tmp_path / "p"), "--size", "32", "--json"]
        )
        assert result.exit_code == 0, result.output
        assert {part: set(shares) for part, shares in json.loads(result.stdout)["accuracy"].items()} == {
            "vision-tower": {"colour", "shape", "row", "column"},
            "blind-tower": {"colour", "shape"},
            "language-model": {"reading"},
        }
        assert json.loads((tmp_path / "p" / "parts.json").read_text())["tower"] == [16, 2, 2]
        for name in ("vision-tower", "blind-tower"):
            CLIPVisionModel.from_pretrained(tmp_path / "p" / name)
        Qwen2ForCausalLM.from_pretrained(tmp_path / "p" / "language-model")
        fields = {"kernel_sizes": [2, 4], "detail_kernel": 2, "spatial_width": 8}
        made = assemble(tmp_path / "p" / "language-model", tmp_path / "p" / "vision-tower", fields)
        assert made.config.image_seq_length == 2 + 16
        text = made.processor.apply_chat_template(
            [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "Is it?"}]}],
            add_generation_prompt=True,
        )
        assert text == "<image>\nIs it?\n"

    def test_the_same_seed_makes_the_same(self, tmp_path, tiny, monkeypatch):
        monkeypatch.setitem(parts.SCALES, "tiny", tiny)
        for name in "ab":
            make_parts(tmp_path / name, size=32, seed=3)
        for part in ("vision-tower", "blind-tower", "language-model"):
            files = [(tmp_path / name / part / "model.safetensors").read_bytes() for name in "ab"]
            assert files[0] == files[1]
        assert files[0] != (tmp_path / "a" / "vision-tower" / "model.safetensors").read_bytes()

    @pytest.mark.parametrize(
        ("changes", "message"),
        [({"scale": "huge"}, "'huge' must be one of tiny, small"), ({"size": 90}, "size=90 must be a multiple of")],
    )
    def test_what_cannot_be_is_refused(self, tmp_path, changes, message):
        with pytest.raises(DataError, match=message):
            make_parts(tmp_path / "p", **changes)
        assert not (tmp_path / "p").exists()

    def test_nothing_is_overwritten(self, tmp_path):
        with pytest.raises(DataError, match="is there already"):
            make_parts(tmp_path)


def _moved(seed, index, size, patch, by):
    """An image whose labels say other rows and columns."""
    pixels, labels = labelled_image(seed, index, size, patch)
    labels[:, 2:] = (labels[:, 2:] + by) % (size // patch)
    return pixels, labels


def _answered(question, scene, answer):
    """The question's type, where the answer is right."""
    kinds = {str(Kind(c, s)): Kind(c, s) for c in COLOURS for s in SHAPES}
    named = [kinds[name] for name in sorted((k for k in kinds if k in question), key=question.index)]
    there = [kind for _, kind in scene]
    if question[:8] in ("Describe", "What is ", "Name the") and "colour" not in question:
        places = [part.split(" at the ")[1] for part in answer.replace(" and ", ", ").split(", ")]
        assert places == sorted((place for place, _ in scene), key=PLACES.index)
        assert all(f"a {kind} at the {place}" in answer for place, kind in scene)
        return "description"
    if "colour" in question:
        where = max((p for p in PLACES if f"at the {p}" in question), key=len)
        (kind,) = [kind for place, kind in scene if place == where and kind.shape in question]
        assert kind.colour == answer
        return "colour"
    if answer in ("yes", "no"):
        assert (named[0] in there) == (answer == "yes")
        return "presence"
    if answer.isdigit():
        shape = next((s for s in ("cross", *SHAPES) if s in question), None)
        colour = next((c for c in COLOURS if c in question), None)
        assert sum(Kind(colour, shape).covers(kind) for kind in there) == int(answer)
        return "count"
    if len(named) == 1:
        assert [place for place, kind in scene if kind == named[0]] == [answer]
        return "position"
    assert "relative" in question or question.startswith(("Seen from", "On which side"))
    first, second = named if "relative" in question else named[::-1]
    ((r1, c1),), ((r2, c2),) = (
        [divmod(PLACES.index(place), 3) for place, other in scene if other == kind] for kind in (first, second)
    )
    assert {"left": c1 < c2, "right": c1 > c2, "above": r1 < r2, "below": r1 > r2}[answer]
    return "relation"
