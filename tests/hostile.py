"""Checkpoints that were made to do harm, each written as real files.

``HOSTILE`` must be refused: by name, what writes one into a folder and returns the source to load, what the refusal
says, and what loads it. ``CODE`` are those of them that leave a file ``ran`` behind where they are believed.
``HARMLESS`` look alike and must load: nothing may be refused only because the writers here are wrong.
"""

import functools
import io
import json
import os
import pickle
import random
import stat
import struct
import tarfile
import warnings
import zipfile
from typing import Any, NamedTuple

import torch

from sp_fast import SPProjector
from tests.helpers import randomised, small

CONV, BIAS = "model.conv_24.weight", "model.mm_projector.0.bias"


@functools.cache
def projector():
    return randomised(SPProjector(small("conv336_24"), dtype=torch.float16))


@functools.cache
def weights():
    return projector().official_state_dict()


# ---- Pickles, assembled by hand: what no pickler would write


class Name(NamedTuple):
    module_and_name: str


class Call(NamedTuple):
    function: Any  # its name, or a value
    arguments: tuple = ()


class Build(NamedTuple):
    value: Any
    state: Any


class Kept(NamedTuple):  # beside the pickle
    identifier: Any


class Pairs(tuple):
    """A dict's items, which may repeat a key."""


def code(value):
    """Opcodes that leave the value on the stack; bytes are opcodes already."""
    match value:
        case bytes():
            return value
        case None | True | False:
            return {None: b"N", True: b"\x88", False: b"\x89"}[value]
        case int():
            digits = pickle.encode_long(value)
            return b"\x8a" + bytes([len(digits)]) + digits
        case str():
            return b"X" + struct.pack("<I", len(value.encode())) + value.encode()
        case dict() | Pairs():
            items = value.items() if isinstance(value, dict) else value
            return b"}(" + b"".join(code(key) + code(item) for key, item in items) + b"u"
        case Name(name):
            return b"c" + name.replace(" ", "\n").encode() + b"\n"
        case Call(function, arguments):
            return code(Name(function) if isinstance(function, str) else function) + code(arguments) + b"R"
        case Build(built, state):
            return code(built) + code(state) + b"b"
        case Kept(identifier):
            return code(identifier) + b"Q"
        case tuple():
            return b"(" + b"".join(map(code, value)) + b"t"
    raise TypeError(value)


def pickled(value):
    return b"\x80\x02" + code(value) + b"."


KINDS = {torch.float16: "Half", torch.int8: "Char", torch.bool: "Bool", torch.complex64: "ComplexFloat"}
ORDERED = Call("collections OrderedDict")


def stored(tensor, number, **changed):
    """A tensor as torch pickles it."""
    given = {"key": number, "count": tensor.numel(), "offset": 0, "shape": tuple(tensor.shape), "location": "cpu"}
    given |= {"stride": tensor.stride(), "hooks": ORDERED} | changed
    kind = Name(f"torch {KINDS[tensor.dtype]}Storage")
    storage = Kept(("storage", kind, given["key"], given["location"], given["count"]))
    arguments = (storage, given["offset"], given["shape"], given["stride"], False, given["hooks"])
    return Call("torch._utils _rebuild_tensor_v2", arguments)


def raw(tensor):
    return bytes(tensor.contiguous().view(torch.uint8).numpy())


def described(state, **conv):
    """What a state dict's pickle holds, and its storages by key; ``conv`` changes how the convolution is described."""
    content = {}
    for number, (name, tensor) in enumerate(state.items()):
        content[name] = stored(tensor, str(number), **(conv if name == CONV else {}))
    return content, {str(number): raw(tensor) for number, tensor in enumerate(state.values())}


def parts(tensors=None, **conv):
    return described({**weights(), **(tensors or {})}, **conv)


def zipped(content, storages, method=zipfile.ZIP_STORED, root="archive", extra=()):
    """The format since torch 1.6; ``extra`` entries come first."""
    file = io.BytesIO()
    with warnings.catch_warnings(action="ignore"), zipfile.ZipFile(file, "w", method) as archive:  # of a name twice
        for name, data in extra:
            archive.writestr(name, data)
        archive.writestr(f"{root}/data.pkl", pickled(content))
        archive.writestr(f"{root}/byteorder", "little")
        for key, data in storages.items():
            archive.writestr(f"{root}/data/{key}", data)
        archive.writestr(f"{root}/version", "3\n")
    return file.getvalue()


LEGACY = {
    "magic": 0x1950A86A20F9469CFC6C,
    "protocol": 1001,
    "system": {"protocol_version": 1001, "little_endian": True, "type_sizes": {"short": 2, "int": 4, "long": 4}},
}


