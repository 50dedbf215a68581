"""A training run from its recipe to its result."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from accelerate.utils import parse_flag_from_env, set_seed
from transformers import TrainerCallback, TrainerState, TrainingArguments

from sp_fast.attention import VISION_TOWER, attention_on
from sp_fast.errors import DataError, TrainingError, first_line
from sp_fast.llava_sp.assemble import Assembly
from sp_fast.training.estimate import GIB, estimate, free_memory
from sp_fast.training.examples import Collator
from sp_fast.training.fingerprint import fingerprint
from sp_fast.training.log_file import LogFile
from sp_fast.training.parts import read_examples, read_parts
from sp_fast.training.recipe import Recipe
from sp_fast.training.record import LEFT_OUT, check_output, the_only_one, write_left_out, write_recipe
from sp_fast.training.result import trained_tensors, write_result
from sp_fast.training.run_folder import checkpoints_of
from sp_fast.training.sampling import OrderSampler
from sp_fast.training.stage import dtype_of, learning_rates, prepare
from sp_fast.training.trainer import SpTrainer


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
    trainer, assembly = set_up(stage, recipe, say, [_Record(stage, recipe), LogFile(recipe.output), *callbacks])
    with the_only_one(recipe.output) if state.is_main_process else nullcontext():
        state.wait_for_everyone()
        with _of_workers():
            trainer.train(resume_from_checkpoint=True if checkpoints_of(recipe.output) else None)
        tensors = trained_tensors(trainer.model, keep=state.is_main_process)
        written = []
        if state.is_main_process:
            model = trainer.accelerator.unwrap_model(trainer.model)
            written = write_result(recipe, model, tensors, assembly, trainer.fingerprint["frozen weights"])
        state.wait_for_everyone()
    return written


class _Record(TrainerCallback):
    """Writes down what a run begins with; of one that goes on, once its checkpoint has been accepted."""

    def __init__(self, stage: str, recipe: Recipe) -> None:
        self._stage, self._recipe = stage, recipe

    def on_train_begin(self, args: Any, state: TrainerState, control: Any, **kwargs: Any) -> None:
        if state.is_world_process_zero:
            write_recipe(self._stage, self._recipe)
            if not state.global_step:  # later ones have been added since
                write_left_out(self._recipe.output, kwargs["train_dataloader"].dataset.bad)


@contextmanager
def _of_workers() -> Iterator[None]:
    """What a process that reads data says is wrapped into its traceback: back to what it says."""
    try:
        yield
    except DataError as error:
        raise DataError(str(error).rpartition(f"{DataError.__module__}.{DataError.__name__}: ")[2].strip()) from error


def set_up(
    stage: str, recipe: Recipe, say: Callable[[str], object], callbacks: Sequence[TrainerCallback] = ()
) -> tuple[SpTrainer, Assembly]:
    """Everything that a run needs, before its first step."""
    state = PartialState(cpu=not torch.cuda.is_available())
    accumulation = recipe.accumulation(state.num_processes)
    settings = arguments(recipe, accumulation, state.device)
    assembly = read_parts(recipe)
    if state.is_main_process:
        _say_memory(stage, recipe, assembly, state.num_processes, say)
    say("looking through the data")
    examples = read_examples(recipe, assembly)
    if not len(examples):
        raise DataError(f"none of {len(examples.bad)} samples can be used; the first: {examples.bad[0]}")
    said = fingerprint(stage, recipe, assembly, len(examples))
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
        args=settings,
        train_dataset=examples,
        data_collator=Collator(assembly.processor.tokenizer.pad_token_id, assembly.config.vision_config.image_size),
        processing_class=assembly.processor,
        order=order,
        rates=learning_rates(stage, recipe),
        callbacks=list(callbacks),
    )
    trainer.fingerprint = said
    return trainer, assembly


def _say_memory(stage: str, recipe: Recipe, assembly: Assembly, processes: int, say: Callable[[str], object]) -> None:
    """Before anything is loaded."""
    found = estimate(stage, recipe, assembly, processes)
    is_divided = recipe.deepspeed or any(map(parse_flag_from_env, ("ACCELERATE_USE_FSDP", "ACCELERATE_USE_DEEPSPEED")))
    say(f"about {found.total / GIB:,.2f} GiB a process, by estimate: sp-fast train estimate shows the parts")
    warning = found.check(free_memory())
    if warning is not None and not is_divided:
        say(f"warning: {warning}")


def arguments(recipe: Recipe, accumulation: int, device: torch.device) -> TrainingArguments:
    """transformers' own, of a recipe.

    Raises:
        TrainingError: settings that transformers does not take, or one process with several GPUs, to which it would
            give parts of a batch.
    """
    # A launcher's configuration may say otherwise, and would hold.
    os.environ["ACCELERATE_MIXED_PRECISION"] = "bf16" if recipe.dtype == "bfloat16" else "no"
    try:
        found = _arguments(recipe, accumulation, on_cpu=device.type == "cpu")
    except (ValueError, ImportError) as error:
        raise TrainingError(f"transformers refuses these settings: {first_line(error)}") from error
    if found.n_gpu > 1:  # with nn.DataParallel, which would tear images from their prompts
        raise TrainingError(
            f"{found.n_gpu} GPUs are visible to one process: start with accelerate launch --config_file "
            "training/launch/multi_gpu.yaml -m sp_fast.cli train ..., or leave one visible: CUDA_VISIBLE_DEVICES=0"
        )
    return found


def _arguments(recipe: Recipe, accumulation: int, on_cpu: bool) -> TrainingArguments:
    return TrainingArguments(
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


def _check_packages(recipe: Recipe) -> None:
    for name, wanted in (("tensorboard", recipe.tensorboard), ("deepspeed", recipe.deepspeed is not None)):
        if wanted and importlib.util.find_spec(name) is None:
            raise TrainingError(f"{name} is asked for and not installed: pip install {name}, or leave the setting out")
    if recipe.deepspeed is not None and not recipe.deepspeed.is_file():
        raise TrainingError(f"deepspeed={recipe.deepspeed} is no file: give DeepSpeed's JSON configuration")
