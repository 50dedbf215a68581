"""Small tokenizers of the families that language models have, and what each token stands for in the text."""

import functools
import json

from tokenizers import AddedToken, Tokenizer, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from tests import tiny

SPECIAL = ("<pad>", "<s>", "</s>", "<unk>")
# What is hard about texts: role words, broken control tokens, spaces, line ends, and characters of one to many bytes.
PIECES = (
    "hello", " world", "ASSISTANT:", "ASSISTANT: ", "USER:", " USER: ", "\n", "\n\n", " ", "  ", "\t", "\r\n", "", "x",
    "The answer is 42.", "</", "< /s>", "<", "<image", "###", "[INST]", "é", "naïve", "中文", "日本語", "ß", "Ω", "½",
)  # fmt: skip
HARDER = ("😀", "👨‍👩‍👧", "🇩🇪", "e\u0301", "\u200b", "\u00a0", "ﬁ", "▁", "İ", "\u2028", "אב", "\x00", "\ufeff")
_CORPUS = [f"{a}{b} the question and the answer" for a in PIECES for b in PIECES]


def _fast(raw, add_bos=True, add_eos=False):
    if add_bos or add_eos:
        template = f"{'<s> ' * add_bos}$A{' </s>' * add_eos}"
        raw.post_processor = processors.TemplateProcessing(single=template, special_tokens=[("<s>", 1), ("</s>", 2)])
    raw.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in SPECIAL])
    return PreTrainedTokenizerFast(
        tokenizer_object=raw, bos_token="<s>", eos_token="</s>", unk_token="<unk>", pad_token="<pad>"
    )


def _trained(raw, trainer):
    raw.train_from_iterator(_CORPUS, trainer(vocab_size=600, special_tokens=list(SPECIAL), show_progress=False))
    return json.loads(raw.to_str())["model"]


def byte_level():
    """As GPT-2's and Qwen2's: merges of bytes, no BOS."""
    raw = Tokenizer(models.BPE(unk_token="<unk>"))
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    _trained(raw, functools.partial(trainers.BpeTrainer, initial_alphabet=pre_tokenizers.ByteLevel.alphabet()))
    return _fast(raw, add_bos=False)


def _sentencepiece():
    found = Tokenizer(models.BPE(unk_token="<unk>"))
    found.pre_tokenizer = pre_tokenizers.Metaspace()
    model = _trained(found, trainers.BpeTrainer)
    names = list(model["vocab"]) + [f"<0x{byte:02X}>" for byte in range(256)]
    merges = [tuple(pair) for pair in model["merges"]]
    vocabulary = {name: i for i, name in enumerate(names)}
    return Tokenizer(models.BPE(vocabulary, merges, unk_token="<unk>", byte_fallback=True, fuse_unk=True))


def legacy():
    """As Vicuna's: a space in front of every text between control tokens."""
    raw = _sentencepiece()
    raw.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    return _fast(raw)


def metaspace():
    """As Llama's that is not legacy: a space in front of the first text alone."""
    raw = _sentencepiece()
    raw.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    return _fast(raw)


def unigram():
    """As T5's: pieces by likelihood, a control token added at the end."""
    raw = Tokenizer(models.Unigram())
    raw.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always")
    model = _trained(raw, functools.partial(trainers.UnigramTrainer, unk_token="<unk>"))
    pieces = [tuple(pair) for pair in model["vocab"]] + [(f"<0x{byte:02X}>", -20.0) for byte in range(256)]
    raw.model = models.Unigram(pieces, 3, True)
    return _fast(raw, add_bos=False, add_eos=True)


def word_piece():
    """As BERT's: words in lower case, spaces are no tokens."""
    raw = Tokenizer(models.WordPiece(unk_token="<unk>"))
    raw.normalizer = normalizers.BertNormalizer(lowercase=True, strip_accents=False)
    raw.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    model = _trained(raw, functools.partial(trainers.WordPieceTrainer, limit_alphabet=2000))
    letters = sorted({letter for name in model["vocab"] for letter in name} | set(map(chr, range(33, 127))))
    names = dict.fromkeys([*model["vocab"], *letters, *(f"##{letter}" for letter in letters)])
    raw.model = models.WordPiece({name: i for i, name in enumerate(names)}, unk_token="<unk>")
    return _fast(raw, add_eos=True)


FAMILIES = {
    "bytes": tiny.tokenizer,
    "byte_level": byte_level,
    "legacy": legacy,
    "metaspace": metaspace,
    "unigram": unigram,
    "word_piece": word_piece,
}
WANTS_SPACE = {"metaspace"}  # between <image> and what follows, see LlavaSpProcessor.separated


def _bytes_of_letters():
    """GPT-2's letters for bytes: those that can be printed stand for themselves."""
    plain = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in plain]
    return {chr(byte): byte for byte in plain} | {chr(256 + i): byte for i, byte in enumerate(others)}


_LETTERS = _bytes_of_letters()


def _surface(family, token):
    if family in ("bytes", "byte_level"):
        return bytes(_LETTERS[letter] for letter in token)
    if family == "word_piece":
        return token.removeprefix("##").encode()
    return bytes([int(token[3:5], 16)]) if token.startswith("<0x") else token.replace("▁", " ").encode()


def slow_mask(family, tokenizer, ids, text, flags):
    """For each token whether one of its characters is flagged, by walking along the text token by token."""
    text = text.replace("▁", " ") if family in ("legacy", "metaspace", "unigram") else text
    text = text.lower() if family == "word_piece" else text
    data = text.encode()
    marks = [flag for letter, flag in zip(text, flags, strict=True) for _ in letter.encode()]
    at, mask = 0, []
    for token in tokenizer.convert_ids_to_tokens(ids):
        assert token != "<unk>", "whose characters are unknown"
        if family == "word_piece":  # no token has spaces
            at += len(data[at:]) - len(data[at:].decode().lstrip().encode())
        if token in (*SPECIAL, "<image>"):
            piece = token.encode()
            if not data.startswith(piece, at):  # put in by the tokenizer
                mask.append(False)
                continue
        else:
            piece = _surface(family, token)
            if family in ("legacy", "metaspace", "unigram"):
                while len(piece) - len(piece.lstrip(b" ")) > len(data[at:]) - len(data[at:].lstrip(b" ")):
                    piece = piece[1:]  # a space in front that the text does not have
        assert data.startswith(piece, at), (family, token, data[at : at + 20])
        mask.append(any(marks[at : at + max(len(piece), 1)]))
        at += len(piece)
    assert not data[at:].strip()
    return mask
