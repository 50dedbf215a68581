"""Hostile and damaged checkpoints: loading runs no code, ends, stays small, and gives what the file holds or an error.

Every load happens in a process of its own, so that a crash, a hang and a large memory are seen.
"""

import copy
import io
import json
import math
import multiprocessing
import os
import pickle
import random
import re
import resource
import time
import zipfile
from collections import Counter, OrderedDict
from pathlib import Path

import pytest
import torch
from safetensors.torch import save

from sp_fast import CheckpointError, SPProjector
from tests import hostile
from tests.helpers import equal, randomised, small

MIB = 2**20
pytestmark = pytest.mark.filterwarnings("ignore:.*(deprecated|prototype)")


# ---- The guarded process


def status(field):
    """Bytes, from the kernel's own count."""
    lines = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return int(lines[field].split()[0]) * 1024


def serve(pipe):
    """Answers calls, with at most 1 GiB more of data than the imports take; private maps of files count."""
    torch.set_num_threads(1)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    resource.setrlimit(resource.RLIMIT_DATA, (status("VmData") + 1024 * MIB,) * 2)
    pipe.send("ready")
    while True:
        function, arguments = pipe.recv()
        Path("/proc/self/clear_refs").write_text("5")  # the peak, VmHWM, starts anew
        before, start = status("VmRSS"), time.perf_counter()
        answer = function(*arguments)
        pipe.send((*answer, (status("VmHWM") - before) / MIB, time.perf_counter() - start))


class Guard:
    """A process for many calls, and a new one where a call killed it or does not end.

    An answer is what became of the call, details, MiB that it took at its peak, and seconds.
    """

    process = None

    def call(self, function, *arguments, seconds=20):
        if self.process is None:
            self.start()
        try:
            self.pipe.send((function, arguments))
            if self.pipe.poll(seconds):
                return self.pipe.recv()
            outcome = "hung", f"no answer in {seconds} s"
        except (EOFError, ConnectionError):
            self.process.join()
            outcome = "died", f"exit code {self.process.exitcode}"
        self.close()
        return *outcome, math.inf, math.inf

    def start(self):
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(["tests.hostile"])  # whose imports take longer than the calls
        self.pipe, other = context.Pipe()
        self.process = context.Process(target=serve, args=(other,), daemon=True)
        self.process.start()
        other.close()
        assert self.pipe.recv() == "ready"

    def close(self):
        if self.process is not None:
            self.process.kill()
            self.process.join()
            self.process = None


@pytest.fixture(scope="module")
def guard():
    guard = Guard()
    yield guard
    guard.close()


def take(size):
    try:
        return "taken", len(bytearray(size))
    except MemoryError:
        return "refused", ""


def test_the_guard_sees_harm(guard):
    assert guard.call(os.abort)[:2] == ("died", "exit code -6")
    assert guard.call(time.sleep, 60, seconds=0.2)[0] == "hung"
    assert guard.call(take, 300 * MIB)[2] == pytest.approx(300, abs=5)
    assert guard.call(take, 2048 * MIB)[0] == "refused"
    assert guard.call(take, 1)[2] < 5


# ---- Made to do harm


def into_another(source):
    projector = copy.deepcopy(hostile.projector())
    projector.load_official(source)
    return projector


LOADERS = {"official": SPProjector.from_official, "own": SPProjector.from_pretrained, "into another": into_another}


def load(how, source):
    """What became of a load: refused, with the message; raised, with any other error; loaded, and whether exactly."""
    try:
        loaded = LOADERS[how](source)
    except CheckpointError as error:
        return "refused", str(error)
    except BaseException as error:  # noqa: BLE001, which is what is looked for
        return "raised", f"{type(error).__name__}: {error}"[:500]
    return "loaded", equal(loaded.official_state_dict(), hostile.weights())


def fire(folder):
    """Loads every file the unsafe way; whether code ran."""
    for path in sorted(folder.iterdir()):
        try:
            with path.open("rb") as file:
                torch.load(file, weights_only=False)
        except BaseException:  # noqa: BLE001, after the code ran
            continue
    return "fired" if (folder / "ran").exists() else "nothing ran", ""


WAY_OUT = (
    "fetch it|fetch the|ask its author|give |choose |use |put |name the|save tensors|must|divide|no field|in \\[0, 1\\)"
)


def empty(folder):
    folder.mkdir()
    return folder


