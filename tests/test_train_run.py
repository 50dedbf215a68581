"""Both stages on tiny models, from folders to an answer; what is trained and what is not; a run that goes on."""

import itertools
import json
import math

import peft
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModel, CLIPVisionConfig, TrainerCallback
from typer.testing import CliRunner

from sp_fast import SPProjector, SPProjectorConfig
from sp_fast.cli import app
from sp_fast.errors import SPFastError, TrainingError
from sp_fast.llava_sp.answering import Request, Settings, answer
from sp_fast.llava_sp.loading import load_model
from sp_fast.training.parts import read_parts
from sp_fast.training.run import set_up, train
from tests import tiny, tiny_training
from tests.tiny_training import Watch, quiet, recipe, start

pytestmark = pytest.mark.usefixtures("quick_runs")


@pytest.fixture(scope="module")
def two_stages(tmp_path_factory):
    """Folders of both runs and of the merged model."""
    with pytest.MonkeyPatch.context() as patch:
        tiny_training.quicken(patch)
        return trained_and_merged(tmp_path_factory.mktemp("two-stages"))


def trained_and_merged(folder):
    tiny_training.parts(folder)
    tiny_training.captions(folder / "data")
    start(folder)
    first = recipe("pretrain", folder, projector=str(folder / "start"), epochs=2)
    train("pretrain", first, quiet)
    tiny_training.data(folder / "data", 16, text_only=(1, 2, 3, 4, 5))
    second = recipe("finetune", folder, projector=str(folder / "pretrain" / "projector"), projector_learning_rate=1e-3)
    train("finetune", second, quiet)
    out = CliRunner().invoke(
        app, ["train", "merge", str(folder / "finetune"), "--out", str(folder / "merged"), "--json"]
    )
    assert out.exit_code == 0, out.output
    return folder, first, second


def tensors_of(folder):
    return load_file(folder / "model.safetensors")


def test_the_first_stage_trains_all_of_the_projector_and_nothing_else(two_stages):
    folder, _, _ = two_stages
    before, after = tensors_of(folder / "start"), tensors_of(folder / "pretrain" / "projector")
    assert before.keys() == after.keys()
    assert [name for name in before if torch.equal(before[name], after[name])] == []
    assert {path.name for path in (folder / "pretrain").iterdir() if path.is_dir()} == {"projector", "checkpoint-6"}


def test_the_second_stage_begins_with_the_whole_projector_of_the_first(two_stages):
    folder, _, second = two_stages
    given = SPProjector.from_pretrained(folder / "pretrain" / "projector").state_dict()
    trainer, _ = set_up("finetune", second, quiet)
    found = trainer.model.get_base_model().model.multi_modal_projector.state_dict()
    assert given.keys() == found.keys()
    assert all(torch.equal(given[name], found[name]) for name in given)


def test_the_second_stage_trains_every_adapter_and_all_of_the_projector(two_stages):
    folder, _, _ = two_stages
    before, after = tensors_of(folder / "pretrain" / "projector"), tensors_of(folder / "finetune" / "projector")
    assert [name for name in before if torch.equal(before[name], after[name])] == []
    adapter = load_file(folder / "finetune" / "adapter" / "adapter_model.safetensors")
    layers, linear = 2, 7
    assert len(adapter) == 2 * layers * linear
    assert all("language_model.layers" in name for name in adapter)
    assert all(tensor.count_nonzero() for tensor in adapter.values())  # B begins at zero


def test_frozen_weights_are_bit_unchanged_in_the_merged_model(two_stages):
    folder, _, second = two_stages
    merged, parts = tensors_of(folder / "merged"), read_parts(second).rest
    changed = {name for name, tensor in parts.items() if not torch.equal(tensor.load(), merged[name])}
    assert changed == {name for name in parts if "language_model.layers" in name and name.endswith("proj.weight")}


def test_the_merged_model_answers_as_the_trained_one(two_stages):
    folder, _, _ = two_stages
    loaded = load_model(folder / "merged")
    found = next(iter(answer(loaded, [Request("What?", (folder / "data" / "0.png",))], Settings(max_new_tokens=4))))
    assert found.new_tokens == 4
    assert "ASSISTANT" in loaded.processor.chat_template
    base = read_parts(two_stages[2]).build(torch.float32)
    base.model.multi_modal_projector = SPProjector.from_pretrained(folder / "finetune" / "projector")
    trained = peft.PeftModel.from_pretrained(base, folder / "finetune" / "adapter").eval()
    inputs = tiny.inputs_of(base, "USER: <image>\nWhat? ASSISTANT:", [tiny.image()])
    torch.testing.assert_close(loaded.model(**inputs).logits, trained(**inputs).logits, rtol=1e-4, atol=1e-4)


