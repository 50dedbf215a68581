"""`sp-fast generate`: the same tokens in batches as alone, from the command line as from Python, and clear errors."""

from __future__ import annotations

import io
import json
import socket
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import TextStreamer
from typer.testing import CliRunner

from sp_fast.cli import app
from sp_fast.errors import BackendError, CheckpointError, ConfigError, ImageError, ResourceError
from sp_fast.generate_cli import generate
from sp_fast.llava_sp import loading
from sp_fast.llava_sp.answering import Request, Settings, answer, prompt_tokens, read_requests
from sp_fast.llava_sp.loading import load_model
from tests import tiny
from tests.official import edit

GREEDY = Settings(max_new_tokens=12)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("model")
    model = tiny.model_of()
    model.save_pretrained(path)
    tiny.processor_of(model.config).save_pretrained(path)
    for i in range(4):
        tiny.image(i).save(path / f"{i}.png")
    return path


@pytest.fixture(scope="module")
def loaded(folder):
    return load_model(folder)


def requests(folder):
    images = [folder / f"{i}.png" for i in range(4)]
    return [
        Request("what is it?", (images[0],), "question"),
        Request("hello", (), "text only"),
        Request("is <image> like <image>?", tuple(images[1:3]), "two"),
        Request("<image>", (images[3],), "image only"),
        Request("hello again, with a longer text than before", (), "longer"),
    ]


@pytest.mark.parametrize("batch_size", [2, 5])
@pytest.mark.parametrize("chat", [True, False])
def test_batches_equal_singles(loaded, folder, batch_size, chat):
    asked = requests(folder)
    alone = list(answer(loaded, asked, Settings(max_new_tokens=12, batch_size=1, chat=chat)))
    together = list(answer(loaded, asked, Settings(max_new_tokens=12, batch_size=batch_size, chat=chat)))
    assert [a.id for a in together] == [r.id for r in asked]
    for one, other in zip(alone, together, strict=True):
        assert (one.text, one.prompt_tokens, one.new_tokens) == (other.text, other.prompt_tokens, other.new_tokens)
        assert one.prompt_tokens == prompt_tokens(loaded, next(r for r in asked if r.id == one.id), chat)
    assert all(a.ttft_seconds is not None and a.ttft_seconds < a.seconds for a in alone)
    assert len({a.text for a in alone}) == len(asked)


def test_an_answer_is_what_generate_gives(loaded, folder):
    found = next(answer(loaded, [Request("what?", (folder / "0.png",))], GREEDY))
    text = (
        "A chat between a curious user and an artificial intelligence assistant. The assistant gives helpful, detailed,"
        " and polite answers to the user's questions. USER: <image>\nwhat? ASSISTANT:"
    )
    inputs = tiny.inputs_of(loaded.model, text, [tiny.image(0)])
    ids = loaded.model.generate(**inputs, max_new_tokens=12, do_sample=False)[0, inputs["input_ids"].shape[1] :]
    assert found.text == tiny.tokenizer().decode(ids, skip_special_tokens=True).strip()
    assert found.prompt_tokens == inputs["input_ids"].shape[1]
    assert found.new_tokens == 12


def test_the_end_of_text_ends_the_count(loaded, folder):
    alone = next(answer(loaded, [Request("hello", ())], GREEDY))
    inputs = tiny.inputs_of(
        loaded.model,
        loaded.processor.apply_chat_template([{"role": "user", "content": "hello"}], add_generation_prompt=True),
    )
    ids = loaded.model.generate(**inputs, max_new_tokens=12, do_sample=False)[0, inputs["input_ids"].shape[1] :]
    config = loaded.model.generation_config
    config.eos_token_id = int(ids[4])
    try:
        found = list(answer(loaded, [Request("hello", ()), Request("something else", ())], GREEDY))
    finally:
        config.eos_token_id = None
    assert alone.new_tokens == 12
    assert found[0].new_tokens == ids.tolist().index(int(ids[4])) + 1


def test_temperature_samples_by_seed(loaded, folder):
    request = [Request("hello", (folder / "0.png",))]

    def text(seed):
        return next(answer(loaded, request, Settings(max_new_tokens=12, temperature=5.0, seed=seed))).text

    assert text(0) == text(0) != text(1)