@pytest.mark.parametrize("name", hostile.HOSTILE)
def test_hostile_checkpoints_are_refused(name, guard, tmp_path):
    write, says, how = hostile.HOSTILE[name]
    folder = empty(tmp_path / "checkpoint")
    source = write(folder)
    outcome, message, mib, seconds = guard.call(load, how, source)
    assert outcome == "refused", f"{outcome}: {message}"
    assert re.search(says, message, re.DOTALL), message
    assert re.search(WAY_OUT, message), message
    assert str(folder) in message or "/dev/zero" in message
    assert not (folder / "ran").exists()
    assert mib < 250
    assert seconds < 10
    assert len(message) < 6000
    if how == "official":  # which the types may differ for: they are cast
        casts = name == "safetensors: bfloat16 among float16"
        assert guard.call(load, "into another", source)[0] == ("loaded" if casts else "refused")
        assert not (folder / "ran").exists()


@pytest.mark.parametrize("name", hostile.CODE)
def test_their_code_would_run(name, guard, tmp_path):
    """The canary of the test above is alive: loaded the unsafe way, each of these files leaves it."""
    hostile.CODE[name][0](tmp_path)
    assert guard.call(fire, tmp_path)[0] == "fired"


@pytest.mark.parametrize("name", hostile.HARMLESS)
def test_what_looks_alike_loads(name, guard, tmp_path):
    how = "own" if "own folder" in name else "official"
    source = hostile.HARMLESS[name](empty(tmp_path / "checkpoint"))
    assert guard.call(load, how, source)[:2] == ("loaded", True)


# ---- Damaged by chance


def whole():
    """A small checkpoint in each format, by ending; the same bytes in every process, as torch's older format is not."""
    config = small("conv336_cropping_sfe_dfi", vision_width=2, spatial_width=2, text_width=3)
    state = randomised(SPProjector(config, dtype=torch.float16)).official_state_dict()
    archive = io.BytesIO()
    torch.save(state, archive)
    before = hostile.legacy(*hostile.described(state))
    return {".safetensors": save(state), ".bin": archive.getvalue(), ".old.bin": before}


WHOLE = whole()
# Where a file is more than numbers: names, shapes, places. Half of the damage goes there.
EDGES = {".safetensors": [(0, 2200)], ".bin": [(0, 2600), (-2000, 0)], ".old.bin": [(0, 4500)]}


def flip(draw, data, place):
    for _ in range(draw.choice([1, 1, 2, 8])):
        data[place] ^= 1 << draw.randrange(8)
        place = min(place + draw.randrange(40), len(data) - 1)


def overwrite(draw, data, place):
    data[place : place + draw.choice([1, 2, 4, 8])] = draw.choice([b"\0", b"\xff", b"9", b"\x7f\xff"]) * 4


def delete(draw, data, place):
    del data[place : place + draw.choice([1, 2, 8, 300])]


def insert(draw, data, place):
    data[place:place] = draw.choice([draw.randbytes(2), b"0", b" ", b"\0" * 64, b'"', b",", b"}", b"]"])


def duplicate(draw, data, place):
    data[place:place] = data[place : place + draw.choice([1, 2, 64, 1000])]


def truncate(draw, data, place):
    del data[place:]


def splice(draw, data, place):
    source, length = draw.randrange(len(data)), draw.choice([2, 8, 100, 4000])
    data[place : place + length] = data[source : source + length]


def graft(draw, data, place):
    """The rest of the file comes from one of another format."""
    data[place:] = WHOLE[draw.choice(list(WHOLE))][place:]


BYTES = [flip, overwrite, delete, insert, duplicate, truncate, splice, graft]


def shape(draw, header, name, other):
    lengths = header[name]["shape"]
    place = draw.randrange(len(lengths))
    change = draw.randrange(6)
    if change == 0:
        draw.shuffle(lengths)
    elif change == 1:
        lengths[place] = draw.choice([-1, 0, 1, lengths[place] + 1, 2**31, 2**62, 2**63, 2**64, 1.5, "2", None, [2]])
    elif change == 2:
        lengths.insert(place, 1)
    elif change == 3:
        del lengths[place]
    elif change == 4:
        header[name]["shape"] = header[other]["shape"]
    else:
        lengths[:] = [math.prod(lengths)]


def dtype(draw, header, name, other):
    kinds = ["BF16", "I16", "U16", "F32", "F64", "I8", "BOOL", "F8_E4M3", "F4", "C64", "f16", "", None, 16]
    for key in draw.choice([[name], [name, other], [key for key in header if key != "__metadata__"]]):
        header[key]["dtype"] = kinds[0] if draw.random() < 0.4 else draw.choice(kinds)


