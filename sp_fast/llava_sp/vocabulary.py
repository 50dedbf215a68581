"""Tokenizers of converted models.

Rows of the vocabulary are never added or removed. ``<image>`` becomes a special token of the tokenizer; the model never
looks its row up, so it needs none, and ``image_token_index`` is the number that the tokenizer gives it.
"""

from __future__ import annotations

import json
import shutil
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

from transformers import AutoTokenizer, PretrainedConfig
from transformers.utils import is_protobuf_available, is_sentencepiece_available

from sp_fast.errors import CheckpointError, first_line
from sp_fast.llava_sp.official_config import read_config
from sp_fast.llava_sp.processing import CHAT_TEMPLATES, IMAGE_TOKEN
from sp_fast.recognise import listed

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_FILES = (
    "tokenizer.json", "tokenizer.model", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json",
    "vocab.json", "merges.txt", "chat_template.jinja",
)  # fmt: skip
_VOCABULARIES = ("tokenizer.json", "tokenizer.model", "vocab.json")


def tokenizer_files(folder: Path) -> list[Path]:
    """A folder's tokenizer, file by file; empty where it has no vocabulary."""
    if not any((folder / name).is_file() for name in _VOCABULARIES):
        return []
    return [folder / name for name in _FILES if (folder / name).is_file()]


def load_tokenizer(folder: Path, text_config: PretrainedConfig) -> PreTrainedTokenizerBase:
    """A folder's tokenizer. Nothing is downloaded, and none of its code is run.

    Raises:
        CheckpointError: there is none, it cannot be read, or it has tokens without a row in the vocabulary.
    """
    files = tokenizer_files(folder)
    if not files:
        raise CheckpointError(f"{folder} holds none of {', '.join(_VOCABULARIES)}: give a folder with --tokenizer")
    if not (is_sentencepiece_available() and is_protobuf_available()) and files[0].name == "tokenizer.model":
        raise CheckpointError(
            f"{files[0]} is read by sentencepiece and protobuf, which are not installed here: pip install "
            "sentencepiece protobuf, or give a folder with the same tokenizer's tokenizer.json with --tokenizer"
        )
    try:
        # Beside an official config.json, whose type transformers does not know, it would not load.
        with tempfile.TemporaryDirectory() as alone:
            for path in files:
                shutil.copy(path, alone)
            settings = Path(alone, "tokenizer_config.json")
            named = settings.is_file() and "tokenizer_class" in read_config(settings, "")
            known = {} if named else {"config": text_config}
            tokenizer = AutoTokenizer.from_pretrained(alone, local_files_only=True, trust_remote_code=False, **known)
    except Exception as error:  # readers of vocabularies fail in any way
        raise CheckpointError(
            f"the tokenizer in {folder} cannot be loaded ({first_line(error)}): give another with --tokenizer, e.g. "
            "one with tokenizer.json"
        ) from error
    beyond = [token for token, i in tokenizer.get_vocab().items() if i >= text_config.vocab_size]
    if beyond := [token for token in beyond if token != IMAGE_TOKEN]:
        raise CheckpointError(
            f"{folder}: the tokens {listed(beyond)} have no row in the vocabulary of {text_config.vocab_size}: give "
            "the tokenizer that the model was trained with, with --tokenizer"
        )
    return tokenizer


def chat_template(choice: str | None, tokenizer: PreTrainedTokenizerBase, text_config: PretrainedConfig) -> str | None:
    """The template for ``LlavaSpProcessor.for_model``: a name, the content of a file, or None for the tokenizer's own.

    By default Vicuna's, with which LLaVA-SP was trained; language models other than Llama keep a template of their own.

    Raises:
        CheckpointError: neither a name nor a file.
    """
    if choice is None:
        keeps = text_config.model_type != "llama" and tokenizer.chat_template
        return None if keeps else "vicuna_v1"
    if choice in CHAT_TEMPLATES:
        return choice
    try:
        return Path(choice).read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        raise CheckpointError(
            f"chat template {choice!r} is none of {', '.join(CHAT_TEMPLATES)}, nor a file that can be read"
        ) from error


def same_words(first: PreTrainedTokenizerBase, other: PreTrainedTokenizerBase) -> bool:
    """Whether two tokenizers give the same numbers to the same tokens, ``<image>`` aside."""
    words = [{k: v for k, v in tokenizer.get_vocab().items() if k != IMAGE_TOKEN} for tokenizer in (first, other)]
    return words[0] == words[1]


def save_without_image(tokenizer: PreTrainedTokenizerBase, folder: Path, vocabulary: int) -> None:
    """Saves a tokenizer into an official checkpoint, without an ``<image>`` that has no row in the vocabulary."""
    tokenizer.save_pretrained(folder)
    if tokenizer.convert_tokens_to_ids(IMAGE_TOKEN) < vocabulary:
        return
    for path in tokenizer_files(folder):
        if path.suffix == ".json":
            values = json.loads(path.read_text(encoding="utf-8"))
            path.write_text(json.dumps(_without_image(values), indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _without_image(values: object) -> object:
    """JSON without the token: as a name, as an item of a list, or as an item whose content it is."""
    if isinstance(values, dict):
        return {k: _without_image(v) for k, v in values.items() if k != IMAGE_TOKEN and not _is_image(v)}
    if isinstance(values, list):
        return [_without_image(v) for v in values if not _is_image(v)]
    return values


def _is_image(value: object) -> bool:
    return value == IMAGE_TOKEN or (isinstance(value, dict) and value.get("content") == IMAGE_TOKEN)
