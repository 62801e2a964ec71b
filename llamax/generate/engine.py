"""The decoding loop: prompts in, tokens out, a few compiled programs for all lengths."""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Bool, Float, Int, Key

from llamax.config.mesh import Rules, load_rules
from llamax.config.rotary import RopeLongrope
from llamax.errors import UserError
from llamax.generate.sampling import Rows, Sampling, rows_of, sample
from llamax.generate.serving import STEP_OPTIONS, for_serving, on_cuda, reads_rows, upright
from llamax.mesh.rules import batch_ways, shardings, spec_of
from llamax.model.cache import Cache, in_order, init_cache, map_cache
from llamax.model.execution import Execution
from llamax.model.position import rotary_kinds
from llamax.model.transformer import Transformer

NOTHING = -1  # in place of a token: the row was done
FOREVER = 2**30  # longer than any text
PREFILL = 1024  # columns of a prompt read at once: the memory for scores is this times the capacity
MOST_STEPS = 16  # decoding steps of one dispatch
DISPATCH_SECONDS = 0.05  # what a dispatch aims at, so that text keeps flowing


class State(NamedTuple):
    """What a step needs of a batch: the last token of every row, how many it drew, and which rows are done."""

    token: Int[Array, " batch"]
    drawn: Int[Array, " batch"]
    done: Bool[Array, " batch"]


class Request(NamedTuple):
    """What a batch asks for, as arrays: how rows draw, with which keys, how far, and what ends them."""

    rows: Rows
    keys: Key[Array, " batch"]
    limit: Int[Array, " batch"]
    stops: Int[Array, " stops"]


class Timings(NamedTuple):
    """Seconds of one batch. `prefill` ends with the first token of every row; compilation is apart."""

    compile: float
    prefill: float
    decode: float
    steps: int  # decoding steps after the first token, of the whole batch


