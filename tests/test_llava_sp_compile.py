"""Compiled generation: the same tokens, few graphs, none broken. Backends that only trace are quick, and see breaks."""

from __future__ import annotations

import gc
import logging
import weakref

import pytest
import torch
from transformers import GenerationConfig, LogitsProcessor, StoppingCriteria
from transformers.generation.streamers import BaseStreamer

from sp_fast import compile_model
from sp_fast.errors import ConfigError
from sp_fast.llava_sp import compile as compiling
from tests import tiny

ENCODE, PREFILL, DECODE = "tower and projector", "prefill", "decode"


@pytest.fixture(autouse=True)
def _fresh_dynamo():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def small(*args):
    """One layer of the language model and one of the tower: tracing them is what takes these tests their time."""
    model = tiny.model_of(*args, num_hidden_layers=1)
    model.config.vision_feature_layer = 1
    return model


def compiled(model, **kwargs):
    return compile_model(model, **{"buckets": (96, 160), "max_new_tokens": 24, "backend": "eager", **kwargs})


def requests(model):
    """Two batches of two prompts, one for each bucket."""
    short = tiny.inputs_of(model, ["<image>\nwhat?", "and <image>"], [tiny.image(0), tiny.image(1)])
    long = tiny.inputs_of(model, ["<image>" + "what is it? " * 6, "one <image>"], [tiny.image(2), tiny.image(3)])
    assert short["input_ids"].shape[1] < 96 < long["input_ids"].shape[1] < 160
    return short, long


@pytest.mark.parametrize(
    ("make", "text", "tower", "backend"),
    [
        pytest.param(tiny.model_of, "llama", "clip", "eager", marks=pytest.mark.campaign),
        (small, "qwen2", "siglip", "aot_eager"),
        pytest.param(small, "mistral", "clip", "eager", marks=pytest.mark.campaign),
    ],
)
def test_the_same_tokens_from_one_graph_a_region_and_bucket(make, text, tower, backend):
    model = make(text, tower)
    plain = [model.generate(**inputs, max_new_tokens=20, do_sample=False) for inputs in requests(model)]
    compilation = compiled(model, backend=backend)
    report = compilation.warm_up(batch=2, images=2)
    assert report == {
        "buckets": [96, 160],
        "cache_tokens": 184,
        "graphs": {ENCODE: 1, PREFILL: 2, DECODE: 1},
        "recompilations": {},
    }
    for _ in range(2):
        for inputs, expected in zip(requests(model), plain, strict=True):
            assert model.generate(**inputs, max_new_tokens=20, do_sample=False).equal(expected)
    assert compilation.report() == report


@pytest.mark.parametrize("tower", tiny.TOWERS)
def test_the_whole_forward_is_one_graph(tower):
    """Cold, too: transformers' own hooks, which break it, are not needed to read one hidden state."""
    model = small("llama", tower)
    inputs, _ = requests(model)
    with torch.no_grad():
        found = torch.compile(model, fullgraph=True, backend="eager")(**inputs).logits
        torch.testing.assert_close(found, model(**inputs).logits)


def test_another_batch_size_is_reported():
    model = small()
    compilation = compiled(model, buckets=(96,))
    compilation.warm_up(batch=1)
    inputs, _ = requests(model)
    model.generate(**inputs, max_new_tokens=4)
    assert compilation.recompilations == {ENCODE: 1, PREFILL: 1, DECODE: 1}
    compilation.warm_up(batch=2, images=2)
    assert not compilation.recompilations


def test_text_only_compiles_no_tower():
    model = small()
    inputs = tiny.inputs_of(model, "hello")
    expected = model.generate(**inputs, max_new_tokens=8, do_sample=False)
    compilation = compiled(model, buckets=(16,))
    assert compilation.warm_up(images=0)["graphs"] == {PREFILL: 1, DECODE: 1}
    assert model.generate(**inputs, max_new_tokens=8, do_sample=False).equal(expected)
    assert not compilation.recompilations


@pytest.mark.parametrize("part", ["vision_tower.encoder.layers.0", "multi_modal_projector", "language_model.layers.0"])
def test_a_graph_break_is_an_error(part):
    model = small()
    module = model.model.get_submodule(part)
    whole = module.forward

    def broken(*args, **kwargs):
        torch._dynamo.graph_break()
        return whole(*args, **kwargs)

    module.forward = broken
    compiled(model)
    with pytest.raises(torch._dynamo.exc.Unsupported, match="graph_break"):
        model.generate(**requests(model)[0], max_new_tokens=4)


