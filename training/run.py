"""A training run from its recipe to its result."""

from __future__ import annotations

import fcntl
import hashlib
import importlib.util
import json
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import yaml
from accelerate import PartialState
from accelerate.utils import parse_flag_from_env, set_seed
from transformers import TrainerCallback, TrainingArguments

from sp_fast.attention import VISION_TOWER, attention_on
from sp_fast.errors import DataError, TrainingError, first_line
from sp_fast.llava_sp.assemble import Assembly, assemble, disassemble
from sp_fast.training.encoding import Encoder
from sp_fast.training.estimate import GIB, estimate, free_memory
from sp_fast.training.examples import BadSample, Collator, Examples
from sp_fast.training.log_file import LogFile
from sp_fast.training.recipe import Recipe
from sp_fast.training.result import FINISHED, trained_tensors, write_result
from sp_fast.training.sampling import OrderSampler
from sp_fast.training.settings import settings
from sp_fast.training.stage import dtype_of, learning_rates, prepare
from sp_fast.training.trainer import SpTrainer
from sp_fast.variants import VARIANTS

RECIPE_FILE, LEFT_OUT = "recipe.yaml", "left_out.jsonl"
_COMPARED = 256  # numbers of each frozen tensor
# Of a recipe, what may change between an interruption and going on; paths are told by their contents.
_FREE = {
    "output", "workers", "logging_steps", "save_steps", "save_total_limit", "tensorboard",
    "data", "image_folder", "model", "language_model", "vision_tower", "projector", "tokenizer", "template",
    "deepspeed",
}  # fmt: skip


def train(
    stage: str, recipe: Recipe, say: Callable[[str], object], callbacks: Sequence[TrainerCallback] = ()
) -> list[Path]:
    """Trains, or goes on from the newest whole checkpoint of the run's folder; returns what was written.

    Args:
        say: is told what happens, on the main process.

    Raises:
        SPFastError: parts, data or settings that cannot be used; a run that cannot go on.
    """
    state = PartialState(cpu=not torch.cuda.is_available())
    say = say if state.is_main_process else lambda text: None
    check_output(recipe.output)
    _check_packages(recipe)
    trainer, assembly = set_up(stage, recipe, say, [LogFile(recipe.output), *callbacks])
    with _the_only_one(recipe.output) if state.is_main_process else nullcontext():
        if state.is_main_process:
            write_recipe(stage, recipe)
            _write_left_out(recipe.output / LEFT_OUT, trainer.train_dataset.bad)
        state.wait_for_everyone()
        with _of_workers():
            trainer.train(resume_from_checkpoint=True if any(recipe.output.glob("checkpoint-*")) else None)
        tensors = trained_tensors(trainer.model)
        written = []
        if state.is_main_process:
            written = write_result(recipe.output, trainer.accelerator.unwrap_model(trainer.model), tensors, assembly)
        state.wait_for_everyone()
    return written


@contextmanager
def _of_workers() -> Iterator[None]:
    """What a process that reads data says is wrapped into its traceback: back to what it says."""
    try:
        yield
    except DataError as error:
        raise DataError(str(error).rpartition(f"{DataError.__module__}.{DataError.__name__}: ")[2].strip()) from error


@contextmanager
def _the_only_one(run: Path) -> Iterator[None]:
    """Makes the folder, and keeps another process from training in it; the system forgets it with this process.

    Raises:
        TrainingError: another one does.
    """
    try:
        run.mkdir(parents=True, exist_ok=True)
        folder = os.open(run, os.O_RDONLY)
    except OSError as error:
        raise TrainingError(f"{run} cannot be written ({error.strerror}): give another output") from error
    try:
        _lock(folder, run)
        yield
    finally:
        os.close(folder)


