"""One process on one device is what the package trains on: anything more is refused before it starts."""

from __future__ import annotations

import os
import sys

from ..errors import ConfigError

_PROCESS_COUNTS = ("WORLD_SIZE", "OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "MV2_COMM_WORLD_SIZE")
"""Where a launcher says how many processes it started: torchrun, accelerate, and those of MPI that accelerate reads."""


def check_one_process(n_processes: int = 1) -> None:
    """Refuse to be one of several processes: each would train all of it, and write to the same places.

    Args:
        n_processes: As a caller knows them; a launcher's environment and ``torch.distributed`` are asked as well.

    Raises:
        ConfigError: With their number and what to start instead.
    """
    n_processes = max(n_processes, *map(_count, _PROCESS_COUNTS), _initialised_processes())
    if n_processes > 1:
        raise ConfigError(
            f"{n_processes} processes were started, and training in several is not supported: each would repeat the "
            f"whole work; start one, without torchrun, mpirun or accelerate launch (or with --nproc_per_node 1)."
        )


def check_one_gpu(n_gpus: int) -> None:
    """Refuse to train over several GPUs, which a Trainer spreads a batch over as soon as it sees them.

    Raises:
        ConfigError: With their number and how to show one.
    """
    if n_gpus > 1:
        raise ConfigError(
            f"{n_gpus} GPUs are visible, and training on several is not supported: transformers' Trainer would wrap "
            f"the model in nn.DataParallel, past which no attention is captured; set CUDA_VISIBLE_DEVICES=0 (or "
            f"another one's number) before the process starts."
        )


def check_one_device() -> None:
    """Both, by what this process sees, before anything is loaded."""
    import torch

    check_one_process()
    check_one_gpu(torch.cuda.device_count())


def _count(name: str) -> int:
    value = os.environ.get(name, "")
    return int(value) if value.isdecimal() else 1


def _initialised_processes() -> int:
    torch = sys.modules.get("torch")
    if torch is None or not torch.distributed.is_available() or not torch.distributed.is_initialized():
        return 1
    return torch.distributed.get_world_size()
