"""Many ranks as one: who we are, what is agreed on, and the model that they share.

Started by torchrun (RANK, WORLD_SIZE and so on are set) a process is one of many; alone it is rank 0 of 1, and all here
costs nothing. Words of a few bytes travel over gloo, which needs no GPU and so stalls none; gradients over NCCL, where
there is CUDA.
"""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from datetime import timedelta
from types import TracebackType
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor

from openelm.errors import Stopped, UserError
from openelm.model.geometry import ModelConfig
from openelm.model.transformer import Checkpointing, OpenELM

T = TypeVar("T")
# What torch.distributed says, in words of its own, when another rank is gone or does not answer.
_LOST = ("connection", "timed out", "timeout", "nccl", "socket", "broken pipe", "peer")
# How long the ranks that are left listen for each other before they say who is not.
LOST_S = 3.0
# How long rank 0 may be alone at work: listing a million files, training a tokenizer.
ALONE = timedelta(hours=6)


class World:
    """All ranks of a run, seen from one of them. Use it with ``with``: it leaves the group at the end.

    ``sharding`` cuts the weights into ``shards`` parts, of which there are ``replicas`` whole sets: one set a rank
    (none), a node (node), or one in all (full). ``timeout_s`` is how long a rank may keep the others waiting before all
    of them end.
    """

    def __init__(self, sharding: str = "none", timeout_s: float = 600.0) -> None:
        self.rank, self.size = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
        node = int(os.environ.get("LOCAL_WORLD_SIZE", self.size))
        self.shards = {"none": 1, "node": node, "full": self.size}[sharding]
        self.replicas = max(1, self.size // self.shards)
        self.shard, self.replica = self.rank % self.shards, self.rank // self.shards
        self.device = pick_device(int(os.environ.get("LOCAL_RANK", 0)), self.size)
        self.patience = timedelta(seconds=timeout_s)
        self._turns = 0
        if self.size == 1:
            return
        if self.shards * self.replicas != self.size:
            raise UserError(
                f"train.sharding=node: {self.size} ranks are not whole nodes of {node}: start as many ranks on each "
                "node, or set train.sharding=full"
            )
        if self.device.type == "cuda":
            torch.cuda.set_device(self.device)
        backend = "cpu:gloo,cuda:nccl" if self.device.type == "cuda" else "gloo"
        dist.init_process_group(backend, timeout=self.patience)
        self._store = dist.distributed_c10d._get_default_store()
        names = ("replicate", "shard")
        self.mesh = init_device_mesh(self.device.type, (self.replicas, self.shards), mesh_dim_names=names)
        # Its groups have a patience of their own. NCCL can only abort: gloo, which can say who is gone, comes first.
        later = self.patience + timedelta(seconds=60 if self.device.type == "cuda" else 0)
        for name in names:
            dist.distributed_c10d._set_pg_timeout(later, self.mesh.get_group(name))

    def agree(self, step: int, *values: int) -> list[int]:
        """The sums of some whole numbers over all ranks. Whoever waits here for a rank that is gone names it."""
        if self.size == 1:
            return list(values)
        if step >= 0:  # what is agreed on between steps leaves the last one standing
            self._store.set(f"openelm/at/{self.rank}", f"step {step + 1} on {socket.gethostname()}")
        tensor = torch.tensor(values, dtype=torch.int64)
        dist.all_reduce(tensor)
        return [int(value) for value in tensor]

    def sum_(self, tensor: Tensor) -> Tensor:
        """Add up a tensor over all ranks, in place."""
        if self.size > 1:
            dist.all_reduce(tensor)
        return tensor

    def sum_words(self, tensor: Tensor) -> list[float]:
        """The sums of a few figures on the CPU."""
        found: list[float] = self.sum_(tensor).tolist()
        return found

    def gather(self, value: T) -> list[T]:
        """Everyone's value, by rank, on rank 0; an empty list elsewhere."""
        if self.size == 1:
            return [value]
        found: list[Any] | None = [None] * self.size if self.rank == 0 else None
        dist.gather_object(value, found)
        return found or []

    def first(self, make: Callable[[], T], *, patience: timedelta = ALONE) -> T:
        """What ``make`` gives on rank 0, on every rank. What it refuses is said once, and all ranks end with that."""
        if self.size == 1:
            return make()
        answer: list[Any] = [None, None]
        error: Exception | None = None
        if self.rank == 0:
            try:
                answer = [make(), None]
            except (UserError, Stopped) as refusal:
                answer, error = [None, 2 if isinstance(refusal, UserError) else refusal.code], refusal
            except Exception as failure:
                answer, error = [None, 1], failure
        # Waited for at the store, where patience is not limited by the time that a step may take.
        self._turns += 1
        turn = f"openelm/first/{self._turns}"
        self._store.set(turn, "") if self.rank == 0 else self._store.wait([turn], patience)
        dist.broadcast_object_list(answer)
        if error:
            raise error
        if answer[1] is not None:
            raise Stopped("", answer[1])
        value: T = answer[0]
        return value

    def each(self, make: Callable[[], T]) -> T:
        """What ``make`` gives here. Where it is refused on any rank, the first of those says so, and all end."""
        error: UserError | None = None
        try:
            value = make()
        except UserError as refusal:
            error = refusal
        failed = self.agree(-1, *(int(rank == self.rank and error is not None) for rank in range(self.size)))
        if error and failed.index(1) == self.rank:
            raise error
        if any(failed):
            raise Stopped("", 2)
        return value

    def part(self, whole: Sequence[int]) -> tuple[int, int]:
        """(first row, rows) of a tensor of this whole shape that this rank holds, as FSDP2 deals them out."""
        rows = whole[0] if whole else 1
        each = -(-rows // self.shards) if self.size > 1 else rows
        first = min(self.shard * each, rows) if self.size > 1 else 0
        return first, min(each, rows - first)

    def barrier(self) -> None:
        """Wait for all ranks."""
        self.agree(-1, 0)

    def __enter__(self) -> World:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.size == 1:
            return
        lost = self._lost(error) if isinstance(error, RuntimeError) else None
        if error is None or isinstance(error, UserError | Stopped):
            with suppress(RuntimeError):  # of those that have left already
                dist.destroy_process_group()
        if lost:
            raise Stopped(lost, 1) from error

    def _lost(self, error: RuntimeError) -> str | None:
        """Who is gone or hangs, where an error says that somebody is: those who do not report the same loss."""
        text = str(error).lower()
        if not any(word in text for word in _LOST):
            return None
        silent = list(range(self.size))
        with suppress(Exception):  # the store may be gone with rank 0
            self._store.set(f"openelm/lost/{self.rank}", "")
            deadline_s = time.monotonic() + LOST_S
            while silent and time.monotonic() < deadline_s:
                time.sleep(0.1)
                silent = [rank for rank in silent if not self._store.check([f"openelm/lost/{rank}"])]
        reason = str(error).splitlines()[0][:200]
        return (
            f"rank {self.rank} lost touch with "
            + (", ".join(map(self._last_seen, silent)) if silent else "the other ranks, which lost it too")
            + f" ({reason}). A rank that died has said why itself; one that hangs is waited for train.timeout_s="
            f"{self.patience.total_seconds():g} seconds. The last checkpoint is whole: go on with --resume"
        )

    def _last_seen(self, rank: int) -> str:
        with suppress(Exception):
            if self._store.check([f"openelm/at/{rank}"]):
                return f"rank {rank} (last seen in {self._store.get(f'openelm/at/{rank}').decode()})"
        return f"rank {rank}"


def pick_device(local_rank: int = 0, ranks: int = 1) -> torch.device:
    """CUDA where there is one (the rank's own), then, for a rank alone, Apple's GPU, then the CPU."""
    if torch.cuda.is_available():
        if local_rank >= torch.cuda.device_count():
            raise UserError(
                f"rank {local_rank} of this machine has no GPU of its own: there are {torch.cuda.device_count()}; "
                "start as many ranks as there are GPUs (torchrun --nproc-per-node=gpu)"
            )
        return torch.device("cuda", local_rank)
    return torch.device("mps" if ranks == 1 and torch.backends.mps.is_available() else "cpu")


def check_batch(global_batch: int, micro_batch: int, ranks: int) -> None:
    """Refuse a batch that the ranks cannot share equally, naming the nearest ones."""
    unit = ranks * micro_batch
    if global_batch % unit:
        near = sorted({max(1, global_batch // unit) * unit, (global_batch // unit + 1) * unit})
        divisors = [m for m in range(1, micro_batch) if global_batch % (ranks * m) == 0]
        raise UserError(
            f"train.global_batch={global_batch} rows is not a multiple of {ranks} ranks x train.micro_batch="
            f"{micro_batch} = {unit}: set train.global_batch={' or '.join(map(str, near))}"
            + (f", or train.micro_batch={divisors[-1]}" if divisors else "")
        )


def build(
    geometry: ModelConfig,
    world: World,
    weights: Callable[[OpenELM], Iterable[tuple[str, Tensor]]],
    *,
    dtype: torch.dtype,
    checkpointing: Checkpointing = "none",
    compile: bool = False,
    adapt: Callable[[OpenELM], None] = lambda model: None,
) -> OpenELM:
    """The model, ready to train: in fp32, on the rank's device, sharded where there are several ranks.

    The order matters: ``adapt`` changes what the model consists of, activation checkpointing is part of what is
    compiled, compiled blocks are what is sharded, and only then is there memory for ``weights``: names and whole
    tensors, of which a rank keeps its rows. ``dtype`` is what sharded weights are gathered in.
    """
    with torch.device("meta"):
        model = OpenELM(geometry)
        adapt(model)
    model.train()
    model.checkpoint_activations(checkpointing)
    if compile:
        compile_model(model, whole=world.size == 1)
    if world.size > 1:
        _shard(model, world, dtype)
    model.to_empty(device=world.device)
    parameters = dict(model.named_parameters())
    for name, whole in weights(model):
        first, rows = world.part(whole.shape)
        own_rows(parameters[name].detach()).copy_(whole[first : first + rows])
    return model


def compile_model(model: OpenELM, *, whole: bool, backend: str = "inductor") -> None:
    """One graph up to the loss where nothing cuts in; sharding does, between blocks, so each block has one."""
    if whole:
        model.compile(backend=backend)
        return
    # No two layers are alike: each is compiled once to train and once to measure, and none is to fall back in silence.
    wanted = 4 * len(model.layers)
    torch._dynamo.config.recompile_limit = max(wanted, torch._dynamo.config.recompile_limit)
    for block in model.layers:
        block.compile(backend=backend, dynamic=False)  # or head counts become symbols, which attention does not take


def _shard(model: OpenELM, world: World, dtype: torch.dtype) -> None:
    """FSDP2: gradients are summed in fp32, over the shards of a group and then over its replicas."""
    policy = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32, cast_forward_inputs=False)
    for block in model.layers:
        fully_shard(block, mesh=world.mesh, mp_policy=policy, reshard_after_forward=world.shards > 1)
    fully_shard(model, mesh=world.mesh, mp_policy=policy, reshard_after_forward=False)
    for module in sharded_modules(model):
        # The loop divides by the step's whole weight itself, and gloo knows no average.
        module.set_gradient_divide_factor(1.0)
        module.set_force_sum_reduction_for_comms(True)


def sharded_modules(model: nn.Module) -> list[FSDPModule]:
    """The model and its blocks where there are several ranks; nothing for one."""
    return [module for module in model.modules() if isinstance(module, FSDPModule)]


def before_micro_batch(model: nn.Module, world: World, *, last: bool) -> None:
    """Replicas exchange gradients only after the last micro-batch of a step."""
    if isinstance(model, FSDPModule):
        model.set_requires_all_reduce(last)
        model.set_reshard_after_backward(last or world.shards > 1)


def reshard(model: nn.Module) -> None:
    """Let go of gathered weights. A pass without gradients keeps them, and would go on with them after a change."""
    for module in sharded_modules(model):
        module.reshard()


@contextmanager
def gathered(model: OpenELM, world: World) -> Iterator[OpenELM]:
    """The model whole on every rank for a while, so that one of them can use it alone: without hooks or compilation."""
    if world.size == 1:
        yield model
        return
    for module in sharded_modules(model):
        module.unshard()
    with torch.device("meta"):
        whole = OpenELM(model.config)
        if model.adapt is not None:
            model.adapt(whole)
    # The same memory. FSDP's own modules would remember a pass that the other ranks did not make.
    whole.load_state_dict({name: weight.detach() for name, weight in model.named_parameters()}, assign=True)
    try:
        yield whole
    finally:
        reshard(model)


def own_rows(tensor: Tensor) -> Tensor:
    """The rows of a tensor that this rank holds, as a plain tensor that shares their memory."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor
