"""A mutation campaign: faults are planted into the kernels and the geometry, and each has to fail a test.

    python -m tests.mutation.campaign --seed 0 --count 70 [--file kernels/x.py] [--json FILE] [--list]

Exit code 0: every mutant of the sample was killed or is explained (explained.py). 1: one survived. 2: the tests fail
without a mutant. A new file gets a row in TARGETS, or in SCHEDULE where it changes no result.
"""

import argparse
import json
import os
import random
import re
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from queue import SimpleQueue

from rich.console import Console
from rich.progress import track
from rich.table import Table

from tests.mutation.explained import ANY, EXPLAINED
from tests.mutation.operators import Mutant, mutants

ROOT = Path(__file__).resolve().parents[2]
LIMIT_S = 30
SCHEDULE = {
    "kernels/device.py",
    "kernels/launch.py",
    "kernels/tiles.py",
}  # choices: a wrong one is right, slow or refused

MATMUL, GEOMETRY = "tests/test_windowed_matmul.py", "tests/test_geometry.py"
WINDOWED, GRADIENTS, POOLED, PROJECTOR, MUTANTS = (
    f"tests/interpreter/test_{name}.py"
    for name in (
        "windowed_matmul_triton",
        "windowed_matmul_backward",
        "pooled_rows_triton",
        "projector_triton",
        "mutants",
    )
)
TILES = f"{MUTANTS}::test_tiles_of_windows"
FORWARD = [
    TILES,
    *(
        f"{WINDOWED}::test_{name}"
        for name in (
            "every_batch_bucket[9]",  # two tiles of images
            "accuracy_beside_plain_torch[crop+detail-sm_90-torch.bfloat16]",  # weights on the M side
            "widths_that_tiles_do_not_divide[100-40]",
            "widths_that_tiles_do_not_divide[17-200]",
            "rows_beyond_two_billion_elements",
            "weights_beyond_two_billion_elements",
            "plan_of_the_published_windows",
            "layouts_of_rows",
            "refusals_name_the_way_out",
        )
    ),
]
BACKWARD = [
    *(
        f"{GRADIENTS}::test_{name}"
        for name in (
            "shared_cells_and_cells_that_no_window_meets",
            "weight_gradients_in_a_buffer_and_added_to_it[torch.float32-triton]",
            "every_batch_bucket[2]",
            "weights_beyond_two_billion_elements",
            "widths_that_tiles_do_not_divide[17-130]",
        )
    ),
    f"{TILES}[more outputs than a tile]",
    f"{TILES}[full tiles]",
]
ADDED = f"{GRADIENTS}::test_weight_gradients_in_a_buffer_and_added_to_it[torch.float32-torch]"
PARTS_OF_TAIL = [MUTANTS, PROJECTOR, "-k", "head_is or replaced or attention_alone or frozen"]
QUANTISED = "tests/test_windowed_matmul_quantized.py"
QUANTISED_TRITON = "tests/interpreter/test_windowed_matmul_quantized_triton.py"
# File -> words for pytest: 5 to 15 s, what fails soonest first. A selection in tests/interpreter is interpreted.
TARGETS: dict[str, list[str]] = {
    "kernels/autocast.py": [MATMUL, "-k", "autocast"],
    "kernels/gelu_rows_triton.py": [MUTANTS, "-k", "head_is"],
    "kernels/pooled_rows.py": [
        f"{MATMUL}::test_pooled_rows",
        MUTANTS,
        POOLED,
        "-k",
        "matmul or pooling or layouts or empty",
    ],
    "kernels/pooled_rows_triton.py": [MUTANTS, POOLED, "-k", "pooling or float32 or layouts or beyond or empty"],
    "kernels/spatial_norm_backward_triton.py": PARTS_OF_TAIL,
    "kernels/spatial_project_backward_triton.py": PARTS_OF_TAIL,
    "kernels/spatial_tail.py": PARTS_OF_TAIL,
    "kernels/spatial_tail_backward_triton.py": PARTS_OF_TAIL,
    "kernels/spatial_tail_triton.py": [MUTANTS, "-k", "head_is"],
    "kernels/token_head.py": [MUTANTS, PROJECTOR, "-k", "mutants or attention_alone or frozen or mixed or empty"],
    "kernels/token_head_backward.py": PARTS_OF_TAIL,
    "kernels/quantized.py": [QUANTISED],
    "kernels/window.py": [GEOMETRY, MATMUL, "-k", "windows or decoding or forward or errors"],
    "kernels/windowed_matmul.py": [*BACKWARD[:2], MATMUL, "-k", "not accuracy and not long and not gradcheck"],
    "kernels/windowed_matmul_drows_triton.py": BACKWARD,
    "kernels/windowed_matmul_dweight_triton.py": BACKWARD,
    "kernels/windowed_matmul_quantized.py": [QUANTISED],
    "kernels/windowed_matmul_quantized_triton.py": [QUANTISED_TRITON],
    "kernels/windowed_matmul_torch.py": [
        ADDED,
        MUTANTS,
        MATMUL,
        "-k",
        "half or matmul and not (long or gradcheck or opcheck)",
    ],
    "kernels/windowed_matmul_triton.py": FORWARD,
    "kernels/windowed_plan_triton.py": [*FORWARD, *BACKWARD[:2]],
    "sp_fast/geometry.py": [GEOMETRY, MATMUL, "-k", "test_geometry or forward"],
}


