"""Runs of one shape trained in step: several coroutines of the loop served by one program over a member axis.

A run is a coroutine (`loop.run_steps`) that asks for dispatches. `alone` answers one run with its own program;
`together` stacks the states of several, runs one program for all, and hands each its row. The runs cannot tell which it
is, so rows, evaluations, checkpoints and results are theirs alone, and a member that diverges, fails or finishes just
stops asking. Members share shapes and programs; every number that differs between them is an array of the state.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Int

from llamax.config.run import RunConfig
from llamax.mesh.rules import Rules
from llamax.model.execution import Execution
from llamax.train.state import TrainState
from llamax.train.step import Batch, Dispatch, compiler_options, execution_of, updates

MEMBER = "member"


class Ask(NamedTuple):
    """What a run wants next: `steps` from `state` on `batches`. The first ask has 0: compile, run nothing."""

    state: TrainState | Seat
    batches: Batch
    steps: int


class Answer(NamedTuple):
    """What it gets: the new state, metrics [steps_per_dispatch], steps run, and steps tried of those asked."""

    state: TrainState | Seat
    metrics: dict[str, Any]
    ran: Any
    steps: int


Coroutine = Generator[Ask, Answer, dict[str, Any]]


def alone(run: Coroutine, compiled: Callable[[], Dispatch]) -> dict[str, Any]:
    """The result of one run by the program that `compiled` waits for, whose seconds so never count as training."""
    program: Any = None
    try:
        ask = next(run)
        while True:
            if program is None:
                program = compiled()
                answer = Answer(ask.state, {}, 0, 0)
            else:
                state, metrics, ran = program(ask.state, ask.batches, np.int32(ask.steps))
                answer = Answer(state, metrics, ran, ask.steps)
                del state
            del ask  # its state is donated
            ask = run.send(answer)
    except StopIteration as stop:
        return stop.value
    finally:
        run.close()


# ---------------------------------------------------------------- several in step
class ProgramFailed(Exception):
    """The program of a population did not compile or run; each member continues alone from its newest checkpoint."""


def together(runs: Sequence[Coroutine], population: Population) -> list[dict[str, Any] | BaseException]:
    """How each run ended, in order: its result, or what it raised. The others go on when one ends.

    Raises:
        ProgramFailed: the shared program failed; the runs are closed and have saved nothing new.
        KeyboardInterrupt, SystemExit: from a run; all are closed.
    """
    ended: dict[int, dict[str, Any] | BaseException] = {}

    def advance(i: int, answer: Answer | None) -> Ask | None:
        try:
            return next(runs[i]) if answer is None else runs[i].send(answer)
        except StopIteration as stop:
            ended[i] = stop.value
        except (KeyboardInterrupt, SystemExit):
            raise
        except BaseException as error:  # a lost lease is no Exception
            ended[i] = error
        return None

    try:
        asks = {i: ask for i in range(len(runs)) if (ask := advance(i, None)) is not None}
        while asks:
            try:
                answers = population.serve(asks)
            except Exception as error:
                raise ProgramFailed(f"the program of {len(asks)} members failed: {error}") from error
            asks = {i: ask for i, answer in answers.items() if (ask := advance(i, answer)) is not None}
    finally:
        for run in runs:
            run.close()
    return [ended[i] for i in range(len(runs))]


@dataclass(frozen=True)
class Seat:
    """A member's state inside the population's; `whole` copies it out."""

    population: Population
    row: int


@dataclass(frozen=True)
class Row:
    """One row of an array that is still on the device; it is fetched when somebody looks."""

    array: Array
    row: int

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        return np.asarray(np.asarray(self.array)[self.row], dtype)  # JAX keeps the host copy for the other members

    def is_ready(self) -> bool:
        """Whether the device is done with it."""
        return self.array.is_ready()  # type: ignore[attr-defined]


def whole(state: TrainState | Seat) -> TrainState:
    """The state itself: of a run alone, or a copy of a member's row of its population as it is now."""
    return state.population.take(state.row) if isinstance(state, Seat) else state