def test_new_tokens_stop_at_the_context(loaded):
    found = next(answer(loaded, [Request("x" * 300)], Settings(max_new_tokens=500)))
    assert found.prompt_tokens + found.new_tokens == 512
    with pytest.raises(ConfigError, match="^the prompt has .* context is 512"):
        next(answer(loaded, [Request("x" * 400)], GREEDY))


def test_a_prompt_beyond_the_context_is_named_before_anything_runs(folder, loaded):
    asked = [Request("fine", (), 1), Request("x" * 400, (), 2)]
    with pytest.raises(ConfigError, match="request 2: the prompt has .* context is 512"):
        next(answer(loaded, asked, Settings(max_new_tokens=1, batch_size=1)))


def test_a_prompt_near_the_context_takes_no_room_from_its_batch(loaded):
    asked = [Request(text, (), text) for text in ("a", "x" * 505, "b", "c")]
    alone, together = (
        list(answer(loaded, asked, Settings(max_new_tokens=16, batch_size=size, chat=False))) for size in (1, 4)
    )
    assert [a.new_tokens for a in together] == [16, 512 - together[1].prompt_tokens, 16, 16]
    assert [(a.id, a.text) for a in together] == [(a.id, a.text) for a in alone]


def test_settings_have_bounds():
    Settings(max_new_tokens=1, batch_size=1, temperature=99.9)
    for wrong in ({"max_new_tokens": 0}, {"batch_size": 0}, {"temperature": -0.1}, {"temperature": 100}):
        with pytest.raises(ConfigError, match=next(iter(wrong))):
            Settings(**wrong)


def run(*arguments):
    return CliRunner().invoke(app, ["generate", *map(str, arguments)])


def test_one_prompt(folder, loaded):
    expected = next(answer(loaded, [Request("what?", (folder / "0.png",))], GREEDY))
    arguments = ("--model", folder, "--image", folder / "0.png", "--prompt", "what?", "--max-new-tokens", 12)
    result = run(*arguments)
    assert result.exit_code == 0, result.stderr
    assert result.stdout.strip() == expected.text
    assert "attention sdpa (auto: the model is on cpu)" in result.stderr
    line = json.loads(run(*arguments, "--json").stdout)
    assert (line["text"], line["new_tokens"]) == (expected.text, 12)
    assert 0 < line["ttft_seconds"] < line["seconds"]


def test_a_file_of_prompts(folder, loaded):
    rows = [
        {"prompt": "what is it?", "image": "0.png", "id": "question"},
        {"prompt": "hello"},
        {"prompt": "is <image> like <image>?", "images": ["1.png", "2.png"]},
    ]
    (folder / "prompts.jsonl").write_text("\n\n".join(map(json.dumps, rows)) + "\n")
    result = run("--model", folder, "--batch", folder / "prompts.jsonl", "--max-new-tokens", 12, "--json")
    assert result.exit_code == 0, result.stderr
    found = [json.loads(line) for line in result.stdout.splitlines()]
    assert [line["id"] for line in found] == ["question", 3, 5]
    expected = answer(loaded, requests(folder)[:3], GREEDY)
    assert [line["text"] for line in found] == [a.text for a in expected]


def test_a_terminal_gets_the_text_as_it_comes(folder, loaded, monkeypatch):
    class Terminal(io.StringIO):
        def isatty(self):
            return True

    expected, pieces = next(answer(loaded, [Request("what?", (folder / "0.png",))], GREEDY)), []
    show = TextStreamer.on_finalized_text

    def noted(self, text, stream_end=False):
        pieces.append(text)
        show(self, text, stream_end)

    monkeypatch.setattr(TextStreamer, "on_finalized_text", noted)
    monkeypatch.setattr(sys, "stdout", Terminal())
    generate(model=folder, image=[folder / "0.png"], prompt="what?", max_new_tokens=12)
    assert sys.stdout.getvalue().strip() == expected.text
    assert len(pieces) == 12 + 1  # one a token, and the end