def _lock(folder: int, run: Path) -> None:
    try:
        fcntl.flock(folder, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        raise TrainingError(f"another process is training in {run}: wait for it, or give another output") from error


def set_up(
    stage: str, recipe: Recipe, say: Callable[[str], object], callbacks: Sequence[TrainerCallback] = ()
) -> tuple[SpTrainer, Assembly]:
    """Everything that a run needs, before its first step."""
    state = PartialState(cpu=not torch.cuda.is_available())
    accumulation = recipe.accumulation(state.num_processes)
    assembly = read_parts(recipe)
    if state.is_main_process:
        _say_memory(stage, recipe, assembly, state.num_processes, say)
    examples = read_examples(recipe, assembly)
    say(f"{len(examples):,} samples; {len(examples.bad):,} are left out" + f", see {LEFT_OUT}" * bool(examples.bad))
    dtype = dtype_of(recipe)
    attention = attention_on(recipe.attention, state.device, dtype)
    say(f"{state.num_processes} x {state.device.type}, attention {attention.name} ({attention.reason})")
    set_seed(recipe.seed)  # of LoRA's first weights, the same everywhere
    names = {"text_config": attention.name, "vision_config": VISION_TOWER.name}
    model = prepare(assembly.build(dtype, names, recipe.seed), stage, recipe)
    order = OrderSampler(
        examples.sizes, examples.has_images, recipe.batch_size * accumulation * state.num_processes, recipe.seed,
        recipe.group_by_length,
    )  # fmt: skip
    trainer = SpTrainer(
        model=model,
        args=arguments(recipe, accumulation, state.device),
        train_dataset=examples,
        data_collator=Collator(assembly.processor.tokenizer.pad_token_id, assembly.config.vision_config.image_size),
        processing_class=assembly.processor,
        order=order,
        rates=learning_rates(stage, recipe),
        callbacks=list(callbacks),
    )
    trainer.fingerprint = _fingerprint(stage, recipe, assembly, len(examples))
    return trainer, assembly


def _say_memory(stage: str, recipe: Recipe, assembly: Assembly, processes: int, say: Callable[[str], object]) -> None:
    """Before anything is loaded."""
    found, is_divided = estimate(stage, recipe, assembly, processes), parse_flag_from_env("ACCELERATE_USE_FSDP")
    say(f"about {found.total / GIB:,.2f} GiB a process, by estimate: sp-fast train estimate shows the parts")
    warning = found.check(free_memory())
    if warning is not None and not is_divided and not recipe.deepspeed:
        say(f"warning: {warning}")


def read_parts(recipe: Recipe) -> Assembly:
    """The model's parts, unread. Raises CheckpointError or ConfigError where they do not fit."""
    if recipe.model is not None:
        return disassemble(recipe.model, recipe.template)
    projector: str | Path = recipe.projector if recipe.projector in VARIANTS else Path(recipe.projector)
    if isinstance(projector, Path) and not projector.exists():
        raise TrainingError(
            f"projector={recipe.projector} is neither a file or folder nor one of {', '.join(VARIANTS)}"
        )
    return assemble(
        recipe.language_model, recipe.vision_tower, projector, tokenizer=recipe.tokenizer, template=recipe.template
    )


def read_examples(recipe: Recipe, assembly: Assembly, progress: Callable[[int, int], None] | None = None) -> Examples:
    """The data. Raises DataError for samples that cannot be used, unless the recipe skips them."""
    encoder = Encoder(assembly.processor, None, recipe.max_length)
    folder = recipe.image_folder or recipe.data[0].parent
    return Examples(recipe.data, folder, encoder, recipe.bad_samples, progress)


def arguments(recipe: Recipe, accumulation: int, device: torch.device) -> TrainingArguments:
    """transformers' own, of a recipe. Raises TrainingError where it would put one batch on several GPUs."""
    on_cpu = device.type == "cpu"
    found = TrainingArguments(
        output_dir=str(recipe.output),
        per_device_train_batch_size=recipe.batch_size,
        gradient_accumulation_steps=accumulation,
        num_train_epochs=recipe.epochs,
        max_steps=recipe.max_steps or -1,
        learning_rate=recipe.learning_rate,
        weight_decay=recipe.weight_decay,
        warmup_steps=recipe.warmup_ratio,  # below 1 it is a share
        lr_scheduler_type=recipe.schedule,
        max_grad_norm=recipe.max_grad_norm,
        bf16=recipe.dtype == "bfloat16",
        seed=recipe.seed,
        optim="adamw_torch_fused",
        use_cpu=on_cpu,
        dataloader_pin_memory=not on_cpu,
        dataloader_num_workers=recipe.workers,
        remove_unused_columns=False,
        label_names=["labels"],
        ddp_find_unused_parameters=False,  # a batch of text alone gives the projector a gradient of zeros
        deepspeed=str(recipe.deepspeed) if recipe.deepspeed else None,
        logging_steps=recipe.logging_steps,
        logging_nan_inf_filter=False,
        save_strategy="steps",
        save_steps=recipe.save_steps,
        save_total_limit=recipe.save_total_limit,
        report_to=["tensorboard"] if recipe.tensorboard else [],
        disable_tqdm=True,
    )
    if found.n_gpu > 1:  # with nn.DataParallel, which would tear images from their prompts
        raise TrainingError(
            f"{found.n_gpu} GPUs are visible to one process: start with accelerate launch --config_file "
            "training/launch/multi_gpu.yaml -m sp_fast.cli train ..., or leave one visible: CUDA_VISIBLE_DEVICES=0"
        )
    return found


def _check_packages(recipe: Recipe) -> None:
    for name, wanted in (("tensorboard", recipe.tensorboard), ("deepspeed", recipe.deepspeed is not None)):
        if wanted and importlib.util.find_spec(name) is None:
            raise TrainingError(f"{name} is asked for and not installed: pip install {name}, or leave the setting out")
    if recipe.deepspeed is not None and not recipe.deepspeed.is_file():
        raise TrainingError(f"deepspeed={recipe.deepspeed} is no file: give DeepSpeed's JSON configuration")


def check_output(run: Path) -> None:
    """Raises TrainingError for a folder that is no run's to go on with."""
    if run.exists() and not run.is_dir():
        raise TrainingError(f"{run} is there and is no folder: give another output")
    if (run / FINISHED).exists():
        raise TrainingError(f"{run} holds a run that has finished: give another output")
    if run.is_dir() and any(run.iterdir()) and not (run / RECIPE_FILE).is_file():
        raise TrainingError(f"{run} is not empty, and holds no run to go on with: give another output")


def write_recipe(stage: str, recipe: Recipe) -> None:
    """Into the run's folder, what it was started with; ``read_run`` reads it. Paths become absolute."""
    values = {"stage": stage, **recipe.absolute().to_dict()}
    (recipe.output / RECIPE_FILE).write_text(yaml.safe_dump(values, sort_keys=False), encoding="utf-8")


def _write_left_out(path: Path, bad: Sequence[BadSample]) -> None:
    lines = [json.dumps(asdict(one), ensure_ascii=False) + "\n" for one in bad]
    path.write_text("".join(lines), encoding="utf-8", errors="backslashreplace")


def read_run(run: Path) -> tuple[str, Recipe]:
    """The stage and the recipe of a run's folder. Raises TrainingError where there is none."""
    path = run / RECIPE_FILE
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
        stage = values.pop("stage")
    except (OSError, yaml.YAMLError, AttributeError, KeyError) as error:
        raise TrainingError(f"{path} cannot be read ({first_line(error)}): give the folder of a run") from error
    return stage, Recipe(**settings(stage, values, str(path)))


def _fingerprint(stage: str, recipe: Recipe, assembly: Assembly, samples: int) -> dict[str, Any]:
    """What a run that goes on has to have in common with its beginning; files by their contents."""
    values = {name: value for name, value in recipe.to_dict().items() if name not in _FREE}
    words = str(assembly.processor.chat_template).encode()
    return {
        "stage": stage, **values, "samples": samples, "data": {path.name: _hash(path) for path in recipe.data},
        "frozen weights": _hash_of_weights(assembly), "template": hashlib.sha256(words).hexdigest()[:16],
    }  # fmt: skip


def _hash_of_weights(assembly: Assembly) -> str:
    """Of the beginning of every tensor: that tells models apart, and reading all of them would take a minute."""
    found = hashlib.sha256()
    for name, tensor in sorted(assembly.rest.items()):
        first = tensor.load().flatten()[:_COMPARED].float().numpy()
        found.update(repr((name, tensor.shape, str(tensor.dtype))).encode() + first.tobytes())
    return found.hexdigest()[:16]


def _hash(path: Path) -> str | None:
    if not path.is_file():
        return None  # a folder of tables, of which the number of samples is known
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()[:16]
