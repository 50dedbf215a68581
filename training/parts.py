"""From a recipe to the model's parts and the data."""

from __future__ import annotations

from pathlib import Path

from sp_fast.errors import TrainingError
from sp_fast.llava_sp.assemble import Assembly, assemble, disassemble
from sp_fast.quantize import untrainable
from sp_fast.training.encoding import Encoder
from sp_fast.training.examples import Examples, Progress
from sp_fast.training.recipe import Recipe
from sp_fast.variants import VARIANTS

DEFAULT_PROJECTOR = "crop-dfi"


def read_parts(recipe: Recipe) -> Assembly:
    """The model's parts, unread.

    Raises:
        CheckpointError, ConfigError: parts that do not fit.
        TrainingError: the projector's weights are quantised.
    """
    assembly = _assembly(recipe)
    if (scheme := assembly.config.projector.quantization) is not None:
        raise TrainingError(untrainable(scheme))
    return assembly


def _assembly(recipe: Recipe) -> Assembly:
    if recipe.model is not None:
        return disassemble(recipe.model, recipe.template)
    named = recipe.projector or DEFAULT_PROJECTOR
    projector = named if isinstance(named, dict) or named in VARIANTS else Path(named)
    if isinstance(projector, Path) and not projector.exists():
        raise TrainingError(f"projector={named} is neither a file or folder nor one of {', '.join(VARIANTS)}")
    return assemble(
        recipe.language_model, recipe.vision_tower, projector, tokenizer=recipe.tokenizer, template=recipe.template
    )


def read_examples(recipe: Recipe, assembly: Assembly, progress: Progress | None = None) -> Examples:
    """The data.

    Raises:
        DataError: samples that cannot be used, unless the recipe skips them.
        TrainingError: samples may be longer than the language model's context.
    """
    if recipe.max_length > assembly.config.context:
        raise TrainingError(
            f"max_length={recipe.max_length} is beyond the language model's context of {assembly.config.context}: "
            "choose no more than that"
        )
    encoder = Encoder(assembly.processor, None, recipe.max_length)
    folder = recipe.image_folder or recipe.data[0].parent
    return Examples(recipe.data, folder, encoder, recipe.bad_samples, progress)