def legacy(content, storages, **changed):
    """The format before."""
    keys = tuple(storages)
    heads = {**LEGACY, "content": content, "keys": keys} | changed
    # A storage's identifier has one part more here, which is always None.
    pickles = b"".join(pickled(head) for head in heads.values()).replace(b"tQ", b"NtQ")
    return pickles + b"".join(struct.pack("<q", len(storages[key]) // 2) + storages[key] for key in keys)


def tar(content):
    """The format before that."""
    file = io.BytesIO()
    members = {"storages": pickle.dumps(0) + pickle.dumps([]), "tensors": pickle.dumps(0), "pickle": pickled(content)}
    with tarfile.open(fileobj=file, mode="w") as archive:
        for name, data in members.items():
            entry = tarfile.TarInfo(name)
            entry.size = len(data)
            archive.addfile(entry, io.BytesIO(data))
    return file.getvalue()


# ---- Code


def tricks(ran):
    """Values that run code as they are unpickled."""
    touch, python = f"touch '{ran}'", f"open({str(ran)!r}, 'w').close()"
    inner = pickled(Call("posix system", (touch,))).decode("latin-1")
    system = Call("builtins getattr", (Call("importlib import_module", ("os",)), "system"))
    unlock = Call("torch.serialization add_safe_globals", ((Name("posix system"),),))
    return {
        "os.system": Call("os system", (touch,)),
        "posix.system": Call("posix system", (touch,)),
        "exec": Call("builtins exec", (python,)),
        "eval": Call("builtins eval", (python,)),
        "open": Call("builtins open", (str(ran), "w")),
        "a subprocess": Call("subprocess check_call", (("touch", str(ran)),)),
        "importlib and getattr": Call(system, (touch,)),
        "a partial": Call(Call("functools partial", (Name("os system"), touch))),
        "timeit": Call("timeit timeit", (python, "pass", Name("time perf_counter"), 1)),
        "a pickle in the pickle": Call("pickle loads", (Call("_codecs encode", (inner, "latin-1")),)),
        "the list of allowed names": (unlock, Call("posix system", (touch,))),
        "protocol 0": b"cos\nsystem\n(S'touch " + str(ran).encode() + b"'\ntR",
        "INST": b"(S'touch " + str(ran).encode() + b"'\nios\nsystem\n",
        "OBJ": b"(cos\nsystem\nS'touch " + str(ran).encode() + b"'\no",
        "STACK_GLOBAL": code("os") + code("system") + b"\x93" + code((touch,)) + b"R",
        "NEWOBJ": code(Name("subprocess Popen")) + b")\x81" + code(Call("os system", (touch,))) + b"\x86",
    }


def carriers(evil):
    """Files that unpickle a value in one place or another."""
    content, storages = parts()
    swapped = content | {CONV: evil}
    ordered = code(ORDERED) + b"(" + b"".join(map(code, sum(content.items(), ()))) + b"u"
    identifier = Kept(("storage", Name("torch HalfStorage"), "0", evil, 73728))
    return {
        "for a tensor": zipped(swapped, storages),
        "for a tensor, before archives": legacy(swapped, storages),
        "for a tensor, in a tar": tar(swapped),
        "in a bare pickle": pickled(swapped),
        "as a name": zipped({**content, evil: 1}, storages),
        "as a tensor's hooks": zipped(*parts(hooks=evil)),
        "as a storage's location": legacy(*parts(location=evil)),
        "in a storage's identifier": zipped({**content, CONV: identifier}, storages),
        "as a state dict's attribute": zipped(Build(ordered, {"_metadata": evil}), storages),
        "as the magic number": legacy(content, storages, magic=evil),
        "as the system": legacy(content, storages, system=evil),
        "as the storages' names": legacy(content, storages, keys=evil),
        "in the first of two data.pkl": zipped(content, storages, extra=[("archive/data.pkl", pickled(swapped))]),
        "before a good archive": legacy(swapped, storages) + zipped(content, storages),
    }


def script(ran):
    """A TorchScript program that makes a file as it is loaded."""

    class Program(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.path, self.made = str(ran), torch.zeros(1)

        @torch.jit.export
        def __getstate__(self) -> tuple[str, bool]:
            return self.path, self.training

        @torch.jit.export
        def __setstate__(self, state: tuple[str, bool]):
            self.path, self.training = state
            self.made = torch.from_file(self.path, True, 1)  # makes the file that it maps

        def forward(self, x):
            return x

    return torch.jit.script(Program())


def one_file(name, content):
    """Writes one file; its content may depend on where the canary is."""

    def write(folder):
        path = folder / name
        path.write_bytes(content(folder / "ran"))
        return path

    return write


def write_script(folder):
    torch.jit.save(script(folder / "ran"), folder / "model.bin")
    return folder / "model.bin"


OBJECTS = r"model.bin was refused: .*%s.*; ask its author for a safetensors file"
DAMAGED = r"model\.\w+ is truncated or damaged \(.*%s.*\): fetch it again"
TRICK_SAYS = {"INST": "STRING 'touch", "STACK_GLOBAL": "STACK_GLOBAL"}
CARRIER_SAYS = {
    "for a tensor, in a tar": DAMAGED % "no torch.save wrote it",
    "in a bare pickle": DAMAGED % "no torch.save wrote it",
    "as the magic number": DAMAGED % "no torch.save wrote it",
    "in the first of two data.pkl": DAMAGED % "its entries have one name twice",
}
CODE = {}
for name in tricks(""):
    write = one_file("model.bin", lambda ran, name=name: zipped(parts()[0] | {CONV: tricks(ran)[name]}, parts()[1]))
    CODE[f"code: {name}"] = write, OBJECTS % TRICK_SAYS.get(name, "GLOBAL .* in its pickle"), "official"
for name in carriers(None):
    write = one_file("model.bin", lambda ran, name=name: carriers(tricks(ran)["open"])[name])
    CODE[f"code {name}"] = write, CARRIER_SAYS.get(name, OBJECTS % "GLOBAL .* in its pickle"), "official"
write = one_file("model.safetensors", lambda ran: carriers(tricks(ran)["open"])["for a tensor"])
CODE["code in an archive named as safetensors"] = write, DAMAGED % r"\d+ bytes of header", "official"
CODE["code in TorchScript"] = write_script, OBJECTS % "it is a TorchScript program", "official"
HOSTILE = dict(CODE)


# ---- Torch files without code


def saved(change, **options):
    """What torch.save itself writes of the weights, the convolution changed."""
    file = io.BytesIO()
    torch.save({**weights(), CONV: change(weights()[CONV])}, file, **options)
    return file.getvalue()


def patched(data, place, value, width):
    """An archive whose last entry but one is described otherwise in the central directory."""
    entry = data.rindex(b"PK\1\2", 0, data.rindex(b"PK\1\2"))
    return data[: entry + place] + value.to_bytes(width, "little") + data[entry + place + width :]


def linked(name, target):
    """An archive's entry that unpacks to a link."""
    entry = zipfile.ZipInfo(name)
    entry.create_system, entry.external_attr = 3, (stat.S_IFLNK | 0o777) << 16
    return entry, target


def called(function, *arguments):
    """An archive in which a function's result stands for a tensor."""
    content, storages = parts()
    return zipped(content | {BIAS: Call(function, arguments)}, storages)


def flawed(value):
    """A convolution with one value that is no number."""
    conv = weights()[CONV].clone()
    conv.view(-1)[-1] = value
    return {CONV: conv}


class Disguised(torch.Tensor):
    """Says that it is a tensor."""

    __class__ = torch.Tensor


class Mapped(dict):
    """Looks like a state dict."""


TENSOR = "torch._utils _rebuild_tensor_v2"
TORCH = {
    "memory that was never written": (lambda: called("torch HalfTensor", 24), "GLOBAL 'torch HalfTensor'"),
    "an array of 2 GB": (lambda: called("builtins bytearray", 2**31), "GLOBAL 'builtins bytearray'"),
    "a slow codec": (lambda: called("_codecs encode", "a.é" * 10**5, "idna"), "GLOBAL '_codecs encode'"),
    "a wrapper": (lambda: called("torch._utils _rebuild_wrapper_subclass", Name("torch Tensor")), "GLOBAL"),
    "a tensor class": (lambda: called("torch Tensor", 24), "a call of torch.Tensor"),
    "an ordered dict of it all": (lambda: called("collections OrderedDict", ((b")" + b"\x85" * 2 * 10**5, 1),)), "a call of collections.OrderedDict"),
    "200,000 tuples for a name": (lambda: zipped(parts()[0] | {b")" + b"\x85" * 2 * 10**5: 1}, parts()[1]), "a name that is a tuple"),
    "a tuple of a tuple twice, 60 times": (lambda: zipped(b")" + b"q\x00h\x00\x86" * 60 + b")R", {}), "a call of no function"),
    "a number for a name": (lambda: zipped(parts()[0] | {3: 1}, parts()[1]), "a name that is a int"),
    "a tensor's own storage set": (lambda: zipped(parts()[0] | {BIAS: Build(parts()[0][BIAS], (1,))}, parts()[1]), "BUILD '' in its pickle"),
    "a name of 1 MB": (lambda: zipped({"a" * 10**6: 1}, {}), "'a+ is a int, not a named dense tensor: save tensors only"),
    "one name twice": (lambda: zipped(Pairs((*parts()[0].items(), (BIAS, parts()[0][BIAS]))), parts()[1]), "is given twice"),
    "sparse": (lambda: saved(torch.Tensor.to_sparse), "GLOBAL 'torch._utils _rebuild_sparse_tensor'"),
    "meta": (lambda: saved(lambda t: t.to("meta")), "GLOBAL 'torch._utils _rebuild_meta_tensor_no_storage'"),
    "quantised": (lambda: saved(lambda t: torch.quantize_per_tensor(t.float(), 0.1, 0, torch.qint8)), "GLOBAL 'torch._utils _rebuild_qtensor'"),
    "nested": (lambda: saved(lambda t: torch.nested.as_nested_tensor([*t])), "GLOBAL 'torch._utils _rebuild_nested_tensor'"),
    "float8": (lambda: saved(lambda t: t.to(torch.float8_e4m3fn)), "GLOBAL 'torch._utils _rebuild_tensor_v3'"),
    "another class in disguise": (lambda: saved(lambda t: t.as_subclass(Disguised)), "GLOBAL 'tests.hostile Disguised'"),
    "a module": (lambda: saved(lambda t: torch.nn.Linear(1, 1)), "GLOBAL 'torch.nn.modules.linear Linear'"),
    "a dict's class": (lambda: zipped(Call("tests.hostile Mapped", (parts()[0],)), {}), "GLOBAL 'tests.hostile Mapped'"),
    "a counter": (lambda: zipped(Call("collections Counter", (parts()[0],)), {}), "GLOBAL 'collections Counter'"),
    "a list": (lambda: zipped((1, 2), {}), "holds a tuple, not named tensors"),
    "negated": (lambda: saved(lambda t: torch._neg_view(t)), "a call of torch._utils._rebuild_tensor_v2"),
    "integers": (lambda: zipped(*parts({CONV: weights()[CONV].char()})), "conv_24.weight is not of a floating-point type"),
    "truth values": (lambda: zipped(*parts({CONV: weights()[CONV] > 0})), "conv_24.weight is not of a floating-point type"),
    "complex numbers": (lambda: zipped(*parts({CONV: weights()[CONV].to(torch.complex64)})), "not of a floating-point type"),
    "NaN": (lambda: zipped(*parts(flawed(torch.nan))), "conv_24.weight holds NaN or infinite values"),
    "infinity": (lambda: zipped(*parts(flawed(-torch.inf))), "conv_24.weight holds NaN or infinite values"),
    "2**62 elements": (lambda: zipped(*parts(shape=(2**31, 2**31, 1, 1))), "larger than what is stored"),
    "2**80 elements": (lambda: zipped(*parts(shape=(2**40, 2**40, 1, 1), stride=(0, 0, 0, 0))), "would take 2417851639229258"),
    "one number of 9 TB": (lambda: zipped(*parts(shape=(2**20, 2**20, 2, 2), stride=(0, 0, 0, 0))), "would take 8796093"),
    "a length of 600 digits": (lambda: zipped(*parts(shape=(2**2000, 16, 24, 24))), "a shape, strides or an offset that no"),
    "200,000 dimensions": (lambda: zipped(*parts(shape=b"(" + b"K\x01" * 200000 + b"t", stride=b"(" + b"K\x00" * 200000 + b"t")), "rank 200000"),
    "a negative length": (lambda: zipped(*parts(shape=(-8, 16, 24, 24))), "a shape, strides or an offset that no"),
    "a negative stride": (lambda: zipped(*parts(stride=(9216, 576, 24, -1))), "a shape, strides or an offset that no"),
    "a negative offset": (lambda: zipped(*parts(offset=-1)), "a shape, strides or an offset that no"),
    "a fraction for a length": (lambda: zipped(*parts(shape=(b"G" + struct.pack(">d", 8.0), 16, 24, 24))), "a shape, strides or an offset that no"),
    "words for lengths": (lambda: zipped(*parts(shape=("8", "16", "24", "24"))), "a shape, strides or an offset that no"),
    "fewer strides": (lambda: zipped(*parts(stride=(1,))), "a shape, strides or an offset that no"),
    "an offset beyond the storage": (lambda: zipped(*parts(offset=1)), "conv_24.weight is larger than what is stored of it"),
    "strides beyond the storage": (lambda: zipped(*parts(stride=(9216, 576, 24, 2))), "larger than what is stored of it"),
    "a storage beyond its entry": (lambda: zipped(*parts(count=73729)), "larger than what is stored of it"),
    "a storage of the whole file": (lambda: zipped(*parts(count=75000, offset=700)), "larger than what is stored of it"),
    "a storage of exabytes": (lambda: zipped(*parts(count=2**62)), "larger than what is stored of it"),
    "a storage that is not there": (lambda: zipped(*parts(key="77")), "larger than what is stored of it"),
    "a storage elsewhere": (lambda: zipped(*parts(key="../../../../../etc/passwd")), "larger than what is stored of it"),
    "a storage that is a link": (lambda: zipped(parts()[0], {k: v for k, v in parts()[1].items() if k != "0"}, extra=[linked("archive/data/0", "/dev/zero")]), "larger than what is stored of it"),
    "an absolute name": (lambda: zipped(*parts(), extra=[("/etc/sp_fast", "x")]), "lie in several folders"),
    "a name with ..": (lambda: zipped(*parts(), extra=[("../../sp_fast", "x")]), "lie in several folders"),
    "a storage twice": (lambda: zipped(*parts(), extra=[("archive/data/0", b"\0" * 147456)]), "its entries have one name twice"),
    "compressed": (lambda: zipped(parts()[0], parts()[1] | {"9": random.Random(0).randbytes(2**18)}, zipfile.ZIP_DEFLATED), "is compressed, encrypted"),
    "64 MiB compressed to 64 KiB": (lambda: zipped({}, {"0": bytes(2**26)}, zipfile.ZIP_DEFLATED), "is compressed, encrypted"),
    "an entry of 4 GB": (lambda: patched(patched(zipped(*parts()), 20, 2**32 - 2, 4), 24, 2**32 - 2, 4), "not where the archive says"),
    "an entry grown by half": (lambda: patched(zipped(*parts()), 24, 2**20, 4), "is compressed, encrypted"),
    "an encrypted entry": (lambda: patched(zipped(*parts()), 8, 1, 2), "is compressed, encrypted"),
    "an entry that is not there": (lambda: patched(zipped(*parts()), 42, 7, 4), "not where the archive says"),
    "an archive in the archive": (lambda: zipped(*parts(), root="model.bin").replace(b"data.pkl", b"data.zip"), "no torch.save on a little"),
    "an archive of nothing": (lambda: b"PK\5\6" + bytes(18), "no torch.save wrote it"),
    "half an archive": (lambda: zipped(*parts())[:80000], "File is not a zip file"),
    "a pickle of 3 MB": (lambda: zipped(b"}" * 3 * 10**6, {}), "a pickle of 3000003 bytes"),
    "a million dicts": (lambda: zipped(b"}" * 10**6, {}), "no mm_projector tensors"),
    "a memo of gigabytes": (lambda: zipped(b"}r\xff\xff\xff\xff0", {}), "POP"),
    "a list in itself": (lambda: zipped({CONV: b"]q\x00h\x00a"}, {}), "'model.conv_24.weight' is a list"),
    "a stack that is empty": (lambda: zipped(b"R", {}), "pop from empty list"),
    "no end": (lambda: zipped(b"}", {}).replace(b"}.", b"}}"), "pickle exhausted before seeing STOP"),
    "big-endian": (lambda: zipped(*parts()).replace(b"little", b"biggie"), "no torch.save on a little-endian machine wrote it"),
    "a storage of exabytes, before archives": (lambda: legacy(*parts()).replace(struct.pack("<q", 73728), struct.pack("<q", 2**62)), "its storages end at byte"),
    "a storage of another size, before archives": (lambda: legacy(*parts(count=73729)), "larger than what is stored of it"),
    "a storage in a storage, before archives": (lambda: legacy(*parts()).replace(b"NtQ", b"(X\1\0\0\0vK\0K\4ttQ", 1), "something beside storages"),
    "200,000 tuples for a storage's name, before archives": (lambda: legacy(*parts(), keys=(b")" + b"\x85" * 2 * 10**5,)), "its storages end at byte"),
    "half of it, before archives": (lambda: legacy(*parts())[:80000], "its storages end at byte"),
    "a storage without a tensor, before archives": (lambda: legacy(*parts(), keys=("99",)), "'99'"),
    "safetensors": (lambda: safetensors(), "no torch.save wrote it"),
    "protocol 4": (lambda: saved(lambda t: t, pickle_protocol=4), "FRAME|SHORT_BINUNICODE"),
    "protocol 34": (lambda: zipped(*parts()).replace(b"\x80\x02}", b"\x80\x22}"), "PROTO 34 in its pickle"),
    "nothing": (lambda: b"", "no torch.save wrote it"),
}  # fmt: skip
for name, (content, says) in TORCH.items():
    write = one_file("model.bin", lambda _, content=content: content())
    HOSTILE[f"torch: {name}"] = write, f"model.bin.*{says}", "official"


# ---- Safetensors


def listing(state=None):
    """The header of a whole file, and its data."""
    header, data = {}, b""
    for name, tensor in (state or weights()).items():
        kind = {torch.float16: "F16", torch.int8: "I8", torch.bool: "BOOL", torch.complex64: "C64"}[tensor.dtype]
        begin, data = len(data), data + raw(tensor)
        header[name] = {"dtype": kind, "shape": list(tensor.shape), "data_offsets": [begin, len(data)]}
    return header, data


def safetensors(header=None, data=None, length=None, **conv):
    """A file; ``conv`` changes what the header says of the convolution, bytes are a header as it is."""
    whole, whole_data = listing()
    if header is None:
        header = {**whole, CONV: whole[CONV] | conv}
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    length = len(text) if length is None else length
    return length.to_bytes(8, "little") + text + (whole_data if data is None else data)


def text_of(old, new):
    """The header's text, something in it replaced."""
    text = json.dumps(listing()[0])
    assert old in text
    return text.replace(old, new, 1).encode()


def of(state):
    header, data = listing({**weights(), **state})
    return safetensors(header, data)


def half_empty(folder):
    """A file of 128 MB, most of it a hole, that by one of its widths is a projector of 1.2 GB."""
    header, data = listing()
    begin, shape = len(data), [24000, 2667]
    header["model.norm.weight"] = header.pop("model.mm_projector.2.weight")
    header["model.mm_projector.2.weight"] = {"dtype": "F16", "shape": shape, "data_offsets": [begin, begin + 128016000]}
    path = folder / "model.safetensors"
    path.write_bytes(safetensors(header, data))
    os.truncate(path, path.stat().st_size + 128016000)
    return path


WIDE = {
    "model.mm_projector.0.weight": torch.zeros(1, 2**20).half(),
    "model.mm_projector.2.weight": torch.zeros(2**20, 1).half(),
}
SAFETENSORS = {
    "a header of 2**63 bytes": (lambda: safetensors(length=2**63), "9223372036854775808 bytes of header"),
    "a header of 100 MB": (lambda: safetensors(length=10**8), "100000000 bytes of header"),
    "a header beyond the file": (lambda: safetensors(length=2**20), "utf-8|invalid"),
    "a header of no bytes": (lambda: safetensors(length=0), "Expecting value"),
    "a header that ends early": (lambda: safetensors(length=300), "Unterminated|Expecting"),
    "not UTF-8": (lambda: safetensors(text_of("conv_24", "conv_24").replace(b"conv", b"c\xffnv")), "utf-8"),
    "half a character": (lambda: safetensors(text_of("conv_24", r"conv\ud800_24")), "surrogate|hex escape|characters"),
    "lists in lists": (lambda: safetensors(b'{"a": ' + b"[" * 10**6), "JSON that is nested too deeply"),
    "objects in objects": (lambda: safetensors(b'{"a": ' * 10**5), "JSON that is nested too deeply"),
    "a list": (lambda: safetensors(b"[]"), "expected struct"),
    "every tensor twice, in one place": (lambda: safetensors(json.dumps(listing()[0])[:-1].encode() + b", " + json.dumps(listing()[0])[1:].replace("F16", "BF16").encode()), "gives one name twice"),
    "two types of one tensor": (lambda: safetensors(text_of('"dtype"', '"dtype": "BF16", "dtype"')), "gives one name twice"),
    "overlapping data": (lambda: safetensors(data_offsets=[2, 147458]), "invalid offset"),
    "a hole in the data": (lambda: safetensors(shape=[8, 16, 24, 23], data_offsets=[6144, 147456]), "invalid offset"),
    "data beyond the file": (lambda: safetensors(data=b""), "not fully covered"),
    "data behind the tensors": (lambda: safetensors(data=listing()[1] + b"\0\0"), "not fully covered"),
    "reversed offsets": (lambda: safetensors(data_offsets=[147456, 0]), "invalid offset"),
    "negative offsets": (lambda: safetensors(data_offsets=[-147456, 0]), "invalid value"),
    "offsets beyond 64 bits": (lambda: safetensors(data_offsets=[0, 2**64]), "invalid type"),
    "fractions for offsets": (lambda: safetensors(data_offsets=[0.0, 147456.0]), "invalid type"),
    "2**62 times 2**62 elements": (lambda: safetensors(shape=[2**62, 2**62, 24, 24]), "overflow"),
    "2**64 elements": (lambda: safetensors(shape=[2**64, 16, 24, 24]), "invalid type"),
    "2**63 times nothing": (lambda: safetensors(shape=[0, 2**63], data_offsets=[0, 0]), "invalid offset|overflow"),
    "a negative length": (lambda: safetensors(shape=[-8, 16, 24, 24]), "invalid value"),
    "a long shape": (lambda: safetensors(shape=[8, 16, 24, 24, 2]), "bytes|shape|size"),
    "10,000 dimensions": (lambda: safetensors(shape=[8, 16, 24, 24] + [1] * 10**4), "rank 10004"),
    "a name of 1 MB": (lambda: safetensors(text_of("conv_24", "c" * 10**6)), "of 1000013 characters"),
    "a name for the terminal": (lambda: safetensors(text_of("conv_24", r"\u001b[31mconv_24")), "no model has a tensor 'model"),
    "an unknown type": (lambda: safetensors(dtype="F17"), "unknown variant"),
    "float8": (lambda: safetensors(dtype="F8_E4M3", shape=[16, 16, 24, 24]), "conv_24.weight is not of a floating-point type"),
    "4 bits": (lambda: safetensors(dtype="F4", shape=[32, 16, 24, 24]), "conv_24.weight is not of a floating-point type"),
    "bfloat16 among float16": (lambda: safetensors(dtype="BF16"), "mixes torch.bfloat16, torch.float16: choose one"),
    "integers": (lambda: of({CONV: weights()[CONV].char()}), "conv_24.weight is not of a floating-point type"),
    "truth values": (lambda: of({CONV: weights()[CONV] > 0}), "conv_24.weight is not of a floating-point type"),
    "complex numbers": (lambda: of({CONV: weights()[CONV].to(torch.complex64)}), "conv_24.weight is not of a floating-point"),
    "NaN": (lambda: of(flawed(torch.nan)), "conv_24.weight holds NaN or infinite values"),
    "infinity": (lambda: of(flawed(torch.inf)), "conv_24.weight holds NaN or infinite values"),
    "widths of 8 TB": (lambda: of(WIDE), "far from filling"),
    "a pickle": (lambda: pickled(parts()[0]), "bytes of header"),
    "an archive": (lambda: zipped(*parts()), "bytes of header"),
    "nothing": (lambda: b"", "Expecting value"),
    "zeros": (lambda: bytes(10**5), "Expecting value"),
}  # fmt: skip
for name, (content, says) in SAFETENSORS.items():
    write = one_file("model.safetensors", lambda _, content=content: content())
    HOSTILE[f"safetensors: {name}"] = write, f"model.safetensors.*{says}", "official"
HOSTILE["safetensors: a width of 1 GB"] = (
    half_empty,
    r"has shape \[24000, 2667\] where \[24000, 24000\]",
    "official",
)


# ---- Folders: indexes, links, devices


def sharded(folder, text=None, **named):
    """The checkpoint in two shards and their index, which says ``text`` or names the convolution's shard otherwise."""
    folder.mkdir(exist_ok=True)
    shards = {name: f"{'ab'[i > 2]}.safetensors" for i, name in enumerate(weights())}
    for shard in ("a.safetensors", "b.safetensors"):
        state = {name: tensor for name, tensor in weights().items() if shards[name] == shard}
        (folder / shard).write_bytes(safetensors(*listing(state)))
    index = {"metadata": {}, "weight_map": shards | {CONV: named.get("shard", shards[CONV])}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index) if text is None else text)
    return folder


def shard(name):
    return lambda folder: sharded(folder, shard=name)


def index(text):
    return lambda folder: sharded(folder, text)


def moved(write, name, make):
    """What ``write`` writes, but one file is moved out of the folder, and something else put in its place."""

    def rewrite(folder):
        source = write(folder)
        (folder / name).rename(folder.parent / name)
        make(folder / name)
        return source

    return rewrite


def put(name, make):
    """A folder with something under a checkpoint's name."""

    def write(folder):
        make(folder / name)
        return folder / name

    return write


def link(target):
    return lambda path: path.symlink_to(target)


def outside(path):
    path.symlink_to(path.parent.parent / path.name)


def two_links(folder):
    sharded(folder, shard="c.safetensors")
    (folder / "c.safetensors").symlink_to("b.safetensors")
    return folder


NOT_BESIDE, MISSING = "which is not a plain file beside it", "which is missing: it %s; fetch it"
INDEXES = {
    "a shard above": (shard("../a.safetensors"), NOT_BESIDE),
    "a shard of another folder": (shard("/etc/passwd"), NOT_BESIDE),
    "a shard below": (shard("x/a.safetensors"), NOT_BESIDE),
    "a shard by a detour": (shard("x/../a.safetensors"), NOT_BESIDE),
    "a shard named ..": (shard(".."), MISSING % "is no regular file"),
    "a shard without a name": (shard(""), MISSING % "is no regular file"),
    "a shard with a zero byte": (shard("a\0.safetensors"), NOT_BESIDE),
    "a shard for the terminal": (shard("\x1b[31ma.safetensors"), NOT_BESIDE),
    "a shard with a name of 1 MB": (shard("a" * 10**6), r"names the shard a+, which is missing: it cannot be opened \(File name too long"),
    "a number for a shard": (index('{"weight_map": {"a": 3}}'), NOT_BESIDE),
    "a list for a shard": (index('{"weight_map": {"a": ["b"]}}'), "is no index of shards.*fetch it again"),
    "the index itself": (shard("model.safetensors.index.json"), "index.json is truncated or damaged.*fetch it again"),
    "a link out of the folder": (moved(sharded, "b.safetensors", outside), "is a link to .*, outside the checkpoint's folder: put the file itself there"),
    "a link to nothing": (moved(sharded, "b.safetensors", link("gone")), MISSING % "does not exist"),
    "a link to itself": (moved(sharded, "b.safetensors", link("b.safetensors")), MISSING % "does not exist"),
    "a link to a device": (moved(sharded, "b.safetensors", link("/dev/zero")), MISSING % "is no regular file"),
    "a pipe": (moved(sharded, "b.safetensors", os.mkfifo), MISSING % "is no regular file"),
    "a folder": (moved(sharded, "b.safetensors", os.mkdir), MISSING % "is no regular file"),
    "one shard under two names": (two_links, "is in more than one shard, c.safetensors among them"),
    "a shard named twice": (index(f'{{"weight_map": {{"{CONV}": "a.safetensors", "{CONV}": "b.safetensors"}}}}'), "one name twice"),
    "lists in lists": (index('{"weight_map": ' + "[" * 10**6), "nested too deeply"),
    "3 MB": (index('{"weight_map": {}, "x": "' + "x" * 3 * 10**6 + '"}'), "more than 2097152 bytes of JSON"),
    "a shard that is gone": (shard("a.safetensors.gone"), MISSING % "does not exist"),
}  # fmt: skip
for name, (write, says) in INDEXES.items():
    HOSTILE[f"index: {name}"] = write, says, "official"
GIVE = "give a checkpoint file or the folder that holds it"
FILES = {
    "a pipe": (put("model.bin", os.mkfifo), f"model.bin is no regular file: {GIVE}"),
    "a pipe named as safetensors": (put("model.safetensors", os.mkfifo), f"model.safetensors is no regular file: {GIVE}"),
    "a pipe named as an index": (put("model.safetensors.index.json", os.mkfifo), f"index.json is no regular file: {GIVE}"),
    "a device": (lambda folder: "/dev/zero", f"/dev/zero is no regular file: {GIVE}"),
    "a link to a device": (put("model.bin", link("/dev/zero")), f"model.bin is no regular file: {GIVE}"),
    "a link to a device named as safetensors": (put("model.safetensors", link("/dev/zero")), f"model.safetensors is no regular file: {GIVE}"),
    "a link to itself": (put("model.bin", link("model.bin")), f"model.bin does not exist: {GIVE}"),
    "a folder of pipes": (lambda folder: put("model.bin", os.mkfifo)(folder).parent, "holds none of .*: name the checkpoint file itself"),
}  # fmt: skip
for name, (write, says) in FILES.items():
    HOSTILE[f"path: {name}"] = write, says, "official"


# ---- Own folders


def own(values=None, text=None, edit=str, config=None):
    """What save_pretrained writes, values or the text of its config.json changed."""

    def write(folder):
        (SPProjector(config) if config else projector()).save_pretrained(folder)
        path = folder / "config.json"
        path.write_text(text or edit(json.dumps(json.loads(path.read_text()) | (values or {}))))
        return folder

    return write


def transformer(**values):
    return own(values, config=small("tfm336"))


SAVED = "give the folder that save_pretrained wrote"
CONFIGS = {
    "a grid of 10**9": (own({"grid": 10**9}), "grid=1000000000 must be patches a side of a vision tower, up to 1024"),
    "a grid of 10**9, windows of it": (own({"pyramid": "sliding", "kernel_sizes": None, "grid": 10**9, "map_size": 10**9, "sliding_windows": [10**5, 10**5]}), "grid=1000000000 must be patches a side"),
    "a grid of 4,000 digits": (own({"grid": 10**4000}), "grid=1000"),
    "a grid of 5,000 digits": (own(text='{"model_type": "sp_projector", "grid": 1' + "0" * 5000 + "}"), f"cannot be read .*: {SAVED}"),
    "a million windows": (own({"pyramid": "sliding", "kernel_sizes": None, "grid": 1000, "map_size": 1000, "sliding_windows": [1000, 1000]}), "far from filling"),
    "a thousand levels": (own({"grid": 1024, "map_size": 1024, "kernel_sizes": list(range(1, 1025))}), "far from filling"),
    "10**9 layers": (transformer(transformer_layers=10**9), "far from filling"),
    "more layers than tensors": (transformer(transformer_layers=50), "far from filling"),
    "a width of 2**40": (own({"vision_width": 2**40}), "far from filling"),
    "widths of 10**30": (own({"vision_width": 10**30, "spatial_width": 10**30, "text_width": 10**30}), "far from filling"),
    "widths of 4,000 digits": (own({"vision_width": 10**3999, "spatial_width": 10**3999, "text_width": 10**3999}), "far from filling"),
    "100,000 kernel sizes": (own({"kernel_sizes": [24] * 10**5}), "must ascend without repeats"),
    "a detail kernel of 10**9": (own({"detail_kernel": 10**9}), "detail_kernel=1000000000 does not fit the map"),
    "10**9 heads": (transformer(transformer_heads=10**9), "transformer_heads=1000000000 does not divide"),
    "a negative grid": (own({"grid": -24}), "grid=-24 must be a positive integer"),
    "a word for a grid": (own({"grid": "24"}), "grid='24' must be a positive integer"),
    "a fraction for a grid": (own({"grid": 24.0}), "grid=24.0 must be a positive integer"),
    "NaN for a grid": (own({"grid": float("nan")}), "grid=nan must be a positive integer"),
    "true for a grid": (own({"grid": True}), "grid=True must be a positive integer"),
    "a list for a grid": (own({"grid": [24]}), r"grid=\[24\] must be a positive integer"),
    "NaN for dropout": (own({"transformer_dropout": float("nan")}), "transformer_dropout=nan is no probability"),
    "infinity for dropout": (own({"transformer_dropout": float("inf")}), "transformer_dropout=inf is no probability"),
    "words for kernel sizes": (own({"kernel_sizes": ["24"]}), "kernel_sizes=.* must hold integers"),
    "lists for kernel sizes": (own({"kernel_sizes": [[[24]]]}), "kernel_sizes=.* must hold integers"),
    "an object for the pyramid": (own({"pyramid": {"crop": 1}}), "pyramid=.* is unknown; it must be one of"),
    "code of its own": (own({"auto_map": {"AutoModel": "evil.Evil"}}), "'auto_map' is no field of SPProjectorConfig"),
    "trust": (own({"trust_remote_code": True}), "'trust_remote_code' is no field"),
    "a class": (own({"__class__": "evil"}), "'__class__' is no field"),
    "two grids": (own(edit=lambda text: text[:-1] + ', "grid": 27}'), f"gives one name twice.*{SAVED}"),
    "lists in lists": (own(text='{"model_type": ' + "[" * 10**6), f"nested too deeply.*{SAVED}"),
    "lists in lists, closed": (own(text='{"model_type": "sp_projector", "grid": ' + "[" * 900 + "]" * 900 + "}"), "positive integer|nested too deeply"),
    "objects in objects": (own(text='{"a":' * 10**5), f"nested too deeply.*{SAVED}"),
    "3 MB": (own(text='{"x": "' + "x" * 3 * 10**6 + '"}'), f"more than 2097152 bytes of JSON.*{SAVED}"),
    "a list": (own(text="[1]"), "is not of model_type 'sp_projector'"),
    "no text": (moved(own(), "config.json", lambda path: path.write_bytes(b"\xff\xfe\x00")), f"cannot be read .*{SAVED}"),
    "a pipe": (moved(own(), "config.json", os.mkfifo), f"cannot be read, as it is no regular file: {SAVED}"),
    "a device": (moved(own(), "config.json", link("/dev/zero")), f"cannot be read, as it is no regular file: {SAVED}"),
    "a folder": (moved(own(), "config.json", os.mkdir), f"cannot be read, as it is no regular file: {SAVED}"),
    "weights out of the folder": (moved(own(), "model.safetensors", outside), "model.safetensors is a link to .*, outside the checkpoint's folder"),
    "weights in a pipe": (moved(own(), "model.safetensors", os.mkfifo), f"model.safetensors is no regular file: {SAVED}"),
    "weights in a device": (moved(own(), "model.safetensors", link("/dev/zero")), f"model.safetensors is no regular file: {SAVED}"),
    "weights in a folder": (moved(own(), "model.safetensors", os.mkdir), f"model.safetensors is no regular file: {SAVED}"),
    "weights in a pickle": (moved(own(), "model.safetensors", lambda path: path.write_bytes(zipped(*parts()))), "model.safetensors.*bytes of header"),
}  # fmt: skip
for name, (write, says) in CONFIGS.items():
    HOSTILE[f"own folder: {name}"] = write, says, "own"


# ---- What looks alike, and must load


def in_cache(write):
    """The same in Hugging Face's cache: links from a snapshot into a folder of blobs."""

    def arrange(folder):
        plain, cached, blobs = folder / "plain", folder / "snapshots" / "0123abcd", folder / "blobs"
        for path in (plain, cached, blobs):
            path.mkdir(parents=True)
        write(plain)
        for number, path in enumerate(sorted(plain.iterdir())):
            path.rename(blobs / f"{number:040}")
            (cached / path.name).symlink_to(f"../../blobs/{number:040}")
        return cached

    return arrange


def linked_folder(folder):
    sharded(folder / "there")
    (folder / "here").symlink_to("there")
    return folder / "here"


def linked_files(folder):
    sharded(folder / "there")
    (folder / "here").mkdir()
    for path in (folder / "there").iterdir():
        (folder / "here" / path.name).symlink_to(path)
    return folder / "here"


def linked_file(folder):
    (folder / "there").mkdir()
    (folder / "there" / "weights").write_bytes(safetensors())
    (folder / "model.safetensors").symlink_to("there/weights")
    return folder


def attributed(tensor):
    """Attributes that a loader could take for the tensor's own."""
    tensor = tensor.clone()
    tensor.detach, tensor.note = torch.Tensor, 3
    return tensor


def in_one_storage(folder):
    """All tensors one after the other, as DeepSpeed keeps them, and two tied ones of the rest of the model."""
    flat, tied = torch.cat([tensor.flatten() for tensor in weights().values()]), torch.randn(300, 400)
    pieces = flat.split([tensor.numel() for tensor in weights().values()])
    state = {name: piece.view(tensor.shape) for piece, (name, tensor) in zip(pieces, weights().items(), strict=True)}
    torch.save(state | {"model.embed_tokens.weight": tied, "lm_head.weight": tied.t()}, folder / "model.bin")
    return folder


HARMLESS = {
    "an archive": one_file("model.bin", lambda _: zipped(*parts())),
    "the format before": one_file("model.bin", lambda _: legacy(*parts())),
    "safetensors": one_file("model.safetensors", lambda _: safetensors()),
    "an index": sharded,
    "an own folder": own(),
    "torch.save": one_file("model.bin", lambda _: saved(lambda t: t)),
    "torch.save, the format before": one_file(
        "model.bin", lambda _: saved(lambda t: t, _use_new_zipfile_serialization=False)
    ),
    "a parameter": one_file("model.bin", lambda _: saved(torch.nn.Parameter)),
    "columns first": one_file("model.bin", lambda _: saved(lambda t: t.to(memory_format=torch.channels_last))),
    "attributes": one_file("model.bin", lambda _: saved(attributed)),
    "one storage": in_one_storage,
    "a cache": in_cache(sharded),
    "a cache of one file": in_cache(one_file("model.safetensors", lambda _: safetensors())),
    "a cache of an own folder": in_cache(own()),
    "a link to a folder": linked_folder,
    "links to all files": linked_files,
    "a link to an index": moved(sharded, "model.safetensors.index.json", outside),
    "a link to a file": linked_file,
    "a link to a file elsewhere": moved(
        one_file("model.safetensors", lambda _: safetensors()), "model.safetensors", outside
    ),
}