def population_dispatch(config: RunConfig, execution: Execution, members: Mesh, batched: bool) -> Dispatch:
    """`updates` of several members: everything has a leading axis [member], cut over the devices of `members`.

    The members of a device run as one batch where `batched`, else one after the other: on a CPU, where batching makes
    the weight products slower (benchmarks/README.md, "Packed members"). `count` is [member] too: a member with
    count 0, or that has diverged under on_divergence=stop, keeps its state bit for bit.
    """
    one = updates(config, execution)

    def several(state: TrainState, batches: Batch, counts: Int[Array, " member"]) -> Any:
        if batched:
            return jax.vmap(one)(state, batches, counts)
        return jax.lax.map(lambda member: one(*member), (state, batches, counts))

    spec = PartitionSpec(MEMBER)
    return jax.shard_map(several, mesh=members, in_specs=(spec, spec, spec), out_specs=spec, check_vma=False)


class Population:
    """The stacked state of several members and the program that advances it.

    `devices` hold equal shares of the members; a member lives on one device whole. `abstract` is the state of a run
    alone on `mesh`, where members' batches arrive and copies of their states leave for.
    """

    def __init__(
        self, config: RunConfig, rules: Rules, mesh: Mesh, abstract: TrainState, devices: Sequence[jax.Device]
    ) -> None:
        members = Mesh(np.array(devices), (MEMBER,))
        self._alone = jax.tree.map(lambda leaf: leaf.sharding, abstract)
        self._cut = NamedSharding(members, PartitionSpec(MEMBER))
        batched = devices[0].platform != "cpu"
        dispatch = population_dispatch(config, execution_of(config, rules, mesh), members, batched)
        options = compiler_options(devices)
        self._dispatch = jax.jit(dispatch, donate_argnums=0, out_shardings=self._cut, compiler_options=options)
        self._stack = jax.jit(lambda trees: jax.tree.map(lambda *leaves: jnp.stack(leaves), *trees))
        self._pick = jax.jit(
            lambda state, row: jax.tree.map(lambda a: jax.lax.dynamic_index_in_dim(a, row, keepdims=False), state),
            out_shardings=NamedSharding(members, PartitionSpec()),
        )
        self._seats: dict[int, Seat] = {}
        self._rows = 0
        self._state: Any = None
        self._program: Any = None

    def take(self, row: int) -> TrainState:
        """A copy of a member's state, placed as that of a run alone."""
        return jax.device_put(self._pick(self._state, jnp.int32(row)), self._alone)

    def serve(self, asks: Mapping[int, Ask]) -> dict[int, Answer]:
        """An answer for every run that asks: all take as many steps as the one that wants fewest."""
        if self._program is None:
            return self._start(asks)
        count = min(ask.steps for ask in asks.values())
        counts = np.zeros(self._rows, np.int32)
        counts[[self._seats[i].row for i in asks]] = count
        self._state, metrics, ran = self._program(self._state, self._batches(asks), jax.device_put(counts, self._cut))

        def answer(seat: Seat) -> Answer:
            own = {name: Row(array, seat.row) for name, array in metrics.items()}
            return Answer(seat, own, Row(ran, seat.row), count)

        return {i: answer(self._seats[i]) for i in asks}

    def _start(self, asks: Mapping[int, Ask]) -> dict[int, Answer]:
        """Stack the states of the first asks, one a row and copies to fill the devices evenly; compile."""
        devices = self._cut.mesh.size
        self._rows = -(-len(asks) // devices) * devices
        self._seats = {i: Seat(self, row) for row, i in enumerate(asks)}
        self._state = self._stacked({self._seats[i].row: ask.state for i, ask in asks.items()})
        counts = jax.device_put(np.zeros(self._rows, np.int32), self._cut)
        self._program = self._dispatch.lower(self._state, self._batches(asks), counts).compile()
        return {i: Answer(seat, {}, 0, 0) for i, seat in self._seats.items()}

    def _batches(self, asks: Mapping[int, Ask]) -> Batch:
        return self._stacked({self._seats[i].row: ask.batches for i, ask in asks.items()})

    def _stacked(self, trees: Mapping[int, Any]) -> Any:
        """[member, ...] from one tree a row; rows nobody fills, which do not run, hold whatever the first has."""
        first = next(iter(trees.values()))
        return jax.device_put(self._stack([trees.get(row, first) for row in range(self._rows)]), self._cut)
