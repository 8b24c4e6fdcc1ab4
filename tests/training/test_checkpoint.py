"""Checkpoints: whole or absent, checked before use, on any mesh."""

import random
import resource
import shutil

import families
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from bucket import ALL, NOTHING
from etils import epath
from jax.sharding import NamedSharding, PartitionSpec

from llm_jax import storage
from llm_jax.errors import UserError
from llm_jax.training.checkpoint import MANIFEST, Checkpointer, Source


def state_on(layout, scale=1.0):
    """A small tree with a sharded matrix, a vector and a counter."""
    matrix = scale * jnp.arange(64 * 8, dtype=jnp.float32).reshape(64, 8)
    spec = {"w": layout.storage_spec("embed", "mlp"), "b": PartitionSpec(), "count": PartitionSpec()}
    values = {"w": matrix, "b": scale * jnp.ones(5), "count": jnp.array(7, jnp.int32)}
    return {k: jax.device_put(v, NamedSharding(layout.mesh, spec[k])) for k, v in values.items()}


def shapes(state):
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), state)


def saved(directory, layout, steps=(1,), keep=9):
    checkpointer = Checkpointer(directory, keep)
    checkpointer.clean()
    for step in steps:
        checkpointer.save(step, state_on(layout, scale=step))
    checkpointer.wait()
    return checkpointer


def test_any_mesh_to_any_mesh(tmp_path):
    checkpointer = saved(tmp_path, families.layout_of(2, 2, 2))
    for mesh in ((1, 1, 1), (1, 8, 1), (4, 1, 2), (1, 2, 4)):
        target = state_on(families.layout_of(*mesh), scale=0)
        restored = checkpointer.restore(1, shapes(target))
        for name, value in state_on(families.layout_of()).items():
            np.testing.assert_array_equal(restored[name], value)
            assert restored[name].sharding == target[name].sharding


@pytest.mark.parametrize("rows, shared", [(64, False), (8 * 2**10, True)], ids=["small", "large"])
def test_devices_share_the_writing_of_large_arrays(tmp_path, caplog, rows, shared):
    """Where all hold all of it: in parts of at least 1 MiB; nothing is compiled to write a small one."""
    everywhere = NamedSharding(families.layout_of(8).mesh, PartitionSpec())
    state = {"w": jax.device_put(np.arange(rows * 256, dtype=np.float32).reshape(rows, 256), everywhere)}
    checkpointer = Checkpointer(tmp_path, keep=1)
    with jax.log_compiles():
        checkpointer.save(1, state)
    checkpointer.wait()
    assert any("Compiling" in record.message for record in caplog.records) == shared
    np.testing.assert_array_equal(checkpointer.restore(1, shapes(state))["w"], state["w"])


def test_keep(tmp_path):
    layout = families.layout_of()
    checkpointer = saved(tmp_path, layout, steps=(10, 20, 30, 40), keep=2)
    assert checkpointer.steps() == [30, 40]
    assert {path.name for path in tmp_path.iterdir()} == {"00000030", "00000040"}
    assert checkpointer.restore(30, shapes(state_on(layout)))["b"][0] == 30


def test_the_best_survives_restarts(tmp_path):
    """Every save by a Checkpointer of its own, as after a kill: the best is known from the manifests."""
    layout = families.layout_of()
    losses = {10: 3.0, 20: 1.0, 30: 2.0, 40: None, 50: float("nan"), 60: 1.5}
    best = {}
    for step, loss in losses.items():
        checkpointer = Checkpointer(tmp_path, keep=1, keep_best=1, keep_every=30)
        checkpointer.clean()
        best[step] = loss is not None and checkpointer.is_among_best(step, loss)
        checkpointer.save(step, state_on(layout, scale=step), loss)
        checkpointer.close()
    assert [step for step in best if best[step]] == [10, 20]
    assert Checkpointer(tmp_path, keep=1).steps() == [20, 30, 60]
    assert Checkpointer(tmp_path, keep=1).losses() == {20: 1.0, 30: 2.0, 60: 1.5}
    assert checkpointer.restore(20, shapes(state_on(layout)))["b"][0] == 20


def test_what_is_best_is_decided_by_process_0(tmp_path, monkeypatch):
    """A listing may show another process fewer; a save that only some of them begin waits for ever."""
    checkpointer = Checkpointer(tmp_path, keep=1, keep_best=1)
    assert checkpointer.is_among_best(10, 2.0)
    monkeypatch.setattr("llm_jax.hosts.gather", lambda name, value: [not value, value])
    assert not checkpointer.is_among_best(10, 2.0)


def test_a_manifest_that_cannot_be_read_is_not_the_best(tmp_path):
    checkpointer = saved(tmp_path, families.layout_of(), steps=(10,))
    checkpointer.save(20, state_on(families.layout_of()), 2.0)
    checkpointer.wait()
    path = tmp_path / "00000020" / MANIFEST
    path.write_text(path.read_text().replace("2.0", "0.1"))
    assert Checkpointer(tmp_path, 1).losses() == {}


def test_no_device_is_touched_before_it_is_used(tmp_path, monkeypatch):
    """How many devices a CPU is divided into is decided after a Checkpointer is made."""
    monkeypatch.setattr(jax, "default_backend", lambda: pytest.fail("asked jax for its devices"))
    checkpointer = Checkpointer(tmp_path, 1)
    assert checkpointer.steps() == []
    checkpointer.close()


@pytest.fixture
def source(tmp_path):
    """A saved state of a sharded matrix, a vector, and moments that nobody wants."""
    layout = families.layout_of(2, 2, 2)
    checkpointer = Checkpointer(tmp_path / "checkpoints", 1, about={"vocab_size": 64})
    checkpointer.clean()
    params = state_on(layout)
    checkpointer.save(5, {"params": params, "opt_state": {"m": state_on(layout, scale=9)}})
    checkpointer.close()
    return tmp_path


def test_parameters_alone_on_another_mesh(source):
    found = Source.find(source)
    assert found.path.name == "00000005" and found == Source.find(found.path)
    assert found.arrays == {"w": [[64, 8], "float32"], "b": [[5], "float32"], "count": [[], "int32"]}
    assert found.about("vocab_size") == 64
    target = shapes(state_on(families.layout_of(1, 4, 2)))
    for names in (("w", "b", "count"), ("w",)):
        wanted = {name: target[name] for name in names}
        restored = found.restore(wanted)
        assert set(restored) == set(names) and restored["w"].sharding == target["w"].sharding
        np.testing.assert_array_equal(restored["w"], state_on(families.layout_of())["w"])


def test_a_source_that_is_none_or_damaged(source, tmp_path):
    with pytest.raises(UserError, match="neither a checkpoint nor a run directory"):
        Source.find(tmp_path / "nowhere")
    found = Source.find(source)
    with pytest.raises(UserError, match="does not say its tokenizer"):
        found.about("tokenizer")
    path = max((found.path / "state").rglob("*"), key=lambda p: p.stat().st_size * p.is_file())
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    with pytest.raises(UserError, match=f"{path.name} is corrupt"):
        found.restore({"w": shapes(state_on(families.layout_of()))["w"]})


def test_what_a_kill_leaves_behind_is_no_checkpoint(tmp_path):
    checkpointer = saved(tmp_path, families.layout_of(), steps=(1, 2))
    (tmp_path / "00000002" / MANIFEST).unlink()
    (tmp_path / "00000003" / "state.orbax-checkpoint-tmp").mkdir(parents=True)
    assert checkpointer.steps() == [1]
    checkpointer.clean()
    assert [path.name for path in tmp_path.iterdir()] == ["00000001"]


def test_every_flipped_byte_is_named(tmp_path):
    """100 random bytes over all files: none is restored, and the message names the file."""
    layout = families.layout_of()
    checkpointer = saved(tmp_path / "good", layout)
    files = [p for p in (tmp_path / "good").rglob("*") if p.is_file() and p.stat().st_size]
    draw = random.Random(0)
    for _ in range(100):
        shutil.rmtree(tmp_path / "bad", ignore_errors=True)
        shutil.copytree(tmp_path / "good", tmp_path / "bad")
        path = tmp_path / "bad" / draw.choice(files).relative_to(tmp_path / "good")
        data = bytearray(path.read_bytes())
        data[draw.randrange(len(data))] ^= 1 << draw.randrange(8)
        path.write_bytes(data)
        with pytest.raises(UserError, match=path.name):
            Checkpointer(tmp_path / "bad", 1).restore(1, shapes(state_on(layout)))
    assert checkpointer.restore(1, shapes(state_on(layout)))["count"] == 7


def test_a_missing_and_a_shortened_file_are_named(tmp_path):
    layout = families.layout_of()
    checkpointer = saved(tmp_path, layout)
    path = max((tmp_path / "00000001" / "state").rglob("*"), key=lambda p: p.stat().st_size * p.is_file())
    data = path.read_bytes()
    path.write_bytes(data[:-1])
    with pytest.raises(UserError, match=f"{path.name} has {len(data) - 1} bytes"):
        checkpointer.restore(1, shapes(state_on(layout)))
    path.unlink()
    with pytest.raises(UserError, match=f"{path.name} is missing"):
        checkpointer.restore(1, shapes(state_on(layout)))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"w": (64, 9)}, r"w is \[\[64, 8\], 'float32'\], here \[\[64, 9\]"),
        ({"extra": (2,)}, "extra is missing"),
        ({"b": None}, "b is .*, here absent"),
    ],
)
def test_another_model_is_named(tmp_path, change, message):
    layout = families.layout_of()
    checkpointer = saved(tmp_path, layout)
    target = shapes(state_on(layout))
    for name, shape in change.items():
        target.pop(name, None)
        if shape:
            everywhere = NamedSharding(layout.mesh, PartitionSpec())
            target[name] = jax.ShapeDtypeStruct(shape, jnp.float32, sharding=everywhere)
    with pytest.raises(UserError, match=message):
        checkpointer.restore(1, target)


def test_a_save_that_fails_leaves_the_one_before(tmp_path):
    layout = families.layout_of()
    checkpointer = saved(tmp_path, layout)
    (tmp_path / "00000002").write_text("in the way")
    with pytest.raises(UserError, match=r"cannot write checkpoint .*00000002"):
        checkpointer.save(2, state_on(layout))
        checkpointer.wait()
    assert checkpointer.restore(1, shapes(state_on(layout)))["count"] == 7


def test_a_disk_that_fills_during_a_save_is_one_line(tmp_path):
    """The system refuses to let files grow, as a full disk does, while arrays are written."""
    layout = families.layout_of()
    checkpointer = saved(tmp_path, layout)
    large = {"w": jax.random.normal(jax.random.key(0), (512, 512))}
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, before[1]))
    try:
        with pytest.raises(UserError) as raised:
            checkpointer.save(2, large)
            checkpointer.wait()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    path = tmp_path / "00000002"
    mend = "earlier checkpoints are intact, the same command goes on from the newest"
    assert str(raised.value) == f"cannot write checkpoint {path}: File too large; {mend}"
    assert checkpointer.steps() == [1]
    assert checkpointer.restore(1, shapes(state_on(layout)))["count"] == 7
    checkpointer.clean()
    checkpointer.save(2, large)
    checkpointer.wait()
    assert checkpointer.steps() == [1, 2]


# ---- in a bucket: orbax writes through tensorstore's own client ----------------------------------

IN_BUCKET = epath.Path("gs://bucket/run/checkpoints")


@pytest.fixture(scope="module")
def three_saved(doors):
    """Two checkpoints of three, in a bucket whose listings do not show anything."""
    doors.reset()
    doors.shown = NOTHING
    saved(IN_BUCKET, families.layout_of(2, 2, 2), steps=(10, 20, 30), keep=2).close()
    return doors.content()


@pytest.fixture
def in_bucket(bucket, three_saved):
    bucket.reset(three_saved)
    bucket.shown = NOTHING
    return IN_BUCKET


@pytest.mark.slow
def test_checkpoints_in_a_bucket_are_found_without_a_listing(bucket, in_bucket):
    again = Checkpointer(in_bucket, keep=2)
    assert again.steps() == [20, 30] and again.newest() == 30
    assert Source.find(in_bucket.parent).path == in_bucket / "00000030"
    target = state_on(families.layout_of(1, 4, 2), scale=0)
    restored = again.restore(20, shapes(target))
    np.testing.assert_array_equal(restored["w"], state_on(families.layout_of(), scale=20)["w"])
    puts = len(bucket.puts)
    again.save(30, target)  # it is there
    again.close()
    assert len(bucket.puts) == puts


def test_an_old_listing_removes_no_complete_checkpoint(bucket, in_bucket):
    """It shows the arrays of a checkpoint and not yet its manifest; of one that a kill left there is none."""
    bucket.put(f"bucket/run/checkpoints/00000040/state/{MANIFEST}", b"half")
    bucket.show_before("bucket/run/checkpoints/00000030/manifest.json")
    assert in_bucket / "00000030" / "state" in [*in_bucket.glob("00000030/*")]
    assert in_bucket / "00000030" / MANIFEST not in [*in_bucket.glob("00000030/*")]
    assert in_bucket / "00000010" / MANIFEST in [*in_bucket.glob("00000010/*")]  # it was removed since
    assert Checkpointer(in_bucket, keep=2).steps() == [20, 30]
    Checkpointer(in_bucket, keep=2).clean()
    assert Checkpointer(in_bucket, keep=2).newest() == 30
    bucket.shown = ALL
    Checkpointer(in_bucket, keep=2).clean()
    assert [path.name for path in in_bucket.glob("000*")] == ["00000020", "00000030"]


def test_a_damaged_checkpoint_in_a_bucket_is_set_aside(bucket, in_bucket):
    name = max(
        (name for name in bucket.stored if "/00000030/state/" in name), key=lambda n: len(bucket.stored[n][0])
    )
    data = bytearray(bucket.stored[name][0])
    data[len(data) // 2] ^= 1
    bucket.put(name, data)
    with pytest.raises(UserError, match=f"gs://{name} is corrupt.*that of step 20 is intact"):
        Checkpointer(in_bucket, keep=2).newest()
    bucket.shown = ALL
    assert Checkpointer(in_bucket, keep=2).newest(skip=True) == 20
    assert bucket.stored[name.replace("00000030", "damaged.00000030")][0] == data
    assert Checkpointer(in_bucket, keep=2).steps() == [20]


def test_a_save_in_a_bucket_that_fails_is_one_line(bucket, in_bucket, monkeypatch):
    """The later start has the run: this one's checkpoint must not count."""
    lock, checkpointer = storage.lock(in_bucket.parent / ".lock"), Checkpointer(in_bucket, keep=2)
    bucket.put("bucket/run/.lock", b"of a later start")
    with pytest.raises(UserError, match="was taken over by a later start"):
        checkpointer.save(40, state_on(families.layout_of()))
        checkpointer.wait()
    lock.close()
    assert Checkpointer(in_bucket, keep=2).steps() == [20, 30]
