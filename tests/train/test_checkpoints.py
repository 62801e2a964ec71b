"""Checkpoints survive what machines do to them: kill -9, full disks, flipped bytes, other meshes, donated buffers."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from llamax.config.run import CheckpointConfig
from llamax.errors import UserError
from llamax.train.checkpoints import Checkpoints, _stored, find_checkpoints, load_params
from llamax.train.files import disk_cause

HERE = Path(__file__).parents[2]
ROOT = {"PYTHONPATH": str(HERE)}
CONFIG = CheckpointConfig(every_steps=100, every_seconds=60.0)


class Model(nnx.Module):
    def __init__(self, value: float) -> None:
        self.head = nnx.Param(jnp.full((8, 16), value))
        self.blocks = nnx.data([nnx.Param(jnp.arange(24.0, dtype=jnp.bfloat16).reshape(2, 3, 4))])


class State(NamedTuple):
    model: Model
    opt_state: dict
    step: jax.Array
    key: jax.Array


def make_state(step: int = 0) -> State:
    opt_state = {"mu/nu": jnp.full((8, 16), -step, jnp.float32), "empty": jnp.zeros((0, 3)), "flag": jnp.array(True)}
    return State(Model(float(step)), opt_state, jnp.int32(step), jax.random.fold_in(jax.random.key(7), step))


def abstract(tree):
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), tree)


def same(a, b) -> bool:
    def bits(x):
        return np.asarray(jax.random.key_data(x) if jnp.issubdtype(x.dtype, jax.dtypes.prng_key) else x)

    def equal(x, y):
        return x.dtype == y.dtype and bits(x).tobytes() == bits(y).tobytes()

    return jax.tree.structure(a) == jax.tree.structure(b) and all(jax.tree.leaves(jax.tree.map(equal, a, b)))


def save_all(directory: Path, *steps: int, permanent: bool = True) -> None:
    with Checkpoints(directory, CONFIG) as checkpoints:
        for step in steps:
            checkpoints.save(step, make_state(step), {"seconds": step / 2}, permanent)


def restored(directory: Path, warnings: list[str] | None = None):
    with Checkpoints(directory, CONFIG, on_warning=(warnings if warnings is not None else []).append) as checkpoints:
        return checkpoints.restore(abstract(make_state()))


def names(directory: Path) -> list[str]:
    return sorted(os.listdir(directory))


def files(directory: Path) -> list[Path]:
    return sorted(path for path in directory.rglob("*") if path.is_file())


def flip_a_byte(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 0x10
    path.write_bytes(data)


# ---------------------------------------------------------------- what comes back
def test_restores_every_bit(tmp_path):
    save_all(tmp_path, 100)
    step, state, meta = restored(tmp_path)
    assert (step, meta) == (100, {"seconds": 50.0})
    assert same(state, make_state(100))
    assert not same(state, make_state(101))


def test_nothing_saved_restores_nothing(tmp_path):
    assert restored(tmp_path / "absent") is None


def test_other_kinds_of_prng_key(tmp_path):
    state = {"key": jax.random.key(3, impl="rbg"), "keys": jax.random.split(jax.random.key(1), 4)}
    with Checkpoints(tmp_path, CONFIG) as checkpoints:
        checkpoints.save(1, state, {}, True)
        _, back, _ = checkpoints.restore(abstract(state))
    assert same(back, state)
    assert str(jax.random.key_impl(back["key"])) == "rbg"


def test_no_class_is_stored_and_names_are_readable(tmp_path):
    save_all(tmp_path, 1)
    arrays = json.loads((tmp_path / "1" / "digests.json").read_text())["arrays"]
    assert arrays[".model.head.value"] == ["float32", 8, 16]
    assert set(arrays) >= {".step", ".key", ".model.blocks[0].value", ".opt_state['mu/nu']"}
    assert not any(b"Model" in path.read_bytes() for path in files(tmp_path))


def test_the_caller_may_donate_at_once(tmp_path):
    step_once = jax.jit(lambda tree: jax.tree.map(lambda x: x + 1, tree), donate_argnums=0)
    state = {f"p{i}": jnp.zeros((500, 1000)) for i in range(6)}
    state = step_once(state)  # compiled before, so that the next step overwrites while the save is being written
    with Checkpoints(tmp_path, CONFIG) as checkpoints:
        for step in range(1, 6):
            checkpoints.save(step, state, {}, True)
            for _ in range(3):
                state = step_once(state)
        jax.block_until_ready(state)
    for step in range(1, 6):
        saved = load_params_of(tmp_path / str(step), state)
        assert all(bool((array == 3 * step - 2).all()) for array in saved.values())


def load_params_of(folder: Path, like: dict) -> dict:
    """One step's arrays, by a fresh reader that sees no other step."""
    alone = folder.parent / f"alone-{folder.name}"
    shutil.copytree(folder, alone / folder.name)
    with Checkpoints(alone, CONFIG) as checkpoints:
        return checkpoints.restore(abstract(like))[1]


