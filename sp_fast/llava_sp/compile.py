"""compile_model: generation as three compiled regions, each of few shapes.

    tower and projector    pixels -> image tokens; one graph for each number of images
    prefill                the language model on a prompt that is padded on the left to one of a few lengths
    decode                 the whole model on one token and a static cache; a CUDA graph on a GPU

Everything between them stays Python: tokens are chosen, streamed and stopped by transformers' own ``generate``.
"""

from __future__ import annotations

import bisect
import contextlib
import copy
import logging
import sys
import weakref
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch._dynamo.callback import CallbackTrigger, callback_handler
from transformers import CompileConfig, StaticCache

from sp_fast.errors import ConfigError
from sp_fast.llava_sp.modeling import LlavaSpForConditionalGeneration
from sp_fast.llava_sp.unpadded import unpadded

logger = logging.getLogger("sp_fast")

ENCODE, PREFILL, DECODE, PLAIN = "tower and projector", "prefill", "decode", "uncompiled"
BUCKET_STEP, LARGEST_BUCKET = 64, 2048
MOST_GRAPHS = 64  # of one region: torch's own limit of 8 is fewer than lengths times batch sizes
WARM_UP_TOKENS = 3  # one from the prefill, one that compiles the decode step, one that replays it
# What generate may be told, by its caller or a generation config, with the value that runs compiled: one answer a
# prompt, greedy or sampled, from a cache that is never reordered, and nothing that outlives a graph's next replay.
COMPILED = {
    "num_beams": 1, "num_return_sequences": 1, "use_cache": True, "output_hidden_states": False,
    "output_attentions": False, "past_key_values": None, "inputs_embeds": None, "assistant_model": None,
    "cache_implementation": None, "penalty_alpha": None, "dola_layers": None, "prompt_lookup_num_tokens": None,
    "prefill_chunk_size": None, "guidance_scale": None, "custom_generate": None, "compile_config": None,
}  # fmt: skip


def compile_model(
    model: LlavaSpForConditionalGeneration,
    *,
    buckets: Sequence[int] | None = None,
    max_new_tokens: int = 256,
    mode: str | None = None,
    backend: str = "inductor",
) -> Compilation:
    """Makes ``model.generate`` run compiled, with the same tokens; ``restore()`` of what is returned takes it back.

    Each graph is compiled when it is first needed, or by ``warm_up``. A call that does not fit (a prompt beyond the
    largest bucket, more new tokens, beams) runs as it would have before, and says so once.

    Args:
        model: for inference, on its device and in its dtype.
        buckets: lengths that shorter prompts are padded to, image tokens included. Default: from one image and a line
            of text, doubling, to 2,048 or the context.
        max_new_tokens: the most that one call may ask for; with the largest bucket, the length of the static cache.
        mode: of torch.compile. Default: "reduce-overhead" on a GPU, which captures CUDA graphs, else "default".
        backend: of torch.compile.

    Raises:
        ConfigError: another model, one that is compiled already, one with a flash package's attention (which cannot
            read a static cache within a graph), or lengths beyond its context or sliding window.
    """
    if not isinstance(model, LlavaSpForConditionalGeneration):
        raise ConfigError(
            f"compile_model takes a LlavaSpForConditionalGeneration, not a {type(model).__name__}: of a model that "
            "PEFT wrapped, merge the adapters first (merge_and_unload())"
        )
    if "generate" in vars(model):
        raise ConfigError("the model is compiled already: call restore() of what compile_model returned first")
    attention = model.model.language_model.config._attn_implementation
    if attention not in ("sdpa", "eager"):
        raise ConfigError(
            f"the language model's attention is {attention!r}, which breaks the graph on a static cache: load the "
            "model with attn_implementation='sdpa' to compile it, which has torch's own flash kernels"
        )
    if len({str(place) for place in getattr(model, "hf_device_map", {}).values()}) > 1:
        raise ConfigError("the model is spread over several devices, and a static cache is on one: load it on one")
    context = min(model.config.context, getattr(model.config.text_config, "sliding_window", None) or sys.maxsize)
    buckets = tuple(sorted(set(buckets))) if buckets else _default_buckets(model, context - max_new_tokens)
    if not buckets or buckets[0] < 1 or max_new_tokens < 1 or buckets[-1] + max_new_tokens > context:
        raise ConfigError(
            f"buckets={buckets} and max_new_tokens={max_new_tokens} must be positive and together fit the language "
            f"model's context or sliding window of {context}"
        )
    mode = mode or ("reduce-overhead" if model.device.type == "cuda" else "default")
    return Compilation(model, buckets, max_new_tokens, mode, backend)


def _default_buckets(model: LlavaSpForConditionalGeneration, most: int) -> tuple[int, ...]:
    length = (model.config.image_seq_length + 2 * BUCKET_STEP - 1) // BUCKET_STEP * BUCKET_STEP
    found = []
    while length < min(most, LARGEST_BUCKET):
        found.append(length)
        length *= 2
    return (*found, min(most, LARGEST_BUCKET))


