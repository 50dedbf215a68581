"""Recipes: the published ones, the official scripts' flags, and what is refused."""

import re
from pathlib import Path

import pytest
import yaml

from sp_fast import SPProjectorConfig
from sp_fast.errors import TrainingError
from sp_fast.training.recipe import HELP, Recipe
from sp_fast.training.record import read_run, write_recipe
from sp_fast.training.settings import RECIPES, read_options, read_recipe
from sp_fast.training.task.make import Task
from sp_fast.training.task.parts import SCALES

GIVEN = "--output run --data a.json --language-model lm --vision-tower tower"
# As in the official scripts, but for paths.
PRETRAIN = """
    --deepspeed zero2.json --model_name_or_path vicuna-7b --version plain --data_path blip_laion_cc_sbu_558k.json
    --image_folder images --vision_tower clip-vit-large-patch14-336 --mm_projector_type mlp2x_gelu
    --tune_mm_mlp_adapter True --mm_vision_select_layer -2 --mm_use_im_start_end False --mm_use_im_patch_token False
    --bf16 True --output_dir run --num_train_epochs 1 --per_device_train_batch_size 16
    --per_device_eval_batch_size 4 --gradient_accumulation_steps 2 --evaluation_strategy no --save_strategy steps
    --save_steps 1000 --save_total_limit 1 --learning_rate 1e-3 --weight_decay 0. --warmup_ratio 0.03
    --lr_scheduler_type cosine --logging_steps 1 --tf32 True --model_max_length 2048 --gradient_checkpointing True
    --dataloader_num_workers 4 --lazy_preprocess True --report_to wandb
"""
FINETUNE = """
    --lora_enable True --lora_r 128 --lora_alpha 256 --mm_projector_lr 2e-5 --deepspeed zero2.json
    --model_name_or_path vicuna-7b --version v1 --data_path llava_v1_5_mix665k.json --image_folder images
    --vision_tower clip-vit-large-patch14-336 --pretrain_mm_mlp_adapter model.bin --mm_projector_type mlp2x_gelu
    --mm_vision_select_layer -2 --mm_use_im_start_end False --mm_use_im_patch_token False --image_aspect_ratio pad
    --group_by_modality_length True --bf16 True --output_dir run --num_train_epochs 1
    --per_device_train_batch_size 16 --per_device_eval_batch_size 4 --gradient_accumulation_steps 1
    --evaluation_strategy no --save_strategy steps --save_steps 50000 --save_total_limit 1 --learning_rate 2e-4
    --weight_decay 0. --warmup_ratio 0.03 --lr_scheduler_type cosine --logging_steps 1 --tf32 True
    --model_max_length 2048 --gradient_checkpointing True --dataloader_num_workers 4 --lazy_preprocess True
    --report_to wandb
"""


def read(stage, words, config=None):
    return read_recipe(stage, config, read_options(words.split()))


@pytest.mark.parametrize(
    ("stage", "expected"),
    [
        ("pretrain", {"learning_rate": 1e-3, "global_batch_size": 256, "template": "plain", "lora_rank": None}),
        (
            "finetune",
            {"learning_rate": 2e-4, "projector_learning_rate": 2e-5, "global_batch_size": 128, "lora_rank": 128,
             "lora_alpha": 256, "template": "vicuna_v1"},
        ),
    ],
)  # fmt: skip
def test_the_shipped_recipes_are_the_papers(stage, expected):
    """Tab. 11, and the official scripts where it is silent."""
    recipe = read(stage, GIVEN)
    common = {"schedule": "cosine", "warmup_ratio": 0.03, "weight_decay": 0, "epochs": 1, "max_length": 2048}
    common |= {"dtype": "bfloat16", "gradient_checkpointing": True}
    assert {name: getattr(recipe, name) for name in expected | common} == expected | common


