"""The model with the rest of transformers and PEFT: files, pipelines, adapters, training."""

from __future__ import annotations

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForImageTextToText,
    AutoProcessor,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Trainer,
    TrainingArguments,
    pipeline,
)

from sp_fast.errors import CheckpointError, ConfigError
from sp_fast.llava_sp import LlavaSpConfig, LlavaSpForConditionalGeneration, LlavaSpModel, LlavaSpProcessor
from sp_fast.llava_sp.processing import CHAT_TEMPLATES
from tests import tiny

LANGUAGE_MODEL = r".*language_model.*(q_proj|v_proj|up_proj)"
TALK = [
    {"role": "user", "content": [{"type": "text", "text": "what?"}, {"type": "image"}]},
    {"role": "assistant", "content": "a cat"},
    {"role": "user", "content": "sure?"},
]


@pytest.fixture
def saved(tmp_path):
    model = tiny.model_of()
    model.save_pretrained(tmp_path)
    tiny.processor_of(model.config).save_pretrained(tmp_path)
    return model, tmp_path


@pytest.mark.parametrize("text", tiny.TEXTS)
@pytest.mark.parametrize("tower", tiny.TOWERS)
def test_save_and_load(text, tower, tmp_path):
    model = tiny.model_of(text, tower)
    inputs = tiny.inputs_of(model, "<image>\nwhat?", [tiny.image()])
    model.save_pretrained(tmp_path)
    loaded, info = AutoModelForImageTextToText.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info.values()), info
    assert type(loaded) is LlavaSpForConditionalGeneration
    assert AutoConfig.from_pretrained(tmp_path).projector == model.config.projector
    with torch.no_grad():
        assert model(**inputs).logits.equal(loaded(**inputs).logits)
    names = load_file(tmp_path / "model.safetensors").keys()
    assert names == model.state_dict().keys()


def test_the_model_without_a_head(saved):
    model, folder = saved
    core = AutoModel.from_pretrained(folder)
    assert type(core) is LlavaSpModel
    inputs = tiny.inputs_of(model, "<image>", [tiny.image()])
    with torch.no_grad():
        assert core(**inputs).last_hidden_state.equal(model.model(**inputs).last_hidden_state)
        assert core(**inputs, return_dict=False)[0].equal(model.model(**inputs).last_hidden_state)


def test_a_lost_projector_weight_is_an_error(saved):
    _, folder = saved
    tensors = load_file(folder / "model.safetensors")
    del tensors["model.multi_modal_projector.extractor.spatial_weight"]
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(
        CheckpointError, match=r"lacks model.multi_modal_projector.extractor.spatial_weight: give a whole"
    ):
        AutoModelForImageTextToText.from_pretrained(folder)


def test_a_projector_saved_with_adapters_around_it_is_an_error(saved):
    model, folder = saved
    get_peft_model(model, LoraConfig(r=2, target_modules=["multi_modal_projector.output"]))
    model.save_pretrained(folder)
    with pytest.raises(
        CheckpointError, match=r"multi_modal_projector.output.base_layer.weight.* must be merged or removed first"
    ):
        AutoModelForImageTextToText.from_pretrained(folder)


@pytest.mark.parametrize("dtype", [torch.int8, torch.float8_e4m3fn], ids=str)
def test_a_quantised_projector_is_an_error(saved, dtype, monkeypatch):
    model, folder = saved

    def quantised(*_, **__):
        output = model.model.multi_modal_projector.output
        output.weight = torch.nn.Parameter(output.weight.detach().to(dtype), requires_grad=False)
        return model, {"missing_keys": set()}

    monkeypatch.setattr(PreTrainedModel, "from_pretrained", quantised)
    with pytest.raises(CheckpointError, match=rf"projector.output.weight was quantised to {dtype}.*skip_modules"):
        AutoModelForImageTextToText.from_pretrained(folder)


def test_pipeline(saved):
    model, folder = saved
    answer = pipeline("image-text-to-text", model=str(folder))
    prompt = "USER: <image>\nwhat? ASSISTANT:"
    found = answer(text=prompt, images=tiny.image(), max_new_tokens=8, return_full_text=False, do_sample=False)
    inputs = tiny.inputs_of(model, prompt, [tiny.image()])
    ids = model.generate(**inputs, max_new_tokens=8, do_sample=False)[0, inputs["input_ids"].shape[1] :]
    assert found[0]["generated_text"] == tiny.tokenizer().decode(ids)
    messages = [
        {"role": "user", "content": [{"type": "image", "image": tiny.image()}, {"type": "text", "text": "what?"}]}
    ]
    chat = answer(text=messages, max_new_tokens=8, return_full_text=False, do_sample=False)
    assert isinstance(chat[0]["generated_text"], str)