class Engine:
    """A model ready to generate (see `for_serving`), its arrays placed on `mesh` by the mesh `rules` (default: where
    they are).

    Batch, prompt width and capacity are rounded up, so that prompts of any length share a few compiled programs.
    """

    def __init__(
        self,
        model: Transformer,
        mesh: Mesh | None = None,
        rules: Rules | None = None,
        execution: Execution = Execution(),
    ):
        self.rules = load_rules("default") if rules is None else rules
        self.mesh = mesh if mesh is not None else _mesh_of(model)
        self._inputs_last = self.mesh is None and reads_rows(model.config)
        model = for_serving(model, execution, self._inputs_last)
        self.config, self.execution = model.config, execution
        self.model = model if mesh is None else jax.device_put(model, shardings(model, model, self.rules, mesh))
        self._programs: dict[Any, Any] = {}
        self._compile_seconds = 0.0

    def run(
        self,
        prompts: Sequence[np.ndarray],
        samplings: Sequence[Sampling],
        seeds: Sequence[int],
        max_new_tokens: int,
        stop_ids: Sequence[int] = (),
        watch: Callable[[np.ndarray], np.ndarray | None] | None = None,
    ) -> tuple[list[np.ndarray], Timings]:
        """(the new ids of every prompt, a stop id included; timings).

        `watch` is given the tokens of every dispatch [prompts, steps], NOTHING where a row was done, and may say
        which rows are done now [prompts]; tokens such a row drew later are not part of its ids.

        Raises:
            UserError: no prompt, an empty one, an id the embedding has no row for, or more tokens than positions.
        """
        self._check(prompts, max_new_tokens)
        self._compile_seconds = 0.0
        texts, ended = [list(map(int, prompt)) for prompt in prompts], np.zeros(len(prompts), bool)
        spent = Timings(0.0, 0.0, 0.0, 0)
        for reach in self._reaches:
            rows = [i for i, text in enumerate(texts) if len(text) <= reach and not ended[i]]
            if not rows:
                continue
            limits = [min(max_new_tokens, reach - len(prompts[i]) + 1) for i in rows]
            request = self._request([samplings[i] for i in rows], [seeds[i] for i in rows], limits, stop_ids)
            longest = min(max(len(prompts[i]) for i in rows) + max_new_tokens, reach)

            def told(tokens: np.ndarray, rows: list[int] = rows) -> np.ndarray | None:
                whole = np.full((len(prompts), tokens.shape[1]), NOTHING, np.int32)
                whole[rows] = tokens
                halt = watch(whole) if watch is not None else None
                if halt is not None:
                    ended[:] |= halt
                return None if halt is None else halt[rows]

            drawn = [len(texts[i]) - len(prompts[i]) for i in rows]
            found, timings = self._batch([texts[i] for i in rows], drawn, request, longest, told)
            spent = Timings(
                0.0, spent.prefill + timings.prefill, spent.decode + timings.decode, spent.steps + timings.steps
            )
            for i, drew in zip(rows, found, strict=True):
                texts[i] += drew.tolist()
                new = texts[i][len(prompts[i]) :]
                ended[i] |= len(new) >= max_new_tokens or new[-1] in stop_ids
        ids = [np.asarray(text[len(prompt) :], np.int32) for text, prompt in zip(texts, prompts, strict=True)]
        return ids, spent._replace(compile=self._compile_seconds)

    # ------------------------------------------------------------ parts
    @property
    def _reaches(self) -> list[int]:
        """The lengths up to which a cache serves. LongRoPE turns all positions by other angles once a text is longer
        than the original length: what was read is then read again, as the model without a cache does."""
        ropes = [rope for rope, _ in rotary_kinds(self.config)]
        turns = {rope.scaling.original_max_len for rope in ropes if isinstance(rope.scaling, RopeLongrope)}
        return [*sorted(turns), FOREVER]

    def _batch(
        self,
        texts: Sequence[Sequence[int]],
        drawn: Sequence[int],
        request: Request,
        longest: int,
        watch: Callable[[np.ndarray], np.ndarray | None],
    ) -> tuple[list[np.ndarray], Timings]:
        """(new ids of every row; timings) with one cache. The last `drawn` ids of a text were drawn by the request."""
        before = self._compile_seconds
        batch = len(request.limit)
        capacity = _round(longest, 64)
        if self.config.position.kind == "learned":
            capacity = min(capacity, self.config.max_seq_len)
        limit = int(np.max(np.asarray(request.limit)[: len(texts)] - np.asarray(drawn)))
        start = time.perf_counter()
        state, cache = self._prefill(texts, drawn, request, capacity, longest)
        tokens = np.asarray(state.token)[: len(texts), None]
        first = time.perf_counter() - start - (self._compile_seconds - before)
        compiled, start = self._compile_seconds, time.perf_counter()
        columns, done, steps = [tokens], np.asarray(state.done)[: len(texts)], 0
        ended = np.zeros(len(texts), bool)
        seconds = DISPATCH_SECONDS / 2
        while True:
            if (halt := watch(columns[-1])) is not None:
                ended |= halt
            left = limit - 1 - steps
            if left <= 0 or (done | ended).all():
                break
            count = int(min(left, MOST_STEPS, max(1, DISPATCH_SECONDS / seconds)))
            halted = np.pad(ended, (0, batch - len(texts)), constant_values=True)
            since, compiling = time.perf_counter(), self._compile_seconds
            state, cache, out = self._steps(state, cache, request, self._rows(halted), count)
            fresh = np.asarray(out)[: len(texts), :count]
            fresh = np.where(ended[:, None], NOTHING, fresh)
            seconds = (time.perf_counter() - since - (self._compile_seconds - compiling)) / count
            columns.append(fresh)
            steps += count
            done = np.asarray(state.done)[: len(texts)]
        decode = time.perf_counter() - start - (self._compile_seconds - compiled)
        ids = [row[row != NOTHING] for row in np.concatenate(columns, axis=1)]
        return ids, Timings(0.0, first, decode, steps)

    def _check(self, prompts: Sequence[np.ndarray], max_new_tokens: int) -> None:
        if not prompts or max_new_tokens < 1:
            raise UserError(f"{len(prompts)} prompts, max_new_tokens={max_new_tokens}: give at least one of each")
        for number, prompt in enumerate(prompts):
            if not len(prompt):
                raise UserError(f"prompt {number} has no token; give some text")
            ids = np.asarray(prompt)
            if (outside := ids[(ids < 0) | (ids >= self.config.vocab_size)]).size:
                raise UserError(
                    f"prompt {number} has the token {int(outside[0])}, which the embedding of "
                    f"model.vocab_size={self.config.vocab_size} has no row for; use the model's own tokenizer"
                )
        widest = max(len(prompt) for prompt in prompts)
        if self.config.position.kind == "learned" and widest + max_new_tokens > self.config.max_seq_len:
            raise UserError(
                f"{widest} prompt tokens and max_new_tokens={max_new_tokens} exceed the learned positions, "
                f"model.max_seq_len={self.config.max_seq_len}; shorten one"
            )

    def _request(
        self, samplings: Sequence[Sampling], seeds: Sequence[int], limits: Sequence[int], stop_ids: Sequence[int]
    ) -> Request:
        idle = _round(len(samplings), 1) - len(samplings)
        stops = np.full(_round(len(stop_ids), 4), NOTHING, np.int32)
        stops[: len(stop_ids)] = list(stop_ids)
        keys = jax.vmap(jax.random.key)(np.array([*seeds, *[0] * idle], np.uint32))
        return Request(
            Rows(*(self._rows(column) for column in rows_of([*samplings, *[Sampling(0.0)] * idle]))),
            self._rows(keys),
            self._rows(np.array([*limits, *[0] * idle], np.int32)),
            self._everywhere(stops),
        )

    def _prefill(
        self, texts: Sequence[Sequence[int]], drawn: Sequence[int], request: Request, capacity: int, planned: int
    ) -> tuple[State, Cache]:
        """The state after the next token of every row."""
        batch = len(request.limit)
        lengths = np.array([len(text) for text in texts] + [0] * (batch - len(texts)))
        width = min(_round(int(lengths.max()), 16), PREFILL)
        padded = np.zeros((batch, -(-int(lengths.max()) // width) * width), np.int32)
        for row, text in zip(padded, texts, strict=False):
            row[: len(text)] = text
        cache = self._empty(batch, capacity, planned)
        logits = self._rows(np.zeros((batch, self.config.vocab_size), np.float32))
        for column in range(0, padded.shape[1], width):
            counts = np.clip(lengths - column, 0, width).astype(np.int32)
            block = self._rows(padded[:, column : column + width])
            logits, cache = self._call(
                "read", (batch, width, capacity), _read, (1, 4), self.model, cache, block, self._rows(counts), logits
            )
        counts = np.array([*drawn, *[0] * (batch - len(texts))], np.int32)
        state = State(self._rows(np.zeros(batch, np.int32)), self._rows(counts), self._rows(lengths == 0))
        state = self._call("draw", (batch, len(request.stops)), _draw, (1,), logits, state, request)
        return state, cache

    def _steps(
        self, state: State, cache: Cache, request: Request, halted: Array, count: int
    ) -> tuple[State, Cache, Array]:
        shape = (len(state.token), cache.capacity, len(request.stops))
        return self._call(
            "steps",
            shape,
            _decode,
            (1, 2),
            self.model,
            state,
            cache,
            request,
            halted,
            self._everywhere(np.int32(count)),
        )

    def _empty(self, batch: int, capacity: int, planned: int) -> Cache:
        make = functools.partial(init_cache, self.config, batch, capacity, self.execution.activation, planned)
        if self.mesh is None:
            return jax.jit(make)()
        return jax.jit(make, out_shardings=self._places(jax.eval_shape(make)))()

    def _call(
        self, name: str, shape: tuple[int, ...], f: Callable[..., Any], donate: tuple[int, ...], *args: Any
    ) -> Any:
        """f(*args), compiled once for a name and shape; compilation is timed apart."""
        key = (name, *shape)
        if key not in self._programs:
            start = time.perf_counter()
            bound = functools.partial(f, execution=self.execution, turned=self._inputs_last) if name != "draw" else f
            out = self._out(name, args)
            placed: dict[str, Any] = {} if out is None else {"out_shardings": out}
            options = STEP_OPTIONS if name == "steps" and on_cuda() else None
            jitted = jax.jit(bound, donate_argnums=donate, compiler_options=options, **placed)
            self._programs[key] = jitted.lower(*args).compile()
            self._compile_seconds += time.perf_counter() - start
        return self._programs[key](*args)

    def _out(self, name: str, args: Any) -> Any:
        """Where results live: where the arguments of the same kind do, so that one program follows another."""
        if self.mesh is None:
            return None

        def here(tree: Any) -> Any:
            return jax.tree.map(lambda a: a.sharding, tree)

        if name == "read":
            return here(args[4]), here(args[1])
        if name == "draw":
            return here(args[1])
        return here(args[1]), here(args[2]), NamedSharding(self.mesh, PartitionSpec())

    # ------------------------------------------------------------ places
    def _places(self, cache: Cache) -> Cache:
        """Shardings of a cache's arrays: rows over the batch's mesh axes where they divide, heads over theirs."""
        mesh = self.mesh
        assert mesh is not None
        rules = {"pair": (), **self.rules, "position": ()}
        if len(cache.lengths.shape) and cache.lengths.shape[0] % batch_ways(self.rules, mesh):
            rules["batch"] = ()

        def place(axes: tuple[str, ...], array: Any) -> NamedSharding:
            return NamedSharding(mesh, spec_of(axes, tuple(array.shape), rules, mesh, "cache"))

        return map_cache(cache, place)

    def _rows(self, array: Any) -> Any:
        """An array with a leading batch axis where it belongs."""
        if self.mesh is None:
            return jnp.asarray(array)
        ways = batch_ways(self.rules, self.mesh)
        spec = PartitionSpec(self.rules["batch"]) if array.shape[0] % ways == 0 else PartitionSpec()
        return jax.device_put(array, NamedSharding(self.mesh, spec))

    def _everywhere(self, array: Any) -> Any:
        return (
            jnp.asarray(array)
            if self.mesh is None
            else jax.device_put(array, NamedSharding(self.mesh, PartitionSpec()))
        )


# ---------------------------------------------------------------- compiled
def _read(
    model: Transformer,
    cache: Cache,
    tokens: Int[Array, "batch width"],
    counts: Int[Array, " batch"],
    logits: Float[Array, "batch vocab"],
    execution: Execution,
    turned: bool,
) -> tuple[Float[Array, "batch vocab"], Cache]:
    """(logits of each row's last token so far, the cache with these tokens)."""
    model = upright(model) if turned else model
    new, cache = model.decode(tokens, cache, counts, execution, last=True)
    return jnp.where(counts[:, None] > 0, new[:, 0], logits), cache


def _draw(logits: Float[Array, "batch vocab"], state: State, request: Request) -> State:
    """The next token of every row that is not done; NOTHING for the others."""
    token = sample(logits, request.rows, request.keys, state.drawn)
    token = jnp.where(state.done, NOTHING, token)
    drawn = state.drawn + ~state.done
    ended = jnp.any(token[:, None] == request.stops, axis=1) | (drawn >= request.limit)
    return State(token, drawn, state.done | ended)


def _decode(
    model: Transformer,
    state: State,
    cache: Cache,
    request: Request,
    halted: Bool[Array, " batch"],
    count: Int[Array, ""],
    execution: Execution,
    turned: bool,
) -> tuple[State, Cache, Int[Array, "batch steps"]]:
    """`count` steps: (state, cache, the tokens drawn [batch, MOST_STEPS], NOTHING beyond)."""
    state = state._replace(done=state.done | halted)

    def step(i: Any, carry: Any) -> Any:
        state, cache, out = carry
        # A row that is done reads nothing, so its cache stays as it is.
        reads = (~state.done).astype(jnp.int32)
        one = upright(model) if turned else model  # inside the loop, where they are views
        logits, cache = one.decode(jnp.maximum(state.token, 0)[:, None], cache, reads, execution)
        cache = in_order(cache) if turned else cache
        state = _draw(logits[:, 0], state, request)
        return state, cache, out.at[:, i].set(state.token)

    out = jnp.full((len(state.token), MOST_STEPS), NOTHING, jnp.int32)
    return jax.lax.fori_loop(0, count, step, (state, cache, out))


def _mesh_of(model: Transformer) -> Mesh | None:
    """The mesh the model's arrays are on, None on a single device."""
    sharding = jax.tree.leaves(model)[0].sharding
    mesh = sharding.mesh if isinstance(sharding, NamedSharding) else None
    return mesh if isinstance(mesh, Mesh) and mesh.size > 1 else None


def _round(size: int, least: int) -> int:
    """The next power of two, or from 1024 on the next multiple of 1024; at least `least`."""
    if size > 1024:
        return -(-size // 1024) * 1024
    return max(least, 1 << max(size - 1, 0).bit_length())