def test_a_finished_run_is_not_run_again(two_stages):
    _, first, _ = two_stages
    with pytest.raises(TrainingError, match="has finished: give another output"):
        train("pretrain", first, quiet)


def test_the_official_file_of_the_first_stage_is_taken_whole(two_stages, tmp_path):
    """The official code loads mm_projector alone from it."""
    folder, _, _ = two_stages
    tower = {**tiny.TOWERS["clip"].to_dict(), "image_size": 96}  # of 24 x 24 patches, for which it has names
    AutoModel.from_config(CLIPVisionConfig(**tower)).save_pretrained(tmp_path / "tower")
    widths = {"vision_width": 16, "spatial_width": 4, "text_width": 32}
    projector = SPProjector(SPProjectorConfig.variant("crop-dfi", **widths))
    torch.save(projector.official_state_dict(), tmp_path / "model.bin")
    parts = read_parts(
        recipe("finetune", folder, projector=str(tmp_path / "model.bin"), vision_tower=tmp_path / "tower")
    )
    found = parts.make_projector(0).state_dict()
    assert all(torch.equal(tensor, found[name]) for name, tensor in projector.state_dict().items())


def test_a_model_without_spatial_tokens_trains_on_the_same_path(tmp_path):
    tiny_training.parts(tmp_path)
    tiny_training.captions(tmp_path / "data", 8)
    first = recipe("pretrain", tmp_path, projector="mlp")
    train("pretrain", first, quiet)
    tiny_training.data(tmp_path / "data", 8, text_only=(1, 2, 3, 4))
    second = recipe("finetune", tmp_path, projector=str(tmp_path / "pretrain" / "projector"))
    train("finetune", second, quiet)
    begun = read_parts(first).make_projector(first.seed)
    assert begun.config.spatial_tokens == 0
    stages = [begun.state_dict(), *(tensors_of(tmp_path / stage / "projector") for stage in ("pretrain", "finetune"))]
    for before, after in itertools.pairwise(stages):
        assert before.keys() == after.keys()
        assert [name for name in before if torch.equal(before[name], after[name])] == []
    assert SPProjector.from_pretrained(tmp_path / "finetune" / "projector").config == begun.config


@pytest.fixture
def folder(training_folder):
    return training_folder


def trainer_of(folder, stage="finetune", **changes):
    return set_up(stage, recipe(stage, folder, projector=str(folder / "start"), **changes), quiet)[0]


def test_groups_have_the_published_learning_rates(folder):
    changes = {"learning_rate": 2e-4, "projector_learning_rate": 2e-5, "weight_decay": 0.1}
    trainer = trainer_of(folder, **changes)
    groups = trainer.create_optimizer().param_groups
    names = {id(parameter): name for name, parameter in trainer.model.named_parameters()}
    for group in groups:
        in_projector = {"multi_modal_projector" in names[id(parameter)] for parameter in group["params"]}
        assert in_projector == {group["name"] == "projector"}
        assert group["lr"] == (2e-5 if group["name"] == "projector" else 2e-4)
        assert {parameter.dim() > 1 for parameter in group["params"]} == {group["weight_decay"] == 0.1}
    together = sum(len(group["params"]) for group in groups)
    assert together == sum(parameter.requires_grad for parameter in trainer.model.parameters())


@pytest.mark.parametrize("lora_rank", [4, None], ids=["lora", "full"])
def test_what_the_second_stage_trains(folder, lora_rank):
    trainer = trainer_of(folder, lora_rank=lora_rank, dtype="bfloat16")
    trained = {name for name, parameter in trainer.model.named_parameters() if parameter.requires_grad}
    assert not any("vision_tower" in name for name in trained)
    assert sum("multi_modal_projector" in name for name in trained) == len(tensors_of(folder / "start"))
    rest = {name for name in trained if "multi_modal_projector" not in name}
    assert all(("lora_" in name) == bool(lora_rank) for name in rest)
    assert {"lm_head.weight" in name or "embed_tokens" in name for name in rest} == (
        {False} if lora_rank else {True, False}
    )
    for name, parameter in trainer.model.named_parameters():
        assert parameter.dtype == (torch.float32 if parameter.requires_grad else torch.bfloat16), name


