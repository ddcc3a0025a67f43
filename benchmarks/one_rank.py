"""One rank of many by itself: every exchange copies this rank's data in place of that of the others.

For step time without exchanges and for memory of a layout that needs more GPUs than there are. Losses mean nothing.
"""

from torch import distributed
from torch._C._distributed_c10d import _create_work_from_future
from torch.futures import Future

NAME = "one_rank"


class OneRank(distributed.ProcessGroup):
    """A process group whose other ranks hold what this one does."""

    def allreduce(self, tensors, opts=None):
        return _done(tensors)

    allreduce_coalesced = broadcast = allreduce

    def send(self, tensors, rank, tag):
        return _done(tensors)

    recv = send

    def all_to_all_single(self, output, given, output_sizes, input_sizes, opts=None):
        output.copy_(given)
        return _done(output)

    def barrier(self, opts=None):
        return _done(None)

    def allgather(self, outputs, inputs, opts=None):
        for row, given in zip(outputs, inputs, strict=True):
            for output in row:
                output.copy_(given)
        return _done(outputs)

    def all_gather_single(self, output, given, opts=None):
        for part in output.view(self.size(), -1):
            _copy(given.reshape(-1), part)
        return _done(output)

    def reduce_scatter(self, outputs, inputs, opts=None):
        for output, row in zip(outputs, inputs, strict=True):
            output.copy_(row[self.rank()])
        return _done(outputs)

    def reduce_scatter_single(self, output, given, opts=None):
        _copy(given.view(self.size(), -1)[self.rank()], output.view(-1))
        return _done(output)

    def all_gather_single_coalesced(self, outputs, inputs, opts=None):
        return [self.all_gather_single(*pair) for pair in zip(outputs, inputs, strict=True)][-1]

    def reduce_scatter_single_coalesced(self, outputs, inputs, opts=None):
        return [self.reduce_scatter_single(*pair) for pair in zip(outputs, inputs, strict=True)][-1]

    alltoall_base = all_to_all_single
    _allgather_base = all_gather_single  # the names before torch 2.13
    _reduce_scatter_base = reduce_scatter_single
    allgather_into_tensor_coalesced = all_gather_single_coalesced
    reduce_scatter_tensor_coalesced = reduce_scatter_single_coalesced


def _copy(given, output) -> None:
    if given.data_ptr() != output.data_ptr():  # in place
        output.copy_(given)


def _done(value):
    future = Future()
    future.set_result(value)
    return _create_work_from_future(future)


def become(rank: int, size: int) -> None:
    """Have this process be rank `rank` of `size`; call it before the process groups are made."""
    distributed.Backend.register_backend(
        NAME, lambda store, rank, size, timeout: OneRank(rank, size), devices=["cpu", "cuda"]
    )
    start, new_group = distributed.init_process_group, distributed.new_group

    def init_process_group(_backend, timeout=None, **_):
        start(NAME, store=distributed.HashStore(), rank=rank, world_size=size)

    def group(*args, backend=None, **rest):
        return new_group(*args, **rest)

    distributed.init_process_group, distributed.new_group = init_process_group, group
    distributed.batch_isend_irecv = lambda operations: []  # nothing is sent, and what is received is left as it is
