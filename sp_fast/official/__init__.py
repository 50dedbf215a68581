"""The fast projector inside a live model of the official LLaVA-SP code, and out of it again.

from sp_fast.official import accelerate, restore
accelerate(model)    # the official LlavaLlamaForCausalLM, bare or in PEFT; restore(model) takes it back
"""

from sp_fast.official.accelerate import accelerate, restore

__all__ = ["accelerate", "restore"]
