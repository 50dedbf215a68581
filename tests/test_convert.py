"""Official checkpoints to our folders and back: every form, bit for bit, and numbers as the official parts give them."""

import json

import pytest
import torch
from transformers import AutoProcessor

from sp_fast import ReferenceSPProjector
from tests import official, tiny
from tests.official import loaded, same, tensors_of, to_official, to_ours

PROMPT = "USER: <image>\nWhat is it? ASSISTANT:"


def official_logits(tensors, inputs, config, text, tower, layer):
    """What the official code computes, from transformers' own parts and the reference projector."""
    name = "model.vision_tower.vision_tower.vision_model."
    vision = official.tower_model(tower, torch.float32)
    own = {k.removeprefix(name): v for k, v in tensors.items() if k.startswith(name)}
    prefix = "vision_model." if any(k.startswith("vision_model.") for k in vision.state_dict()) else ""
    vision.load_state_dict({prefix + k: v for k, v in own.items()})
    hidden = vision(inputs["pixel_values"], output_hidden_states=True).hidden_states[layer]
    reference = ReferenceSPProjector(config.projector).eval()
    reference.load_state_dict({k: tensors[f"model.{k}"] for k in reference.state_dict()})
    tokens = reference(hidden[:, 1:] if tower == "clip" else hidden)
    model = official.text_model(text, torch.float32)
    model.load_state_dict({k: tensors[k] for k in model.state_dict()})
    ids = inputs["input_ids"]
    embeds = model.get_input_embeddings()(ids.where(ids != config.image_token_id, 0))
    embeds[ids == config.image_token_id] = tokens[0]
    return model(inputs_embeds=embeds).logits


CASES = [
    # variant, language model, tower, files, pyramid
    ("conv336_cropping_sfe_dfi", "llama", "clip", "safetensors", None),
    ("conv336_adptive_pooling_fuse_49", "qwen2", "siglip", "sharded-safetensors", None),
    ("conv336", "llama", "siglip", "bin", None),
    ("tfm336", "llama", "clip", "sharded-bin", "crop"),
    ("tfm336_adptive_pooling", "qwen2", "clip", "safetensors", "pool"),
    ("conv336_crop_multifuse_q", "llama", "clip", "bin", None),
]


@pytest.mark.parametrize(("variant", "text", "tower", "form", "pyramid"), CASES)
def test_whole_models_convert_answer_and_convert_back(variant, text, tower, form, pyramid, tmp_path):
    official.tower_folder(tmp_path / "tower", tower)
    made = official.full(tmp_path / "source", variant, text, tower, form)
    options = {"vision_tower": tmp_path / "tower", "pyramid": pyramid, "shard_size": 60_000}
    plan = to_ours(tmp_path / "source", tmp_path / "ours", **options)
    assert (plan.kind, plan.variant, plan.dtype) == ("full", variant, "float16")
    model = loaded(tmp_path / "ours", dtype=torch.float32)
    processor = AutoProcessor.from_pretrained(tmp_path / "ours")
    inputs = processor(images=tiny.image(), text=PROMPT, return_tensors="pt")
    assert int((inputs["input_ids"] == model.config.image_token_id).sum()) == model.config.image_seq_length
    with torch.no_grad():
        wide = {name: tensor.float() for name, tensor in made.items()}
        expected = official_logits(wide, inputs, model.config, text, tower, -2)
        found = model(**inputs).logits
    assert float((found - expected).abs().max()) < 1e-4 * float(expected.abs().max())
    assert model.generate(**inputs, max_new_tokens=3, do_sample=False).shape[1] == inputs["input_ids"].shape[1] + 3
    to_official(tmp_path / "ours", tmp_path / "back", shard_size=60_000)
    assert same(tensors_of(tmp_path / "back"), made)
    to_ours(tmp_path / "back", tmp_path / "again", **options)
    assert same(tensors_of(tmp_path / "again"), tensors_of(tmp_path / "ours"))