@pytest.mark.parametrize(
    ("stage", "flags", "expected"),
    [
        (
            "pretrain", PRETRAIN,
            {"language_model": Path("vicuna-7b"), "batch_size": 16, "gradient_accumulation_steps": 2,
             "global_batch_size": None, "learning_rate": 1e-3, "template": "plain", "save_steps": 1000,
             "deepspeed": Path("zero2.json"), "tensorboard": False, "workers": 4},
        ),
        (
            "finetune", FINETUNE,
            {"lora_rank": 128, "lora_alpha": 256, "projector_learning_rate": 2e-5, "learning_rate": 2e-4,
             "projector": "model.bin", "template": "vicuna_v1", "group_by_length": True, "max_length": 2048,
             "data": (Path("llava_v1_5_mix665k.json"),), "output": Path("run")},
        ),
    ],
)  # fmt: skip
def test_the_official_scripts_flags_are_understood(stage, flags, expected):
    recipe = read(stage, flags)
    assert {name: getattr(recipe, name) for name in expected} == expected


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--learning-rat 3", "learning-rat, which is no setting of a recipe; did you mean learning_rate?"),
        ("--epochs many", "epochs='many' where a number is expected"),
        ("--batch-size 1.5", "batch_size='1.5' where a whole number is expected"),
        ("--group-by-length perhaps", "group_by_length='perhaps' where true or false is expected"),
        ("--dtype float16", "dtype='float16' where"),
        ("--bad-samples repair", "bad_samples='repair' where"),
        ("--batch-size 0", "batch_size=0 must be 1 or more"),
        ("--learning-rate nan", "learning_rate=nan must be a number above 0"),
        ("--learning-rate -1", "learning_rate=-1.0 must be a number above 0"),
        ("--warmup-ratio 1", "warmup_ratio=1.0 must be a share"),
        ("--lora-dropout nan", "lora_dropout=nan must be a share"),
        ("--weight-decay nan", "weight_decay=nan must be 0 or more"),
        ("--global-batch-size 4 --gradient-accumulation-steps 2", "one of them"),
        ("--model whole", "give model, or language_model and vision_tower"),
        ("--schedule cosin", "schedule='cosin' where"),
        ("--seed 4294967296", "seed=4294967296 must be below"),
        ("--batch-size inf", "batch_size='inf' where a whole number is expected"),
        ("--logging-steps 7", "save_steps=500 must be a multiple of logging_steps=7"),
        ("--bf16 perhaps", "bf16=perhaps must be one of true"),
        ("--fp16 True", "fp16=True is not supported, only false: leave it out"),
        ("--image_aspect_ratio anyres", "image_aspect_ratio=anyres is not supported, only pad"),
        ("--tune_mm_mlp_adapter True", "tune_mm_mlp_adapter=true belongs to the other stage"),
        ("--version llama_2", "version=llama_2 is none of plain, v1"),
        ("--bits 4", "bits=4 is not supported"),
        ("--seed 1 --seed 2", "--seed is given twice"),
        ("--data_path b.json", "sets data twice, the second time as data_path"),
        ("--output", "output=True where a path is expected"),
        ("--seed 1 2", r"seed=\['1', '2'\] where a whole number is expected"),
    ],
)  # fmt: skip
def test_what_is_refused(words, message):
    given = GIVEN.replace("--output run", "") if words == "--output" else GIVEN
    with pytest.raises(TrainingError, match=message):
        read("finetune", f"{given} {words}")


def test_flags_that_say_the_opposite_are_not_passed_by():
    assert read("finetune", f"{GIVEN} --lora_enable False").lora_rank is None
    assert read("finetune", f"{GIVEN} --bf16 yes").dtype == "bfloat16"
    for words in ("--tune_mm_mlp_adapter False", "--lora_enable True", "--lora-rank 4", "--mm_projector_lr 1e-5"):
        with pytest.raises(TrainingError, match="and this is pretrain"):
            read("pretrain", f"{GIVEN} {words}")
    whole = "--output run --data a.json --model whole"
    for words in ("--projector pool", "--tokenizer words"):
        with pytest.raises(TrainingError, match="model has a projector and a tokenizer"):
            read("finetune", f"{whole} {words}")


def test_a_logger_that_is_not_served_is_named(caplog):
    assert read("finetune", f"{GIVEN} --report_to wandb").tensorboard is False
    assert "report_to=wandb is not served" in caplog.text
    assert read("finetune", f"{GIVEN} --report_to tensorboard").tensorboard is True


def test_a_setting_of_the_command_line_stands_above_the_files(tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text("learning_rate: 1e-4\nglobal-batch-size: 8\nseed: 3\ndata: [a.json, b.json]\n")
    recipe = read("finetune", "--output run --language-model lm --vision-tower t --seed=4", str(path))
    assert (recipe.learning_rate, recipe.global_batch_size, recipe.seed) == (1e-4, 8, 4)
    assert recipe.data == (Path("a.json"), Path("b.json"))
    instead = read("finetune", f"{GIVEN} --gradient-accumulation-steps 3", str(path))
    assert (instead.global_batch_size, instead.gradient_accumulation_steps) == (None, 3)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[1, 2]", "must hold settings"),
        ("a: [", "cannot be read as YAML"),
        ("seeds: 1", "seeds, which is no setting of a recipe; did you mean seed?"),
        ("!!python/object/apply:os.system ['true']", "cannot be read as YAML"),
        ("learning_rate:", "has no value for learning_rate"),
    ],
)
def test_a_recipe_that_cannot_be_read(tmp_path, text, message):
    path = tmp_path / "mine.yaml"
    path.write_text(text)
    with pytest.raises(TrainingError, match=message) as raised:
        read("finetune", GIVEN, str(path))
    assert str(path) in str(raised.value)