class Compilation:
    """What ``compile_model`` did to a model, what was compiled since, and the way back.

    A prompt is always shorter than its bucket, so that there is always a mask, and one graph serves a bucket.

    ``graphs`` counts compilations by region; ``recompilations`` those after the last ``warm_up``, which cost a user's
    call seconds.
    """

    def __init__(
        self,
        model: LlavaSpForConditionalGeneration,
        buckets: tuple[int, ...],
        max_new_tokens: int,
        mode: str,
        backend: str,
    ) -> None:
        self.buckets, self.max_new_tokens = buckets, max_new_tokens
        self.graphs: Counter[str] = Counter()
        self._warm: Counter[str] = Counter()
        self._region: str | None = None
        self._model, self._caches = model, {}
        self._said: set[str] = set()
        self._shapes: set[tuple[int, ...]] = set()  # of images
        settings = {"fullgraph": True, "mode": mode, "backend": backend}
        # A prefill is long enough to hide its launches, and each CUDA graph of it would hold its own memory.
        prefill = {**settings, "mode": "default"} if mode == "reduce-overhead" else settings
        core = model.model
        places = (model, "generate"), (core, "encode_images"), (core.language_model, "forward")
        self._before = [(owner, name, vars(owner).get(name)) for owner, name in places]
        self._generate = model.generate
        self._encode = torch.compile(core.encode_images, dynamic=False, **settings)
        self._plain_prefill = core.language_model.forward
        self._prefill = torch.compile(self._plain_prefill, dynamic=False, **prefill)
        self._decode = CompileConfig(**settings, dynamic=False)
        self._decode._compile_all_devices = True
        model.generate, core.encode_images = self.generate, self._encode_images
        core.language_model.forward = self._language_model
        on_compile = _counting(weakref.ref(self))
        callback_handler.register_start_callback(on_compile)
        self._stop_counting = weakref.finalize(self, _stop, on_compile)

    @property
    def recompilations(self) -> Counter[str]:
        """Compilations since the last ``warm_up``, by region."""
        return self.graphs - self._warm

    def report(self) -> dict[str, Any]:
        """Counts, for a log or JSON."""
        return {
            "buckets": list(self.buckets), "cache_tokens": self.buckets[-1] + self.max_new_tokens,
            "graphs": dict(self.graphs), "recompilations": dict(self.recompilations),
        }  # fmt: skip

    def warm_up(
        self, batch: int = 1, images: int = 1, say: Callable[[str], None] = lambda text: None
    ) -> dict[str, Any]:
        """Compiles what a batch of this size, with this many images in all, will need at every length; the report."""
        config, device = self._model.config, self._model.device
        size = config.vision_config.image_size
        pixels = torch.zeros(images, 3, size, size, device=device, dtype=self._model.dtype)
        places = [(images // batch + (row < images % batch)) * config.image_seq_length for row in range(batch)]
        tokens = min(WARM_UP_TOKENS, self.max_new_tokens)
        for bucket in self.buckets:
            if bucket > places[0] + 1:
                say(f"compiling for {batch} prompts of up to {bucket - 1} tokens")
                ids = torch.zeros(batch, bucket - 1, dtype=torch.long, device=device)
                for row, count in zip(ids, places, strict=True):
                    row[:count] = config.image_token_id
                inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
                if images:
                    inputs["pixel_values"] = pixels
                self._model.generate(**inputs, max_new_tokens=tokens, min_new_tokens=tokens, do_sample=False)
        self._warm = self.graphs.copy()
        return self.report()

    def restore(self) -> None:
        """The model as it was. Its caches are given back, its graphs by ``torch.compiler.reset()``."""
        for owner, name, before in self._before:
            vars(owner).pop(name, None)
            if before is not None:
                setattr(owner, name, before)
        for name in ("_compiled_call", "_last_compile_config"):
            vars(self._model).pop(name, None)
        self._stop_counting()
        self._caches.clear()

    @torch.no_grad()
    def generate(self, inputs: Tensor | None = None, generation_config: Any = None, *args: Any, **kwargs: Any) -> Any:
        """``model.generate``, compiled where the call fits."""
        input_ids = kwargs.pop("input_ids", None) if inputs is None else inputs
        settings = {**vars(generation_config or self._model.generation_config), **kwargs}
        tokens = self._new_tokens(input_ids, kwargs, settings)
        why = "arguments are given by position" if args else self._why_not(input_ids, tokens, settings)
        if why is not None:
            if why not in self._said:
                logger.warning("generate runs uncompiled: %s", why)
                self._said.add(why)
            with self._in(PLAIN):
                return self._generate(input_ids, generation_config, *args, **kwargs)
        mask = kwargs.pop("attention_mask", None)
        mask = torch.ones_like(input_ids) if mask is None else mask
        pad = self.buckets[bisect.bisect_right(self.buckets, input_ids.shape[1])] - input_ids.shape[1]
        kwargs = {key: value for key, value in kwargs.items() if key not in ("max_length", "max_new_tokens")}
        self._model.padded = pad
        try:
            with torch._dynamo.config.patch(recompile_limit=MOST_GRAPHS), self._in(DECODE):
                found = self._generate(
                    F.pad(input_ids, (pad, 0)), generation_config, attention_mask=F.pad(mask, (pad, 0)),
                    max_new_tokens=tokens, past_key_values=self._cache(len(input_ids)), compile_config=self._decode,
                    **kwargs | unpadded(kwargs, pad),
                )  # fmt: skip
        finally:
            del self._model.padded
        if isinstance(found, Tensor):
            return found[:, pad:]
        found.sequences = found.sequences[:, pad:]
        found.past_key_values = None  # the next call uses it
        return found

    def _new_tokens(self, input_ids: Tensor | None, kwargs: dict[str, Any], settings: dict[str, Any]) -> int | None:
        """How many tokens the call asks for, None where it leaves that to transformers."""
        for given in (kwargs, settings):
            if given.get("max_new_tokens") is not None:
                return given["max_new_tokens"]
            if given.get("max_length") is not None and input_ids is not None:
                return given["max_length"] - input_ids.shape[1]
        return None

    def _why_not(self, input_ids: Tensor | None, tokens: int | None, settings: dict[str, Any]) -> str | None:
        """What keeps a call from running compiled."""
        if input_ids is None:
            return "there are no input_ids"
        for name, fine in COMPILED.items():
            value = settings.get(name)
            if value is not None and (isinstance(value, Tensor) or value != fine):
                return f"{name} is given" if fine is None else f"{name}={value}"
        pad = settings.get("pad_token_id")
        if settings.get("attention_mask") is None and pad is not None and (input_ids == pad).any():
            return "there is padding, but no attention_mask"
        if tokens is None:
            return "max_new_tokens is not given"
        if tokens > self.max_new_tokens:
            return f"{tokens} new tokens are more than compile_model's max_new_tokens={self.max_new_tokens}"
        if input_ids.shape[1] >= self.buckets[-1]:
            return f"a prompt of {input_ids.shape[1]} tokens is not shorter than the largest bucket, {self.buckets[-1]}"
        if len(self._caches.keys() | {len(input_ids)}) * len(self.buckets) > MOST_GRAPHS:
            return f"{len(self._caches)} batch sizes are compiled, and as many lengths of each as there is room for"
        return None

    def _cache(self, batch: int) -> StaticCache:
        """One for each batch size, kept: a graph is bound to its memory."""
        if batch not in self._caches:
            model, text = self._model, copy.deepcopy(self._model.config.text_config)
            head = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
            heads = getattr(text, "num_key_value_heads", None) or text.num_attention_heads
            # A window as long as the cache hides nothing, and a cache of windows would recompile at every token.
            text.sliding_window, text.layer_types = None, ["full_attention"] * text.num_hidden_layers
            with torch.inference_mode(False):  # or calls outside of it could not write into the cache
                cache = StaticCache(config=text, max_cache_len=self.buckets[-1] + self.max_new_tokens)
                cache.early_initialization(
                    batch_size=batch, num_heads=heads, head_dim=head, dtype=model.dtype, device=model.device
                )
            self._caches[batch] = cache
        self._caches[batch].reset()
        return self._caches[batch]

    def _encode_images(self, pixel_values: Tensor) -> Tensor:
        self._shapes.add(tuple(pixel_values.shape))
        if self._region == PLAIN or len(self._shapes) > MOST_GRAPHS:
            return type(self._model.model).encode_images(self._model.model, pixel_values)
        with torch._dynamo.config.patch(recompile_limit=MOST_GRAPHS), self._in(ENCODE):
            return self._encode(pixel_values).clone()  # of a CUDA graph's memory, which the next replay overwrites

    def _language_model(self, *args: Any, **kwargs: Any) -> Any:
        if self._region != DECODE or kwargs["inputs_embeds"].shape[1] == 1:
            return self._plain_prefill(*args, **kwargs)
        with self._in(PREFILL):
            return self._prefill(*args, **kwargs)

    @contextlib.contextmanager
    def _in(self, region: str) -> Iterator[None]:
        before, self._region = self._region, region
        try:
            yield
        finally:
            self._region = before


def _stop(on_compile: Callable[[Any], None]) -> None:
    with contextlib.suppress(ValueError):  # torch._dynamo.reset() has forgotten it already
        callback_handler.remove_start_callback(on_compile)


def _counting(compilation: weakref.ref[Compilation]) -> Callable[[Any], None]:
    """For torch, which calls it at every compilation, and would else keep the model alive."""

    def on_compile(what: Any) -> None:
        alive = compilation()
        if alive is not None and alive._region is not None and what.callback_trigger == CallbackTrigger.DYNAMO:
            alive.graphs[alive._region] += 1

    return on_compile