def test_restores_onto_another_mesh(tmp_path):
    devices = np.array(jax.devices())
    values = jnp.arange(64.0 * 8).reshape(64, 8)
    rows, columns = (
        NamedSharding(Mesh(devices, ("data",)), PartitionSpec("data")),
        NamedSharding(Mesh(devices[:2].reshape(1, 2), ("data", "tensor")), PartitionSpec(None, "tensor")),
    )
    state = {"w": jax.device_put(values, rows), "key": jax.device_put(jax.random.split(jax.random.key(0), 8), rows)}
    double = jax.jit(lambda x: x * 2, donate_argnums=0)
    with Checkpoints(tmp_path, CONFIG) as checkpoints:
        checkpoints.save(1, state, {}, True)
        double(state["w"])
        asked = {
            "w": jax.ShapeDtypeStruct((64, 8), jnp.float32, sharding=columns),
            "key": jax.ShapeDtypeStruct(
                (8,), state["key"].dtype, sharding=NamedSharding(columns.mesh, PartitionSpec())
            ),
        }
        _, back, _ = checkpoints.restore(asked)
    assert back["w"].sharding == columns
    assert back["key"].sharding.device_set == columns.device_set
    assert np.array_equal(back["w"], values)
    assert same(back["key"], state["key"])


# ---------------------------------------------------------------- which are kept
def test_only_the_newest_temporary_one_is_kept(tmp_path):
    with Checkpoints(tmp_path, CONFIG) as checkpoints:
        for step, permanent in [(10, False), (20, False), (100, True), (130, False), (140, False)]:
            checkpoints.save(step, make_state(step), {}, permanent)
            checkpoints.wait()
            if step == 20:
                assert names(tmp_path) == ["20.temporary"]
            if step == 100:
                assert names(tmp_path) == ["100"]
    assert names(tmp_path) == ["100", "140.temporary"]


def test_a_temporary_one_can_be_made_permanent(tmp_path):
    with Checkpoints(tmp_path, CONFIG) as checkpoints:
        checkpoints.save(10, make_state(10), {"seconds": 1}, False)
        checkpoints.save(10, make_state(10), {"seconds": 2}, True)
        checkpoints.save(10, make_state(10), {"seconds": 3}, False)
    assert names(tmp_path) == ["10"]
    assert restored(tmp_path)[0] == 10


def test_due_by_step_and_by_time(tmp_path):
    now = [0.0]
    with Checkpoints(tmp_path, CONFIG, clock=lambda: now[0]) as checkpoints:
        assert [checkpoints.due(step) for step in (99, 100, 101)] == [None, "permanent", None]
        now[0] = 60.0
        assert checkpoints.due(150) == "temporary"
        assert checkpoints.due(200) == "permanent"
        checkpoints.save(150, make_state(), {}, False)
        checkpoints.wait()
        assert checkpoints.due(160) is None
    with Checkpoints(tmp_path, CheckpointConfig(every_steps=None, every_seconds=None)) as checkpoints:
        assert checkpoints.due(100) is None


# ---------------------------------------------------------------- damage
def damage_kinds():
    return {
        "flipped byte": flip_a_byte,
        "missing": Path.unlink,
        "cut": lambda path: path.write_bytes(path.read_bytes()[:-1]),
    }


@pytest.mark.parametrize("kind", damage_kinds())
def test_any_damaged_file_falls_back_to_the_newest_good_one(tmp_path, kind):
    save_all(tmp_path / "whole", 100, 200)
    whole = files(tmp_path / "whole" / "200")
    assert len(whole) > 5
    for number, path in enumerate(whole):
        if path.stat().st_size == 0 and kind != "missing":
            continue
        copy = tmp_path / str(number)
        shutil.copytree(tmp_path / "whole", copy)
        broken = copy / path.relative_to(tmp_path / "whole")
        damage_kinds()[kind](broken)
        warnings: list[str] = []
        with Checkpoints(copy, CONFIG, on_warning=warnings.append) as checkpoints:
            step, state, _ = checkpoints.restore(abstract(make_state()))
        assert step == 100, broken
        assert same(state, make_state(100))
        assert len(warnings) == 1
        assert "checkpoint 200" in warnings[0]
        assert broken.name in warnings[0]
        assert "using step 100" in warnings[0]
        shutil.rmtree(copy)


