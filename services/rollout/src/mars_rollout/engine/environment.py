"""What vLLM reads from the environment, set before vLLM or torch is imported."""

from __future__ import annotations

import logging
import os

MEDIA_CONNECTOR = "mars_data_urls"
"""The only reader of images in OpenAI requests; see mars_rollout.engine.http."""


def configure_environment(threads: int, max_image_pixels: int) -> None:
    """Prepare this process and the engine's child processes; the first thing a replica does.

    Args:
        threads: CPU threads of the engine. Results are equal bit by bit only at an equal number.
        max_image_pixels: width * height above which an OpenAI request's image is refused.
    """
    os.environ.update(
        OMP_NUM_THREADS=str(threads),
        HF_HUB_OFFLINE="1",
        VLLM_NO_USAGE_STATS="1",
        VLLM_SERVER_DEV_MODE="0",
        VLLM_WORKER_MULTIPROC_METHOD="spawn",
        VLLM_MEDIA_CONNECTOR=MEDIA_CONNECTOR,
        VLLM_MAX_IMAGE_PIXELS=str(max_image_pixels),
        TOKENIZERS_PARALLELISM="false",
        VLLM_CONFIGURE_LOGGING="0",  # its lines go the way of ours
    )
    os.environ.pop("VLLM_LOGGING_CONFIG_PATH", None)  # vLLM refuses it beside that
    limit_vllm_lines()
    os.environ.pop("VLLM_CPU_KVCACHE_SPACE", None)

    from vllm.platforms import current_platform

    if current_platform.is_cpu():
        # The worker lives in the engine's process then: half the memory, and the threads set here.
        os.environ.update(TORCHDYNAMO_DISABLE="1", VLLM_ENABLE_V1_MULTIPROCESSING="0")


def limit_vllm_lines() -> None:
    """Log of what vLLM says warnings and worse, or what VLLM_LOGGING_LEVEL asks for."""
    logging.getLogger("vllm").setLevel(os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING").upper())
