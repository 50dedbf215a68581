"""Models from their parts' folders, and from whole ones: every weight, every error."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, CLIPConfig, CLIPModel

from sp_fast.errors import SPFastError
from sp_fast.llava_sp.assemble import assemble, disassemble
from tests import tiny, tiny_training

PROJECTOR = tiny.PROJECTOR


@pytest.fixture
def folder(tmp_path):
    tiny_training.parts(tmp_path)
    return tmp_path


@pytest.mark.parametrize("text", tiny.TEXTS)
@pytest.mark.parametrize("tower", tiny.TOWERS)
def test_parts_become_a_model(tmp_path, text, tower):
    language, vision = tiny_training.parts(tmp_path, text, tower)
    found = assemble(language, vision, PROJECTOR)
    model = found.build(torch.bfloat16)
    state = model.state_dict()
    own = AutoModelForCausalLM.from_pretrained(language).state_dict()
    for name, tensor in own.items():
        ours = name.replace("model.", "model.language_model.", 1)
        assert torch.equal(state[ours], tensor.bfloat16()), name
    for name, tensor in load_file(vision / "model.safetensors").items():
        assert torch.equal(state[f"model.vision_tower.{name.removeprefix('vision_model.')}"], tensor.bfloat16()), name
    kinds = {name: parameter.dtype for name, parameter in model.named_parameters()}
    assert {kinds[name] for name in kinds if "multi_modal_projector" in name} == {torch.float32}
    assert {kinds[name] for name in kinds if "multi_modal_projector" not in name} == {torch.bfloat16}
    assert model.model.language_model.rotary_emb.inv_freq[0] == 1  # not a weight, and there all the same
    prompt = "USER: <image>\nWhat? ASSISTANT:"
    inputs = found.processor(images=[tiny.image()], text=prompt, return_tensors="pt").to(torch.bfloat16)
    assert model.float()(**inputs).logits.isfinite().all()


def test_a_model_without_spatial_tokens(folder):
    model = assemble(folder / "lm", folder / "tower", "mlp").build(torch.bfloat16)
    names = [name for name, _ in model.model.multi_modal_projector.named_parameters()]
    assert names == ["patch_mlp.0.weight", "patch_mlp.0.bias", "patch_mlp.2.weight", "patch_mlp.2.bias"]
    assert model.config.image_seq_length == 64


def test_the_seed_is_the_projectors(folder):
    found = assemble(folder / "lm", folder / "tower", PROJECTOR)
    one, same, other = (found.make_projector(seed).output.weight for seed in (0, 0, 1))
    assert torch.equal(one, same)
    assert not torch.equal(one, other)
    before = torch.random.get_rng_state()
    found.make_projector(5)
    assert torch.equal(torch.random.get_rng_state(), before)


def test_tied_embeddings_stay_tied(tmp_path):
    config = tiny.TEXTS["qwen2"](**{**tiny.config_of("qwen2").text_config.to_dict(), "tie_word_embeddings": True})
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "tied")
    tiny.tokenizer().save_pretrained(tmp_path / "tied")
    _, vision = tiny_training.parts(tmp_path)
    model = assemble(tmp_path / "tied", vision, PROJECTOR).build(torch.float32)
    assert model.lm_head.weight is model.get_input_embeddings().weight


def test_a_whole_clip_gives_its_tower(folder):
    config = CLIPConfig(vision_config=tiny.TOWERS["clip"].to_dict(), text_config={"hidden_size": 8, "vocab_size": 9})
    config.text_config.update({"intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1})
    clip = CLIPModel(config)
    clip.save_pretrained(folder / "clip")
    model = assemble(folder / "lm", folder / "clip", PROJECTOR).build(torch.float32)
    assert torch.equal(
        model.model.vision_tower.embeddings.patch_embedding.weight,
        clip.vision_model.embeddings.patch_embedding.weight,
    )


def test_a_saved_model_is_taken_apart_again(folder):
    first = assemble(folder / "lm", folder / "tower", PROJECTOR)
    model = first.build(torch.bfloat16)
    model.save_pretrained(folder / "whole")
    first.processor.save_pretrained(folder / "whole")
    again = disassemble(folder / "whole")
    state = again.build(torch.bfloat16).state_dict()
    assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())
    assert again.processor.chat_template == first.processor.chat_template
    assert "ASSISTANT" not in disassemble(folder / "whole", "plain").processor.chat_template


def _edit(path, **changes):
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def _lose(path, name):
    tensors = load_file(path)
    del tensors[next(key for key in tensors if name in key)]
    save_file(tensors, path, metadata={"format": "pt"})


def _infinite(path):
    tensors = load_file(path)
    tensors["output.weight"][0, 0] = torch.inf
    save_file(tensors, path)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda f: shutil.rmtree(f / "lm"), "lm/config.json does not exist: give the language model's folder"),
        (lambda f: shutil.rmtree(f / "tower"), "tower"),
        (lambda f: (f / "lm" / "tokenizer.json").unlink(), "holds none of tokenizer.json"),
        (lambda f: _lose(f / "lm" / "model.safetensors", "layers.1.mlp.up_proj"), "layers.1.mlp.up_proj"),
        (lambda f: _lose(f / "tower" / "model.safetensors", "layers.2.mlp.fc1.weight"), "layers.2.mlp.fc1.weight"),
        (lambda f: _edit(f / "tower" / "config.json", model_type="vit"), "'vit', not of clip"),
        (lambda f: _edit(f / "lm" / "config.json", hidden_size=48), "48"),
        (lambda f: _edit(f / "lm" / "config.json", model_type="nothing", architectures=[]), "model_type='nothing'"),
        (lambda f: _edit(f / "start" / "config.json", text_width=48), "text_width=48, but the text_config has 32"),
        (lambda f: _lose(f / "start" / "model.safetensors", "output.weight"), "output.weight"),
        (lambda f: _infinite(f / "start" / "model.safetensors"), "holds NaN or infinite values"),
        (lambda f: (f / "start" / "config.json").unlink(), "start"),
    ],
)  # fmt: skip
def test_what_is_missing_or_does_not_fit_is_named(folder, damage, message):
    tiny_training.start(folder)
    damage(folder)
    with pytest.raises(SPFastError, match=message):
        assemble(folder / "lm", folder / "tower", folder / "start").build(torch.float32)


def test_another_models_folder_is_no_llava_sp(folder):
    with pytest.raises(SPFastError, match="is of model_type 'llama', not 'llava_sp': give language_model"):
        disassemble(folder / "lm")
