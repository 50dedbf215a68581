"""The memory estimate, from shapes alone, against what real models hold and real steps allocate."""

import json
from pathlib import Path

import pytest
import torch
from accelerate.utils import convert_to_fp32
from torch.profiler import ProfilerActivity, profile

from sp_fast.bench.memory import saved_bytes
from sp_fast.llava_sp.assemble import Assembly
from sp_fast.llava_sp.modeling import LlavaSpForConditionalGeneration
from sp_fast.projector import SPProjector
from sp_fast.training import estimate as module
from sp_fast.training.estimate import GIB, Estimate, estimate, print_estimate
from sp_fast.training.recipe import Recipe
from sp_fast.training.stage import dtype_of, part_of, prepare
from tests import tiny

TRAINED = ("pretrain", None), ("finetune", None), ("finetune", 8)

LAYERS = 2


def daily(cases, *chosen):
    """All cases, of which the daily suite has those."""
    return [case if case in chosen else pytest.param(*case, marks=pytest.mark.campaign) for case in cases]


def recipe(lora_rank=None, **changes):
    settings = {
        "output": Path("run"), "data": (Path("data.json"),), "model": Path("model"), "global_batch_size": 12,
        "batch_size": 3, "max_length": 256, "lora_rank": lora_rank,
    }  # fmt: skip
    return Recipe(**(settings | changes))


def wide(text="llama", **changes):
    widths = {"hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": LAYERS}
    return tiny.config_of(text, **(widths | changes))


def estimated(stage, settings, config, processes=1):
    """Only the configuration of an assembly is there."""
    return estimate(stage, settings, Assembly(config, None, {}, None, {}, None), processes)


def built(stage, settings, config):
    model = LlavaSpForConditionalGeneration(config).to(dtype_of(settings))
    model.model.multi_modal_projector = SPProjector(config.projector)
    return prepare(model, stage, settings).train()


def batch_of(settings, config):
    image, rows = config.image_seq_length, (settings.batch_size, settings.max_length)
    ids = torch.randint(4, tiny.VOCABULARY, rows)
    ids[:, 5 : 5 + image] = config.image_token_id
    mask = torch.ones_like(ids)
    mask[0, -7:] = 0
    labels = ids.masked_fill(ids == config.image_token_id, -100)
    pixels = torch.randn(settings.batch_size, 3, *2 * [config.vision_config.image_size])
    return {"input_ids": ids, "attention_mask": mask, "labels": labels, "pixel_values": pixels}


def loss_of(model, settings, batch):
    """As the Trainer and accelerate compute it."""
    with torch.autocast("cpu", torch.bfloat16, enabled=settings.dtype == "bfloat16"):
        outputs = model(**batch)
    return convert_to_fp32(outputs).loss


def nbytes(tensors):
    return sum(tensor.nbytes for tensor in tensors)


def held(found):
    """Of activations, the batch included, after the forward."""
    return sum(size for name, size in found.parts.items() if name.startswith(("saved", "copies")))


@pytest.mark.parametrize(("stage", "rank"), TRAINED)
def test_weights_gradients_and_states_are_exact(stage, rank):
    settings, config = recipe(rank), wide()
    found = estimated(stage, settings, config).parts
    model = built(stage, settings, config)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad])
    loss_of(model, settings, batch_of(settings, config)).backward()
    optimizer.step()
    weights = {}
    for name, parameter in model.named_parameters():
        part = "vision tower" if "vision_tower" in name else part_of(name)
        key = f"{'trained' if parameter.requires_grad else 'frozen'} {part}"
        weights[key] = weights.get(key, 0) + parameter.nbytes
    assert {name: size for name, size in found.items() if name.startswith(("frozen", "trained"))} == weights
    assert found["gradients"] == nbytes(p.grad for p in model.parameters() if p.grad is not None)
    states = [value for state in optimizer.state.values() for name, value in state.items() if name != "step"]
    assert found["AdamW's states"] == nbytes(states)


