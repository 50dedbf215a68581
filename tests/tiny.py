"""Small LLaVA-SP models, tokenizers and images, seeded: every shape of the real thing in milliseconds."""

from __future__ import annotations

import numpy as np
import torch
from PIL import Image
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    CLIPVisionConfig,
    LlamaConfig,
    MistralConfig,
    PreTrainedTokenizerFast,
    Qwen2Config,
    SiglipVisionConfig,
)

from sp_fast.llava_sp import LlavaSpConfig, LlavaSpForConditionalGeneration, LlavaSpProcessor

VOCABULARY = 260  # 256 bytes and four special tokens; <image> comes after them, and has no row
PROJECTOR = {"kernel_sizes": [2, 4, 8], "detail_kernel": 4, "spatial_width": 12}
_TOWER = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 4, "num_attention_heads": 2}
TOWERS = {
    "clip": CLIPVisionConfig(**_TOWER, image_size=32, patch_size=4),
    "siglip": SiglipVisionConfig(**_TOWER, image_size=32, patch_size=4),
}
_TEXT = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": VOCABULARY,
    "max_position_embeddings": 512,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
    "initializer_range": 0.2,  # so that greedy tokens are decided by more than rounding
}
TEXTS = {"llama": LlamaConfig, "qwen2": Qwen2Config, "mistral": MistralConfig}


def config_of(text="llama", tower="clip", projector=None, **changes):
    projector = PROJECTOR if projector is None else projector
    return LlavaSpConfig(
        vision_config=TOWERS[tower].to_dict(),
        text_config=TEXTS[text](**{**_TEXT, **changes}).to_dict(),
        projector_config=projector,
        image_token_index=VOCABULARY,
    )


def model_of(*args, seed=0, **kwargs):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = LlavaSpForConditionalGeneration(config_of(*args, **kwargs))
        for name, parameter in model.named_parameters():
            if "norm" in name or name.endswith("bias"):  # which begin as ones and zeros, and would hide mistakes
                parameter.data += 0.1 * torch.randn_like(parameter)
    model.generation_config.eos_token_id = None  # as many tokens as are asked for
    return model.eval()


def tokenizer():
    """Bytes as tokens."""
    names = {"<pad>": 0, "<s>": 1, "</s>": 2, "<unk>": 3}
    names |= {character: 4 + i for i, character in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    raw = Tokenizer(models.BPE(vocab=names, merges=[], unk_token="<unk>"))
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    raw.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=raw, bos_token="<s>", eos_token="</s>", unk_token="<unk>", pad_token="<pad>"
    )


def processor_of(config):
    return LlavaSpProcessor.for_model(config, tokenizer())


def image(seed=0, width=40, height=30):
    noise = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(noise)


def inputs_of(model, text, images=(), **kwargs):
    processor = processor_of(model.config)
    return processor(images=list(images) or None, text=text, return_tensors="pt", padding=True, **kwargs)