def offsets(draw, header, name, other):
    begin, end = header[name]["data_offsets"]
    header[name]["data_offsets"], also = draw.choice(
        [
            (header[other]["data_offsets"], [begin, end]),
            (header[other]["data_offsets"], None),
            ([end, begin], None),
            ([begin + 2, end + 2], None),
            ([begin - 2, end], None),
            ([begin, end + 2], None),
            ([begin, begin], None),
            ([begin], None),
            ([-begin, end], None),
            ([begin, 2**64 - 2], None),
        ]
    )
    if also:
        header[other]["data_offsets"] = also


def names(draw, header, name, other):
    change = draw.randrange(6)
    if change == 0:  # also of the same shape: a good file with other contents
        header[name], header[other] = header[other], header[name]
    elif change == 1:
        header[name.replace("model.", draw.choice(["", "module.", "base_model.model.", "model.model.", "x."]))] = (
            header.pop(name)
        )
    elif change == 2:
        del header[name]
    elif change == 3:
        header[draw.choice(["model.conv_6.weight", "lm_head.weight", "", "model.", "é"])] = header.pop(name)
    elif change == 4:
        header[name.replace("8", "6").replace("weight", "bias")] = header.pop(name)
    else:
        header["model." + name] = dict(header[name])


def twice(draw, header, name, other):
    """One name for two tensors in one place: the zero byte is taken out again."""
    header[name + "\0"] = dict(header[name])


FIELDS = [shape, dtype, offsets, names, twice]


def mutant(seed):
    """A damaged file: its ending, what was done, whether it must be refused, and its bytes."""
    draw = random.Random(seed)
    ending = draw.choices(list(WHOLE), [6, 2, 1])[0]
    data = bytearray(WHOLE[ending])
    what = draw.random()
    if what < 0.05:  # a number that is none, in a tensor's data
        _, _, numbers = held(ending, data)["model.conv_24.weight"]
        place = data.index(numbers) + 2 * draw.randrange(len(numbers) // 2)
        data[place : place + 2] = draw.choice([b"\x00\x7c", b"\x00\xfc", b"\x01\x7c", b"\xff\xff"])
        return ending, "no number", True, bytes(data)
    if what < 0.35 and ending == ".safetensors":
        length = int.from_bytes(data[:8], "little")
        header = json.loads(data[8 : 8 + length])
        change, (name, other) = draw.choice(FIELDS), draw.sample(sorted(header.keys() - {"__metadata__"}), 2)
        change(draw, header, name, other)
        text = json.dumps(header).replace("\\u0000", "").encode()
        return (
            ending,
            change.__name__,
            change is twice,
            len(text).to_bytes(8, "little") + text + bytes(data[8 + length :]),
        )
    change = draw.choice(BYTES)
    begin, end = draw.choice(EDGES[ending]) if draw.random() < 0.5 else (0, len(data))
    change(draw, data, draw.randrange(begin, end) % len(data))
    if ending == ".safetensors" and draw.random() < 0.5:  # so that damage is not only found by the header's length
        length = int.from_bytes(WHOLE[ending][:8], "little") + len(data) - len(WHOLE[ending])
        data[:8] = max(0, length).to_bytes(8, "little")
    return ending, change.__name__, False, bytes(data)


# ---- What a file holds, read without the package and without torch: type, shape and bytes by name


def held(ending, data):
    read = {".safetensors": held_safetensors, ".bin": held_archive, ".old.bin": held_before}[ending]
    return {name: (kind, tuple(shape), content) for name, (kind, shape, content) in read(data).items()}


def distinct(pairs):
    assert len(dict(pairs)) == len(pairs)
    return dict(pairs)


def held_safetensors(data):
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length], object_pairs_hook=distinct)
    header.pop("__metadata__", None)
    body = data[8 + length :]
    return {name: (t["dtype"], t["shape"], body[slice(*t["data_offsets"])]) for name, t in header.items()}


class Reader(pickle.Unpickler):
    """Tensors as type, key, offset, shape and strides."""

    def find_class(self, module, name):
        if name == "_rebuild_tensor_v2":
            return lambda storage, offset, shape, stride, *_: (*storage, offset, shape, stride)
        return {"OrderedDict": OrderedDict, "HalfStorage": "F16", "BFloat16Storage": "BF16"}[name]

    def persistent_load(self, identifier):
        return identifier[1], identifier[2]


