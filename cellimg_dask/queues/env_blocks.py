"""Blocks whose user's functions run in worker processes of another environment."""

from __future__ import annotations

import threading
import weakref
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from math import prod
from typing import Any

from numpy.typing import NDArray

from cellimg_dask.bare.block import Outline
from cellimg_dask.bare.trees import decode, encode, with_attached
from cellimg_dask.bare.wire import Message
from cellimg_dask.blocks.block import Block
from cellimg_dask.blocks.errors import QueueClosedError
from cellimg_dask.blocks.functions import ArrayFunction, BlockFunction
from cellimg_dask.blocks.plan import CellPlan
from cellimg_dask.blocks.worker import BlockJob
from cellimg_dask.blocks.wrappers import Shipped, function_name
from cellimg_dask.loading.crew import Crew
from cellimg_dask.queues.env_program import EnvProgram
from cellimg_dask.queues.environments import Env
from cellimg_dask.queues.here import open_runners
from cellimg_dask.queues.rules import Rules
from cellimg_dask.queues.shipping import ship
from cellimg_dask.queues.slots import Room, Slot
from cellimg_dask.queues.worker_pool import Errand, Parcel, WorkerPool

__all__ = ["EnvBlocks", "shipped"]


class EnvBlocks:
    """Runs blocks here, and what the user's functions do in them in another environment.

    So the environment needs Python and NumPy and nothing of this package, and whatever is done
    with arrays before and after is done as for any other queue.

    Parameters
    ----------
    num_workers : int
        Number of processes.
    init : dict or None
        Description of what runs in each of them first.
    env : Env
        The environment.
    rules : Rules
        What they may do.

    Raises
    ------
    InitError
        If ``init`` raises in any of them.
    """

    copies = True

    def __init__(
        self, num_workers: int, init: Mapping[str, Any] | None, env: Env, rules: Rules
    ) -> None:
        self._bound: weakref.WeakKeyDictionary[BlockJob, BlockFunction] = (
            weakref.WeakKeyDictionary()
        )
        self._calls = _Calls()
        self._workers = WorkerPool(num_workers, EnvProgram(env, init), rules)
        self.crew = Crew(2 * num_workers, spare_tiny=False)
        open_runners.add(self)

    def apply(
        self,
        job: BlockJob,
        plan: CellPlan,
        inputs: tuple[NDArray[Any], ...],
        out: NDArray[Any] | None,
    ) -> NDArray[Any]:
        """Compute a cell; see `BlockFunction.apply`."""
        if self._workers.closed:
            raise QueueClosedError("the queue was closed; make a new BlockQueue")
        function = self._bound.get(job)
        if function is None:
            function = self._bound[job] = job.function.bound(self._bind)
        with _Call(self._calls, self._workers, function, job, plan):
            result = function.apply(plan, inputs, job.params, job.dtype, out)
            if result is out or function.fresh:
                return result
            # Before the shared memory that it may lie in is another block's.
            if out is None:
                return result.astype(job.dtype, copy=True)
            out[...] = result
            return out

    def _bind(self, user: Any) -> Any:
        return RemoteFunction(user, self._calls) if isinstance(user, Shipped) else user

    def close(self, wait_s: float | None) -> bool:
        """Turn away who waits, and end the processes; those that still compute are killed."""
        self._workers.close(wait_s)
        self.crew.close()
        open_runners.discard(self)
        return True

    def abandon(self) -> None:
        """Have processes of its own, since this one was forked."""
        self._workers.begin_anew()

    @property
    def num_waiting(self) -> int:
        """How many blocks wait for a worker."""
        return self._workers.num_waiting

    @property
    def pids(self) -> list[int]:
        """Process ids of the workers that are alive."""
        return self._workers.pids


def shipped(function: BlockFunction) -> BlockFunction:
    """Return a block function whose user's functions can be sent to another environment.

    Raises
    ------
    TypeError
        If one of them cannot be.
    """

    def pack(user: Any) -> Any:
        spec = None if isinstance(user, Shipped) else ship(user)
        return user if spec is None else Shipped(user, spec, function_name(user))

    return function.bound(pack)