@dataclass(frozen=True)
class Result:
    """What the targeted tests said to one mutant; no killer where it survived."""

    mutant: Mutant
    killer: str | None
    seconds: float


def all_mutants(root: Path, files: Iterable[str]) -> dict[str, list[Mutant]]:
    return {file: mutants(file, (root / file).read_text()) for file in files}


def sample(by_file: Mapping[str, list[Mutant]], seed: int, count: int) -> list[Mutant]:
    """A file's share grows with the root of its mutants: short files take part, long ones more often."""
    places = []
    for file, found in by_file.items():
        shuffled = random.Random(f"{seed} {file}").sample(found, len(found))
        places += [((place + 0.5) / len(found) ** 0.5, file, mutant) for place, mutant in enumerate(shuffled)]
    chosen = sorted(places, key=lambda place: place[:2])[:count]
    return sorted((mutant for *_, mutant in chosen), key=lambda mutant: (mutant.file, mutant.line))


def why(mutant: Mutant, explained: Mapping[tuple, str]) -> str | None:
    """The explanation of a mutant that may survive."""
    return explained.get(mutant.key) or explained.get((*mutant.key[:3], ANY))


def stale(explained: Iterable[tuple], by_file: Mapping[str, list[Mutant]]) -> list[tuple]:
    """Explanations that no mutant of their file has."""
    keys = {key for found in by_file.values() for m in found for key in (m.key, (*m.key[:3], ANY))}
    return [key for key in explained if key[0] in by_file and key not in keys]


def run_tests(
    tree: Path, words: Sequence[str], limit: int = LIMIT_S, wall: int = 4 * LIMIT_S
) -> tuple[str | None, str]:
    """The first test that fails, or how else pytest ended badly, or None; and what it printed.

    ``limit`` counts seconds of the processor, which a busy machine does not stretch; ``wall`` is for what waits.
    """
    options = [*f"-x -q --no-header -p no:cacheprovider --timeout={wall} -m".split(), "not campaign and not gpu"]
    environment = {
        **os.environ, "TRITON_INTERPRET": str(int(any("interpreter" in word for word in words))),
        "PYTHONPATH": str(tree), "PYTHONDONTWRITEBYTECODE": "1", "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1",
    }  # fmt: skip
    process = subprocess.Popen(
        [sys.executable, "-m", "pytest", *options, *words], cwd=tree, env=environment, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, start_new_session=True,
    )  # fmt: skip
    resource.prlimit(process.pid, resource.RLIMIT_CPU, (limit, limit + 1))
    try:
        output, _ = process.communicate(timeout=wall)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)  # with what the tests have started
        return f"timeout: {wall} s", process.communicate()[0]
    if process.returncode == -signal.SIGXCPU:
        return f"timeout: {limit} s of the processor", output
    failed = re.findall(r"^(?:FAILED|ERROR) (.+?)(?: - .*)?$", output, re.MULTILINE)
    ended = f"crash: exit code {process.returncode}" if process.returncode else None
    return (failed[0] if process.returncode in (1, 2) and failed else ended), output


class Trees:
    """Copies of the sources, one for each process that runs at a time."""

    def __init__(self, root: Path, folder: Path, jobs: int) -> None:
        self.free: SimpleQueue[Path] = SimpleQueue()
        for job in range(jobs):
            ignored = shutil.ignore_patterns(".*", "__pycache__")
            self.free.put(shutil.copytree(root, folder / str(job), ignore=ignored))

    @contextmanager
    def one(self):
        tree = self.free.get()
        try:
            yield tree
        finally:
            self.free.put(tree)