@pytest.mark.parametrize(
    ("stage", "rank", "dtype"),
    daily(
        [(*trained, dtype) for trained in TRAINED for dtype in ("bfloat16", "float32")],
        ("finetune", 8, "bfloat16"),
    ),
)
def test_saved_activations_are_what_autograd_keeps(stage, rank, dtype):
    """Each saved storage once; of the estimate, a batch's own bytes and the loss are no saved activations."""
    settings, config = recipe(rank, dtype=dtype, gradient_checkpointing=False), wide()
    model, batch = built(stage, settings, config), batch_of(settings, config)
    real = saved_bytes([*model.parameters(), *batch.values()], lambda: loss_of(model, settings, batch))
    found = held(estimated(stage, settings, config)) - nbytes(batch.values())
    assert found == pytest.approx(real, abs=1024)  # scalars, and what a mask is made of


@pytest.mark.parametrize(
    ("stage", "rank", "checkpointing", "text", "rows"),
    daily(
        [
            (*trained, again, text, rows)
            for trained in TRAINED
            for again in (True, False)
            for text, rows in (("llama", 3), ("qwen2", 3), ("llama", 1))
        ],
        ("finetune", 8, True, "llama", 3),
        ("finetune", None, False, "llama", 1),
    ),
)
def test_the_peak_is_the_allocators(stage, rank, checkpointing, text, rows):
    """The second of two steps, whose gradients are there already. Of three rows the loss is the worst moment, of one
    short row the last layers' gradients. What a kernel allocates inside of itself has no shape to be known by: here
    that is 0.1 MB, 3% of the smallest step."""
    length = {3: 256, 1: 80}[rows]
    settings = recipe(rank, gradient_checkpointing=checkpointing, batch_size=rows, max_length=length)
    config = wide(text)
    found = estimated(stage, settings, config)
    model, batch = built(stage, settings, config), batch_of(settings, config)
    loss_of(model, settings, batch).backward()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True, acc_events=True) as profiler:
        loss_of(model, settings, batch).backward()
    events = [e for e in profiler.profiler.kineto_results.events() if e.name() == "[memory]"]
    sizes = torch.tensor([e.nbytes() for e in sorted(events, key=lambda e: e.start_ns())])
    real = sizes.cumsum(0).max().item()
    expected = held(found) + found.parts["temporary"] - nbytes(batch.values())
    assert 0.999 < real / expected < 1.04


def test_eager_attention_and_longer_rows_cost_what_they_do():
    config, heads, rows = wide(num_hidden_layers=1), 4, 3
    sdpa, eager = (
        estimated("pretrain", recipe(attention=name, gradient_checkpointing=False), config)
        for name in ("auto", "eager")
    )
    scores = rows * heads * 256 * 256  # softmax in float32, and its result in bfloat16, are kept
    more = eager.parts["saved: language model"] - sdpa.parts["saved: language model"]
    assert scores * 4 < more < scores * 8
    long = estimated("pretrain", recipe(max_length=512), config)
    logits = long.parts["saved: logits and loss"] / sdpa.parts["saved: logits and loss"]
    assert logits == pytest.approx(2, rel=0.01)


def test_rows_without_room_for_an_image_have_none():
    config = tiny.config_of()
    short, long = (estimated("pretrain", recipe(max_length=config.image_seq_length + more), config) for more in (-1, 0))
    assert (short.samples, short.tokens) == (3, config.image_seq_length - 1)
    assert short.parts["saved: projector"] < long.parts["saved: projector"] / 100


def test_a_context_shorter_than_the_recipe_bounds_the_rows():
    config = tiny.config_of(max_position_embeddings=128)
    assert estimated("pretrain", recipe(max_length=2048), config).tokens == 128


def test_processes_divide_what_their_sharding_says():
    config, settings = wide(num_hidden_layers=1), recipe(8)
    one, two = (estimated("finetune", settings, config, processes) for processes in (1, 2))
    assert two.total == one.total + one.parts["gradients"]  # DDP's buckets
    assert two.sharded("none") == two
    zero2, fsdp2 = two.sharded("zero2"), two.sharded("fsdp2")
    states = one.parts["gradients"] + one.parts["AdamW's states"]
    assert zero2.total == one.total - states / 2
    weights = sum(size for name, size in one.parts.items() if name.startswith(("frozen", "trained")))
    projector = sum(p.numel() for p in SPProjector(config.projector).parameters())
    layer = weights_of_a_layer(config, 8)
    assert fsdp2.parts["gathered weights"] == 2 * 2 * max(projector, layer, tiny.VOCABULARY * 256)
    whole = one.total - states / 2 - weights / 2 + fsdp2.parts["gathered weights"]
    assert fsdp2.total == pytest.approx(whole, abs=8)  # rounded up
    assert two.sharded("zero3").parts == fsdp2.parts