def gathered(content, storage):
    """The tensors' elements one after the other, two bytes each."""
    tensors = {}
    for name, (kind, key, offset, shape, stride) in content.items():
        places = [offset]
        for length, step in zip(shape, stride, strict=True):
            places = [place + i * step for place in places for i in range(length)]
        data = storage(key)
        assert min(places) >= 0
        assert max(places) < len(data) // 2
        tensors[name] = kind, shape, b"".join(data[2 * place : 2 * place + 2] for place in places)
    return tensors


def held_archive(data):
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        entries = {entry.filename.partition("/")[2]: entry for entry in archive.infolist()}

    def part(name):
        begin = entries[name].header_offset
        assert entries[name].compress_type == zipfile.ZIP_STORED
        begin += 30 + sum(int.from_bytes(data[begin + i : begin + i + 2], "little") for i in (26, 28))
        return data[begin : begin + entries[name].file_size]

    return gathered(Reader(io.BytesIO(part("data.pkl"))).load(), lambda key: part(f"data/{key}"))


def held_before(data):
    file, storages = io.BytesIO(data), {}
    *_, content, keys = (Reader(file).load() for _ in range(5))
    for key in keys:
        storages[key] = file.read(2 * int.from_bytes(file.read(8), "little"))
    return gathered(content, storages.get)


KINDS = {torch.float16: "F16", torch.bfloat16: "BF16", torch.float32: "F32", torch.float64: "F64"}
WHOLE_HELD = {name.removeprefix("model."): t for name, t in held(".safetensors", WHOLE[".safetensors"]).items()}


def judge(seed, folder):
    """Writes and loads a mutant: refused, loaded with or without a change, or what is wrong."""
    ending, _, must_fail, data = mutant(seed)
    path = folder / f"model{ending}"
    path.write_bytes(data)
    try:
        projector = SPProjector.from_official(path)
    except CheckpointError as error:
        return ("refused", "") if path.name in str(error) else ("the message does not name the file", str(error))
    except BaseException as error:  # noqa: BLE001, which is what is looked for
        return "raised", f"{type(error).__name__}: {error}"
    if must_fail:
        return "loaded what is wrong for sure", ""
    found = {
        name: (KINDS[tensor.dtype], tuple(tensor.shape), tensor.contiguous().view(torch.uint8).numpy().tobytes())
        for name, tensor in projector.official_state_dict(prefix="").items()
    }
    try:
        expected = {re.sub(r"^((base_model|module|model)\.)+", "", name): t for name, t in held(ending, data).items()}
    except Exception as error:  # noqa: BLE001, damage makes a reader fail in any way
        return "loaded what nobody else can read", f"{type(error).__name__}: {error}"
    if found != expected or found.keys() != WHOLE_HELD.keys():
        return "loaded what the file does not hold", str([n for n in WHOLE_HELD if found.get(n) != expected.get(n)])
    return "loaded unchanged" if expected == WHOLE_HELD else "loaded changed", ""


def test_the_judge_reads_files(tmp_path):
    """Its own reading of the undamaged files agrees in all three formats, and it sees a number that differs."""
    contents = [held(ending, data) for ending, data in WHOLE.items()]
    assert contents[0] == contents[1] == contents[2]
    assert len(contents[0]) == 25


@pytest.mark.parametrize("seeds", [range(1000), pytest.param(range(10_000), marks=pytest.mark.campaign)], ids=len)
def test_mutants_load_as_they_are_or_are_refused(seeds, guard, tmp_path):
    counts, wrong, start = Counter(), [], time.perf_counter()
    for seed in seeds:
        outcome, details, mib, seconds = guard.call(judge, seed, tmp_path)
        ending, what, *_ = mutant(seed)
        counts[ending, what, outcome] += 1
        if outcome not in ("refused", "loaded changed", "loaded unchanged") or mib > 250 or seconds > 10:
            wrong.append(f"seed {seed}, {what} in {ending}: {outcome} {details} ({mib:.0f} MiB, {seconds:.1f} s)")
    total = Counter()
    for (_, _, outcome), count in counts.items():
        total[outcome] += count
    print(f"\n{len(seeds)} mutants in {time.perf_counter() - start:.0f} s:", dict(total))
    print(
        *(f"{count:6} {outcome}: {what} in {ending}" for (ending, what, outcome), count in sorted(counts.items())),
        sep="\n",
    )
    assert not wrong, "\n".join(wrong)
    assert counts[".safetensors", "no number", "refused"] > 0
    assert total["refused"] > len(seeds) // 2
    assert min(total["loaded changed"], total["loaded unchanged"]) > len(seeds) // 100
