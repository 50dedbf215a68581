"""The model on a GPU: the projector's Triton kernels inside it, flash attention, compiled generation: `make test-gpu`."""

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import LogitsProcessorList, StaticCache

from sp_fast import ReferenceSPProjector, compile_model
from sp_fast.attention import find_attention
from sp_fast.bench.model_hooks import Prescribed
from sp_fast.llava_sp.loading import load_model
from tests import tiny

pytestmark = pytest.mark.gpu
# Widths that the kernels' tiles and the flash kernels take; heads of 16 and 32.
TEXT = {"hidden_size": 128, "num_attention_heads": 4, "num_key_value_heads": 4}


@pytest.fixture(autouse=True)
def _a_gpu():
    assert torch.cuda.is_available(), "make test-gpu needs an NVIDIA GPU; make test is for machines without one"
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    torch._dynamo.reset()


def model_of(dtype=torch.float32, **changes):
    return tiny.model_of(**{**TEXT, **changes}).to("cuda", dtype)


def inputs_of(model, prompts, images):
    return tiny.inputs_of(model, prompts, [tiny.image(i) for i in range(images)]).to("cuda", model.dtype)


def reference_of(model):
    """The same model with the projector in the official form."""
    projector = model.model.multi_modal_projector
    reference = ReferenceSPProjector(model.config.projector, device="cuda", dtype=model.dtype)
    reference.load_state_dict(projector.official_state_dict(prefix=""))
    return reference


def test_triton_inside_the_model_against_the_reference():
    model = model_of()
    assert model.model.multi_modal_projector.backend.name == "triton"
    inputs = inputs_of(model, ["<image>\nwhat?", "two: <image> <image>"], 3)
    with torch.no_grad():
        fast = model(**inputs).logits
    tokens = model.generate(**inputs, max_new_tokens=32, do_sample=False)
    model.model.multi_modal_projector = reference_of(model)
    with torch.no_grad():
        torch.testing.assert_close(fast, model(**inputs).logits, rtol=1e-4, atol=1e-4)
    assert tokens.equal(model.generate(**inputs, max_new_tokens=32, do_sample=False))


def logits_of(model, inputs, tokens):
    """``[steps, B, vocabulary]`` of generation that is told its tokens, ``[B, steps]``."""
    out = model.generate(
        **inputs, max_new_tokens=tokens.shape[1], logits_processor=LogitsProcessorList([Prescribed(tokens)]),
        output_logits=True, return_dict_in_generate=True, do_sample=False,
    )  # fmt: skip
    return torch.stack(out.logits).float()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_compiled_generation_is_the_same(dtype):
    """Tower and projector, and the decode step, as CUDA graphs. Float32 decides tokens by more than rounding; bfloat16
    is held against the eager logits, by its distance from float32's."""
    model, exact = model_of(dtype), model_of()
    prompts = [["<image>\nwhat?", "and <image>"], ["<image>" + "so " * 30, "<image>"]]
    batches = [inputs_of(model, both, 2) for both in prompts]
    tokens = torch.randint(4, 200, (2, 24), device="cuda")
    plain = [model.generate(**inputs, max_new_tokens=24, do_sample=False) for inputs in batches]
    eager = [logits_of(model, inputs, tokens) for inputs in batches]
    true = [logits_of(exact, inputs_of(exact, both, 2), tokens) for both in prompts]
    compilation = compile_model(model, buckets=(96, 192), max_new_tokens=24)
    compilation.warm_up(batch=2, images=2)
    for _ in range(2):
        for i, inputs in enumerate(batches):
            found = logits_of(model, inputs, tokens)
            noise = (eager[i] - true[i]).norm()
            assert (found - true[i]).norm() <= 1.5 * noise + 1e-5 * true[i].norm()
            if dtype == torch.float32:
                assert model.generate(**inputs, max_new_tokens=24, do_sample=False).equal(plain[i])
    assert not compilation.recompilations
    compilation.restore()
    assert model.generate(**batches[0], max_new_tokens=24, do_sample=False).equal(plain[0])


def test_torchs_flash_kernel_runs_the_prefill():
    model = model_of(torch.bfloat16)
    inputs = inputs_of(model, "<image>\nwhat?", 1)
    inputs.pop("attention_mask")  # nothing is padded, and the flash kernel takes no mask
    with torch.no_grad(), sdpa_kernel(SDPBackend.FLASH_ATTENTION):
        logits = model(**inputs).logits
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH):
        expected = model(**inputs).logits
    assert logits.isfinite().all()
    assert (logits.float() - expected.float()).norm() / expected.float().norm() < 0.05


def test_auto_attention_loads_and_runs(tmp_path):
    model = model_of(torch.bfloat16)
    model.save_pretrained(tmp_path)
    tiny.processor_of(model.config).save_pretrained(tmp_path)
    loaded = load_model(tmp_path, device="cuda")
    installed = [name for name, why in find_attention().items() if why is None]
    assert loaded.attention.name in installed
    inputs = inputs_of(model, "<image>\nwhat?", 1)
    with torch.no_grad():
        found, expected = loaded.model(**inputs).logits, model(**inputs).logits
    assert (found.float() - expected.float()).norm() / expected.float().norm() < 0.05


def test_a_static_cache_gives_the_tokens_of_a_dynamic_one():
    model = model_of()
    inputs = inputs_of(model, ["<image>\nwhat?", "hello"], 1)
    dynamic = model.generate(**inputs, max_new_tokens=24, do_sample=False)
    cache = StaticCache(config=model.config.text_config, max_cache_len=256)
    static = model.generate(**inputs, max_new_tokens=24, do_sample=False, past_key_values=cache, disable_compile=True)
    assert dynamic.equal(static)