class _Calls(threading.local):
    """The blocks that a thread computes, one inside the other."""

    def __init__(self) -> None:
        self.stack: list[_Call] = []


class _Call:
    """A block that a thread computes, while it is entered."""

    def __init__(
        self,
        calls: _Calls,
        workers: WorkerPool,
        function: BlockFunction,
        job: BlockJob,
        plan: CellPlan,
    ) -> None:
        self._stack = calls.stack
        self.workers = workers
        self.function = function
        self.job = job
        self.plan = plan
        self._until_done: ExitStack | None = None

    def __enter__(self) -> None:
        self._stack.append(self)

    def __exit__(self, *exc: Any) -> None:
        self._stack.pop()
        if self._until_done is not None:
            self._until_done.__exit__(*exc)

    def slot(self) -> Slot:
        """Return a place in shared memory that is this block's until it is done."""
        if self._until_done is None:
            self._until_done = ExitStack()
            return self._until_done.enter_context(self.workers.slot())
        # What the block has already computed lies in the other one. To wait for a second might be
        # to wait for oneself.
        more = Slot()
        self._until_done.callback(more.remove)
        return more


@dataclass(eq=False)
class RemoteFunction:
    """Stands for a function of the user's, and has a worker call it."""

    user: Shipped
    calls: _Calls
    _room: int = field(default=0, init=False)
    """So many bytes a result took for which there was no room."""

    @property
    def __name__(self) -> str:
        return self.user.__name__

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Return what the function returns there."""
        call = self.calls.stack[-1]
        trip = _Trip(call.slot(), args, kwargs)
        errand = Errand(
            call.job.function.name,
            call.plan,
            self,
            self._lesson,
            lambda: trip.request(self._first_guess(call)),
            trip.more_room,
        )
        response, _ = call.workers.do(errand)
        self._room = max(self._room, trip.room_wanted)
        # What nobody else handles is copied once, to where it belongs.
        direct = isinstance(call.function, ArrayFunction) and call.function.function is self
        return trip.result(response["outputs"], copy=not direct)

    def _lesson(self) -> Parcel:
        spec, attached = with_attached(self.user.spec)
        return {"spec": spec}, attached

    def _first_guess(self, call: _Call) -> int:
        guess = 0 if call.job.dtype.hasobject else call.job.dtype.itemsize
        return max(self._room, prod(call.plan.full_shape) * guess)


class _Trip:
    """The arguments of one call on their way, and the result on its way back."""

    def __init__(self, slot: Slot, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self._room = Room(slot)
        self._data: Any = None
        self.room_wanted = 0
        """So many bytes the worker asked for."""
        self._block = args[0] if len(args) == 1 and isinstance(args[0], Block) else None
        if self._block is None:
            self._args, self._kwargs = args, kwargs
        else:
            self._args, self._kwargs = self._block.inputs, dict(self._block.params)

    def request(self, more: int) -> Parcel:
        """Put the arrays where they belong, and return the request."""
        room = self._room
        room.begin()
        content: Message = {
            "args": [encode(value, self._place) for value in self._args],
            "kwargs": {name: encode(value, self._place) for name, value in self._kwargs.items()},
        }
        if self._block is not None:
            content["block"] = Outline.content(self._block)
            # What it holds is all zeros, and made there.
            data = self._block.data
            self._data = content["data"] = room.keep(data.shape, data.dtype)
        content["end"] = room.end
        content["segment"] = room.fill(more)
        return content, ()

    def _place(self, array: NDArray[Any]) -> Any:
        return self._room.put(array, writable=array.flags.writeable)

    def more_room(self, question: Message) -> Message:
        """Give the result more room."""
        nbytes = int(question["nbytes"])
        self.room_wanted = nbytes - self._room.end
        return {"segment": self._room.grow(nbytes)}

    def result(self, outputs: Any, *, copy: bool) -> Any:
        """Return what came back; arrays are views of shared memory, or copies."""
        if self._block is not None:
            self._block.data[...] = self._room.array_at(self._data)

        def fetch(place: Any) -> NDArray[Any]:
            array = self._room.array_at(place)
            return array.copy() if copy else array

        return decode(outputs, fetch)