def test_the_processor(saved):
    model, folder = saved
    processor = AutoProcessor.from_pretrained(folder)
    assert type(processor) is LlavaSpProcessor
    assert processor.chat_template == CHAT_TEMPLATES["vicuna_v1"]
    assert processor.tokenizer.padding_side == "left"
    assert processor.decode([tiny.VOCABULARY, 5], skip_special_tokens=True) == tiny.tokenizer().decode([5])
    inputs = processor(text="a <image> b <image>", images=[tiny.image(0), tiny.image(1)], return_tensors="pt")
    expected = tiny.inputs_of(model, "a <image> b <image>", [tiny.image(0), tiny.image(1)])
    assert inputs["input_ids"].equal(expected["input_ids"])
    assert inputs["pixel_values"].equal(expected["pixel_values"])
    assert int((inputs["input_ids"] == model.config.image_token_id).sum()) == 2 * model.config.image_seq_length


def sentencepiece(scheme):
    """Characters, with SentencePiece's spaces."""
    words = ["<pad>", "<s>", "</s>", "<unk>", "\u2581", "\n", *"USERAINT:?<ab", "\u2581what", "what", "\u2581USER:"]
    raw = Tokenizer(models.BPE(vocab={word: i for i, word in enumerate(words)}, merges=[], unk_token="<unk>"))
    raw.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=scheme, split=False)
    return PreTrainedTokenizerFast(tokenizer_object=raw, bos_token="<s>", eos_token="</s>", pad_token="<pad>")


@pytest.mark.parametrize("kind", ["first", "always", "bytes"])
def test_text_around_images_is_tokenised_as_officially(kind):
    """Officially each text between images is tokenised on its own, and what it begins with dropped if that is <s>."""
    tokenizer = tiny.tokenizer() if kind == "bytes" else sentencepiece(kind)
    config = tiny.config_of(vocab_size=len(tokenizer))
    config.image_token_index = len(tokenizer)
    processor = LlavaSpProcessor.for_model(config, tokenizer)
    for prompt in (
        "USER: <image>\nab? A:",
        "<image>ab",
        "<image><image>\n",
        "a<image>",
        "ab",
        "</s>a<image>b",
    ):
        pieces = [tokenizer(text, add_special_tokens=False)["input_ids"] for text in prompt.split("<image>")]
        expected = pieces[0]
        for piece in pieces[1:]:
            expected = [*expected, *[config.image_token_id] * config.image_seq_length, *piece]
        images = [tiny.image()] * (len(pieces) - 1)
        found = processor(text=prompt, images=images or None, add_special_tokens=False)["input_ids"][0]
        assert found == expected, prompt


def test_images_are_padded_to_squares_of_the_mean_colour():
    processor = tiny.processor_of(tiny.config_of())
    black = tiny.Image.new("RGB", (40, 20))
    pixels = processor.image_processor(black, return_tensors="pt")["pixel_values"][0]
    assert pixels.shape == (3, 32, 32)
    assert pixels[:, :6].abs().max() < 0.02  # the padding: the mean, so nothing after normalisation
    assert pixels[:, 12:20].max() < -1


def test_vicuna_template():
    processor = tiny.processor_of(tiny.config_of())
    text = processor.apply_chat_template(TALK, add_generation_prompt=True)
    assert text == (
        "A chat between a curious user and an artificial intelligence assistant. The assistant gives helpful, detailed,"
        " and polite answers to the user's questions. USER: <image>\nwhat? ASSISTANT: a cat</s>USER: sure? ASSISTANT:"
    )
    system = [{"role": "system", "content": "Be brief."}, *TALK[:1]]
    assert processor.apply_chat_template(system) == "Be brief. USER: <image>\nwhat? "


def test_plain_template():
    processor = LlavaSpProcessor.for_model(tiny.config_of(), tiny.tokenizer(), "plain")
    assert processor.apply_chat_template(TALK[:2]) == "<image>a cat\n"


def test_a_template_that_knows_text_alone(tmp_path):
    """As Qwen2's and Mistral's."""
    tokenizer = tiny.tokenizer()
    tokenizer.chat_template = (
        "{% for m in messages %}{{ '[' + m['role'] + ']' + m['content'] + eos_token }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '[assistant]' }}{% endif %}"
    )
    processor = LlavaSpProcessor.for_model(tiny.config_of(), tokenizer, None)
    expected = "[user]<image>\nwhat?</s>[assistant]a cat</s>[user]sure?</s>[assistant]"
    assert processor.apply_chat_template(TALK, add_generation_prompt=True) == expected
    processor.save_pretrained(tmp_path)
    again = AutoProcessor.from_pretrained(tmp_path)
    assert again.apply_chat_template(TALK, add_generation_prompt=True) == expected


def test_another_tokenizer_is_refused():
    tokenizer = tiny.tokenizer()
    tokenizer.add_tokens(["extra"])
    with pytest.raises(ConfigError, match="<image> is token 261 of the tokenizer, but .* is 260"):
        LlavaSpProcessor.for_model(tiny.config_of(), tokenizer)


