"""Peak allocation of tensors on a CPU, a GPU, or the meta device."""

from __future__ import annotations

import weakref
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class PeakMemory:
    """Peak bytes of tensor storage that are allocated inside the block and alive at the same time.

    On CUDA it is the allocator's own peak above the level at entry. On a CPU there is no such counter, so every
    operator's new output storage is counted from its birth to its death; scratch space inside a kernel is not seen.
    On the meta device, where tensors have a size but no memory, the same counts what the step would need.
    """

    def __init__(self, device: str = "cpu") -> None:
        self._device = device
        self._mode: _StorageCounter | None = None
        self._before = 0
        self.peak = 0

    def __enter__(self) -> PeakMemory:
        if self._device == "cuda":
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
            self._before = torch.cuda.memory_allocated()
        else:
            self._mode = _StorageCounter()
            self._mode.__enter__()
        return self

    def __exit__(self, *exception: Any) -> None:
        if self._mode is not None:
            self._mode.__exit__(*exception)
            self.peak = self._mode.peak
        else:
            torch.cuda.synchronize()
            self.peak = torch.cuda.max_memory_allocated() - self._before


class _StorageCounter(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.peak = 0
        self._live = 0
        self._seen: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        known = {
            leaf.untyped_storage()._cdata for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)
        }
        output = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(output):
            if isinstance(leaf, torch.Tensor):
                self._count(leaf, known)
        return output

    def _count(self, tensor: torch.Tensor, known: set[int]) -> None:
        storage = tensor.untyped_storage()
        key, size = storage._cdata, storage.nbytes()
        if key in known or key in self._seen:
            return
        self._seen.add(key)
        self._live += size
        self.peak = max(self.peak, self._live)
        weakref.finalize(storage, self._free, key, size)

    def _free(self, key: int, size: int) -> None:
        self._seen.discard(key)
        self._live -= size
