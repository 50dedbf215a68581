"""The model in transformers: what it computes, beside an obvious assembly of its parts, and what it refuses."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

from sp_fast import ReferenceSPProjector, SPProjectorConfig
from sp_fast.errors import ConfigError, ImageError
from sp_fast.llava_sp import LlavaSpConfig, LlavaSpForConditionalGeneration
from sp_fast.vision import CLIP_L_336
from tests import tiny

PROMPTS = {
    "text only": "hello there",
    "start": "<image>\nwhat is it?",
    "middle": "look: <image>\nwhat is it?",
    "end": "look at this: <image>",
    "two": "this <image> and that <image>\ndiffer?",
    "two side by side": "<image><image>",
    "alone": "<image>",
}


def by_hand(model, prompt, images):
    """Logits of one prompt, its sequence put together from the parts."""
    core, tokenizer = model.model, tiny.tokenizer()
    processor = tiny.processor_of(model.config)
    pixels = [processor.image_processor(image, return_tensors="pt")["pixel_values"] for image in images]
    pieces = []
    for i, text in enumerate(prompt.split("<image>")):
        if i:
            hidden = core.vision_tower(pixels[i - 1], output_hidden_states=True).hidden_states[-2]
            features = hidden[:, 1:] if model.config.vision_config.model_type == "clip_vision_model" else hidden
            pieces.append(core.multi_modal_projector(features)[0])
        ids = torch.tensor(tokenizer(text)["input_ids"], dtype=torch.long)
        pieces.append(core.get_input_embeddings()(ids))
    embeds = torch.cat(pieces)[None]
    return model.lm_head(core.language_model(inputs_embeds=embeds).last_hidden_state)


@pytest.mark.parametrize("tower", tiny.TOWERS)
@pytest.mark.parametrize("text", tiny.TEXTS)
def test_logits_are_those_of_the_parts(text, tower):
    model = tiny.model_of(text, tower)
    for prompt in PROMPTS.values():
        images = [tiny.image(i) for i in range(prompt.count("<image>"))]
        with torch.no_grad():
            found = model(**tiny.inputs_of(model, prompt, images)).logits
            torch.testing.assert_close(found, by_hand(model, prompt, images))


def test_spatial_tokens_come_first():
    model = tiny.model_of()
    inputs = tiny.inputs_of(model, "see <image>", [tiny.image()])
    with torch.no_grad():
        tokens = model.model.encode_images(inputs["pixel_values"])
        whole = model.model.multi_modal_projector.intermediates(model.model.get_patch_features(inputs["pixel_values"]))
        spatial, _ = model.model.multi_modal_projector.integrate(torch.cat([whole.z_small, *whole.z_big], dim=1))
        patches = model.model.multi_modal_projector.patch_mlp(model.model.get_patch_features(inputs["pixel_values"]))
    assert tokens.shape == (1, 3 + 64, 32)
    torch.testing.assert_close(tokens, torch.cat([spatial, patches], dim=1))
    places = (inputs["input_ids"][0] == tiny.VOCABULARY).nonzero().flatten()
    embeds = model.model._embed(inputs["input_ids"], tokens.flatten(0, 1))
    assert embeds[0, places].equal(tokens[0])


@pytest.mark.parametrize("name", ["two", "middle"])
def test_a_batch_with_left_padding_equals_singles(name):
    model = tiny.model_of()
    prompts = [PROMPTS[name], PROMPTS["text only"], PROMPTS["start"]]
    images = [[tiny.image(10 * i + j) for j in range(p.count("<image>"))] for i, p in enumerate(prompts)]
    together = tiny.inputs_of(model, prompts, [image for row in images for image in row])
    batch = model.generate(**together, max_new_tokens=16, do_sample=False)[:, together["input_ids"].shape[1] :]
    for i, prompt in enumerate(prompts):
        inputs = tiny.inputs_of(model, prompt, images[i])
        alone = model.generate(**inputs, max_new_tokens=16, do_sample=False)[:, inputs["input_ids"].shape[1] :]
        assert alone[0].equal(batch[i])


@pytest.mark.parametrize("text", tiny.TEXTS)
def test_static_and_dynamic_cache_give_the_same_tokens(text):
    model = tiny.model_of(text)
    inputs = tiny.inputs_of(model, ["<image>\nwhat?", "hello"], [tiny.image()])
    dynamic = model.generate(**inputs, max_new_tokens=24, do_sample=False)
    static = model.generate(**inputs, max_new_tokens=24, do_sample=False, cache_implementation="static")
    assert dynamic.equal(static)
    assert len(dynamic[0, -24:].unique()) > 3  # not one token for ever, which would hide a difference


@pytest.mark.parametrize("tower", tiny.TOWERS)
def test_fast_against_reference_projector(tower):
    model, inputs = tiny.model_of(tower=tower), None
    inputs = tiny.inputs_of(model, ["<image>\nwhat?", "two: <image> <image>"], [tiny.image(i) for i in range(3)])
    with torch.no_grad():
        fast = model(**inputs).logits
    tokens = model.generate(**inputs, max_new_tokens=32, do_sample=False)
    projector = model.model.multi_modal_projector
    reference = ReferenceSPProjector(model.config.projector)
    reference.load_state_dict(projector.official_state_dict(prefix=""))
    model.model.multi_modal_projector = reference
    with torch.no_grad():
        torch.testing.assert_close(fast, model(**inputs).logits)
    assert tokens.equal(model.generate(**inputs, max_new_tokens=32, do_sample=False))


@pytest.mark.parametrize("tower", tiny.TOWERS)
def test_without_spatial_tokens_it_is_transformers_llava(tower, tmp_path):
    """The same weights, logits and answers: what spatial tokens are held against is LLaVA-1.5 itself."""
    model = tiny.model_of(tower=tower, projector="mlp")
    unknown, config = 3, model.config  # a token of the vocabulary, which transformers' own needs for an image
    llava = LlavaForConditionalGeneration(
        LlavaConfig(
            vision_config=config.vision_config.to_dict(), text_config=config.text_config.to_dict(),
            image_token_index=unknown, image_seq_length=config.image_seq_length,
            vision_feature_select_strategy=config.vision_feature_select_strategy,
        )
    ).eval()  # fmt: skip
    layers = {"patch_mlp.0": "linear_1", "patch_mlp.2": "linear_2"}
    state = model.state_dict()
    for ours, theirs in layers.items():
        state = {name.replace(ours, theirs): tensor for name, tensor in state.items()}
    llava.load_state_dict(state)
    inputs = tiny.inputs_of(model, ["<image>\nwhat?", "two: <image> <image>"], [tiny.image(i) for i in range(3)])
    ids = inputs["input_ids"]
    theirs = {**inputs, "input_ids": ids.masked_fill(ids == tiny.VOCABULARY, unknown)}
    assert (ids == tiny.VOCABULARY).sum(1).tolist() == [64, 128]
    model.save_pretrained(tmp_path)
    again = LlavaSpForConditionalGeneration.from_pretrained(tmp_path).eval()
    with torch.no_grad():
        expected = llava(**theirs).logits
        torch.testing.assert_close(model(**inputs).logits, expected)
        assert torch.equal(again(**inputs).logits, model(**inputs).logits)
    settings = {"max_new_tokens": 8, "do_sample": False, "eos_token_id": None}
    new = slice(None), slice(ids.shape[1], None)
    assert model.generate(**inputs, **settings)[new].equal(llava.generate(**theirs, **settings)[new])


@pytest.mark.parametrize("tower", tiny.TOWERS)
@pytest.mark.parametrize("layer", [-2, -1, 1, 0, -5])
def test_the_tower_stops_where_it_is_read(tower, layer):
    model = tiny.model_of(tower=tower)
    model.config.vision_feature_layer = layer
    called = []
    for index, block in enumerate(model.model.vision_tower.encoder.layers):
        block.register_forward_hook(lambda *_, index=index: called.append(index))
    pixels = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        found = model.model.get_patch_features(pixels)
        assert called == list(range(layer % 5))
        hidden = model.model.vision_tower(pixels, output_hidden_states=True).hidden_states[layer]
    assert found.equal(hidden[:, 1:] if tower == "clip" else hidden)


def test_nothing_is_saved_for_the_backward_of_a_frozen_tower():
    model = tiny.model_of().train()
    model.model.vision_tower.requires_grad_(False)
    model.enable_input_require_grads()  # as PEFT does, for gradient checkpointing
    pixels = torch.randn(1, 3, 32, 32, requires_grad=True)
    assert not model.model.get_patch_features(pixels).requires_grad
    model.model.vision_tower.requires_grad_(True)
    assert model.model.get_patch_features(pixels).requires_grad
    with torch.no_grad():
        assert not model.model.get_patch_features(pixels).requires_grad


def test_the_image_token_needs_no_row():
    model = tiny.model_of()
    assert model.get_input_embeddings().num_embeddings == model.config.image_token_id == tiny.VOCABULARY
    out = model.generate(**tiny.inputs_of(model, "<image>", [tiny.image()]), max_new_tokens=8, do_sample=True)
    assert out.max() == tiny.VOCABULARY  # in the prompt, and nowhere else
    assert out[0, -8:].max() < tiny.VOCABULARY


def test_wrong_numbers_of_images():
    model = tiny.model_of()
    inputs = tiny.inputs_of(model, "<image>", [tiny.image()])
    twice = {**inputs, "pixel_values": inputs["pixel_values"].repeat(2, 1, 1, 1)}
    with pytest.raises(ValueError, match=r"67 image tokens and the images 134 \(2 images of 67\)"):
        model(**twice)
    with pytest.raises(ValueError, match=r"67 image tokens and the images 0"):
        model(input_ids=inputs["input_ids"])
    with pytest.raises(ValueError, match=r"67 image tokens and the images 0"):
        model.generate(input_ids=inputs["input_ids"], max_new_tokens=1)
    with pytest.raises(ImageError, match="the text has 1 <image> and 0 images are given"):
        tiny.processor_of(model.config)(text="<image>")
    with pytest.raises(ImageError, match="the text has 0 <image> and 1 images are given"):
        tiny.processor_of(model.config)(text=["a", "b"], images=tiny.image())
    with pytest.raises(ImageError, match="the text has 2 <image> and 1 images are given"):
        tiny.processor_of(model.config)(text="<image><image>", images=[tiny.image()])
    embeds = torch.zeros(1, 67, 32)
    for wrong in (
        {"inputs_embeds": embeds, "pixel_values": inputs["pixel_values"]},
        {"inputs_embeds": embeds, "input_ids": inputs["input_ids"]},
        {},
    ):
        with pytest.raises(ValueError, match="give input_ids, with or without images"):
            model(**wrong)


def test_settings_of_a_call_that_are_not_the_models():
    model = tiny.model_of()
    inputs = tiny.inputs_of(model, "<image>", [tiny.image()])
    model(**inputs, vision_feature_layer=-2)
    for name, value in (("vision_feature_layer", -1), ("vision_feature_select_strategy", "full")):
        with pytest.raises(ValueError, match=f"{name}={value!r} is not the configuration's"):
            model(**inputs, **{name: value})
        with pytest.raises(ValueError, match=f"{name}={value!r} is not the configuration's"):
            model.get_image_features(inputs["pixel_values"], **{name: value})
    with pytest.raises(ValueError, match="image_sizes"):
        model(**inputs, image_sizes=torch.tensor([[32, 32]]))


@pytest.mark.parametrize("settings", [{"num_beams": 2}, {"num_return_sequences": 2, "do_sample": True, "top_k": 1}])
def test_beams_and_several_answers_keep_images_together(settings):
    model = tiny.model_of()
    prompts = ["<image> or <image>?", "none", "<image>"]
    images = [tiny.image(i) for i in range(3)]
    together = model.generate(**tiny.inputs_of(model, prompts, images), max_new_tokens=12, **settings)
    answers = settings.get("num_return_sequences", 1)
    for i, (prompt, own) in enumerate(zip(prompts, [images[:2], [], images[2:]], strict=True)):
        alone = model.generate(**tiny.inputs_of(model, prompt, own), max_new_tokens=12, **settings)
        for answer in range(answers):
            assert together[i * answers + answer, -12:].equal(alone[answer, -12:])


def test_images_are_repeated_prompt_by_prompt():
    """As transformers 5.17 expands a batch, whose later releases encode the images before."""
    model = tiny.model_of()
    each = model.config.image_seq_length
    ids = torch.tensor([[tiny.VOCABULARY] * 2 * each, [5] * 2 * each, [5] * each + [tiny.VOCABULARY] * each])
    pixels = torch.arange(3.0)[:, None, None, None].expand(3, 3, 2, 2)
    expanded, kwargs = model._expand_inputs_for_generation(expand_size=2, input_ids=ids, pixel_values=pixels)
    assert expanded.equal(ids[[0, 0, 1, 1, 2, 2]])
    assert kwargs["pixel_values"][:, 0, 0, 0].tolist() == [0, 1, 0, 1, 2, 2]


def test_penalties_see_no_image_tokens():
    """Which have no row among the scores; what is generated is penalised like any text."""
    model = tiny.model_of()
    inputs = tiny.inputs_of(model, "<image>aaa", [tiny.image()])
    plain = model.generate(**inputs, max_new_tokens=24, do_sample=False)[0, -24:]
    penalised = model.generate(**inputs, max_new_tokens=24, do_sample=False, repetition_penalty=1e6)[0, -24:]
    assert len(plain.unique()) < 24 == len(penalised.unique())
    assert not set(penalised.tolist()) & set(inputs["input_ids"][0].tolist())


def test_a_prompt_beyond_the_context():
    model = tiny.model_of(max_position_embeddings=100)
    with pytest.raises(ValueError, match=r"134 tokens, image tokens included \(67 an image\).*context is 100"):
        model.generate(**tiny.inputs_of(model, "<image><image>", [tiny.image()] * 2))


def test_generate_without_a_prompt():
    assert tiny.model_of().generate(max_new_tokens=4).shape == (1, 5)  # from the beginning of text


WRONG = {
    "grid": ({"grid": 24}, "grid=24, but the vision_config has 8"),
    "widths": ({"text_width": 4096}, "text_width=4096, but the text_config has 32"),
    "unknown": ({"kernels": 4}, "'kernels' is no field"),
    "variant": ("cropped", "'cropped' is no variant"),
    "too large": ("crop-dfi", "the map of side 24 does not fit the 8x8 grid"),
}


@pytest.mark.parametrize("name", WRONG)
def test_a_projector_that_does_not_fit(name):
    projector, message = WRONG[name]
    with pytest.raises(ConfigError, match=message):
        tiny.config_of(projector=projector)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"vision_feature_layer": 5}, "one of the tower's 5 hidden states"),
        ({"vision_feature_layer": [-2, -3]}, "one of the tower's 5 hidden states"),
        ({"vision_feature_select_strategy": "full"}, "would project the CLS token"),
        ({"projector_hidden_act": "relu"}, "projector_hidden_act='relu'"),
        ({"multimodal_projector_bias": False}, "multimodal_projector_bias=False"),
        ({"vision_config": {"model_type": "dinov2"}}, "'dinov2'; LLaVA-SP has clip_vision_model or siglip"),
    ],
)
def test_what_llava_sp_has_not(changes, message):
    parts = {"vision_config": tiny.TOWERS["clip"].to_dict(), "text_config": LlamaConfig(**tiny._TEXT).to_dict()}
    with pytest.raises(ConfigError, match=message):
        LlavaSpConfig(**{**parts, "projector_config": tiny.PROJECTOR, **changes})


@pytest.mark.parametrize("sizes", [{"image_size": (32, 32)}, {"patch_size": (4, 4)}, {"image_size": 3}])
def test_a_tower_without_whole_square_patches(sizes):
    vision = {**tiny.TOWERS["clip"].to_dict(), **sizes}
    with pytest.raises(ConfigError, match="must be pixels of a square image and patch"):
        LlavaSpConfig(vision_config=vision, text_config=LlamaConfig(**tiny._TEXT).to_dict())


def test_official_variants_by_name():
    vision, text = CLIPVisionConfig(**CLIP_L_336).to_dict(), LlamaConfig(hidden_size=64).to_dict()
    for name in ("conv336_adptive_pooling_fuse_49", "tfm336", "sliding-dfi", "mlp"):
        config = LlavaSpConfig(vision_config=vision, text_config=text, projector_config=name)
        width = 1024 if name == "tfm336" else 512
        assert config.projector == SPProjectorConfig.variant(name, spatial_width=width, text_width=64)
        assert LlavaSpConfig.from_dict(config.to_dict()).projector == config.projector


def test_parameters_at_the_published_widths():
    shape = {"vocab_size": 32000, "hidden_size": 4096, "intermediate_size": 11008}
    config = LlavaSpConfig(
        vision_config=CLIPVisionConfig(**CLIP_L_336).to_dict(),
        text_config=LlamaConfig(**shape, num_hidden_layers=32, num_attention_heads=32).to_dict(),
    )
    with torch.device("meta"):
        model = LlavaSpForConditionalGeneration(config)

    def count(module: nn.Module) -> int:
        return sum(p.numel() for p in module.parameters())

    assert count(model.model.vision_tower) == 303_507_456
    assert count(model.model.language_model) == 6_607_343_616
    assert count(model.lm_head) == 131_072_000
    assert count(model.model.multi_modal_projector) == 923_550_208
    assert config.image_seq_length == 582
    assert config.image_token_id == 32_000