@pytest.mark.parametrize("asked", [False, True])
def test_layers_are_computed_again_where_asked(folder, asked):
    core = trainer_of(folder, gradient_checkpointing=asked).model.base_model.model.model
    assert any(getattr(module, "gradient_checkpointing", False) for module in core.language_model.modules()) == asked
    assert not any(getattr(module, "gradient_checkpointing", False) for module in core.vision_tower.modules())


def test_all_of_the_language_model_can_be_trained(folder):
    done = recipe("finetune", folder, projector=str(folder / "start"), lora_rank=None, max_steps=2)
    train("finetune", done, quiet)
    loaded = load_model(folder / "finetune" / "model")
    before = read_parts(done).rest
    after = loaded.model.state_dict()
    changed = {name for name, tensor in before.items() if not torch.equal(tensor.load(), after[name])}
    assert changed == {name for name in before if "vision_tower" not in name}


def one_step(folder, batch_size):
    """Parameters after one step of four samples, in float64."""
    trainer = trainer_of(
        folder, output=folder / f"run-{batch_size}", batch_size=batch_size, group_by_length=False, max_steps=1,
        warmup_ratio=0, lora_dropout=0,
    )  # fmt: skip
    trainer.model.double()
    watch = Watch()
    trainer.add_callback(watch)
    trainer.train()
    found = {name: p.detach() for name, p in trainer.model.named_parameters() if p.requires_grad}
    return watch.losses[1], trainer.gradient_norms, found


def test_accumulated_gradients_equal_those_of_a_large_batch(folder):
    """Samples of several lengths: the mean is over all tokens, not over batches of them."""
    large, small = one_step(folder, 4), one_step(folder, 1)
    assert math.isclose(large[0], small[0], rel_tol=4 * torch.finfo(torch.float32).eps)  # the Trainer adds in float32
    for part, norm in large[1].items():
        torch.testing.assert_close(small[1][part], norm, rtol=1e-9, atol=0)
    for name, parameter in large[2].items():
        torch.testing.assert_close(small[2][name], parameter, rtol=1e-9, atol=1e-12)


def test_a_batch_of_text_alone_gives_the_projector_zeros(folder):
    tiny_training.data(folder / "data", 4, text_only=range(4))
    trainer = trainer_of(folder, max_steps=1)
    seen = {}

    class Gradients(TrainerCallback):
        def on_pre_optimizer_step(self, args, state, control, model, **kwargs):
            seen.update({n: p.grad.clone() for n, p in model.named_parameters() if p.requires_grad})

    trainer.add_callback(Gradients())
    trainer.train()
    of_projector = [gradient for name, gradient in seen.items() if "multi_modal_projector" in name]
    assert len(of_projector) == len(tensors_of(folder / "start"))
    assert not any(gradient.count_nonzero() for gradient in of_projector)
    assert any(gradient.count_nonzero() for gradient in seen.values())


@pytest.mark.parametrize("workers", [pytest.param(0, marks=pytest.mark.campaign), 2])
def test_an_interrupted_run_goes_on_bit_for_bit(folder, workers):
    """In the middle of the second epoch, with dropout and accumulated gradients."""
    tiny_training.data(folder / "data", 8, text_only=(1, 2))
    changes = {
        "projector": str(folder / "start"),
        "epochs": 2,
        "batch_size": 1,
        "workers": workers,
        "lora_dropout": 0.5,
    }
    through, stopped, went_on = Watch(), Watch(3), Watch()
    train("finetune", recipe("finetune", folder, output=folder / "through", **changes), quiet, [through])
    again = recipe("finetune", folder, output=folder / "stopped", **changes)
    with pytest.raises(KeyboardInterrupt):
        train("finetune", again, quiet, [stopped])
    train("finetune", again, quiet, [went_on])
    assert {**stopped.losses, **went_on.losses} == through.losses
    assert min(went_on.losses) == 4
    assert len(through.losses) == 4
    for name in ("projector/model.safetensors", "adapter/adapter_model.safetensors"):
        assert (folder / "stopped" / name).read_bytes() == (folder / "through" / name).read_bytes()


