"""transformers' Trainer, with what training LLaVA-SP needs: groups of parameters, an order of samples that can be gone
on with, a stop where numbers are no longer finite."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import gather_object
from torch import Tensor, nn
from torch.distributed.fsdp import MixedPrecisionPolicy
from torch.nn.utils import clip_grads_with_norm_
from torch.utils.data import Sampler
from transformers import PrinterCallback, Trainer, TrainerCallback

from sp_fast.errors import TrainingError
from sp_fast.training.checkpoints import AtomicCheckpoints
from sp_fast.training.gradient_norm import gradient_norm
from sp_fast.training.meter import Meter
from sp_fast.training.record import add_left_out
from sp_fast.training.stage import parameter_groups, trained

logger = logging.getLogger("sp_fast")


class SpTrainer(AtomicCheckpoints, Trainer):
    """Trains what requires a gradient.

    Args:
        order: of the samples; begins each epoch with ``set_epoch``.
        rates: highest learning rates by part of the model.
    """

    def __init__(self, *args: Any, order: Sampler[int], rates: Mapping[str, float], **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._order, self._rates = order, rates
        self._step: list[tuple[Tensor, list[str]]] = []  # losses of this step's batches, and their samples
        self.skipped = 0  # bad samples of this process that were found when they were read
        #: gradient norms of the last step by part, before clipping
        self.gradient_norms: dict[str, Tensor] = {}
        self._meter = Meter(self.model)
        self.add_callback(_Guard(self))
        self.add_callback(self._meter)
        if self.is_fsdp_enabled and self.args.bf16:  # else gradients and the loss would be summed in bfloat16
            self.accelerator.state.fsdp_plugin.mixed_precision_policy = MixedPrecisionPolicy(
                torch.bfloat16, reduce_dtype=torch.float32, output_dtype=torch.float32
            )
        self.remove_callback(PrinterCallback)  # with disable_tqdm the Trainer prints every line of the log to stdout

    def _get_train_sampler(self, *args: Any, **kwargs: Any) -> Sampler[int]:
        return self._order

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """AdamW with a group for each part of the model."""
        if self.optimizer is None:
            module = self.model if model is None else model
            kind, settings = self.get_optimizer_cls_and_kwargs(self.args)
            groups = parameter_groups(module, self._rates, self.args.weight_decay)
            self.optimizer = kind(groups, **settings)
        return self.optimizer

    def training_step(
        self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: Tensor | int | None = None
    ) -> Tensor:
        """As the Trainer's; remembers which samples gave which loss."""
        ids, skipped = inputs.pop("ids"), inputs.pop("skipped")  # which the model would not take
        for said in skipped:
            logger.warning("skipped: %s", said)
            add_left_out(Path(self.args.output_dir), said, self.state.global_step + 1)
        self.skipped += len(skipped)
        self._meter.add(inputs)
        loss = super().training_step(model, inputs, num_items_in_batch)
        self._step.append((loss, ids))
        return loss

    def get_batch_samples(self, *args: Any, **kwargs: Any) -> tuple[list[Any], Tensor | None]:
        """As the Trainer's; a step all of whose samples were skipped divides by one, and changes next to nothing."""
        samples, labels = super().get_batch_samples(*args, **kwargs)
        return samples, None if labels is None else torch.as_tensor(labels).clamp(min=1)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """As the Trainer's; a line about steps also has the meter's figures."""
        if "loss" in logs:
            step, gather = self.state.global_step, self.accelerator.gather
            logs |= self._meter.line(step, self.gradient_norms, self.skipped, gather)
        logs.pop("total_flos", None)  # the Trainer's guess, in which frozen weights are trained
        with self._meter.paused():
            super().log(logs, start_time)

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        with self._meter.paused():
            super()._save_checkpoint(model, trial)

    def _clip_grad_norm(self, model: nn.Module) -> Tensor | float:
        """As the Trainer's, from the norms of the parts, so that those cost nothing more."""
        norm = self._gradient_norm(model)
        if not self.is_deepspeed_enabled:  # which clips in its own step
            clip_grads_with_norm_(_with_gradients(model), self.args.max_grad_norm, norm)
        return norm

    def _get_grad_norm(self, model: nn.Module, grad_norm: Tensor | float | None = None) -> Tensor | float:
        return self._gradient_norm(model) if grad_norm is None else grad_norm

    def _gradient_norm(self, model: nn.Module) -> Tensor | float:
        """Of all, and in ``gradient_norms`` of each part."""
        if self.is_deepspeed_enabled:
            return super()._get_grad_norm(model, super()._clip_grad_norm(model))
        self.gradient_norms = {
            part: gradient_norm(p.grad for p in some.values() if p.grad is not None)
            for part, some in trained(model).items()
        }
        return torch.stack(list(self.gradient_norms.values())).norm()

    def check_step(self) -> None:
        """Before the optimizer's step, on every rank.

        Raises:
            TrainingError: a loss or a gradient that is not finite, with the samples and the last good checkpoint.
        """
        step, self._step = self._step, []
        losses = torch.stack([loss for loss, _ in step])
        norms = [norm.to(losses.device) for norm in self.gradient_norms.values()]
        fine = torch.stack([losses.isfinite().all(), *(norm.isfinite() for norm in norms)]).all()
        if self.accelerator.reduce(fine.float()).item() == self.args.world_size:
            return
        whose = [ids for (_, ids), loss in zip(step, losses, strict=True) if not loss.isfinite()]
        suspects = gather_object([one for ids in whose for one in ids])
        if suspects:
            problem = f"the loss is not finite, on the samples {', '.join(map(str, suspects))}"
        else:
            ids = [one for _, ids in step for one in ids]
            problem = (
                f"the losses are finite and their gradients are not, on the samples {', '.join(ids)} of this process"
            )
        # DeepSpeed's backward takes the step itself.
        taken = "" if self.is_deepspeed_enabled else "The step was not taken."
        raise TrainingError(
            f"step {self.state.global_step + 1}: {problem}. {taken} Look at those samples (sp-fast train check-data). "
            f"If they could be mended, {self._way_on}; with other data or a lower learning rate, begin anew"
        )


class _Guard(TrainerCallback):
    """Asks before the optimizer's step whether there is anything to step by."""

    def __init__(self, trainer: SpTrainer) -> None:
        self._trainer = trainer

    def on_pre_optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        self._trainer.check_step()


def _with_gradients(model: nn.Module) -> list[nn.Parameter]:
    return [parameter for parameter in model.parameters() if parameter.grad is not None]