def test_a_damaged_step_is_replaced_when_reached_again(tmp_path):
    save_all(tmp_path, 100, 200)
    flip_a_byte(tmp_path / "200" / "digests.json")
    with Checkpoints(tmp_path, CONFIG, on_warning=lambda text: None) as checkpoints:
        assert checkpoints.restore(abstract(make_state()))[0] == 100
        checkpoints.save(200, make_state(200), {}, True)
    warnings: list[str] = []
    assert restored(tmp_path, warnings)[0] == 200
    assert warnings == []


def test_no_good_one_is_an_error_and_never_a_silent_restart(tmp_path):
    save_all(tmp_path, 100, 200)
    (tmp_path / "100" / "digests.json").unlink()
    flip_a_byte(max(files(tmp_path / "200" / "state" / "ocdbt.process_0" / "d"), key=lambda path: path.stat().st_size))
    with pytest.raises(
        UserError, match=r"(?s)no checkpoint can be restored.*200: state/.*changed.*100: digests.json is mi"
    ):
        restored(tmp_path)
    assert names(tmp_path) == ["100", "200"]


def test_an_unfinished_first_save_is_ignored_and_cleared(tmp_path):
    save_all(tmp_path, 100)
    (tmp_path / "100").rename(tmp_path / "100.saving")
    assert restored(tmp_path) is None
    assert names(tmp_path) == []


def test_another_model_is_an_error_that_names_the_array(tmp_path):
    save_all(tmp_path, 100)
    other = make_state()._replace(opt_state={**make_state().opt_state, "mu/nu": jnp.zeros((8, 17))})
    with (
        Checkpoints(tmp_path, CONFIG) as checkpoints,
        pytest.raises(UserError, match=r"mu/nu.*\['float32', 8, 16\] there, \['float32', 8, 17\] asked for"),
    ):
        checkpoints.restore(abstract(other))


# ---------------------------------------------------------------- the model alone
def test_load_params(tmp_path):
    save_all(tmp_path / "checkpoints", 100, 200)
    model = jax.eval_shape(lambda: Model(0.0))
    assert same(load_params(tmp_path, model), make_state(200).model)
    assert same(load_params(tmp_path, model, step=100), make_state(100).model)
    with pytest.raises(UserError, match="no checkpoint of step 150; take one of the steps 100, 200"):
        load_params(tmp_path, model, step=150)
    with pytest.raises(UserError, match="no checkpoint; train the run first"):
        load_params(tmp_path / "other", model)


def test_load_params_leaves_a_running_save_alone(tmp_path):
    save_all(tmp_path / "checkpoints", 100)
    (tmp_path / "checkpoints" / "200.saving").mkdir()
    load_params(tmp_path, jax.eval_shape(lambda: Model(0.0)))
    assert names(tmp_path / "checkpoints") == ["100", "200.saving"]


# ---------------------------------------------------------------- clock
@pytest.mark.parametrize("leap", [86400.0, -86400.0])
def test_a_clock_that_leaps_fails_no_save(tmp_path, monkeypatch, leap):
    """Orbax measures its patience with the wall clock: here it moves a day whenever it is looked at."""
    real, looks = time.time, iter(range(1, 10**9))
    monkeypatch.setattr(time, "time", lambda: real() + leap * next(looks))
    save_all(tmp_path, 100, 200)
    assert restored(tmp_path)[0] == 200
    assert next(looks) > 10, "nobody looked"


# ---------------------------------------------------------------- full disk
FULL = "RESOURCE_EXHAUSTED: Failed to write 9 bytes to file 11: No space left on device [os_error_code='28']"


@pytest.mark.parametrize("where", ["write", "digest", "rename"])
def test_a_full_disk_keeps_what_was_saved(tmp_path, monkeypatch, where):
    save_all(tmp_path, 100)

    def full(*args, **kwargs):
        raise OSError(28, "No space left on device") if where != "write" else ValueError(FULL)

    checkpoints = Checkpoints(tmp_path, CONFIG)
    with monkeypatch.context() as patch:
        if where == "write":
            patch.setattr(checkpoints._writer, "wait_until_finished", full)
        else:
            patch.setattr(
                "llamax.train.checkpoints." + {"digest": "write_digests", "rename": "os.replace"}[where], full
            )
        message = "step 200 .*no space left on device, free some space; still saved: step 100"
        with pytest.raises(UserError, match=message):  # noqa: PT012 - Orbax may refuse at once or behind the loop
            checkpoints.save(200, make_state(200), {}, False)
            checkpoints.wait()
    assert [found.step for found in find_checkpoints(tmp_path)] == [100]
    checkpoints.save(200, make_state(200), {}, False)  # there is space again
    checkpoints.close()
    assert restored(tmp_path)[0] == 200


