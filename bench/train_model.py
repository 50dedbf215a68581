"""A model with LoRA on its language model and a trained projector, in its process: one training step."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from peft import LoraConfig, inject_adapter_in_model
from torch import Tensor
from transformers import PreTrainedModel

from sp_fast.bench import implementations
from sp_fast.bench.model_cases import EXACT, SP_FAST, SP_REFERENCE
from sp_fast.bench.model_subject import ModelJob, ModelSubject, Prompts
from sp_fast.bench.model_weights import base_model, put_projector, widen_parts
from sp_fast.bench.subject import gradients, poison, sampled
from sp_fast.bench.timing import Run
from sp_fast.bench.train_cases import ADAMW, LORA_ALPHA, LORA_RANK, LORA_TARGETS, MODES, ModelStep
from sp_fast.bench.train_step import Shadow, step_run
from sp_fast.bench.train_subject import JUDGED_STEPS
from sp_fast.bench.weights import random_tensor

PROJECTORS = {
    SP_FAST: implementations.OURS,
    SP_REFERENCE: implementations.YARDSTICK,
    EXACT: implementations.EXACT,
}
IGNORED = -100  # a label that is not supervised
LORA_SAMPLED = 2**14  # elements compared of one adapter, of which there are hundreds


@dataclass(frozen=True)
class ModelStepJob(ModelJob):
    """What a worker builds. Steps move the weights: every case begins with its own."""

    case: str = ""  # its key

    def build(self) -> ModelStepSubject:
        return ModelStepSubject(self)


class ModelStepSubject(ModelSubject):
    """A model with its optimizer, as transformers and PEFT train it."""

    def _build(self) -> PreTrainedModel:
        """Tower and language model are frozen, but for adapters, none of which is zero: all have a gradient."""
        job = self._job
        model, weights = base_model(job.shape, job.dtype, self._device, job.seed)
        model.requires_grad_(False)
        self._implementation = put_projector(model, PROJECTORS[job.implementation], job.shape, weights, self._device)
        if job.implementation == EXACT:
            widen_parts(model)
        lora = LoraConfig(r=LORA_RANK, lora_alpha=LORA_ALPHA, lora_dropout=0.0, target_modules=LORA_TARGETS)
        projector = [p for p in self._implementation.module.parameters() if p.requires_grad]
        inject_adapter_in_model(lora, model)
        self._adapters = {name: p for name, p in model.named_parameters() if "lora_" in name}
        with torch.no_grad():
            for name, adapter in self._adapters.items():
                adapter.copy_(random_tensor(name, tuple(adapter.shape), job.seed, self._device) * 0.1)
        for module in model.modules():
            if job.implementation == EXACT and hasattr(module, "lora_A"):
                module.lora_A.double()
                module.lora_B.double()
        for parameter in projector:
            parameter.requires_grad_(True)
        groups = [{"params": list(self._adapters.values())}, {"params": projector}]
        self.optimizer = torch.optim.AdamW(groups, fused=True, **ADAMW)
        return model.train()

    def forward(self, case: ModelStep) -> Callable[[], tuple[Tensor, ...]]:
        """The model's own: pixels and ids to the loss."""
        self._set(case)
        prompts = self._prompts(case, self._job.seed)
        return lambda: (self._call(prompts).loss,)

    def run(self, case: ModelStep) -> Run:
        """A whole step, its gradients held until the next begins."""
        return step_run(self.optimizer, self.forward(case), lambda outputs: outputs[0].backward(), self._device)

    def results(self, case: ModelStep) -> str:
        """Logits and gradients of the first of a few steps, and what the steps made of the parameters beside what AdamW
        makes of them. A seeded sample of each."""
        self._set(case)
        poison(self._device)
        found: dict[str, Tensor] = {}
        exact, seed = self._job.implementation == EXACT, self._job.seed
        for step in range(1 if exact else JUDGED_STEPS):
            self.optimizer.zero_grad()
            prompts = self._prompts(case, seed + step)
            loss, logits = self._exact_loss(prompts) if exact else self._call(prompts).to_tuple()[:2]
            loss.backward()
            if step == 0:
                found |= {"logits": sampled(logits, seed), **_together(gradients(self._implementation, seed))}
                found |= self._adapter_gradients()
            if not exact:
                trained = sorted(self._implementation.gradient_keys())
                if step == 0:
                    views = {key: self._implementation.parameter(key) for key in trained}
                    shadow = Shadow(views | self._adapters, seed, LORA_SAMPLED)
                held = {key: self._implementation.gradient(key) for key in trained}
                shadow.step(held | {name: p.grad for name, p in self._adapters.items()})
                self.optimizer.step()
        if not exact:
            found |= shadow.results(_place)
        self.optimizer.zero_grad()
        return self._save(case, found)

    def _call(self, prompts: Prompts) -> object:
        return self.module(
            input_ids=prompts.ids, pixel_values=prompts.pixels, attention_mask=torch.ones_like(prompts.ids),
            labels=self._labels(prompts.ids), use_cache=False,
        )  # fmt: skip

    def _exact_loss(self, prompts: Prompts) -> tuple[Tensor, Tensor]:
        """The same in float64: transformers would round image tokens to the vocabulary's type and logits to float32."""
        embeds = self._embeds(prompts.ids, self._encode(prompts.pixels))
        logits = self.module(inputs_embeds=embeds, use_cache=False).logits
        labels = self._labels(prompts.ids)[:, 1:]
        return F.cross_entropy(logits[:, :-1].flatten(0, 1), labels.flatten(), ignore_index=IGNORED), logits

    def _labels(self, ids: Tensor) -> Tensor:
        """The text after the image is supervised."""
        is_image = ids == self.module.config.image_token_id
        after = is_image.flip(1).cumsum(1).flip(1) == 0
        return ids.masked_fill(~after, IGNORED)

    def _adapter_gradients(self) -> dict[str, Tensor]:
        """By the kind of layer that is adapted."""
        found: dict[str, list[Tensor]] = {}
        for name, adapter in self._adapters.items():
            found.setdefault(f"grad.{_place(name)}", []).append(sampled(adapter.grad, self._job.seed, LORA_SAMPLED))
        return {name: torch.cat(parts) for name, parts in found.items()}

    def _set(self, case: ModelStep) -> None:
        super()._set(case)
        if case.mode == MODES[1]:
            self.module.gradient_checkpointing_enable({"use_reentrant": False})


def _together(found: dict[str, Tensor]) -> dict[str, Tensor]:
    """Gradients with those of the SFE's convolutions as one: of an image each has one output, so all elements of its
    gradient are multiples of D numbers, on so few of which equal implementations differ by chance."""
    covering = [name for name in found if re.fullmatch(r"grad\.conv_\d+", name)]
    rest = {name: gradient for name, gradient in found.items() if name not in covering}
    return rest | ({"grad.conv": torch.cat([found[name] for name in covering])} if covering else {})


def _place(name: str) -> str:
    """Of an adapter, the layer's name and the factor's; of a projector's tensor, its official module."""
    adapted = re.search(r"(\w+)\.(lora_[AB])\.", name)
    return ".".join(adapted.groups()) if adapted else name.split(".")[0]
