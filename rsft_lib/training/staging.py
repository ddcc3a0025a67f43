"""Main memory into which a checkpoint is copied, so that training continues while it is written."""

import weakref

import torch
from torch import Tensor

ALIGNMENT = 64  # bytes


class Staging:
    """One block of main memory that every save reuses.

    On a GPU it is pinned (registered with CUDA), so that a copy takes the pace of the bus: copying into memory that was
    never touched takes more than ten times as long.
    """

    def __init__(self, nbytes: int, tensors: int):
        """Room for `tensors` tensors of `nbytes` bytes in all."""
        self.memory = torch.zeros(nbytes + tensors * ALIGNMENT, dtype=torch.uint8)
        self.used = 0
        if torch.cuda.is_available() and self.memory.nbytes:
            address = self.memory.data_ptr()
            failure = int(torch.cuda.cudart().cudaHostRegister(address, self.memory.nbytes, 1))
            if failure:
                print(f"checkpoints are copied to unpinned memory, slowly: CUDA error {failure}", flush=True)
            else:
                weakref.finalize(self.memory, torch.cuda.cudart().cudaHostUnregister, address)

    def copy(self, value: Tensor) -> Tensor:
        """A copy of `value` in this memory; on a GPU it is complete after `torch.cuda.synchronize()`."""
        place = self.memory[self.used : self.used + value.nbytes].view(value.dtype).view(value.shape)
        self.used += -(-value.nbytes // ALIGNMENT) * ALIGNMENT
        return place.copy_(value, non_blocking=True)
