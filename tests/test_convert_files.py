"""What convert writes beside the numbers: types, shards, tokenizer, templates, model card; and what it holds meanwhile."""

import dataclasses
import io
import json
import shutil
import weakref

import pytest
import sentencepiece
import torch
from safetensors import safe_open
from transformers import AutoProcessor, AutoTokenizer

from sp_fast.llava_sp.convert import FromOfficial, plan_from_official
from tests import official, tiny
from tests.official import loaded, same, tensors_of, to_official, to_ours


def test_dtype_converts_every_tensor(tmp_path):
    parts = official.parts(tmp_path)
    shutil.rmtree(parts.tower)
    official.tower_folder(parts.tower, dtype=torch.float32)
    options = {"base": parts.base, "vision_tower": parts.tower, "dtype": "bfloat16"}
    plan = to_ours(parts.projector, tmp_path / "ours", **options)
    assert plan.dtype == "bfloat16"
    assert {t.dtype for t in tensors_of(tmp_path / "ours").values()} == {torch.bfloat16}
    assert loaded(tmp_path / "ours", dtype="auto").dtype == torch.bfloat16
    back = {"vision_tower": "towers/tiny-clip", "dtype": "float32"}
    plan = to_official(tmp_path / "ours", tmp_path / "back", **back)
    assert sum(part.bytes for part in plan.parts) == sum(size for size in plan.files.values() if size)
    found, made = tensors_of(tmp_path / "back"), official.projector()
    assert same({k: found[k] for k in made}, {k: v.bfloat16().float() for k, v in made.items()})


def test_our_names_and_files_are_those_of_save_pretrained(tmp_path):
    official.full(tmp_path / "source")
    official.tower_folder(tmp_path / "tower")
    plan = to_ours(tmp_path / "source", tmp_path / "ours", vision_tower=tmp_path / "tower", shard_size=50_000)
    loaded(tmp_path / "ours", dtype="auto").save_pretrained(tmp_path / "saved")
    assert same(tensors_of(tmp_path / "ours"), tensors_of(tmp_path / "saved"))
    config, saved = (json.loads((tmp_path / f / "config.json").read_text()) for f in ("ours", "saved"))
    assert config == saved
    files = {path.name for path in (tmp_path / "ours").glob("model*")} - {"model.safetensors.index.json"}
    assert files == {name for name in plan.files if name.startswith("model")}
    for name in files:
        with (tmp_path / "ours" / name).open("rb") as file:
            assert int.from_bytes(file.read(8), "little") % 8 == 0  # data are aligned
        with safe_open(tmp_path / "ours" / name, "pt") as file:
            sizes = [file.get_tensor(k).nbytes for k in file.keys()]  # noqa: SIM118
        assert sum(sizes) == plan.files[name]
        assert sum(sizes) <= 50_000 or len(sizes) == 1
    assert len(files) > 3


def test_no_two_tensors_are_in_memory(tmp_path):
    official.full(tmp_path / "source")
    official.tower_folder(tmp_path / "tower")
    conversion = plan_from_official(
        FromOfficial(tmp_path / "source", tmp_path / "ours", vision_tower=tmp_path / "tower")
    )
    alive, order = set(), []

    def counted(name, tensor):
        def load():
            assert not alive, f"{alive} while {name} is made"
            made = tensor.load().clone()
            alive.add(name)
            order.append(name)
            weakref.finalize(made, alive.discard, name)
            return made

        return dataclasses.replace(tensor, load=load)

    counting = {name: counted(name, tensor) for name, tensor in conversion.tensors.items()}
    dataclasses.replace(conversion, tensors=counting).write(False)
    assert sorted(order) == sorted(conversion.tensors)


def test_tokenizers(tmp_path):
    official.full(tmp_path / "source")
    official.tower_folder(tmp_path / "tower")
    to_ours(tmp_path / "source", tmp_path / "ours", vision_tower=tmp_path / "tower")
    plain, ours = tiny.tokenizer(), AutoTokenizer.from_pretrained(tmp_path / "ours")
    text = "A photo of é, twice  over.\n"
    assert plain(text)["input_ids"] == ours(text)["input_ids"]
    assert ours.convert_tokens_to_ids("<image>") == tiny.VOCABULARY
    config = json.loads((tmp_path / "ours" / "config.json").read_text())
    assert config["image_token_index"] == tiny.VOCABULARY
    assert config["text_config"]["vocab_size"] == tiny.VOCABULARY
    to_official(tmp_path / "ours", tmp_path / "back")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        assert (tmp_path / "back" / name).read_bytes() == (tmp_path / "source" / name).read_bytes()
    kept = tmp_path / "ours" / "official" / "tokenizer.json"
    kept.write_text(kept.read_text().replace('"!"', '"!!"'))
    to_official(tmp_path / "ours", tmp_path / "other")  # what was kept is no longer the model's
    assert AutoTokenizer.from_pretrained(tmp_path / "other").get_vocab() == plain.get_vocab()
    shutil.rmtree(tmp_path / "ours" / "official")  # as after training and save_pretrained
    to_official(tmp_path / "ours", tmp_path / "bare", vision_tower="towers/tiny-clip")
    assert "<image>" not in "".join(path.read_text() for path in (tmp_path / "bare").glob("*.json"))
    assert AutoTokenizer.from_pretrained(tmp_path / "bare").get_vocab() == plain.get_vocab()


