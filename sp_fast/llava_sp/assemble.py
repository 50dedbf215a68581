"""A model in memory from its parts, each in its own files: what training begins with.

Nothing is read but names and shapes until ``Assembly.build``.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from transformers import AutoProcessor, GenerationConfig

from sp_fast.checkpoint import MODEL_TYPE, fill, inspect_official, inspect_pretrained
from sp_fast.config import SPProjectorConfig
from sp_fast.errors import CheckpointError, SPFastError, first_line
from sp_fast.layout import Entry
from sp_fast.llava_sp.configuration import LlavaSpConfig
from sp_fast.llava_sp.conversion import model_shapes
from sp_fast.llava_sp.convert import generation_config
from sp_fast.llava_sp.modeling import PROJECTOR as PROJECTOR_MODULE
from sp_fast.llava_sp.modeling import LlavaSpForConditionalGeneration
from sp_fast.llava_sp.official_config import PUBLISHED_LAYER, read_config, text_config, vision_config
from sp_fast.llava_sp.official_names import PROJECTOR, TOWER, WHOLE, split, tower_tensors
from sp_fast.llava_sp.processing import LlavaSpProcessor, add_image_token
from sp_fast.llava_sp.sources import read_if_there
from sp_fast.llava_sp.vocabulary import chat_template, load_tokenizer
from sp_fast.projector import SPProjector
from sp_fast.recognise import check_whole
from sp_fast.stored_tensor import StoredTensor
from sp_fast.tensor_files import stored_tensors


@dataclass(frozen=True)
class Assembly:
    """A model's parts, unread.

    Args:
        rest: tower and language model, by our names.
        make_projector: the projector in float32; its argument seeds one that begins at random.
        origins: files or folders by role.
    """

    config: LlavaSpConfig
    processor: LlavaSpProcessor
    rest: dict[str, StoredTensor]
    make_projector: Callable[[int], SPProjector]
    origins: dict[str, Path]
    generation: GenerationConfig

    def build(
        self, dtype: torch.dtype, attention: str | Mapping[str, str] = "sdpa", seed: int = 0
    ) -> LlavaSpForConditionalGeneration:
        """The model on the CPU: tower and language model in ``dtype``, the projector in float32.

        Raises:
            CheckpointError: damaged data.
        """
        projector = self.make_projector(seed)
        state = {name: tensor.load() for name, tensor in self.rest.items()}
        state |= {PROJECTOR + name: tensor.to(dtype) for name, tensor in projector.state_dict().items()}
        try:
            model = LlavaSpForConditionalGeneration.from_pretrained(
                None, config=copy.deepcopy(self.config), state_dict=state, dtype=dtype, attn_implementation=attention
            )
        except SPFastError:
            raise
        except Exception as error:  # parts of models fail in any way
            where = " with ".join(map(str, self.origins.values()))
            raise CheckpointError(f"{where} cannot be put together ({first_line(error)})") from error
        setattr(model.model, PROJECTOR_MODULE, projector)
        model.generation_config = self.generation
        return model


def assemble(
    language_model: Path,
    vision_tower: Path,
    projector: str | Path | Mapping[str, Any] = "crop-dfi",
    *,
    tokenizer: Path | None = None,
    template: str | None = None,
) -> Assembly:
    """From a language model's folder and a CLIP's or SigLIP's.

    Args:
        projector: a variant's name or fields of ``SPProjectorConfig``, for one that begins at random; or the folder of
            ``SPProjector.save_pretrained``, or an official checkpoint's file or folder, which has to be whole.
        tokenizer: its folder, where it is not the language model's.
        template: a chat template's name or file; see ``vocabulary.chat_template``.

    Raises:
        CheckpointError, ConfigError: parts that are missing, damaged, or do not fit each other.
    """
    text_path = language_model / "config.json"
    text = text_config(text_path, read_config(text_path, "give the language model's folder with its config.json"))
    rest = {
        name: tensor
        for name, tensor in split(*stored_tensors(language_model)).rest.items()
        if not name.startswith(TOWER)
    }
    rest |= tower_tensors(*stored_tensors(vision_tower))
    vision = vision_config(vision_tower, None, any(name.startswith(f"{TOWER}head.") for name in rest))
    words = load_tokenizer(tokenizer or language_model, text)
    origins = {"language model": language_model, "vision tower": vision_tower}
    fields: Any = projector
    if isinstance(projector, Path):
        origins["projector"] = projector
        fields = _stored_config(projector, vision.image_size // vision.patch_size).to_dict()
    config = LlavaSpConfig(
        vision_config=vision.to_dict(),
        text_config=text.to_dict(),
        projector_config=fields,
        image_token_index=add_image_token(words),
        vision_feature_layer=PUBLISHED_LAYER,
        architectures=[LlavaSpForConditionalGeneration.__name__],
    )
    make = partial(_random_projector, config.projector)
    if isinstance(projector, Path):
        make = partial(_stored_projector, projector, config.projector)
    _check_rest(f"{language_model} with {vision_tower}", config, rest)
    processor = LlavaSpProcessor.for_model(config, words, chat_template(template, words, text))
    return Assembly(config, processor, rest, make, origins, generation_config(language_model, text, words))


def disassemble(folder: Path, template: str | None = None) -> Assembly:
    """From a whole LLaVA-SP model, which ``save_pretrained`` or ``sp-fast convert`` wrote.

    Args:
        template: instead of the model's own; see ``assemble``.

    Raises:
        CheckpointError: another model's folder, or one that is not whole.
    """
    values = read_config(folder / "config.json", "give the folder of a LLaVA-SP model")
    if values.get("model_type") != LlavaSpConfig.model_type:
        raise CheckpointError(
            f"{folder} is of model_type {values.get('model_type')!r}, not {LlavaSpConfig.model_type!r}: give "
            "language_model and vision_tower instead, or convert an official checkpoint with sp-fast convert"
        )
    try:
        config = LlavaSpConfig.from_pretrained(folder, local_files_only=True)
        processor = AutoProcessor.from_pretrained(folder, local_files_only=True)
    except Exception as error:  # damaged files fail in any way
        raise CheckpointError(f"{folder} cannot be loaded ({first_line(error)}): convert or fetch it again") from error
    if template is not None:
        chosen = chat_template(template, processor.tokenizer, config.text_config)
        processor = LlavaSpProcessor.for_model(config, processor.tokenizer, chosen)
    where, tensors = stored_tensors(folder)
    rest = {name: tensor for name, tensor in tensors.items() if not name.startswith(PROJECTOR)}
    own = {name.removeprefix(PROJECTOR): t for name, t in tensors.items() if name.startswith(PROJECTOR)}
    _check_rest(where, config, rest)
    make = partial(_filled, where, config.projector, own)
    generation = generation_config(folder, config.text_config, processor.tokenizer)
    return Assembly(config, processor, rest, make, {"model": folder}, generation)


def _check_rest(where: str, config: LlavaSpConfig, rest: Mapping[str, StoredTensor]) -> None:
    shapes = model_shapes(config, rest)
    check_whole(where, {k: s for k, s in shapes.items() if not k.startswith(PROJECTOR)}, rest, WHOLE)


def _stored_config(path: Path, grid: int) -> SPProjectorConfig:
    return inspect_pretrained(path) if _is_ours(path) else inspect_official(path, grid)[1]


def _is_ours(path: Path) -> bool:
    """Whether ``SPProjector.save_pretrained`` wrote it, and no official code."""
    return path.is_dir() and read_if_there(path).get("model_type") == MODEL_TYPE


def _stored_projector(path: Path, config: SPProjectorConfig, seed: int) -> SPProjector:
    if _is_ours(path):
        return SPProjector.from_pretrained(path, dtype=torch.float32)
    projector = SPProjector(config, dtype=torch.float32)
    projector.load_official(path)
    return projector


def _random_projector(config: SPProjectorConfig, seed: int) -> SPProjector:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return SPProjector(config, dtype=torch.float32)


def _filled(where: str, config: SPProjectorConfig, tensors: Mapping[str, StoredTensor], seed: int) -> SPProjector:
    projector = SPProjector(config, device="meta", dtype=torch.float32)
    places = [Entry(name, name) for name, _ in projector.named_parameters()]
    fill(where, projector, places, tensors, "cpu")
    return projector