def test_restore():
    model = small()
    core = model.model
    core.language_model.forward = own = core.language_model.forward  # as accelerate's hooks leave it
    before = {id(module): set(vars(module)) for module in model.modules()}
    inputs, _ = requests(model)
    expected = model.generate(**inputs, max_new_tokens=8, do_sample=False)
    compilation = compiled(model, buckets=(96,))
    model.generate(**inputs, max_new_tokens=8)
    compilation.restore()
    graphs = dict(compilation.graphs)
    assert model.generate(**inputs, max_new_tokens=8, do_sample=False).equal(expected)
    for name in ("generate", "encode_images", "forward", "_compiled_call", "_last_compile_config"):
        for module in (model, model.model, model.model.language_model):
            assert name in before[id(module)] or name not in vars(module)
    torch.compile(lambda x: x + 1, backend="eager")(torch.ones(2))
    assert compilation.graphs == graphs
    assert vars(core.language_model)["forward"] == own
    compiled(model)


def test_a_compiled_model_is_freed():
    model = small()
    compiled(model, buckets=(96,)).warm_up()
    gone = weakref.ref(model)
    del model
    torch._dynamo.reset()
    gc.collect()
    assert gone() is None


UNFITTING = {
    "too many tokens": ({"max_new_tokens": 25}, "25 new tokens are more than compile_model's max_new_tokens=24"),
    "beams": ({"max_new_tokens": 4, "num_beams": 2}, "num_beams=2"),
    "answers": ({"max_new_tokens": 4, "num_return_sequences": 2, "num_beams": 2}, "num_beams=2"),
    "no cache": ({"max_new_tokens": 4, "use_cache": False}, "use_cache=False"),
    "a cache": ({"max_new_tokens": 4, "cache_implementation": "static"}, "cache_implementation is given"),
    "no length": ({}, "max_new_tokens is not given"),
}


@pytest.mark.parametrize("name", UNFITTING)
def test_what_does_not_fit_runs_uncompiled_and_says_so(name, caplog):
    model = tiny.model_of()
    kwargs, message = UNFITTING[name]
    inputs, _ = requests(model)
    expected = model.generate(**inputs, **kwargs, do_sample=False)
    compilation = compiled(model)
    with caplog.at_level(logging.WARNING, "sp_fast"):
        for _ in range(2):
            assert model.generate(**inputs, **kwargs, do_sample=False).equal(expected)
    assert [record.getMessage() for record in caplog.records] == [f"generate runs uncompiled: {message}"]
    assert not compilation.graphs


def test_beams_of_a_generation_config_run_uncompiled(caplog):
    model = tiny.model_of()
    inputs = tiny.inputs_of(model, "<image>\nwhat?", [tiny.image()])
    config = GenerationConfig(num_beams=2, max_new_tokens=4)
    expected = model.generate(**inputs, generation_config=config)
    compilation = compiled(model)
    assert model.generate(inputs["input_ids"], config, pixel_values=inputs["pixel_values"]).equal(expected)
    model.generation_config.num_beams = 2
    assert model.generate(**inputs, max_new_tokens=4).equal(expected)
    assert caplog.messages == ["generate runs uncompiled: num_beams=2"]
    assert not compilation.graphs


SEEING = {
    "repetition penalty": {"repetition_penalty": 3.0},
    "n-grams": {"no_repeat_ngram_size": 2},
    "least length": {"min_length": 90, "eos_token_id": list(range(4, 200))},
    "least new length": {"min_new_tokens": 5, "eos_token_id": list(range(4, 200))},
    "end": {"eos_token_id": list(range(4, 200)), "pad_token_id": 0},
}


def test_padding_is_seen_by_nobody():
    model = small()
    inputs, _ = requests(model)

    def answers():
        every = {"nothing": {}, **SEEING}
        return {
            name: model.generate(**inputs, max_new_tokens=20, do_sample=False, **settings)
            for name, settings in every.items()
        }

    expected = answers()
    compiled(model, buckets=(96,))
    for name, found in answers().items():
        assert found.equal(expected[name]), name
        assert (name == "nothing") is found.equal(expected["nothing"]), name


def test_what_a_caller_hangs_in_sees_the_prompts_as_they_are():
    class Watching(StoppingCriteria, LogitsProcessor):
        def __init__(self):
            self.seen = []

        def __call__(self, input_ids, scores, **_):
            self.seen.append(input_ids.tolist())
            return scores if len(self.seen) % 2 else torch.zeros(len(input_ids), dtype=torch.bool)

    def seen(model):
        watching = Watching()
        model.generate(
            **tiny.inputs_of(model, ["hello", "hi"]), max_new_tokens=4, do_sample=False, logits_processor=[watching],
            stopping_criteria=[watching],
        )  # fmt: skip
        return watching.seen

    model = small()
    expected = seen(model)
    compiled(model, buckets=(16,))
    assert seen(model) == expected
    assert len(expected) == 8