def judge(trees: Trees, mutant: Mutant, words: Sequence[str]) -> Result:
    """One mutant, in a copy that is whole again afterwards."""
    with trees.one() as tree:
        path, start = tree / mutant.file, time.perf_counter()
        original = path.read_bytes()
        try:
            path.write_text(mutant.source)
            killer, _ = run_tests(tree, words)
        finally:
            path.write_bytes(original)
        return Result(mutant, killer, time.perf_counter() - start)


def unmutated(trees: Trees, words: Sequence[str]) -> tuple[str | None, str]:
    with trees.one() as tree:
        return run_tests(tree, words)


def campaign(
    seed: int, count: int, *, files: Sequence[str] = (), json_file: Path | None = None, jobs: int = 2,
    root: Path = ROOT, targets: Mapping[str, list[str]] = TARGETS, explained: Mapping[tuple, str] = EXPLAINED,
    console: Console | None = None,
) -> int:  # fmt: skip
    """Runs a sample, prints it, and returns the exit code."""
    console = console or Console()
    by_file = all_mutants(root, files or targets)
    chosen = sample(by_file, seed, count)
    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(jobs) as pool:
        try:
            trees = Trees(root, Path(folder), jobs)
            used = sorted({mutant.file for mutant in chosen})
            baseline = [pool.submit(unmutated, trees, targets[file]) for file in used]
            for file, future in zip(track(used, "without a mutant", console=console), baseline, strict=True):
                failed, output = future.result()
                if failed:
                    console.print(f"{output}\nThe tests of {file} fail without a mutant: {failed}", markup=False)
                    return 2
            futures = [pool.submit(judge, trees, mutant, targets[mutant.file]) for mutant in chosen]
            for future in track(as_completed(futures), "mutants", len(futures), console=console):
                if not future.result().killer:
                    console.print(f"lives: {line(future.result().mutant)}", markup=False)
            results = [future.result() for future in futures]
        finally:
            pool.shutdown(cancel_futures=True)  # at an interrupt too
    survivors = [r.mutant for r in results if not r.killer and not why(r.mutant, explained)]
    console.print(table(results, explained))
    for key in stale(explained, by_file):
        console.print(f"stale explanation, no such mutant: {key}", style="yellow", markup=False)
    if json_file:
        json_file.write_text(json.dumps([as_row(r, explained) for r in results], indent=1))
    killed = sum(bool(r.killer) for r in results)
    console.print(
        f"seed {seed}: {len(results)} mutants of {sum(map(len, by_file.values()))}, {killed} killed, "
        f"{len(results) - killed - len(survivors)} explained, {len(survivors)} survived"
    )
    return int(bool(survivors))


def line(m: Mutant) -> str:
    return f"{m.file}:{m.line}: {m.operator}: {m.before} -> {m.after}"


def as_row(result: Result, explained: Mapping[tuple, str]) -> dict:
    m = result.mutant
    return {
        "file": m.file, "line": m.line, "operator": m.operator, "before": m.before, "after": m.after,
        "killer": result.killer, "explanation": why(m, explained), "seconds": round(result.seconds, 1),
    }  # fmt: skip


def table(results: Sequence[Result], explained: Mapping[tuple, str]) -> Table:
    shown = Table("", "place", "operator", "before -> after", "killed by", "s", show_lines=True)
    for number, result in enumerate(results, 1):
        row = as_row(result, explained)
        lives = f"explained: {row['explanation']}" if row["explanation"] else "[bold red]SURVIVED"
        verdict = (result.killer or lives).removeprefix("tests/").replace("[torch", "\\[torch")
        change = f"{row['before']}\n-> {row['after']}".replace("[", "\\[")
        place = f"{row['file']}:{row['line']}"
        shown.add_row(str(number), place, row["operator"], change, verdict, f"{result.seconds:.1f}")
    return shown


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="tests.mutation.campaign", description=__doc__.splitlines()[0])
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--count", type=int, default=70)
    parser.add_argument("--file", action="append", choices=TARGETS, help="only this one; may be given again")
    parser.add_argument("--json", type=Path, help="results as a list of objects")
    parser.add_argument("--list", action="store_true", help="print the sample, run nothing")
    options = parser.parse_args(arguments)
    if options.list:
        for m in sample(all_mutants(ROOT, options.file or TARGETS), options.seed, options.count):
            print(line(m))
        return 0
    return campaign(options.seed, options.count, files=options.file or (), json_file=options.json)


if __name__ == "__main__":
    sys.exit(main())
