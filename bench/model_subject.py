"""A model under measurement, in the process where it lives: its stages as runs, and their results for the gate."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import CompileConfig, LogitsProcessorList, PreTrainedModel

from sp_fast.bench.gate import GateError
from sp_fast.bench.model_cases import EXACT, LLAVA, ModelCase
from sp_fast.bench.model_counts import image_tokens, prompt_length
from sp_fast.bench.model_hooks import Clock, Prescribed, Warnings
from sp_fast.bench.model_shapes import ModelShape
from sp_fast.bench.model_weights import build_model
from sp_fast.bench.subject import poison, sampled, seeds_for, token_parts
from sp_fast.bench.timing import Run
from sp_fast.llava_sp.tower import tower_kind

JUDGED_STEPS = 4  # new tokens whose logits are judged: the prefill's, and those of decode steps
BUCKET = 64  # a compiled prompt is padded to a multiple
Stage = Callable[[], tuple[Tensor, ...]]


@dataclass(frozen=True)
class ModelJob:
    """What a worker builds. ``folder`` receives the results."""

    implementation: str
    shape: ModelShape
    dtype: torch.dtype
    device: str
    seed: int
    folder: Path

    def build(self) -> ModelSubject:
        return ModelSubject(self)


@dataclass(frozen=True)
class Prompts:
    """Of a batch: ``pixels`` ``[B, 3, size, size]``, ``ids`` ``[B, L]`` with the image in the midst of the text, and
    ``answer`` ``[B, JUDGED_STEPS]``, tokens that are fed back whatever the logits say."""

    pixels: Tensor
    ids: Tensor
    answer: Tensor


class ModelSubject:
    """One method a question that a worker is asked."""

    def __init__(self, job: ModelJob) -> None:
        self._job, self._device = job, torch.device(job.device)
        self.module = self._build()
        self._stages = {
            "tower": self._tower, "projector": self._projector, "prefill": self._prefill, "ttft": self._ttft,
            "decode": self._decode, "end_to_end": self._end_to_end,
        }  # fmt: skip
        self._setting: tuple = ()
        self._compilation: Any = None
        self._warnings = Warnings()

    def _build(self) -> PreTrainedModel:
        job = self._job
        return build_model(job.implementation, job.shape, job.dtype, self._device, job.seed)

    def inputs(self, case: ModelCase) -> tuple[Tensor, ...]:
        return (self._prompts(case, self._job.seed).pixels,)

    def forward(self, case: ModelCase) -> Stage:
        return self.run(case).timed

    def run(self, case: ModelCase) -> Run:
        """What is timed. A stage's inputs are what the model itself makes of the stage before."""
        self._set(case)
        with torch.no_grad():
            return self._stages[case.stage](case, self._prompts(case, self._job.seed))

    def results(self, case: ModelCase) -> str:
        """What the case computes, by the functions that are timed: image tokens, the logits of a few steps of
        ``generate`` with prescribed tokens, and the tokens that it chooses by itself. A seeded sample of each.

        Raises:
            GateError: a result of another shape.
        """
        self._set(case)
        poison(self._device)
        with torch.no_grad():
            found = self._sampled(case, 0)
            for seed in range(1, 1 if self._job.implementation == LLAVA else seeds_for(found)):
                more = self._sampled(case, seed)
                found = {name: torch.cat([found[name], more[name]]) for name in found}
            self._check_compiled()
            if self._job.implementation != EXACT:
                prompts = self._prompts(case, self._job.seed)
                found["greedy"] = self._new(case, self._generate(case, prompts, case.new_tokens))
        return self._save(case, found)

    def _save(self, case: ModelCase, found: dict[str, Tensor]) -> str:
        path = self._job.folder / f"{self._job.implementation}.{case.key}.safetensors"
        save_file({name: tensor.contiguous().cpu() for name, tensor in found.items()}, path)
        return str(path)

    # Stages

    def _tower(self, case: ModelCase, prompts: Prompts) -> Run:
        return _run(lambda: (self._features(prompts.pixels),))

    def _projector(self, case: ModelCase, prompts: Prompts) -> Run:
        features = self._features(prompts.pixels)
        return _run(lambda: (self.module.model.multi_modal_projector(features),))

    def _prefill(self, case: ModelCase, prompts: Prompts) -> Run:
        embeds = self._embeds(prompts.ids, self._encode(prompts.pixels))
        return _run(lambda: (self.module(inputs_embeds=embeds, use_cache=True, logits_to_keep=1).logits,))

    def _ttft(self, case: ModelCase, prompts: Prompts) -> Run:
        return _run(lambda: (self._generate(case, prompts, 1),))

    def _end_to_end(self, case: ModelCase, prompts: Prompts) -> Run:
        return _run(lambda: (self._generate(case, prompts, case.new_tokens),))

    def _decode(self, case: ModelCase, prompts: Prompts) -> Run:
        """The time between the first token of ``generate`` and its last, for each: TPOT as a user's stream shows it."""
        clock = Clock()
        timed = _run(lambda: (self._generate(case, prompts, case.new_tokens, streamer=clock),)).timed
        return Run(timed, before=clock.reset, own_ms=lambda: clock.ms_a_token(case.new_tokens))

    # Parts

    def _features(self, pixels: Tensor) -> Tensor:
        """Patch features, as the model's own code gets them: transformers' LLaVA runs the whole tower."""
        if self._job.implementation != LLAVA:
            return self.module.model.get_patch_features(pixels)
        tower, layer = self.module.model.vision_tower, self.module.config.vision_feature_layer
        hidden = tower(pixels, output_hidden_states=True).hidden_states[layer]
        return hidden[:, 1:] if tower_kind(tower.config).has_cls else hidden

    def _encode(self, pixels: Tensor) -> Tensor:
        """Image tokens ``[B, T, H]``; compiled where the model is."""
        if self._job.implementation != LLAVA:
            return self.module.model.encode_images(pixels)
        return self.module.model.multi_modal_projector(self._features(pixels))

    def _embeds(self, ids: Tensor, tokens: Tensor) -> Tensor:
        is_image = ids == self.module.config.image_token_id
        embeds = self.module.get_input_embeddings()(ids.masked_fill(is_image, 0)).to(tokens.dtype)
        return embeds.masked_scatter(is_image.unsqueeze(-1), tokens.flatten(0, 1))

    def _generate(self, case: ModelCase, prompts: Prompts, count: int, **options: Any) -> Any:
        if self._job.implementation == LLAVA and case.mode == "compiled":
            options |= {"cache_implementation": "static", "compile_config": self._transformers_own()}
        return self.module.generate(
            input_ids=prompts.ids, attention_mask=torch.ones_like(prompts.ids), pixel_values=prompts.pixels,
            max_new_tokens=count, **options,
        )  # fmt: skip

    def _transformers_own(self) -> CompileConfig:
        """What LLaVA has without this package: a static cache and a compiled decode step."""
        config = CompileConfig(
            fullgraph=True, dynamic=False, mode="reduce-overhead" if self._device.type == "cuda" else "default"
        )
        config._compile_all_devices = True
        return config

    # Results

    def _sampled(self, case: ModelCase, seed: int) -> dict[str, Tensor]:
        """Of one batch: image tokens, spatial and patch tokens apart, and logits."""
        prompts = self._prompts(case, self._job.seed + seed)
        tokens, logits = self._encode(prompts.pixels), self._logits(case, prompts)
        text, places = case.shape.config().text_config, image_tokens(case, self._job.implementation)
        steps = prompts.answer.shape[1]
        self._check("image tokens", tokens, (case.batch, places, text.hidden_size))
        self._check("logits", logits, (case.batch, steps, text.vocab_size))
        spatial = tokens.shape[1] - case.shape.config().projector.patch_tokens
        named = {**token_parts(tokens, spatial), "logits": logits}
        return {name: sampled(tensor, self._job.seed) for name, tensor in named.items()}

    def _logits(self, case: ModelCase, prompts: Prompts) -> Tensor:
        """``[B, JUDGED_STEPS, vocabulary]``: of ``generate`` as it is timed, whose choices are replaced; float64 in one
        forward."""
        steps = prompts.answer.shape[1]
        if self._job.implementation == EXACT:
            ids = torch.cat([prompts.ids, prompts.answer[:, :-1]], dim=1)
            embeds = self._embeds(ids, self._encode(prompts.pixels))
            return self.module(inputs_embeds=embeds, use_cache=False, logits_to_keep=steps).logits
        prescribed = LogitsProcessorList([Prescribed(prompts.answer)])
        options = {"logits_processor": prescribed, "output_logits": True, "return_dict_in_generate": True}
        return torch.stack(self._generate(case, prompts, steps, **options).logits, dim=1)

    def _new(self, case: ModelCase, ids: Tensor) -> Tensor:
        """The tokens that ``generate`` has added."""
        length = prompt_length(case, self._job.implementation)
        self._check("generated tokens", ids, (case.batch, length + case.new_tokens))
        return ids[:, length:]

    def _check_compiled(self) -> None:
        """`generate` runs what it cannot compile uncompiled, with a warning: no figure of the compiled model."""
        if self._compilation is not None and self._warnings.said:
            raise GateError(f"not judged: {self._warnings.said[0]}")

    def _check(self, what: str, tensor: Tensor, shape: tuple[int, ...]) -> None:
        if tuple(tensor.shape) != shape:
            raise GateError(f"accuracy: the {what} have shape {tuple(tensor.shape)}, not {shape}")

    # Settings and inputs

    def _set(self, case: ModelCase) -> None:
        """Attention and mode of the case; what an earlier one has compiled goes."""
        setting = (case.attention, case.mode, case.prompt_tokens, case.new_tokens)
        if setting == self._setting:
            return
        self._restore()
        self.module.model.language_model.set_attn_implementation(case.attention)
        if case.mode == "compiled" and self._job.implementation not in (LLAVA, EXACT):
            self._compilation = self._compiled(case)
        self._setting = setting

    def _restore(self) -> None:
        """The model as it was built."""
        self._setting = ()
        if self._compilation is not None:
            logging.getLogger("sp_fast").removeHandler(self._warnings)
            self._compilation.restore()
            self._compilation = None
            torch.compiler.reset()

    def _compiled(self, case: ModelCase) -> Any:
        """For this prompt: graphs are compiled when the results are judged, before any clock runs."""
        from sp_fast import compile_model

        length = prompt_length(case, self._job.implementation)
        context = case.shape.config().text_config.max_position_embeddings
        bucket = min((length // BUCKET + 1) * BUCKET, context - case.new_tokens)
        self._warnings = Warnings()
        logging.getLogger("sp_fast").addHandler(self._warnings)
        return compile_model(self.module, buckets=[bucket], max_new_tokens=case.new_tokens)

    def _prompts(self, case: ModelCase, seed: int) -> Prompts:
        """Seeded, the same in every process but for the number of image tokens."""
        generator = torch.Generator(self._device).manual_seed(seed)
        config, model = case.shape.config(), self.module.config
        size, words = config.vision_config.image_size, min(model.image_token_id, config.text_config.vocab_size - 1)
        shape = (case.batch, 3, size, size)
        pixels = torch.randn(shape, generator=generator, device=self._device).to(self._job.dtype)
        steps = min(JUDGED_STEPS, case.new_tokens)
        text, answer = (
            torch.randint(words, (case.batch, count), generator=generator, device=self._device)
            for count in (case.prompt_tokens, steps)
        )
        before, after = text.split([case.prompt_tokens // 2, case.prompt_tokens - case.prompt_tokens // 2], dim=1)
        places = image_tokens(case, self._job.implementation)
        image = torch.full((case.batch, places), model.image_token_id, device=self._device)
        return Prompts(pixels, torch.cat([before, image, after], dim=1), answer)


def _run(function: Stage) -> Run:
    return Run(torch.no_grad()(function))