def test_compiled(folder, loaded):
    torch._dynamo.reset()
    expected = next(answer(loaded, [Request("what?", (folder / "0.png",))], GREEDY))
    compiled = load_model(folder, compiled=True)
    assert compiled.attention.reason == "auto: a compiled static cache needs it"
    from sp_fast import compile_model

    compilation = compile_model(compiled.model, buckets=(256,), max_new_tokens=12, backend="aot_eager")
    compilation.warm_up()
    assert next(answer(compiled, [Request("what?", (folder / "0.png",))], GREEDY)).text == expected.text
    assert not compilation.recompilations


@pytest.mark.campaign
def test_the_command_compiles_for_its_prompts(folder, loaded, monkeypatch):
    from sp_fast.llava_sp import compile as module

    torch._dynamo.reset()
    made = []

    def traced(model, **kwargs):
        made.append(compile_model(model, backend="eager", **kwargs))
        return made[-1]

    compile_model = module.compile_model
    monkeypatch.setattr(module, "compile_model", traced)
    rows = [{"prompt": r.prompt, "images": [path.name for path in r.images]} for r in requests(folder)[:3]]
    (folder / "compiled.jsonl").write_text("\n".join(map(json.dumps, rows)))
    arguments = ("--model", folder, "--batch", folder / "compiled.jsonl", "--json", "--compile", "--batch-size", 2)
    result = run(*arguments, "--max-new-tokens", 12)
    assert result.exit_code == 0, result.stderr
    expected = answer(loaded, requests(folder)[:3], GREEDY)
    assert [json.loads(line)["text"] for line in result.stdout.splitlines()] == [a.text for a in expected]
    assert not made[0].recompilations
    assert "compiled again" not in result.stderr
    result = run(*arguments, "--max-new-tokens", 500)
    assert result.exit_code == 0, result.stderr
    assert "not compiled: prompts and 500 new tokens reach beyond the context of 512" in result.stderr
    assert len(made) == 1


BAD_LINES = {
    "[1]": 'line 2 has no "prompt"',
    '{"text": "a"}': 'line 2 has no "prompt"',
    "{": "line 2 is no JSON",
    '{"prompt": "a", "picture": "0.png"}': "line 2 has 'picture', which is none of",
    '{"prompt": "a", "images": "0.png"}': "line 2: images must be a list of paths",
    '{"prompt": "a", "image": "9.png"}': r"line 2: the image .*9\.png does not exist",
    '{"prompt": "a", "image": "../0.png"}': r"line 2: \.\./0\.png leads out of",
    '{"prompt": "a", "image": "/etc/passwd"}': r"line 2: /etc/passwd leads out of",
    '{"prompt": "<image>"}': "line 2: the prompt has 1 <image> and 0 images",
    '{"prompt": "<image>", "images": ["0.png", "1.png"]}': "line 2: the prompt has 1 <image> and 2 images",
}


@pytest.mark.parametrize("line", BAD_LINES)
def test_a_bad_line_stops_before_anything_runs(folder, line):
    path = folder / "bad.jsonl"
    path.write_text('{"prompt": "fine"}\n' + line + "\n")
    with pytest.raises((ConfigError, ImageError), match=BAD_LINES[line]):
        read_requests(path)
    result = run("--model", folder, "--batch", path)
    assert result.exit_code == 1
    assert result.stdout == ""


def test_an_image_that_cannot_be_read(folder, loaded):
    (folder / "broken.png").write_bytes((folder / "0.png").read_bytes()[:200])
    with pytest.raises(ImageError, match=r"request 7: .*broken.png cannot be read"):
        next(answer(loaded, [Request("a", (folder / "broken.png",), 7)], GREEDY))


def test_no_network(folder, monkeypatch):
    def connect(*_):
        raise AssertionError("something reached for the network")

    monkeypatch.setattr(socket.socket, "connect", connect)
    assert list(answer(load_model(folder), [Request("hello")], GREEDY))
    with pytest.raises(CheckpointError, match="nobody/model is no folder: give a local .* nothing is downloaded"):
        load_model("nobody/model")


def official(folder):
    (folder / "config.json").write_text('{"model_type": "llava_llama"}')


def truncated(folder):
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])


def no_config(folder):
    (folder / "config.json").unlink()


def no_tokenizer(folder):
    (folder / "tokenizer.json").unlink()


def adapter(folder):
    (folder / "config.json").rename(folder / "adapter_config.json")


def changed(folder, change):
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})


def lost_weight(folder):
    changed(folder, lambda tensors: tensors.pop("model.language_model.layers.0.mlp.up_proj.weight"))


