"""Labels: which tokens are the assistant's, against a slow walk along the text, for six families of tokenizers."""

import random

import pytest
from tokenizers import AddedToken, normalizers
from transformers import ByT5Tokenizer

from sp_fast.errors import DataError, TrainingError
from sp_fast.llava_sp import LlavaSpProcessor
from sp_fast.training.conversation import Conversation, Message
from sp_fast.training.encoding import Encoder
from tests import tiny
from tests.train_tokenizers import FAMILIES, HARDER, PIECES, WANTS_SPACE, slow_mask

SYSTEM = (
    "A chat between a curious user and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the user's questions."
)


@pytest.fixture(scope="module")
def processors():
    found = {}
    for name, make in FAMILIES.items():
        tokenizer = make()
        config = tiny.config_of()
        config.image_token_index = len(tokenizer)
        found[name] = LlavaSpProcessor.for_model(config, tokenizer)
    return found


def text_of(rng, family, images=0):
    pieces = [*PIECES, *(() if family == "word_piece" else HARDER)]
    chosen = rng.choices(pieces, k=rng.choice((0, 1, 2, 5, 20)))
    for _ in range(images):
        chosen.insert(rng.choice((0, rng.randint(0, len(chosen)), len(chosen))), "<image>")
    return "".join(chosen)


def conversation_of(seed, family, template):
    rng = random.Random(f"{seed} {family} {template}")
    if template == "plain":
        caption = text_of(rng, family)
        return Conversation("", (Message("user", "<image>\nBriefly."), Message("assistant", caption)), ("0.png",))
    messages, images = [], 0
    if rng.random() < 0.3:
        messages.append(Message("system", text_of(rng, family)))
    for _ in range(rng.randint(1, 4)):
        places = rng.choice((0, 0, 0, 1, 2))
        in_answer = rng.random() < 0.05
        messages.append(Message("user", text_of(rng, family, places)))
        messages.append(Message("assistant", text_of(rng, family, in_answer)))
        images += places + in_answer
    return Conversation("", tuple(messages), ("0.png",) * images)


def by_hand(conversation, template, wants_space):
    """The prompt and a flag for each of its characters, by the rules of LLaVA's conversation modes."""
    if template == "plain":
        parts = [("<image>", False), (conversation.messages[1].text + "\n", True)]
    else:
        messages = list(conversation.messages)
        system = messages.pop(0).text if messages[0].role == "system" else SYSTEM
        parts = [(system + " ", False)]
        for message in messages:
            if message.role == "user":
                parts.append(("USER: " + message.text + " ", False))
            else:
                parts += [("ASSISTANT:", False), (" " + message.text + "</s>", True)]
    text, flags = "".join(part for part, _ in parts), [flag for part, flag in parts for _ in part]
    if not wants_space:
        return text, flags
    at = 0
    while (at := text.find("<image>", at)) >= 0:
        at += len("<image>")
        if text[at:] and not text.startswith("<image>", at):
            text, flags = text[:at] + " " + text[at:], [*flags[:at], flags[at], *flags[at:]]
    return text, flags


def check(processors, family, template, seeds):
    """How many tokens were compared, and how many of them are supervised."""
    processor = processors[family]
    encoder, tokenizer, image = Encoder(processor, template, 10**6), processor.tokenizer, processor.image_token_id
    tokens = supervised = 0
    for seed in seeds:
        conversation = conversation_of(seed, family, template)
        text, flags = by_hand(conversation, template, family in WANTS_SPACE)
        ids = tokenizer(text)["input_ids"]
        expected_ids, expected = [], []
        for token, said in zip(ids, slow_mask(family, tokenizer, ids, text, flags), strict=True):
            times = encoder.image_tokens if token == image else 1
            expected_ids += [token] * times
            expected += [token if said and token != image else -100] * times
        if not any(label >= 0 for label in expected):
            with pytest.raises(DataError, match="no supervised token"):
                encoder.encode(conversation)
            continue
        found = encoder.encode(conversation)
        assert found.input_ids == expected_ids, (family, template, seed)
        assert found.labels == expected, (family, template, seed)
        tokens, supervised = tokens + len(expected), supervised + sum(label >= 0 for label in expected)
    return tokens, supervised


@pytest.mark.parametrize("template", ["vicuna_v1", "plain"])
@pytest.mark.parametrize("family", FAMILIES)
def test_labels_equal_a_slow_walk(processors, family, template):
    check(processors, family, template, range(15))


@pytest.mark.campaign
@pytest.mark.parametrize("family", FAMILIES)
def test_labels_equal_a_slow_walk_on_a_thousand_conversations(processors, family):
    vicuna = check(processors, family, "vicuna_v1", range(1000))
    plain = check(processors, family, "plain", range(1000))
    print(f"\n{family}: 2,000 conversations; tokens and supervised ones {vicuna} in vicuna_v1, {plain} in plain: equal")


