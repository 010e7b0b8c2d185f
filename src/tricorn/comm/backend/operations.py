"""The operations of ``torch.distributed`` 2.13, under the names that it calls."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from datetime import timedelta
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch._C._distributed_c10d import PrefixStore, Store

from tricorn.comm.backend.hosts import Hosts
from tricorn.comm.backend.tensors import OnePiece, each_in_one_piece, reduction, sent
from tricorn.comm.backend.work import FarWork, Work
from tricorn.comm.shared import Shared
from tricorn.errors import PeerLost, UsageError

_WIDE = {
    "allreduce", "allreduce_coalesced", "broadcast", "barrier", "allgather", "all_gather_single_coalesced",
    "reduce_scatter",
}  # fmt: skip


class Operations:
    """Each as ``shared`` does it, or ``hosts`` where ranks are on several; with ``asyncOp`` in the group's thread."""

    def __init__(
        self, *, store: Store, rank: int, size: int, timeout: timedelta, shared: Shared, hosts: Hosts | None
    ) -> None:
        self._rank, self._size, self._store, self._timeout = rank, size, store, timeout
        self._shared, self._hosts = shared, hosts
        self._wide = hosts or shared
        self._accelerated: dist.ProcessGroup | None = None

    def allreduce(self, tensors: list[Tensor], opts: Any = None) -> Any:
        return self._do("allreduce", lambda: self._all_reduce(tensors, opts), tensors, opts, tensors, opts)

    def allreduce_coalesced(self, tensors: list[Tensor], opts: Any = None) -> Any:
        return self._do("allreduce_coalesced", lambda: self._all_reduce(tensors, opts), tensors, opts, tensors, opts)

    def reduce(self, tensors: list[Tensor], opts: Any) -> Any:
        def work() -> None:
            for tensor in tensors:
                operation, factor = reduction(opts, tensor)
                if self._rank == opts.rootRank:
                    with OnePiece(tensor) as whole:
                        if factor is not None:
                            whole.mul_(factor)
                        self._shared.reduce(whole, opts.rootRank, operation)
                else:
                    self._shared.reduce(sent(tensor, factor), opts.rootRank, operation)

        return self._do("reduce", work, tensors, opts, tensors, opts)

    def broadcast(self, tensors: list[Tensor], opts: Any) -> Any:
        def work() -> None:
            for tensor in tensors:
                with OnePiece(tensor) as whole:
                    self._wide.broadcast(whole, opts.rootRank)

        return self._do("broadcast", work, tensors, opts, tensors, opts)

    def allgather(self, outputs: list[list[Tensor]], inputs: list[Tensor], opts: Any = None) -> Any:
        def work() -> None:
            for row, tensor in zip(outputs, inputs, strict=True):
                with each_in_one_piece(row) as wholes:
                    self._wide.all_gather(wholes, sent(tensor))

        return self._do(
            "allgather", work, inputs, opts, outputs, inputs, opts, results=[each for row in outputs for each in row]
        )

    def allgather_coalesced(self, outputs: list[list[Tensor]], inputs: list[Tensor], opts: Any = None) -> Any:
        return self.allgather([[*column] for column in zip(*outputs, strict=True)], inputs, opts)

    def all_gather_single(self, output: Tensor, tensor: Tensor, opts: Any = None) -> Any:
        return self.all_gather_single_coalesced([output], [tensor], opts)

    def all_gather_single_coalesced(self, outputs: list[Tensor], inputs: list[Tensor], opts: Any = None) -> Any:
        def work() -> None:
            for output, tensor in zip(outputs, inputs, strict=True):
                with OnePiece(output) as whole:
                    self._wide.all_gather(whole.view(-1).tensor_split(self._size), sent(tensor))

        return self._do("all_gather_single_coalesced", work, inputs, opts, outputs, inputs, opts, results=outputs)

    def reduce_scatter(self, outputs: list[Tensor], inputs: list[list[Tensor]], opts: Any = None) -> Any:
        def work() -> None:
            for output, row in zip(outputs, inputs, strict=True):
                operation, factor = reduction(opts, output)
                with OnePiece(output) as whole:
                    parts = [sent(part, factor) for part in row]
                    self._wide.reduce_scatter(whole, parts, operation)

        return self._do("reduce_scatter", work, outputs, opts, outputs, inputs, opts)

    def reduce_scatter_single(self, output: Tensor, tensor: Tensor, opts: Any = None) -> Any:
        return self.reduce_scatter_single_coalesced([output], [tensor], opts)

    def reduce_scatter_single_coalesced(self, outputs: list[Tensor], inputs: list[Tensor], opts: Any = None) -> Any:
        rows = [[*sent(tensor).view(-1).tensor_split(self._size)] for tensor in inputs]
        return self.reduce_scatter(outputs, rows, opts)

    def all_to_all_single(
        self, output: Tensor, tensor: Tensor, output_sizes: list[int], input_sizes: list[int], opts: Any = None
    ) -> Any:
        def work() -> None:
            with OnePiece(output) as whole:
                self._shared.all_to_all(self._split(whole, output_sizes), self._split(sent(tensor), input_sizes))

        arguments = (output, tensor, output_sizes, input_sizes, opts)
        return self._do("all_to_all_single", work, [output], opts, *arguments)

    def alltoall(self, outputs: list[Tensor], inputs: list[Tensor], opts: Any = None) -> Any:
        def work() -> None:
            with each_in_one_piece(outputs) as wholes:
                self._shared.all_to_all(wholes, [sent(tensor) for tensor in inputs])

        return self._do("alltoall", work, outputs, opts, outputs, inputs, opts)

    def gather(self, outputs: list[list[Tensor]], inputs: list[Tensor], opts: Any) -> Any:
        def work() -> None:
            for place, tensor in enumerate(inputs):
                with each_in_one_piece(outputs[place] if self._rank == opts.rootRank else []) as wholes:
                    self._shared.gather(wholes, sent(tensor), opts.rootRank)

        return self._do(
            "gather", work, inputs, opts, outputs, inputs, opts, results=[each for row in outputs for each in row]
        )

    def scatter(self, outputs: list[Tensor], inputs: list[list[Tensor]], opts: Any) -> Any:
        def work() -> None:
            for place, output in enumerate(outputs):
                row = inputs[place] if self._rank == opts.rootRank else []
                with OnePiece(output) as whole:
                    self._shared.scatter(whole, [sent(part) for part in row], opts.rootRank)

        return self._do("scatter", work, outputs, opts, outputs, inputs, opts)

    def barrier(self, opts: Any = None) -> Any:
        return self._do("barrier", self._wide.barrier, [], opts, opts)

    def monitored_barrier(self, timeout: timedelta | None = None, wait_all_ranks: bool = False) -> None:
        """A barrier within a time of its own; PeerLost names the rank that has not come."""
        if self._hosts:
            everywhere: Any = self._hosts.gloo  # whose declaration lacks it
            try:
                everywhere.monitored_barrier(timeout or self._timeout, wait_all_ranks)
            except RuntimeError as error:
                raise PeerLost(f"not all ranks have come to monitored_barrier: {error}") from error
            return
        usual, self._shared.timeout = self._shared.timeout, (timeout or self._timeout).total_seconds()
        try:
            self._shared.barrier()
        finally:
            self._shared.timeout = usual

    # The names of earlier versions.
    _allgather_base = all_gather_single
    allgather_into_tensor_coalesced = all_gather_single_coalesced
    _reduce_scatter_base = reduce_scatter_single
    reduce_scatter_tensor_coalesced = reduce_scatter_single_coalesced
    alltoall_base = all_to_all_single

    # Messages.

    def send(self, tensors: list[Tensor], target: int, tag: int = 0) -> Any:
        if other := self._other(tensors):
            return self._named(other.send(tensors, target, tag), other, f"sending to rank {target}")
        result = Work(tensors)
        self._shared.send(tensors[0].detach().contiguous(), target, tag, later=True, then=result.finish)
        return result

    def recv(self, tensors: list[Tensor], source: int | None, tag: int = 0) -> Any:
        if other := self._other(tensors):
            if source is None:
                return self._named(other.recv_anysource(tensors, tag), other, "receiving")
            return self._named(other.recv(tensors, source, tag), other, f"receiving from rank {source}")
        result, tensor = Work(tensors), tensors[0].detach()
        whole = tensor if tensor.is_contiguous() else torch.empty_like(tensor, memory_format=torch.contiguous_format)

        def then(error: BaseException | None, rank: int) -> None:
            if whole is not tensor and error is None:
                tensor.copy_(whole)
            result.finish(error, rank)

        self._shared.receive(whole, source, tag, later=True, then=then)
        return result

    def recv_anysource(self, tensors: list[Tensor], tag: int = 0) -> Any:
        return self.recv(tensors, None, tag)

    def _do(
        self, name: str, work: Callable[[], Any], tensors: list[Tensor], opts: Any, *arguments: Any,
        results: list[Tensor] | None = None,
    ) -> Any:  # fmt: skip
        if other := self._other(tensors, name):
            return self._named(getattr(other, name)(*arguments), other, name)
        result = Work(tensors if results is None else results)
        if opts is not None and opts.asyncOp:
            self._shared.start(lambda: result.run(work))
        else:
            self._shared.run(lambda: result.run(work))
        return result

    def _named(self, work: Any, other: dist.ProcessGroup, what: str) -> Any:
        return FarWork(work, partial(self._hosts.lost, what)) if self._hosts and other is self._hosts.gloo else work

    def _other(self, tensors: list[Tensor], name: str = "") -> dist.ProcessGroup | None:
        """Who does it instead: NCCL for tensors on a GPU, from the first of them on; Gloo between hosts."""
        if not tensors or not tensors[0].is_cuda:
            return self._hosts.gloo if self._hosts and name not in _WIDE else None
        if self._accelerated is None:
            options = dist.ProcessGroupNCCL.Options()
            options._timeout = self._timeout
            store = PrefixStore("cuda/", self._store)
            nccl = dist.ProcessGroupNCCL(store, self._rank, self._size, options)
            self._accelerated = dist.ProcessGroup(store, self._rank, self._size)
            self._accelerated._set_default_backend(dist.ProcessGroup.BackendType.NCCL)
            self._accelerated._register_backend(torch.device("cuda"), dist.ProcessGroup.BackendType.NCCL, nccl)
        return self._accelerated

    def _all_reduce(self, tensors: list[Tensor], opts: Any) -> None:
        for tensor in tensors:
            operation, factor = reduction(opts, tensor)
            with OnePiece(tensor) as whole:
                if factor is not None:
                    whole.mul_(factor)
                self._wide.all_reduce(whole, operation)

    def _split(self, whole: Tensor, sizes: list[int]) -> Sequence[Tensor]:
        """By rows: as many for each rank as told, or the same number for all."""
        if sizes:
            return whole.split_with_sizes(sizes)
        if whole.shape[0] % self._size:
            raise UsageError(
                f"{whole.shape[0]} rows cannot be split equally between {self._size} ranks",
                remedy="Give the sizes of all parts, or a number of rows that the ranks divide.",
            )
        return whole.tensor_split(self._size)