def test_a_write_refused_by_the_operating_system(tmp_path):
    """For real, through Orbax: a limit on file size makes the kernel refuse its writes."""
    code = f"""
import resource, sys, jax.numpy as jnp
from pathlib import Path
from llamax.config.run import CheckpointConfig
from llamax.errors import UserError
from llamax.train.checkpoints import Checkpoints
checkpoints = Checkpoints(Path({str(tmp_path)!r}), CheckpointConfig())
checkpoints.save(1, {{"w": jnp.ones(10)}}, {{}}, True)
checkpoints.wait()
resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, resource.RLIM_INFINITY))
try:
    import numpy as np
    many = {{str(i): np.random.default_rng(i).normal(size=100_000) for i in range(60)}}
    checkpoints.save(2, many, {{}}, True)
    checkpoints.close()
except UserError as error:
    print(error)
    sys.exit(2)
"""
    done = subprocess.run([sys.executable, "-c", code], env=os.environ | ROOT, cwd=HERE, capture_output=True, text=True)
    assert done.returncode == 2, done.stderr
    assert "file too large; still saved: step 1;" in done.stdout
    assert done.stderr == ""
    assert names(tmp_path) == ["1"]


def test_a_programming_error_is_not_blamed_on_the_disk(tmp_path):
    checkpoints = Checkpoints(tmp_path, CONFIG)
    with pytest.raises(TypeError):
        checkpoints.save(1, make_state(), {"bad": object()}, True)
    checkpoints.close()
    assert disk_cause(ValueError("no number here")) is None


# ---------------------------------------------------------------- kill -9
KILLED = """
import sys, jax, jax.numpy as jnp
from pathlib import Path
from llamax.config.run import CheckpointConfig
from llamax.train.checkpoints import Checkpoints
state = {f"p{i}": jnp.zeros((100, 50)) for i in range(6)} | {"step": jnp.int32(0)}
abstract = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), state)
checkpoints = Checkpoints(Path(sys.argv[1]), CheckpointConfig())
found = checkpoints.restore(abstract)
step, state, meta = found or (0, state, {"sum": 0})
assert all((state[name] == step).all() for name in state), "torn"
assert meta["sum"] == step, meta
print("restored", step, flush=True)
while True:
    step += 1
    state = jax.tree.map(lambda x: x + 1, state)
    checkpoints.save(step, state, {"sum": step}, permanent=step % 4 == 0)
    if step % 3 == 0:
        checkpoints.wait()
        print("saved", step, flush=True)
"""


@pytest.mark.parametrize("times", [2, pytest.param(25, marks=pytest.mark.slow)])
def test_kill_9_at_any_moment_leaves_a_restorable_folder(tmp_path, times):
    directory, known, rng = tmp_path / "checkpoints", 0, random.Random(times)
    for _ in range(times):
        child = subprocess.Popen(
            [sys.executable, "-c", KILLED, str(directory)],
            env=os.environ | ROOT, cwd=HERE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )  # fmt: skip
        first = child.stdout.readline().split()
        assert first[:1] == ["restored"], child.communicate()[1]
        assert int(first[1]) >= known
        time.sleep(rng.uniform(0.02, 0.6))
        child.send_signal(signal.SIGKILL)
        saved = [int(line.split()[1]) for line in child.communicate()[0].splitlines() if line.startswith("saved")]
        known = max([int(first[1]), *saved])
    temporary = [found for found in find_checkpoints(directory) if not found.permanent]
    assert len(temporary) <= 2  # the newest, and the one it was about to replace
    like = {f"p{i}": jax.ShapeDtypeStruct((100, 50), jnp.float32) for i in range(6)} | {
        "step": jax.ShapeDtypeStruct((), jnp.int32)
    }
    warnings: list[str] = []
    with Checkpoints(directory, CONFIG, on_warning=warnings.append) as checkpoints:
        step, state, meta = checkpoints.restore(like) or (0, {}, {"sum": 0})
    assert step >= known
    assert meta["sum"] == step
    assert all(bool((array == step).all()) for array in state.values())
    assert warnings == []
    if known:
        assert not [name for name in names(directory) if name.endswith((".saving", ".deleting"))]


def test_of_simulated_devices_that_hold_the_same_one_is_written():
    mesh = jax.make_mesh((2,), ("data",), devices=jax.devices()[:2])
    whole, cut = (NamedSharding(mesh, PartitionSpec(*axes)) for axes in ((), ("data",)))
    arrays = {"whole": jax.device_put(np.arange(4.0), whole), "cut": jax.device_put(np.arange(4.0), cut)}
    given = _stored(arrays)
    assert [len(found["whole"].sharding.device_set) for found in (given, arrays)] == [1, 2]
    assert given["cut"] is arrays["cut"]
    np.testing.assert_array_equal(given["whole"], arrays["whole"])