def unmerged(folder):
    name = "model.language_model.layers.0.mlp.up_proj."
    changed(folder, lambda tensors: tensors.update({f"{name}base_layer.weight": tensors.pop(f"{name}weight")}))


def whole_numbers(folder, part="model.multi_modal_projector.output"):
    changed(folder, lambda tensors: tensors.update({f"{part}.weight": tensors[f"{part}.weight"].to(torch.int8)}))


def quantised(folder):
    edit(folder / "config.json", quantization_config={"quant_method": "bitsandbytes", "load_in_8bit": True})
    whole_numbers(folder)


def quantised_unsaid(folder):
    whole_numbers(folder, "lm_head")


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (official, "is of model_type 'llava_llama', not 'llava_sp': sp-fast convert makes one"),
        (truncated, "truncated or damaged"),
        (no_config, "config.json cannot be read"),
        (no_tokenizer, "cannot be loaded"),
        (adapter, "is an adapter, which is no model on its own: .* merged into"),
        (lost_weight, r"lacks model.language_model.layers.0.mlp.up_proj.weight: convert"),
        (unmerged, "base_layer.weight: adapters, .* must be merged or removed first"),
        (whole_numbers, r"quantised where it must not be, in model.multi_modal_projector.output.weight: .*left .* out"),
        (quantised, r"quantised where it must not be, in model.multi_modal_projector.output.weight: .*left .* out"),
        (quantised_unsaid, "quantised where it must not be, in lm_head.weight"),
    ],
)
def test_a_folder_that_is_no_model(folder, tmp_path, damage, message):
    for name in (
        "config.json",
        "model.safetensors",
        "generation_config.json",
        "processor_config.json",
        "tokenizer.json",
        "tokenizer_config.json",
    ):
        (tmp_path / name).write_bytes((folder / name).read_bytes())
    damage(tmp_path)
    with pytest.raises(CheckpointError, match=message):
        load_model(tmp_path)


@pytest.mark.parametrize(
    ("choice", "message"),
    [
        ({"dtype": "float16"}, "'float16' is for GPUs"),
        ({"dtype": "int8"}, "dtype='int8' is unknown; it must be 'auto' or one of float32"),
        ({"device": "cuda:7"}, "device 'cuda:7' cannot be used"),
        ({"device": "gpu"}, "device 'gpu' cannot be used"),
        ({"attention": "flash"}, "attention='flash' is unknown"),
        ({"attention": "flash_attention_2"}, "'flash_attention_2' was requested, but the model is on cpu"),
    ],
)
def test_choices_that_cannot_run(folder, choice, message):
    with pytest.raises(BackendError, match=message):
        load_model(folder, **choice)


def test_choices_of_type(folder, tmp_path):
    assert load_model(folder, dtype="bfloat16").model.dtype == torch.bfloat16
    assert load_model(folder, attention="eager").model.model.language_model.config._attn_implementation == "eager"
    half = tiny.model_of().half()
    half.save_pretrained(tmp_path)
    tiny.processor_of(half.config).save_pretrained(tmp_path)
    loaded = load_model(tmp_path)
    assert loaded.model.dtype == torch.float32
    assert "CPUs hardly multiply" in loaded.dtype_reason


def test_too_large_for_memory(folder, monkeypatch):
    real = loading.host()
    monkeypatch.setattr(loading, "host", lambda: type(real)(real.cpu, real.cores, real.total, 1000))
    with pytest.raises(ResourceError, match=r"needs 0.0 GiB for its weights, and cpu has 0.0 GiB free"):
        load_model(folder)


@pytest.mark.parametrize(
    "arguments",
    [
        ["--image", "0.png"],
        ["--prompt", "a", "--batch", "b.jsonl"],
        ["--batch", "b.jsonl", "--image", "0.png"],
        ["--prompt", "a", "--image", "missing.png"],
        ["--prompt", "a", "--temperature", "1000"],
        ["--batch", "missing.jsonl"],
    ],
)
def test_wrong_arguments(folder, arguments):
    result = run("--model", folder, *arguments)
    assert result.exit_code == 1
    assert result.stderr.startswith("sp-fast generate: ")
    assert "Traceback" not in result.stderr