def test_the_selected_layer_is_the_checkpoints(tmp_path):
    made = official.full(tmp_path / "source", mm_vision_select_layer=-1)
    official.tower_folder(tmp_path / "tower")
    to_ours(tmp_path / "source", tmp_path / "ours", vision_tower=tmp_path / "tower")
    model = loaded(tmp_path / "ours", dtype=torch.float32)
    inputs = AutoProcessor.from_pretrained(tmp_path / "ours")(images=tiny.image(), text=PROMPT, return_tensors="pt")
    with torch.no_grad():
        wide = {name: tensor.float() for name, tensor in made.items()}
        expected = official_logits(wide, inputs, model.config, "llama", "clip", -1)
        assert torch.allclose(model(**inputs).logits, expected, atol=1e-4)
    to_official(tmp_path / "ours", tmp_path / "back")
    assert json.loads((tmp_path / "back" / "config.json").read_text())["mm_vision_select_layer"] == -1


@pytest.mark.parametrize("whole_clip", [False, True])
def test_projector_with_base_and_tower(whole_clip, tmp_path):
    base = official.base(tmp_path / "base")
    tower = official.tower_folder(tmp_path / "tower", whole=whole_clip)
    (tmp_path / "stage1").mkdir()
    made = official.projector()
    torch.save(made, tmp_path / "stage1" / "model.bin")
    plan = to_ours(
        tmp_path / "stage1" / "model.bin",
        tmp_path / "ours",
        base=tmp_path / "base",
        vision_tower=tmp_path / "tower",
    )
    assert plan.kind == "projector"
    assert any("no config.json" in note and "-2" in note for note in plan.notes)
    state = loaded(tmp_path / "ours", dtype=torch.float16).state_dict()
    for name, tensor in base.state_dict().items():
        assert torch.equal(state[name.replace("model.", "model.language_model.")], tensor), name
    for name, tensor in tower.state_dict().items():
        assert torch.equal(state["model.vision_tower." + name.removeprefix("vision_model.")], tensor), name
    official.write_weights(tmp_path / "ours", tensors_of(tmp_path / "ours"), "bin")
    (tmp_path / "ours" / "model.safetensors").unlink()  # every tensor is now a view of one file
    plan = to_official(tmp_path / "ours", tmp_path / "back", layout="projector", vision_tower="towers/tiny-clip")
    saved = tmp_path / "back" / "model.bin"
    assert 0 < saved.stat().st_size - plan.files["model.bin"] < 20_000  # no more than its own
    assert same(torch.load(tmp_path / "back" / "model.bin"), made)
    config = json.loads((tmp_path / "back" / "config.json").read_text())
    assert config.items() >= official.FACTS.items()
    assert sorted(p.name for p in (tmp_path / "back").iterdir()) == ["config.json", "model.bin"]


@pytest.mark.parametrize("with_head", [False, True])
def test_tied_embeddings(with_head, tmp_path):
    extra = official.text_model("qwen2", tie_word_embeddings=True).state_dict() if with_head else {}
    made = official.full(
        tmp_path / "source",
        text="qwen2",
        tie_word_embeddings=True,
        extra={k: v.clone() for k, v in extra.items() if k == "lm_head.weight"},
    )
    official.tower_folder(tmp_path / "tower")
    to_ours(tmp_path / "source", tmp_path / "ours", vision_tower=tmp_path / "tower")
    model = loaded(tmp_path / "ours")
    assert model.lm_head.weight is model.model.language_model.embed_tokens.weight
    to_official(tmp_path / "ours", tmp_path / "back")
    assert same(tensors_of(tmp_path / "back"), made)


def test_buffers_are_dropped_and_image_newline_is_kept_for_the_way_back(tmp_path):
    newline = {"model.image_newline": torch.randn(24).half()}
    buffers = {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(3)}
    made = official.full(tmp_path / "source", extra={**newline, **buffers}, image_aspect_ratio="anyres")
    official.tower_folder(tmp_path / "tower")
    plan = to_ours(tmp_path / "source", tmp_path / "ours", vision_tower=tmp_path / "tower")
    assert any("image_newline" in note for note in plan.notes)
    assert any("anyres" in note for note in plan.notes)
    card = (tmp_path / "ours" / "README.md").read_text()
    assert all(note in card for note in plan.notes)
    loaded(tmp_path / "ours")
    to_official(tmp_path / "ours", tmp_path / "back")
    assert same(tensors_of(tmp_path / "back"), {k: v for k, v in made.items() if k not in buffers})
    assert json.loads((tmp_path / "back" / "config.json").read_text())["image_aspect_ratio"] == "anyres"


