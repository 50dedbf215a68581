"""One implementation in a process of its own, so that its memory and its time are its own; driven over a pipe."""

from __future__ import annotations

import multiprocessing
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from sp_fast import SPProjectorConfig
from sp_fast.bench.implementations import IMPLEMENTATIONS
from sp_fast.bench.process_memory import peak_mib, reset_peak
from sp_fast.bench.weights import random_weights
from sp_fast.checkpoint import official_tensors
from sp_fast.errors import ResourceError, SPFastError

FEATURES = "features.safetensors"
SAMPLED_GRADIENTS = 2**18  # elements compared of one tensor's gradient, drawn by seed


@dataclass(frozen=True)
class Job:
    """What a worker builds and runs. ``folder`` holds the patch features and receives the results."""

    implementation: str
    config: SPProjectorConfig
    checkpoint: str | None  # None: seeded random weights
    dtype: torch.dtype
    device: str
    threads: int
    seed: int
    folder: Path


class Worker:
    """The parent's end. Raises the error that the child met, as RuntimeError or as the package's own."""

    def __init__(self, job: Job) -> None:
        context = multiprocessing.get_context("spawn")
        self._pipe, other = context.Pipe()
        self._process = context.Process(target=_serve, args=(job, other), daemon=True)
        self._process.start()
        other.close()
        self.job = job
        self._receive()

    def ask(self, command: str, *arguments: Any) -> Any:
        self._pipe.send((command, *arguments))
        return self._receive()

    def tensors(self, command: str) -> dict[str, Tensor]:
        """Results that are too large for a pipe."""
        return load_file(self.ask(command))

    def close(self) -> None:
        if self._process.is_alive():
            self._process.terminate()
        self._process.join()

    def __enter__(self) -> Worker:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _receive(self) -> Any:
        try:
            answer = self._pipe.recv()
        except EOFError:
            self._process.join()
            raise ResourceError(
                f"the {self.job.implementation} process died (exit code {self._process.exitcode}; -9 is usually a "
                "machine out of memory): close other programs, or use a smaller batch"
            ) from None
        if isinstance(answer, Exception):
            raise answer
        return answer


def _serve(job: Job, pipe: Connection) -> None:
    try:
        served = _Served(job)
        pipe.send("ready")
        while True:
            command, *arguments = pipe.recv()
            pipe.send(getattr(served, command)(*arguments))
    except (EOFError, KeyboardInterrupt):
        return
    except SPFastError as error:
        pipe.send(error)
    except Exception as error:  # noqa: BLE001, any failure must reach the parent, which raises it
        pipe.send(RuntimeError(f"{job.implementation}: {type(error).__name__}: {error}"))


class _Served:
    """The child's end: one method a command."""

    def __init__(self, job: Job) -> None:
        torch.set_num_threads(job.threads)
        self._job, self._device = job, torch.device(job.device)
        weights = random_weights(job.config, job.seed, job.dtype)
        if job.checkpoint is not None:
            stored = official_tensors(job.checkpoint)
            weights = {
                key: replace(stored[key], dtype=job.dtype, load=lambda key=key: stored[key].load().to(job.dtype))
                for key in weights
            }
        self._implementation = IMPLEMENTATIONS[job.implementation](job.config, weights, self._device)
        features = load_file(job.folder / FEATURES)["patch_features"]
        self._features = features.to(self._device, job.dtype)
        generator = torch.Generator().manual_seed(job.seed)
        shape = (len(features), job.config.spatial_tokens + job.config.patch_tokens, job.config.text_width)
        self._cotangent = torch.randn(shape, generator=generator).to(self._device, job.dtype)

    def outputs(self) -> str:
        """Everything that the forward computes, level by level."""
        with torch.no_grad():
            output = self._implementation.intermediates(self._features)
        spatial = self._job.config.spatial_tokens
        named = {f"z_small.{i}": output.z_small[:, i] for i in range(output.z_small.shape[1])}
        named |= {f"z_big.{i}": z for i, z in enumerate(output.z_big)}
        named |= {f"attention.{i}": a for i, a in enumerate(output.attention)}
        named |= {"spatial_tokens": output.tokens[:, :spatial], "patch_tokens": output.tokens[:, spatial:]}
        return self._save("outputs", named)

    def gradients(self) -> str:
        """A seeded sample of every gradient, in the official layout, pooled by module.

        Pooled, because some gradients vanish identically (softmax is blind to the key's bias): alone, such a tensor
        is rounding noise on both sides and has no relative error.
        """
        self._forward_backward()
        implementation, found = self._implementation, {}
        for key in sorted(implementation.gradient_keys()):
            gradient = implementation.gradient(key)
            generator = torch.Generator().manual_seed(self._job.seed)
            count = gradient.numel()
            sample = torch.arange(count)
            if count > SAMPLED_GRADIENTS:
                sample = torch.randint(count, (SAMPLED_GRADIENTS,), generator=generator)
            elements = gradient[torch.unravel_index(sample.to(self._device), gradient.shape)].double()
            found.setdefault(f"grad.{key.split('.')[0]}", []).append(elements)
        self._free_gradients()
        return self._save("gradients", {name: torch.cat(parts) for name, parts in found.items()})

    def time_ms(self, direction: str) -> float:
        """Milliseconds of one run: "forward" without gradients, or "backward", which is forward and backward."""
        run = self._runs()[direction]
        self._synchronise()
        start = time.perf_counter()
        run()
        self._synchronise()
        elapsed = (time.perf_counter() - start) * 1e3
        self._free_gradients()
        return elapsed

    def memory_mib(self, direction: str) -> float:
        """Peak memory of one run."""
        reset_peak(self._device)
        self._runs()[direction]()
        self._synchronise()
        peak = peak_mib(self._device)
        self._free_gradients()
        return peak

    def _runs(self) -> dict[str, Callable[[], None]]:
        return {"forward": self._forward, "backward": self._forward_backward}

    def _forward(self) -> None:
        with torch.no_grad():
            self._implementation.intermediates(self._features)

    def _forward_backward(self) -> None:
        tokens = self._implementation.intermediates(self._features).tokens
        tokens.backward(self._cotangent.to(tokens.dtype))

    def _free_gradients(self) -> None:
        """Every run allocates its gradients anew, and nobody holds any while another implementation runs."""
        self._implementation.module.zero_grad(set_to_none=True)

    def _synchronise(self) -> None:
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)

    def _save(self, name: str, tensors: dict[str, Tensor]) -> str:
        path = self._job.folder / f"{self._job.implementation}.{name}.safetensors"
        save_file({key: tensor.detach().double().cpu().contiguous() for key, tensor in tensors.items()}, path)
        return str(path)