def test_a_changed_recipe_does_not_go_on(folder):
    first = recipe("finetune", folder, projector=str(folder / "start"))
    with pytest.raises(KeyboardInterrupt):
        train("finetune", first, quiet, [Watch(1)])
    changed = recipe("finetune", folder, projector=str(folder / "start"), seed=1, save_steps=7)
    with pytest.raises(TrainingError, match="seed is 1, and was 0") as raised:
        train("finetune", changed, quiet)
    assert "save_steps" not in str(raised.value)


def test_a_loss_that_is_not_finite_stops_the_run(folder):
    """With the step, the samples and the checkpoint to go on from; the step is not taken."""
    broken = recipe("finetune", folder, projector=str(folder / "start"), save_steps=1, save_total_limit=9)

    class Breaks(TrainerCallback):
        def on_step_begin(self, args, state, control, model, **kwargs):
            if state.global_step == 2:
                model.base_model.model.lm_head.weight.data.fill_(math.nan)

    with pytest.raises(TrainingError) as raised:
        train("finetune", broken, quiet, [Breaks()])
    said = str(raised.value)
    assert "step 3: the loss is not finite, on the samples sample-" in said
    assert said.count("sample-") == 4
    assert f"resume from {folder / 'finetune' / 'checkpoint-2'}" in said
    assert not (folder / "finetune" / "checkpoint-3").exists()


def test_gradients_that_are_not_finite_stop_the_run(folder):
    class Breaks(TrainerCallback):
        def on_step_begin(self, args, state, control, model, **kwargs):
            weight = next(p for n, p in model.named_parameters() if "multi_modal_projector" in n)
            weight.register_hook(lambda gradient: gradient * math.inf)

    with pytest.raises(TrainingError, match=r"step 1: the losses are finite and their gradients are not.*sample-"):
        train("finetune", recipe("finetune", folder, projector=str(folder / "start")), quiet, [Breaks()])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"projector": "crop-dif"}, "neither a file or folder nor one of crop"),
        ({"vision_tower": "nowhere"}, "nowhere"),
        ({"language_model": "nowhere"}, "nowhere"),
        ({"data": ["nowhere.json"]}, "nowhere.json"),
        ({"global_batch_size": 3}, "global_batch_size=3 is not a multiple of batch_size=2 times 1 processes"),
        ({"attention": "fast"}, "fast"),
        ({"model": "nowhere", "language_model": None, "vision_tower": None, "projector": None}, "nowhere"),
        ({"max_length": 513}, "max_length=513 is beyond the language model's context of 512"),
        ({"template": "nowhere"}, "nowhere"),
        ({"deepspeed": "zero2.json"}, "deepspeed is asked for and not installed"),
        ({"tensorboard": True}, "tensorboard is asked for and not installed"),
    ],
)
def test_what_cannot_be_used_is_named(folder, changes, message):
    with pytest.raises(SPFastError, match=message):
        train("finetune", recipe("finetune", folder, **{"projector": str(folder / "start"), **changes}), quiet)
    assert not (folder / "finetune").exists()


def test_one_process_with_several_gpus_is_refused(folder, monkeypatch):
    """The Trainer would use nn.DataParallel."""
    monkeypatch.setattr("transformers.TrainingArguments.n_gpu", 2)
    with pytest.raises(TrainingError, match="2 GPUs are visible to one process: start with accelerate launch"):
        trainer_of(folder)


def test_a_folder_of_something_else_is_not_written_to(folder):
    (folder / "finetune").mkdir()
    (folder / "finetune" / "thesis.txt").write_text("mine")
    with pytest.raises(TrainingError, match="is not empty, and holds no run"):
        train("finetune", recipe("finetune", folder, projector=str(folder / "start")), quiet)


def test_a_whole_model_can_be_trained_on(folder):
    model = tiny.model_of()
    model.save_pretrained(folder / "whole")
    tiny.processor_of(model.config).save_pretrained(folder / "whole")
    words = ["--model", folder / "whole", "--data", folder / "data" / "data.json", "--output", folder / "run"]
    words += ["--max_length", 400, "--bf16", "False", "--lora_r", 2, "--global-batch-size", 16, "--batch-size=4"]
    words += ["--workers", 0]
    out = CliRunner().invoke(app, ["train", "finetune", *map(str, words)])
    assert out.exit_code == 0, out.output
    state = json.loads((folder / "run" / "checkpoint-1" / "trainer_state.json").read_text())
    assert state["global_step"] == 1
    out = CliRunner().invoke(app, ["train", "finetune", *map(str, words)])
    assert out.exit_code == 1
    assert "has finished" in out.output