def weights_of_a_layer(config, rank):
    layer = built("finetune", recipe(rank), config).get_base_model().model.language_model.layers[0]
    return sum(p.numel() for p in layer.parameters())


def test_a_warning_names_need_free_memory_and_ways_out():
    found = Estimate({"frozen language model": 3 * GIB, "temporary": 2 * GIB}, 0, 4, 2048, 1)
    assert found.check(5 * GIB) is None
    warning = found.check(5 * GIB - 1)
    for word in (
        "5.0 GiB",
        "3.0 GiB, is for frozen language model",
        "batch_size",
        "gradient_checkpointing",
        "LoRA",
        "fsdp2",
    ):
        assert word in warning


def test_it_prints_and_is_json(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "120")
    found = Estimate({"frozen language model": 3 * GIB, "gradients": GIB, "DDP's buckets": GIB}, GIB, 4, 2048, 2)
    print_estimate(found, 4 * GIB)
    out = capsys.readouterr().out
    assert all(
        word in out for word in ("4 x 2,048", "zero2", "fsdp2", "together", "5.00", "free: 4.00 GiB", "needs about")
    )
    row = next(line for line in out.splitlines() if "frozen language model" in line)
    assert [cell for cell in row.split() if cell[0].isdigit()] == ["3.00", "3.00", "1.50", "1.50"]
    assert json.loads(json.dumps(found.to_dict()))["total_bytes"] == 5 * GIB


def test_free_memory_is_of_the_machine(monkeypatch):
    assert 0 < module.free_memory() < 2**50
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (7, 9))
    assert module.free_memory() == 7


@pytest.mark.campaign
@pytest.mark.parametrize("stage", ["pretrain", "finetune"])
def test_a_7b_model(stage, capsys):
    """Vicuna 7B, CLIP ViT-L/14-336, the published projector: parameters by hand."""
    from transformers import CLIPVisionConfig, LlamaConfig

    from sp_fast.llava_sp import LlavaSpConfig
    from sp_fast.vision import CLIP_L_336

    text = LlamaConfig(hidden_size=4096, intermediate_size=11008, num_hidden_layers=32, max_position_embeddings=4096)
    config = LlavaSpConfig(
        vision_config=CLIPVisionConfig(**CLIP_L_336).to_dict(), text_config=text.to_dict(), image_token_index=32000
    )
    rank = {"pretrain": None, "finetune": 128}[stage]
    settings = recipe(rank, batch_size=16, global_batch_size=128, max_length=2048)
    found = estimated(stage, settings, config, 8)
    with capsys.disabled():
        print_estimate(found, 141 * 10**9)
    layer = 4 * 4096 * 4096 + 3 * 4096 * 11008 + 2 * 4096
    assert found.parts["frozen language model"] == 2 * (32 * layer + 2 * 32000 * 4096 + 4096)
    projector = 923_550_208
    assert found.parts["trained projector"] == 4 * projector
    lora = (rank or 0) * 32 * (4 * (4096 + 4096) + 3 * (4096 + 11008))
    assert found.parts["gradients"] == 4 * (projector + lora)
    assert found.parts["AdamW's states"] == 8 * (projector + lora)
    logits = 16 * 2048 * 32000
    assert found.parts["saved: logits and loss"] == pytest.approx(4 * logits, rel=0.01)  # log-softmax in float32
    # The loss's gradient and log-softmax's, float32, while the labels are free again; with LoRA, a layer's own after that.
    if stage == "pretrain":
        assert found.parts["temporary"] == 2 * 4 * logits - 8 * 16 * 2048
    assert found.parts["temporary"] < 3 * 4 * logits