def test_what_a_checkpoint_holds_itself_goes_before_its_base(tmp_path):
    """A base that is a LLaVA with a projector and a tower; a projector file that holds embeddings as well."""
    below = official.full(tmp_path / "base", "conv336")
    embeddings = {"model.embed_tokens.weight": torch.randn(tiny.VOCABULARY, 24).half()}
    made = official.projector("conv336_adptive_pooling_fuse_49")
    official.write_weights(tmp_path / "stage1", {**made, **embeddings})
    official.write_json(tmp_path / "stage1" / "config.json", {**official.FACTS, "mm_vision_select_layer": -3})
    official.tower_folder(tmp_path / "tower")
    plan = to_ours(tmp_path / "stage1", tmp_path / "ours", base=tmp_path / "base", vision_tower=tmp_path / "tower")
    assert any("the projector in base is not used" in note for note in plan.notes)
    to_official(tmp_path / "ours", tmp_path / "back")
    back = tensors_of(tmp_path / "back")
    prefix = "model.vision_tower.vision_tower.vision_model."
    tower = official.tower_tensors(official.tower_model(), prefix)
    language = {k: v for k, v in below.items() if k.startswith(("model.layers", "model.norm", "lm_head"))}
    assert same(back, {**language, **made, **embeddings, **tower})
    config = json.loads((tmp_path / "back" / "config.json").read_text())
    assert config["mm_vision_select_layer"] == -3


def test_siglip_without_the_head_that_nothing_reads(tmp_path):
    prefix = "model.vision_tower.vision_tower.vision_model."
    head = {k: None for k in official.tower_tensors(official.tower_model("siglip"), prefix) if ".head." in k}
    assert head
    made = official.full(tmp_path / "source", tower="siglip", extra=head)
    official.tower_folder(tmp_path / "tower", "siglip")
    to_ours(tmp_path / "source", tmp_path / "ours", vision_tower=tmp_path / "tower")
    loaded(tmp_path / "ours")
    to_official(tmp_path / "ours", tmp_path / "back")
    assert same(tensors_of(tmp_path / "back"), made)


def test_rotary_scaling_is_kept(tmp_path):
    official.full(tmp_path / "source", rope_scaling={"type": "linear", "factor": 2.0}, rope_theta=5000.0)
    official.tower_folder(tmp_path / "tower")
    to_ours(tmp_path / "source", tmp_path / "ours", vision_tower=tmp_path / "tower")
    rope = json.loads((tmp_path / "ours" / "config.json").read_text())["text_config"]["rope_parameters"]
    assert (rope["rope_theta"], rope["rope_type"], rope["factor"]) == (5000.0, "linear", 2.0)
    to_official(tmp_path / "ours", tmp_path / "back")
    config = json.loads((tmp_path / "back" / "config.json").read_text())
    assert config["rope_theta"] == 5000.0
    assert config["rope_scaling"] == {"type": "linear", "factor": 2.0}
    assert (config["model_type"], config["architectures"]) == ("llava_llama", ["LlavaLlamaForCausalLM"])
    assert (config["mm_use_im_start_end"], config["mm_use_im_patch_token"]) == (False, False)
    assert config.items() >= {**official.FACTS, "torch_dtype": "float16", "hidden_size": 24}.items()


def test_the_published_tower_is_known_by_name():
    from sp_fast.llava_sp.official_config import tower_name, vision_config

    config = vision_config(None, "openai/clip-vit-large-patch14-336", True)
    assert (config.model_type, config.hidden_size, config.image_size) == ("clip_vision_model", 1024, 336)
    assert tower_name(config) == "openai/clip-vit-large-patch14-336"
    assert tower_name(official.TOWERS["clip"]) is None
