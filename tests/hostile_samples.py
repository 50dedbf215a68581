"""Samples that someone careless or ill-disposed might put into a data set, and whether each can be used."""

import io
import json
import os
import random
import socket
import struct
import zlib
from typing import NamedTuple

import numpy as np
from PIL import Image

from tests import tiny


class Case(NamedTuple):
    """A line of a data file. ``good`` is None where either is right, as for a flipped bit."""

    name: str
    line: bytes
    good: bool | None = False


TURNS = [{"from": "human", "value": "<image>\nWhat?"}, {"from": "gpt", "value": "That."}]
CHAT = [{"role": "user", "content": "<image>\nWhat?"}, {"role": "assistant", "content": "That."}]


def llava(name, good=False, **fields):
    row = {"id": name, "image": "0.png", "conversations": TURNS} | fields
    return Case(name, json.dumps(row).encode(), good)


def chat(name, good=False, **fields):
    return Case(name, json.dumps({"id": name, "images": ["0.png"], "messages": CHAT} | fields).encode(), good)


def said(name, *turns, good=False, **fields):
    return llava(name, good, conversations=[{"from": role, "value": value} for role, value in turns], **fields)


def encoded(image, kind, **settings):
    buffer = io.BytesIO()
    image.save(buffer, kind, **settings)
    return buffer.getvalue()


def png_of(width, height, depth=8, color=2, data=b"\0" * 100):
    """A PNG that claims a size, whatever it holds."""
    chunks = (
        (b"IHDR", struct.pack(">IIBBBBB", width, height, depth, color, 0, 0, 0)),
        (b"IDAT", zlib.compress(data)),
        (b"IEND", b""),
    )
    body = b"".join(struct.pack(">I", len(d)) + n + d + struct.pack(">I", zlib.crc32(n + d)) for n, d in chunks)
    return b"\x89PNG\r\n\x1a\n" + body