@pytest.mark.parametrize("legacy", [False, True])
def test_a_tokenizer_model_alone(tmp_path, legacy):
    """As in Vicuna's folder. Every text between images is SentencePiece's, as the official code has it."""
    parts = official.parts(tmp_path)
    official.base(parts.base, vocab_size=320)
    for path in parts.base.glob("tokenizer*"):
        path.unlink()
    words = [f"USER: what is it, number {i}? ASSISTANT: it is a cat\n" for i in range(50)]
    trained = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(words), model_writer=trained, vocab_size=300, model_type="bpe", byte_fallback=True,
        unk_id=0, bos_id=1, eos_id=2, normalization_rule_name="identity", remove_extra_whitespaces=False,
        hard_vocab_limit=False, minloglevel=2,
    )  # fmt: skip
    (parts.base / "tokenizer.model").write_bytes(trained.getvalue())
    settings = {"tokenizer_class": "LlamaTokenizer", "legacy": legacy, "add_bos_token": True}
    tokens = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "pad_token": "<unk>"}
    official.write_json(parts.base / "tokenizer_config.json", settings | tokens)
    to_ours(parts.projector, tmp_path / "ours", base=parts.base, vision_tower=parts.tower)
    processor = AutoProcessor.from_pretrained(tmp_path / "ours")
    plain = sentencepiece.SentencePieceProcessor(model_proto=trained.getvalue())
    image = processor.tokenizer.convert_tokens_to_ids("<image>")
    assert image == plain.vocab_size()
    expected = [1, *plain.encode("USER: "), *[image] * 582, *plain.encode("\nwhat is it? ASSISTANT:")]
    found = processor(text="USER: <image>\nwhat is it? ASSISTANT:", images=[tiny.image()])
    assert found["input_ids"][0] == expected


def test_chat_templates(tmp_path):
    official.tower_folder(tmp_path / "tower")
    own = tiny.tokenizer()
    own.chat_template = "{{ 'own' }}"
    (tmp_path / "file.jinja").write_text("{{ 'mine' }}")
    cases = [("llama", None, "USER: hi"), ("qwen2", None, "own"), ("qwen2", "vicuna_v1", "USER: hi")]
    cases += [("llama", "plain", "<image>"), ("llama", str(tmp_path / "file.jinja"), "mine")]
    for i, (text, choice, expected) in enumerate(cases):
        official.full(tmp_path / f"source{i}", "conv336", text)
        own.save_pretrained(tmp_path / f"source{i}")
        to_ours(tmp_path / f"source{i}", tmp_path / f"ours{i}", vision_tower=tmp_path / "tower", template=choice)
        processor = AutoProcessor.from_pretrained(tmp_path / f"ours{i}")
        messages = [{"role": "user", "content": [{"type": "text", "text": "hi"}]}]
        assert expected in processor.apply_chat_template(messages), (text, choice)


def test_generation_config_and_model_card(tmp_path):
    parts = official.parts(tmp_path)
    sampling = {"temperature": 0.9, "top_p": 0.6, "eos_token_id": 7, "transformers_version": "4.31.0"}
    official.write_json(parts.base / "generation_config.json", sampling)  # as Vicuna's, which transformers 5 refuses
    (parts.base / "README.md").write_text("---\nlanguage: en\nlicense: llama2\n---\n# Base\nlicense: none\n")
    (parts.tower / "LICENSE").write_text("\nMIT License\n\nCopyright\n")
    to_ours(parts.projector, tmp_path / "ours", base=parts.base, vision_tower=parts.tower)
    generation = json.loads((tmp_path / "ours" / "generation_config.json").read_text())
    assert generation["eos_token_id"] == 7
    assert generation["pad_token_id"] == 0
    assert "temperature" not in generation
    card = (tmp_path / "ours" / "README.md").read_text()
    assert "* language model (base): `llama2` (README.md)" in card
    assert "* vision tower (tower): LICENSE: “MIT License”" in card
    assert "* checkpoint (stage1): unknown" in card
    assert "license:" not in card.split("---")[1]  # the parts' differ
    for folder in (parts.base, parts.tower, parts.projector.parent):
        (folder / "README.md").write_text("---\nlicense: apache-2.0\n---\n")
    to_ours(parts.projector, tmp_path / "same", base=parts.base, vision_tower=parts.tower)
    assert "license: apache-2.0" in (tmp_path / "same" / "README.md").read_text().split("---")[1]