def lora(model):
    torch.manual_seed(1)
    config = LoraConfig(
        r=4, target_modules=LANGUAGE_MODEL, modules_to_save=["multi_modal_projector"], init_lora_weights=False
    )
    return get_peft_model(model, config)


def test_lora_save_reload_merge(tmp_path):
    inputs = tiny.inputs_of(tiny.model_of(), "<image>\nwhat?", [tiny.image()])
    model = lora(tiny.model_of()).eval()
    copy = model.base_model.model.model.multi_modal_projector
    with torch.no_grad():  # as a training would: the copy to save is another projector now
        for parameter in copy.modules_to_save["default"].parameters():
            parameter += 0.01 * torch.randn_like(parameter)
        expected = model(**inputs).logits
        assert not expected.equal(tiny.model_of()(**inputs).logits)
    model.save_pretrained(tmp_path)
    with torch.no_grad():
        reloaded = PeftModel.from_pretrained(tiny.model_of(), tmp_path).eval()
        assert reloaded(**inputs).logits.equal(expected)
        merged = reloaded.merge_and_unload()
        torch.testing.assert_close(merged(**inputs).logits, expected)
        merged.save_pretrained(tmp_path / "merged")
        whole = AutoModelForImageTextToText.from_pretrained(tmp_path / "merged")
        assert whole(**inputs).logits.equal(merged(**inputs).logits)


def gradients(model, inputs):
    model.zero_grad()
    model(
        **inputs, labels=inputs["input_ids"].masked_fill(inputs["input_ids"] >= tiny.VOCABULARY, -100)
    ).loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def test_gradient_checkpointing_changes_no_gradient():
    model = tiny.model_of().train()
    inputs = tiny.inputs_of(model, ["<image>\nwhat?", "hello"], [tiny.image()])
    expected = gradients(model, inputs)
    model.gradient_checkpointing_enable()
    found = gradients(model, inputs)
    assert found.keys() == expected.keys()
    assert "model.multi_modal_projector.extractor.spatial_weight" in found
    for name, gradient in found.items():
        torch.testing.assert_close(gradient, expected[name])


def test_bfloat16():
    exact = tiny.model_of()
    model = tiny.model_of().to(torch.bfloat16)
    inputs = tiny.inputs_of(model, "<image>\nwhat?", [tiny.image()])
    with torch.no_grad():
        found, expected = model(**inputs).logits, exact(**inputs).logits
        with torch.autocast("cpu", torch.bfloat16):
            mixed = exact(**inputs).logits
    assert found.dtype == torch.bfloat16
    for logits in (found, mixed):
        assert (logits.float() - expected).norm() / expected.norm() < 0.1  # ten roundings of 2^-8 or so on the way


def test_one_step_of_the_trainer(tmp_path):
    model = tiny.model_of().train()
    model.model.vision_tower.requires_grad_(False)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    rows = []
    for i in range(2):
        row = {k: v[0] for k, v in tiny.inputs_of(model, "<image>\nwhat?", [tiny.image(i)]).items()}
        rows.append({**row, "labels": row["input_ids"].masked_fill(row["input_ids"] >= tiny.VOCABULARY, -100)})
    arguments = TrainingArguments(
        tmp_path, max_steps=1, per_device_train_batch_size=2, learning_rate=1e-2, report_to=[], use_cpu=True
    )
    result = Trainer(model, arguments, train_dataset=rows).train()
    assert 0 < result.training_loss < 20
    moved = {name for name, p in model.named_parameters() if not p.equal(before[name])}
    frozen = {name for name in before if "vision_tower" in name}
    unread = {name for name, p in model.named_parameters() if p.requires_grad} - moved
    assert not moved & frozen
    assert unread <= {"model.multi_modal_projector.integrator.key.0.1.bias"}  # softmax does not see it


def test_dtype_and_attention_at_load(saved):
    _, folder = saved
    model = AutoModelForImageTextToText.from_pretrained(
        folder, dtype=torch.bfloat16, attn_implementation={"text_config": "eager", "vision_config": "sdpa"}
    )
    assert model.model.multi_modal_projector.output.weight.dtype == torch.bfloat16
    assert model.model.language_model.config._attn_implementation == "eager"
    assert model.model.vision_tower.config._attn_implementation == "sdpa"


def test_a_configuration_saved_before_is_read_back(tmp_path):
    config = tiny.config_of(tower="siglip", text="qwen2")
    config.save_pretrained(tmp_path)
    loaded = LlavaSpConfig.from_pretrained(tmp_path)
    assert loaded.to_dict() == config.to_dict()
    assert loaded.vision_feature_select_strategy == "full"
    assert loaded.image_seq_length == 3 + 64
