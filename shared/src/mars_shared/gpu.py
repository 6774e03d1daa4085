"""Memory of the GPUs that a process may use, asked of NVIDIA's driver; no CUDA context is made."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from typing import Any

from prometheus_client.core import GaugeMetricFamily
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector

logger = logging.getLogger(__name__)


def open_nvml() -> Any:
    """The driver's library, or None on a machine without a GPU."""
    try:
        import pynvml
    except ImportError:
        return None
    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError as error:
        logger.debug("no GPU is told of: %s", error)
        return None
    return pynvml


class GpuMemory(Collector):
    """Used and total memory by GPU, read at each scrape.

    Args:
        nvml: `open_nvml()`; None gives no metrics.
        visible: as CUDA_VISIBLE_DEVICES has it: indices or beginnings of UUIDs; None for all.
    """

    def __init__(self, nvml: Any, visible: str | None) -> None:
        self._nvml = nvml
        self._visible = None if visible is None else [name.strip() for name in visible.split(",") if name.strip()]

    def collect(self) -> Iterator[Metric]:
        if self._nvml is None:
            return
        used = GaugeMetricFamily("mars_gpu_memory_used_bytes", "In use by all processes", labels=["gpu"])
        total = GaugeMetricFamily("mars_gpu_memory_total_bytes", "That the GPU has", labels=["gpu"])
        for index in range(self._nvml.nvmlDeviceGetCount()):
            handle = self._nvml.nvmlDeviceGetHandleByIndex(index)
            uuid = str(self._nvml.nvmlDeviceGetUUID(handle))
            if self._sees(index, uuid):
                memory = self._nvml.nvmlDeviceGetMemoryInfo(handle)
                used.add_metric([uuid], memory.used)
                total.add_metric([uuid], memory.total)
        yield used
        yield total

    def _sees(self, index: int, uuid: str) -> bool:
        return self._visible is None or any(name == str(index) or uuid.startswith(name) for name in self._visible)


def gpu_memory() -> GpuMemory:
    """Of the GPUs that this process may use."""
    return GpuMemory(open_nvml(), os.environ.get("CUDA_VISIBLE_DEVICES"))