def test_a_first_call_in_inference_mode_spoils_no_later_one():
    model = small()
    inputs = tiny.inputs_of(model, "hello")
    expected = model.generate(**inputs, max_new_tokens=4, do_sample=False)
    compiled(model, buckets=(16,))
    with torch.inference_mode():
        assert model.generate(**inputs, max_new_tokens=4, do_sample=False).equal(expected)
    assert model.generate(**inputs, max_new_tokens=4, do_sample=False).equal(expected)


def test_no_more_graphs_than_torch_keeps(monkeypatch, caplog):
    monkeypatch.setattr(compiling, "MOST_GRAPHS", 3)
    model = small()
    compilation = compiled(model, buckets=(16, 24))  # of two lengths: two batch sizes would be four graphs
    for prompts in (["hello"], ["hello", "hi"]):
        model.generate(**tiny.inputs_of(model, prompts), max_new_tokens=2)
    said = [record.getMessage() for record in caplog.records if record.name == "sp_fast"]
    assert said == [
        "generate runs uncompiled: 1 batch sizes are compiled, and as many lengths of each as there is room for"
    ]
    assert compilation.graphs == {PREFILL: 1, DECODE: 1}


def test_padding_without_a_mask_runs_uncompiled(caplog):
    """transformers then takes the padding token for what it is."""
    model = tiny.model_of()
    inputs = tiny.inputs_of(model, ["hello there", "hi"])
    expected = model.generate(**inputs, max_new_tokens=8, do_sample=False)
    del inputs["attention_mask"]
    compiled(model)
    assert model.generate(**inputs, max_new_tokens=8, do_sample=False).equal(expected)
    assert caplog.messages == ["generate runs uncompiled: there is padding, but no attention_mask"]


def test_a_prompt_beyond_the_largest_bucket_runs_uncompiled(caplog):
    model = tiny.model_of()
    compilation = compiled(model, buckets=(80,))
    model.generate(**requests(model)[1], max_new_tokens=2)
    assert "not shorter than the largest bucket, 80" in caplog.text
    assert not compilation.graphs


def test_max_length_streams_and_dictionaries():
    class Streamer(BaseStreamer):
        def __init__(self):
            self.tokens = []

        def put(self, value):
            self.tokens += value.flatten().tolist()

        def end(self):
            self.tokens += ["end"]

    model, streamer = small(), Streamer()
    inputs = tiny.inputs_of(model, "hello")
    length = inputs["input_ids"].shape[1]
    expected = model.generate(**inputs, max_new_tokens=8, do_sample=False)
    compiled(model, buckets=(16,))
    assert model.generate(**inputs, max_length=length + 8, do_sample=False).equal(expected)
    out = model.generate(
        **inputs,
        max_new_tokens=8,
        do_sample=False,
        return_dict_in_generate=True,
        output_logits=True,
        streamer=streamer,
    )
    assert out.sequences.equal(expected)
    assert len(out.logits) == 8
    assert out.past_key_values is None
    assert streamer.tokens == [*expected[0].tolist(), "end"]


def test_default_buckets():
    assert compile_model(tiny.model_of(), max_new_tokens=32).buckets == (192, 384, 480)
    assert compile_model(tiny.model_of(max_position_embeddings=4096)).buckets == (192, 384, 768, 1536, 2048)


def test_what_cannot_be_compiled():
    model = tiny.model_of()
    with pytest.raises(
        ConfigError, match=r"buckets=\(96, 500\) and max_new_tokens=24 .* context or sliding window of 512"
    ):
        compiled(model, buckets=(500, 96))
    model.model.language_model.config._attn_implementation = "flash_attention_2"
    with pytest.raises(ConfigError, match="'flash_attention_2', which breaks the graph"):
        compiled(model)
    model.model.language_model.config._attn_implementation = "sdpa"
    with pytest.raises(ConfigError, match=r"not a LlavaSpModel: .* merge the adapters first"):
        compile_model(model.model)
    with pytest.raises(ConfigError, match=r"sliding window of 100"):
        compiled(tiny.model_of("mistral", sliding_window=100))
    model.hf_device_map = {"model.vision_tower": 0, "model.language_model": 1}
    with pytest.raises(ConfigError, match="spread over several devices"):
        compiled(model)
    model.hf_device_map = {"": "cpu"}
    compiled(model)
    with pytest.raises(ConfigError, match="compiled already"):
        compiled(model)


@pytest.mark.campaign
def test_inductor():
    model = tiny.model_of()
    plain = [model.generate(**inputs, max_new_tokens=20, do_sample=False) for inputs in requests(model)]
    compilation = compiled(model, backend="inductor")
    compilation.warm_up(batch=2, images=2)
    for inputs, expected in zip(requests(model), plain, strict=True):
        assert model.generate(**inputs, max_new_tokens=20, do_sample=False).equal(expected)
    assert not compilation.recompilations
