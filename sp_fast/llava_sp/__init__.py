"""LLaVA-SP for transformers: importing this registers it with the auto classes."""

from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForImageTextToText,
    AutoModelForMultimodalLM,
    AutoProcessor,
)

from sp_fast.llava_sp.configuration import LlavaSpConfig
from sp_fast.llava_sp.modeling import LlavaSpForConditionalGeneration, LlavaSpModel
from sp_fast.llava_sp.processing import LlavaSpProcessor

__all__ = ["LlavaSpConfig", "LlavaSpForConditionalGeneration", "LlavaSpModel", "LlavaSpProcessor"]

AutoConfig.register(LlavaSpConfig.model_type, LlavaSpConfig, exist_ok=True)
AutoModel.register(LlavaSpConfig, LlavaSpModel, exist_ok=True)
AutoModelForImageTextToText.register(LlavaSpConfig, LlavaSpForConditionalGeneration, exist_ok=True)
AutoModelForMultimodalLM.register(LlavaSpConfig, LlavaSpForConditionalGeneration, exist_ok=True)
AutoProcessor.register(LlavaSpConfig, LlavaSpProcessor, exist_ok=True)
