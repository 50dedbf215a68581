"""Energy, clocks and power of an NVIDIA GPU, as its driver counts them. Every reading is optional: None without it."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from sp_fast.bench.timing import Run


@dataclass(frozen=True)
class Energy:
    """Over many runs back to back."""

    energy_mj: float | None = None  # millijoules a run, of the whole board
    power_w: float | None = None  # that energy over the time
    sm_mhz: int | None = None
    memory_mhz: int | None = None
    temperature_c: int | None = None
    throttled: bool | None = None  # by power or heat, while it ran


#: NVML's bits for a power cap, hardware and thermal slowdowns, and the power brake
_SLOWDOWNS = 0x04 | 0x08 | 0x20 | 0x40 | 0x80


class Meter:
    """NVML's readings of one device; without NVML, or on a CPU, every one of them is None."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._nvml: Any = None
        if device.type != "cuda":
            return
        try:
            import pynvml

            pynvml.nvmlInit()
            # By UUID: CUDA_VISIBLE_DEVICES renumbers devices for CUDA, but not for NVML.
            uuid = f"GPU-{torch.cuda.get_device_properties(device).uuid}"
            self._handle = pynvml.nvmlDeviceGetHandleByUUID(uuid)
            self._nvml = pynvml
        except Exception:  # noqa: BLE001, no package, no library, no permission: figures without energy
            self._nvml = None

    def driver(self) -> str | None:
        """The driver's version."""
        return self._read("nvmlSystemGetDriverVersion", of_device=False)

    def measure(self, run: Run, seconds: float) -> Energy:
        """Repeats ``run`` for about ``seconds`` and reads the counters around it."""
        if self._nvml is None:
            return Energy()
        torch.cuda.synchronize(self._device)
        before, start, runs = self._read("nvmlDeviceGetTotalEnergyConsumption"), time.perf_counter(), 0
        clocks: dict[str, Any] = {}
        while time.perf_counter() - start < seconds:
            for _ in range(10):
                run.once()
            runs += 10
            clocks = self._clocks()  # while the device works through what was queued
            torch.cuda.synchronize(self._device)
        elapsed, after = time.perf_counter() - start, self._read("nvmlDeviceGetTotalEnergyConsumption")
        if before is None or after is None:
            return Energy(**clocks)
        return Energy((after - before) / runs, (after - before) / 1e3 / elapsed, **clocks)

    def _clocks(self) -> dict[str, Any]:
        reasons = self._read("nvmlDeviceGetCurrentClocksThrottleReasons")
        return {
            "sm_mhz": self._read("nvmlDeviceGetClockInfo", "NVML_CLOCK_SM"),
            "memory_mhz": self._read("nvmlDeviceGetClockInfo", "NVML_CLOCK_MEM"),
            "temperature_c": self._read("nvmlDeviceGetTemperature", "NVML_TEMPERATURE_GPU"),
            "throttled": None if reasons is None else bool(reasons & _SLOWDOWNS),
        }

    def _read(self, function: str, constant: str | None = None, of_device: bool = True) -> Any:
        try:
            call: Callable[..., Any] = getattr(self._nvml, function)
            arguments = [getattr(self._nvml, constant)] if constant else []
            return call(*([self._handle] if of_device else []), *arguments)
        except Exception:  # noqa: BLE001, drivers and boards differ in what they tell
            return None