def test_what_is_missing_is_named():
    with pytest.raises(TrainingError, match="output and data must be given"):
        read("pretrain", "--language-model lm --vision-tower t")
    with pytest.raises(TrainingError, match="is no file, and none of the recipes finetune, pretrain"):
        read("pretrain", GIVEN, "no-such")
    with pytest.raises(TrainingError, match="'evaluate' is no stage: choose pretrain or finetune"):
        read("evaluate", GIVEN)


def test_the_global_batch_is_divided_among_processes():
    recipe = read("finetune", f"{GIVEN} --batch-size 4")
    assert [recipe.accumulation(processes) for processes in (1, 2, 8)] == [32, 16, 4]
    with pytest.raises(TrainingError, match="global_batch_size=128 is not a multiple of batch_size=4 times 3"):
        recipe.accumulation(3)


def test_a_run_remembers_its_recipe_wherever_it_is_read(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("start").mkdir()
    recipe = read("finetune", f"{GIVEN} --projector start --lora-rank null")
    recipe.output.mkdir()
    write_recipe("finetune", recipe)
    stage, again = read_run(tmp_path / "run")
    assert (stage, again) == ("finetune", recipe.absolute())
    assert again.projector == str(tmp_path / "start")
    assert again.lora_rank is None
    Path("pool").mkdir()
    Path("plain").mkdir()
    named = read("pretrain", f"{GIVEN} --projector pool").absolute()
    assert (named.projector, named.template) == ("pool", "plain")
    with pytest.raises(TrainingError, match="give the folder of a run"):
        read_run(tmp_path)


def test_a_projector_may_be_spelled_out(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "mine.yaml"
    path.write_text("projector:\n  kernel_sizes: [2, 4]\n  detail_kernel: null\nglobal_batch_size: 4\n")
    recipe = read_recipe("pretrain", str(path), read_options(GIVEN.split()))
    assert recipe.projector == {"kernel_sizes": [2, 4], "detail_kernel": None}
    recipe.output.mkdir()
    write_recipe("pretrain", recipe)
    assert read_run(recipe.output)[1].projector == recipe.projector
    path.write_text("projector: [2, 4]\nglobal_batch_size: 4\n")
    with pytest.raises(TrainingError, match=r"projector=\[2, 4\] where text or fields with their values is expected"):
        read_recipe("pretrain", str(path), read_options(GIVEN.split()))


@pytest.mark.parametrize("stage", ["pretrain", "finetune"])
@pytest.mark.parametrize(("scale", "attention"), [("tiny", "eager"), ("small", "auto")])
def test_the_task_s_recipes_can_be_used(stage, scale, attention):
    recipe = read_recipe(stage, f"{scale}-{stage}", read_options(GIVEN.split()))
    assert (recipe.lora_rank, recipe.accumulation(1), recipe.attention) == (None, 1, attention)


@pytest.mark.parametrize("scale", ["tiny", "small"])
def test_the_task_s_projectors_are_the_published_one_on_the_grid_of_their_tower(scale):
    recipe = read_recipe("pretrain", f"{scale}-pretrain", read_options(GIVEN.split()))
    sizes, published = SCALES[scale], SPProjectorConfig()
    widths = {"vision_width": sizes.tower[0], "text_width": sizes.language[0]}
    found = SPProjectorConfig(**recipe.projector, grid=Task().size // sizes.patch, **widths)
    assert [k * published.grid // found.grid for k in found.kernel_sizes] == list(published.kernel_sizes)
    assert found.detail_sides == published.detail_sides
    assert found.vision_width // found.spatial_width == published.vision_width // published.spatial_width


def test_shipped_recipes_and_help_name_real_settings():
    for path in RECIPES.glob("*.yaml"):
        assert yaml.safe_load(path.read_text()).keys() <= HELP.keys()
    assert HELP.keys() == set(Recipe.__dataclass_fields__)
    assert all(re.match(r"[A-Z\"].*\.$", said) for said in HELP.values())
