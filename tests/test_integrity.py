"""One flipped bit in every kind of file of a run: whatever reads it names it, before anything is given out.

A subset, in this process; benchmarks/reliability/flips.py does it 100 times and through the scripts.
"""

import re
import shutil

import pytest

from llm_jax import storage
from llm_jax.data.source import damage
from llm_jax.errors import UserError
from llm_jax.text import shards
from llm_jax.training import experiment
from llm_jax.training.checkpoint import Checkpointer
from llm_jax.training.program import Program
from llm_jax.training.rundir import RunDirectory

SMALL = {
    "steps": 2,
    "global_batch_size": 8,
    "data.validation": "position",
    "data.sequence_length": 16,
    "model.num_layers": 1,
    "model.model_dim": 16,
    "model.num_heads": 2,
    "schedule.warmup_steps": 1,
}


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """Two sources and an evaluation set, and a checkpoint of the state before the first step."""
    root = tmp_path_factory.mktemp("integrity")
    for name in ("a", "b", "news"):
        (root / f"{name}.txt").write_text(f"To be, or not to be, that is the question of {name}.\n" * 40)
    sources = tuple({"name": name, "text": (str(root / f"{name}.txt"),)} for name in ("a", "b"))
    sets = ({"name": "news", "text": (str(root / "news.txt"),)},)
    changes = SMALL | {"data.sources": sources, "evaluation.sets": sets}
    config = experiment.override(experiment.default_config(), changes)
    directory = RunDirectory.open(root / "run")
    program = Program.prepare(experiment.resolve(config), directory.data, say=lambda _: None)
    data = shards.content_id(shards.read_header(directory.data))
    directory.write_config(program.experiment, program.layout.mesh.shape, data)
    checkpointer = Checkpointer(directory.checkpoints, keep=1)
    checkpointer.save(0, program.init())
    checkpointer.close()
    return directory.path


@pytest.fixture
def copy(run, tmp_path):
    shutil.copytree(run, tmp_path / "run")
    return tmp_path / "run"


def use(workdir):
    """Restores, and touches all tokens that training and evaluation read."""
    program, _ = Program.restore(workdir)
    assert program.tokenizer.vocab_size
    assert program.batches[0].inputs.shape == (1, 1, 8, 16)
    for split in ("validation.a", "validation.b", "test.news"):
        assert list(program.evaluation_batches(split))


def flip(path):
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


@pytest.mark.slow
def test_a_flip_in_each_kind_of_file_is_named(copy):
    """Of files whose names are hashes, one in each directory."""
    use(copy)
    names = shards.read_header(copy / "data")["splits"]
    assert len(names) == 5
    files = [path for path in (copy / "data").iterdir() if not path.name.startswith("train.b")]
    step = copy / "checkpoints" / "00000000"
    kinds = {re.sub(r"[0-9a-f]{32}", "*", str(path)): path for path in step.rglob("*") if path.is_file()}
    assert len(files) == 2 + 4 * 3 and len(kinds) >= 8
    for path in [*files, *kinds.values()]:
        good = path.read_bytes()
        flip(path)
        with pytest.raises(UserError, match=re.escape(str(path))):
            use(copy)
        if path in files:
            assert [line for line in damage_of(copy / "data") if str(path) in line]
        path.write_bytes(good)
    use(copy)


def damage_of(directory):
    try:
        return damage(directory)
    except UserError as error:  # the header, which says what else there is
        return [str(error)]


def test_a_new_run_starts_over_what_a_kill_left_of_its_first_files(tmp_path):
    """Half a config.json, half a shard set: neither makes a directory somebody else's."""
    for name in ("config.json", "environment.json"):
        storage.temporary_beside(tmp_path / name).write_text("{")
    storage.temporary_beside(tmp_path / "data").mkdir()
    assert len(storage.leftovers(tmp_path)) == 3
    directory = RunDirectory.open(tmp_path)
    with directory.held():
        assert list(tmp_path.iterdir()) == [directory.lock]


def test_a_run_directory_is_held_by_one(tmp_path):
    """What another run removes as left over would be what the first one is writing."""
    directory = RunDirectory.open(tmp_path)
    held = pytest.raises(UserError, match="is being trained by another process")
    with directory.held(), held, directory.held():
        pass
    with directory.held():
        pass
    (tmp_path / ".hidden").touch()
    with pytest.raises(UserError, match=r"it holds \.hidden"):
        RunDirectory.open(tmp_path)