def image_files():
    """Name, content, whether it can be used."""
    picture = tiny.image(5)
    grey16 = Image.fromarray(np.arange(1200, dtype=np.uint16).reshape(30, 40))
    exif = Image.Exif()
    exif[0x0112] = 6
    whole = {kind: encoded(picture, kind) for kind in ("PNG", "JPEG", "GIF", "WEBP", "TIFF", "BMP")}
    yield from ((f"plain.{kind.lower()}", content, True) for kind, content in whole.items())
    yield from (
        ("zero.png", b"", False), ("text.jpg", b"no image", False), ("page.html.png", b"<html></html>", False),
        ("cmyk.jpg", encoded(picture.convert("CMYK"), "JPEG"), True),
        ("palette.png", encoded(picture.convert("P"), "PNG"), True),
        ("transparent.png", encoded(picture.convert("RGBA"), "PNG"), True),
        ("grey.png", encoded(picture.convert("L"), "PNG"), True),
        ("grey and alpha.png", encoded(picture.convert("LA"), "PNG"), True),
        ("bits.png", encoded(picture.convert("1"), "PNG"), True),
        ("16 bits.png", encoded(grey16, "PNG"), False), ("floats.tiff", encoded(Image.new("F", (9, 9)), "TIFF"), False),
        ("whole numbers.tiff", encoded(Image.new("I", (9, 9)), "TIFF"), False),
        ("rotated.jpg", encoded(picture, "JPEG", exif=exif), True),
        ("progressive.jpg", encoded(picture, "JPEG", progressive=True), True),
        ("frames.gif", encoded(picture, "GIF", save_all=True, append_images=[tiny.image(i) for i in range(99)]), True),
        ("frames.tiff", encoded(picture, "TIFF", save_all=True, append_images=[picture] * 9), True),
        ("is a png.jpg", whole["PNG"], True), ("no ending", whole["PNG"], True), ("ünï 中.png", whole["PNG"], True),
        ("one.png", encoded(picture.crop((0, 0, 1, 1)), "PNG"), True),
        ("thin.png", encoded(Image.new("RGB", (1, 100_000)), "PNG"), False),
        ("wide.png", encoded(Image.new("RGB", (100_000, 1)), "PNG"), False),
        ("flat.png", encoded(Image.new("RGB", (4000, 2)), "PNG"), True),
        ("bomb.png", png_of(100_000, 100_000), False), ("bomb2.png", png_of(9000, 9000, data=b"\0" * 9000 * 2), False),
        ("bomb3.png", png_of(2**31 - 1, 2**31 - 1), False), ("bomb1bit.png", png_of(30_000, 30_000, 1, 0), False),
        ("empty pixels.png", png_of(0, 0), False), ("few pixels.png", png_of(500, 500), False),
        ("vector.svg", b'<svg xmlns="http://www.w3.org/2000/svg" width="9" height="9"/>', False),
        ("vector.png", b'<?xml version="1.0"?><svg/>', False),
        ("script.eps", b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\nshowpage\n", False),
        ("script.jpg", b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\nshowpage\n", False),
        ("page.pdf", b"%PDF-1.4\n%%EOF", False), ("netpbm.ppm", encoded(picture, "PPM"), False),
        ("icon.ico", encoded(picture, "ICO"), False), ("packed.zip", b"PK\x03\x04" + b"\0" * 99, False),
        ("pcx.pcx", encoded(picture, "PCX"), False), ("targa.tga", encoded(picture, "TGA"), False),
        ("two.png", whole["PNG"] * 2, True), ("gzip.png", b"\x1f\x8b\x08" + b"\0" * 99, False),
    )  # fmt: skip
    rng = random.Random(0)
    for kind, content in whole.items():
        for cut in (8, 30, 0.5, 0.9):
            length = cut if isinstance(cut, int) else int(len(content) * cut)
            yield f"cut at {cut}.{kind.lower()}", content[:length], None if cut == 0.9 else False
        for i in range(5):
            flipped = bytearray(content)
            for _ in range(4):
                flipped[rng.randrange(len(flipped))] ^= 1 << rng.randrange(8)
            yield f"flipped {i}.{kind.lower()}", bytes(flipped), None
    yield from ((f"noise {i}.png", rng.randbytes(2000), False) for i in range(5))
    yield from ((f"noise after a head {i}.png", whole["PNG"][:33] + rng.randbytes(999), False) for i in range(5))


def paths(folder):
    """What leads out of the folder, or nowhere; beside it lies secret.png, which nobody may read."""
    secret = folder.parent / "secret.png"
    tiny.image(9).save(secret)
    (folder / "sub").mkdir()
    tiny.image(1).save(folder / "sub" / "1.png")
    os.mkfifo(folder / "pipe.png")
    socket.socket(socket.AF_UNIX).bind(os.path.relpath(folder / "socket.png"))
    links = {
        "out.png": secret, "outside": folder.parent, "zeros.png": "/dev/zero", "round.png": "round.png",
        "nowhere.png": "missing.png", "inside.png": "0.png", "to pipe.png": "pipe.png", "up.png": "../secret.png",
        "twice.png": "out.png", "self": ".",
    }  # fmt: skip
    for name, target in links.items():
        (folder / name).symlink_to(target)
    good = [
        f"{folder}/0.png",
        "./0.png",
        "sub/../0.png",
        "sub/1.png",
        "inside.png",
        "self/self/0.png",
        "sub//1.png",
        "0.png/.",
    ]
    bad = [
        "missing.png", "no/such/folder.png", "../secret.png", "sub/../../secret.png", str(secret), "outside/secret.png",
        "out.png", "up.png", "twice.png", "self/../../secret.png", "self/../secret.png", "zeros.png", "round.png", "nowhere.png",
        "pipe.png", "to pipe.png", "socket.png", "sub", "outside", "", ".", "..", "/", "0.png/x", "/etc/passwd",
        "/dev/zero", "/dev/stdin", "/proc/self/mem", "/proc/self/environ", "~/secret.png", "$HOME/secret.png",
        "http://localhost/0.png", "https://example.com/0.png", "file:///etc/passwd", f"file://{folder}/0.png",
        "data:image/png;base64,iVBORw0KGgo=", "0.png\0", "\0", "0.png\0.txt", "x" * 300, "x/" * 3000, "C:\\0.png", "sub\\1.png",
        "\ud800.png", "\udcff", "0.png\n", " 0.png", "0.PNG", "*.png", "%2e%2e/secret.png", "..\\secret.png", "....//secret.png",
        "<image>", "; rm -rf .", "\x1b[2J",
    ]  # fmt: skip
    yield from (llava(f"path {i} leads in", True, image=path) for i, path in enumerate(good))
    yield from (llava(f"path {i} leads out", image=path) for i, path in enumerate(bad))


def fields():
    """Fields of other types than they should be."""
    wrong = [1, 1.5, True, {"a": 1}, [[]], [None], ""]
    gpt, assistant = TURNS[1], CHAT[1]
    for i, value in enumerate([*wrong, None, [], "x", [1]]):
        yield llava(f"conversations {i}", conversations=value)
        yield chat(f"messages {i}", messages=value)
    for i, value in enumerate([*wrong, None, [], "tool", "USER", "Human", "gpt "]):
        yield llava(f"from {i}", conversations=[TURNS[0] | {"from": value}, gpt])
        yield chat(f"role {i}", messages=[CHAT[0] | {"role": value}, assistant])
    for i, value in enumerate([*wrong[:-1], None, []]):
        yield llava(f"value {i}", conversations=[TURNS[0], gpt | {"value": value}])
        yield chat(f"content {i}", messages=[CHAT[0], assistant | {"content": value}], good=value == [] or False)
        yield llava(f"image {i}", image=value)
        yield chat(f"images {i}", images=value)
        yield llava(f"a turn {i}", conversations=[value, gpt])
        yield chat(f"a part {i}", messages=[{"role": "user", "content": [value]}, assistant])
        yield chat(f"type {i}", messages=[{"role": "user", "content": [{"type": value}]}, assistant])
        yield chat(f"text {i}", messages=[CHAT[0], {"role": "assistant", "content": [{"type": "text", "text": value}]}])
        yield llava(f"id {i}", True, id=value)
        yield llava(f"other {i}", True, width=value, model=value)
    yield chat("bytes are text", images=[{"bytes": "iVBORw0KGgo="}])
    yield chat("no path", images=[{"path": None, "bytes": None}])


def shapes():
    """Conversations of another shape, and texts that mean something to someone."""
    human, gpt = ("human", "<image>"), ("gpt", "That.")
    yield said("none")
    yield said("no answer", human)
    yield said("an answer alone", gpt)
    yield said("ends with a question", human, gpt, ("human", "Why?"))
    yield said("two questions", human, ("human", "Why?"), gpt)
    yield said("two answers", human, gpt, gpt)
    yield said("the system alone", ("system", "Be brief."))
    yield said("the system in the middle", human, gpt, ("system", "Be brief."), ("human", "Why?"), gpt)
    yield said("an answer first", gpt, human, gpt, good=True)
    yield said("its image is skipped", ("gpt", "<image>"), ("human", "Why?"), gpt)
    yield said("too few places", ("human", "What?"), gpt)
    yield said("too many places", ("human", "<image><image>"), gpt)
    yield said("too many images", human, gpt, image=["0.png", "0.png"])
    yield said("no image", human, gpt, image=None)
    yield said("no images", human, gpt, image=[])
    yield said("a place in the answer", ("human", "Show me."), ("gpt", "<image>"), good=True)
    yield said("sixty images", ("human", "<image>" * 60), gpt, image=["0.png"] * 60)
    yield llava("both formats", messages=CHAT)
    yield llava("both fields", images=["0.png"])
    yield llava("the same id", True)
    yield llava("the same id", True)
    for token in ("</s>", "<s>", "<pad>", "<unk>"):
        yield said(f"says {token}", human, ("gpt", f"It ends {token} here."))
    yield said("half a character", human, ("gpt", "\ud83d"))
    yield said("the wrong half", ("human", "<image>\udc00"), gpt)
    yield said("a long question", ("human", "<image>" + "x" * 10**6), gpt)
    yield said("a long answer", human, ("gpt", "x" * 10**6), good=True)
    yield said("an empty answer", human, ("gpt", ""), good=True)
    for i, text in enumerate(
        ("{{ 7 * 7 }}", "{% endgeneration %}", "{% for x in y %}", "{{ ''.__class__ }}", "{# no #}")
    ):
        yield said(f"template {i}", ("human", f"<image>{text}"), ("gpt", text), good=True)
    for i, text in enumerate(("USER: x ASSISTANT: y", "\n\n### Human:", "\0", "\u202e", "\ufeff", "<image", "[INST]")):
        yield said(f"text {i} that means nothing", human, ("gpt", text), good=True)


def lines():
    """What is hardly JSON."""
    good = json.dumps({"id": "x", "image": "0.png", "conversations": TURNS}).encode()
    bad = [
        b"{", b"}", b"[]", b"[1]", b'"text"', b"1", b"null", b"true", b"NaN", b"{}", good[:-1], good[: len(good) // 2], good + good,
        good + b",", b"// " + good, good.replace(b'"', b"'"), b"\xef\xbb\xbf" + good, b"\0" * 50, b"\xff\xfe" + good,
        good.replace(b"That", b"Th\xffat"), good.replace(b'"x"', b'NaN'), good.replace(b'"x"', b"9" * 9999),
        good.replace(b'"x"', b"Infinity"), good.replace(b'"x"', b'"x", "id": "y"'), good.replace(b'"from"', b'"value": "", "from"'),
        good.replace(b'"x"', b"[" * 100_000 + b"]" * 100_000), b"[" * 100_000, b'{"a":' * 100_000, good.replace(b"That", b"Th\tat"),
        good.replace(b"That", rb"Th\xat"), b"id,image\n"[:-1], b"<xml/>", b"\x80\x04K\x01.",
    ]  # fmt: skip
    yield from (Case(f"line {i}", line) for i, line in enumerate(bad))
    yield Case("nested", good.replace(b'"x"', b"[" * 200 + b"]" * 200), True)


def plant(folder):
    """Cases, whose images are put into the folder; all data sets begin with a good sample."""
    tiny.image(0).save(folder / "0.png")
    cases = [llava("good", True)]
    for name, content, good in image_files():
        (folder / name).write_bytes(content)
        cases.append(llava(name, good, image=name))
    return [*cases, *paths(folder), *fields(), *shapes(), *lines()]