@pytest.mark.parametrize("family", FAMILIES)
def test_ids_are_the_processors(processors, family):
    processor = processors[family]
    encoder = Encoder(processor, None, 10**6)
    for seed in range(6):
        conversation = conversation_of(seed, family, "vicuna_v1")
        messages = [{"role": message.role, "content": message.text} for message in conversation.messages]
        images = [tiny.image(i) for i in range(len(conversation.images))]
        inputs = processor(text=processor.apply_chat_template(messages), images=images or None)
        assert encoder.encode(conversation).input_ids == inputs["input_ids"][0], seed


def official_ids(tokenizer, prompt):
    """LLaVA's tokenizer_image_token: the texts between images by themselves, BOS once."""
    first, *others = (tokenizer(text)["input_ids"] for text in prompt.split("<image>"))
    return first + [token for other in others for token in [-200, *other[1:]]]


def official_v1(tokenizer, prompt):
    """LLaVA's preprocess_v1: lengths of rounds and of what comes before their answers."""
    labels, at = official_ids(tokenizer, prompt), 1
    ids, labels[0] = list(labels), -100
    for turn in prompt.split("</s>")[:-1]:
        asked, _ = turn.split(" ASSISTANT: ")
        length = len(official_ids(tokenizer, asked + " ASSISTANT: ")) - 2
        labels[at : at + length] = [-100] * length
        at += len(official_ids(tokenizer, turn))
    assert at == len(ids)  # else it warns of a "tokenization mismatch" and trains nothing
    return ids, labels


def official_plain(tokenizer, prompt):
    """LLaVA's preprocess_plain."""
    ids, masked = official_ids(tokenizer, prompt), len(official_ids(tokenizer, "<image>"))
    return ids, [-100] * masked + ids[masked:]


# Of the answers one begins with letters that the vocabulary has with a space in front, the others do not.
ORDINARY = [
    ("<image>\nWhat is this?", "the answer is 42, on a mat."),
    ("And the colour?\nIn one word.", "7"),
    ("naïve 中文 😀", "中 is 42.\n\nThat is all"),
]


@pytest.mark.parametrize("turns", [1, 2, 3])
def test_labels_are_the_official_ones(processors, turns):
    processor = processors["legacy"]
    pairs = [pair for turn in ORDINARY[:turns] for pair in zip(("user", "assistant"), turn, strict=True)]
    messages = [Message(role, text) for role, text in pairs]
    for template, official in (("vicuna_v1", official_v1), ("plain", official_plain)):
        conversation = Conversation("", tuple(messages[: 2 if template == "plain" else None]), ("0.png",))
        ids, labels = official(processor.tokenizer, by_hand(conversation, template, False)[0])
        encoder = Encoder(processor, template, 10**6)
        found = encoder.encode(conversation)
        at = ids.index(-200)
        images = [processor.image_token_id] * encoder.image_tokens
        assert found.input_ids == ids[:at] + images + ids[at + 1 :]
        assert found.labels == labels[:at] + [-100] * encoder.image_tokens + labels[at + 1 :]


def asked(question, answer="Yes.", images=0):
    return Conversation("", (Message("user", question), Message("assistant", answer)), ("0.png",) * images)


CHATML = (
    "{% for m in messages %}{{ '[' + m['role'] + ']\\n' }}{% if m['role'] == 'assistant' %}{% generation %}"
    "{{ m['content'] + '</s>' }}{% endgeneration %}{% else %}{{ m['content'] }}{% endif %}{% endfor %}"
)


@pytest.mark.parametrize(
    ("prompt", "lead"),
    [
        ("{{ '[assistant]\\n' }}", ""),
        ("{{ '[assistant]' }}", "\n"),
        ("", ""),  # a prompt that ends before the role: its name is the template's
        ("{{ '[assistant]\\n(thinks)' }}", ""),
    ],
)
def test_what_stands_between_a_prompt_and_its_answer_is_supervised(processors, monkeypatch, prompt, lead):
    processor = processors["bytes"]
    monkeypatch.setattr(processor, "chat_template", CHATML + "{% if add_generation_prompt %}" + prompt + "{% endif %}")
    for answer in ("Yes.", "", "\n No "):
        labels = Encoder(processor, None, 512).encode(asked("What?", answer)).labels
        assert processor.decode([label for label in labels if label >= 0]) == lead + answer + "</s>"


@pytest.mark.parametrize("token", ["</s>", "<s>", "<pad>", "<unk>"])
def test_control_tokens_in_the_data_are_refused(processors, token):
    encoder = Encoder(processors["legacy"], None, 512)
    for conversation in (asked(f"What is {token}?"), asked("What?", f"A {token} token")):
        with pytest.raises(DataError, match=f"says {token}, a control token"):
            encoder.check(conversation)
    system = Conversation("", (Message("system", f"Be {token}"), *asked("Why?").messages), ())
    with pytest.raises(DataError, match="control token"):
        encoder.encode(system)


def test_control_tokens_that_the_tokenizer_makes_of_other_text_are_refused():
    tokenizer = FAMILIES["metaspace"]()
    tokenizer.backend_tokenizer.normalizer = normalizers.NFKC()
    tokenizer.backend_tokenizer.add_special_tokens([AddedToken("</t>", special=True, normalized=True)])
    config = tiny.config_of()
    config.image_token_index = len(tokenizer)
    encoder = Encoder(LlavaSpProcessor.for_model(config, tokenizer), "vicuna_v1", 512)
    wide = "".join(chr(ord(letter) + 0xFEE0) for letter in "</t>")
    with pytest.raises(DataError, match="control token in text that is written another way"):
        encoder.encode(asked("What?", f"A {wide} token"))


def test_a_sample_is_cut_at_its_end_and_counted(processors):
    conversation = asked("<image>\nWhat?", "A long answer", images=1)
    whole = Encoder(processors["bytes"], None, 10**6).encode(conversation)
    length, first = len(whole.input_ids), next(i for i, label in enumerate(whole.labels) if label >= 0)
    last_image = max(i for i, token in enumerate(whole.input_ids) if token == tiny.VOCABULARY)
    for kept in (length, length - 1, first + 1):
        found = Encoder(processors["bytes"], None, kept).encode(conversation)
        assert found.input_ids == whole.input_ids[:kept]
        assert found.labels == whole.labels[:kept]
        assert found.truncated == (kept < length)
    with pytest.raises(DataError, match=f"no supervised token: its answer begins at token {first + 1}, beyond {first}"):
        Encoder(processors["bytes"], None, first).encode(conversation)
    for kept in (last_image, last_image - 5, 10):
        with pytest.raises(DataError, match=f"images end at token {last_image + 1}, beyond {kept}"):
            Encoder(processors["bytes"], None, kept).encode(conversation)


def test_bos_comes_once_also_where_the_template_says_it(processors):
    processor = processors["legacy"]
    bos = processor.tokenizer.bos_token_id
    kept = processor.chat_template
    try:
        processor.chat_template = "{{ bos_token }}" + kept
        said = Encoder(processor, None, 512).encode(asked("Why?")).input_ids
    finally:
        processor.chat_template = kept
    assert said[0] == bos
    assert said.count(bos) == 1
    assert Encoder(processor, None, 512).encode(asked("Why?")).input_ids.count(bos) == 1


def test_images_without_their_place_in_the_template_are_refused(processors):
    plain = Encoder(processors["bytes"], "plain", 512)
    with pytest.raises(DataError, match="plain has 1 places for its 0 images"):
        plain.check(asked("Why?"))
    with pytest.raises(DataError, match="plain has 2 places for its 1 images"):
        plain.encode(
            Conversation("", (Message("system", "Be brief."), *asked("<image>", images=1).messages), ("0.png",))
        )


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("{% for m in messages %}{{ m['content'] }}{% endfor %}", "put its answers.*generation"),
        ("{% generation %}x{% endgeneration %}{{ messages[-1]['content'] }}", "leaves the answer out"),
        ("{% generation %}{{ raise_exception('no system') }}{% endgeneration %}", "cannot be used.*no system"),
        ("{% generation %}{% endfor %}", "cannot be used.*endfor"),
        (None, "nor the processor's own"),
    ],
)
def test_templates_that_do_not_say_what_is_supervised_are_refused(processors, template, message):
    processor = processors["bytes"]
    kept = processor.chat_template
    processor.chat_template = template
    try:
        with pytest.raises(TrainingError, match=message):
            Encoder(processor, None, 512)
    finally:
        processor.chat_template = kept


def test_unknown_templates_and_slow_tokenizers_are_refused(processors):
    with pytest.raises(TrainingError, match="'vicuna' is none of vicuna_v1, plain"):
        Encoder(processors["bytes"], "vicuna", 512)
    tokenizer = ByT5Tokenizer()
    config = tiny.config_of()
    config.image_token_index = len(tokenizer)
    with pytest.raises(TrainingError, match="ByT5Tokenizer does not say where its tokens stand"):
        Encoder(LlavaSpProcessor.for_model(config, tokenizer), "plain", 512)
