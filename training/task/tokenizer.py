"""A tokenizer built from what the spatial task says: its phrases are tokens, and single characters for other text."""

from __future__ import annotations

import re
import string

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from sp_fast.training.task.words import phrases

PAD, BOS, EOS, UNKNOWN = SPECIAL = ("<pad>", "<s>", "</s>", "<unk>")
#: A line for a question, a line for its answer, and its end.
CHAT_TEMPLATE = (
    "{% for message in messages %}{% if message['role'] == 'assistant' %}"
    "{% generation %}{{ message['content'] + eos_token }}{% endgeneration %}"
    "{% else %}{{ message['content'] + '\n' }}{% endif %}{% endfor %}"
)


def make_tokenizer() -> PreTrainedTokenizerFast:
    """Phrases of the task first ("a", "red circle", "at the", "top left"), then the printable characters: text of any
    kind can be read, and what is decoded is what was encoded. Its chat template is ``CHAT_TEMPLATE``."""
    found = phrases()
    vocabulary = {token: i for i, token in enumerate(dict.fromkeys([*SPECIAL, *found, *string.printable]))}
    raw = Tokenizer(models.WordLevel(vocabulary, UNKNOWN))
    # The longest that fits, from left to right.
    longest = sorted(found, key=len, reverse=True)
    pattern = "|".join([*map(re.escape, longest), r"[\s\S]"])
    raw.pre_tokenizer = pre_tokenizers.Split(Regex(pattern), "isolated")
    raw.post_processor = processors.TemplateProcessing(f"{BOS} $A", None, [(BOS, vocabulary[BOS])])
    raw.decoder = decoders.Fuse()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=raw, pad_token=PAD, bos_token=BOS, eos_token=EOS, unk_token=UNKNOWN
    )
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer
