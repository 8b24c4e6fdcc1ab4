"""What a config may say about its text."""

import pytest

from llm_jax import config as configs
from llm_jax.errors import UserError
from llm_jax.text import sources
from llm_jax.text.sources import DataConfig, SetConfig, SourceConfig
from llm_jax.training import experiment


@pytest.fixture
def text(tmp_path):
    for name in ("a.txt", "b.txt"):
        (tmp_path / name).write_text("text")
    return tmp_path


def mixture(folder, **changes):
    one = {"name": "one", "text": (str(folder / "a.txt"),), "weight": 2.0, "max_epochs": 3}
    two = {"name": "two", "text": (str(folder / "b.txt"), "python:docs"), "weight": 1, **changes}
    return {"data": {"sources": [one, two], "text": ()}}


def test_sources_and_sets_of_a_config(text):
    values = mixture(text) | {"evaluation": {"sets": [{"name": "one", "text": [str(text / "b.txt")]}]}}
    e = experiment.resolve(values)
    assert [(s.name, s.weight, s.max_epochs) for s in e.data.mixture] == [("one", 2.0, 3), ("two", 1.0, 0)]
    assert e.data.mixture is e.data.sources
    assert e.evaluation.sets == (SetConfig("one", (str(text / "b.txt"),)),)
    assert experiment.resolve(configs.to_config_dict(e)) == e


def test_on_a_command_line(text):
    places = f"({{'name': 'one', 'text': ('{text / 'a.txt'}',)}},)"
    changes = {"data.sources": places, "evaluation.sets": places}
    e = experiment.resolve(experiment.override(experiment.default_config(), changes))
    assert e.data.sources == (SourceConfig("one", (str(text / "a.txt"),)),)
    assert e.evaluation.sets == (SetConfig("one", (str(text / "a.txt"),)),)


def test_one_text_is_a_source_without_a_name(text):
    assert DataConfig(text=("a", "b")).mixture == (SourceConfig("text", ("a", "b")),)


BAD = {
    "no name": ({"name": ""}, r"data\.sources\[1\]\.name is ''"),
    "a path as name": ({"name": "a/b"}, r"data\.sources\[1\]\.name is 'a/b'; use letters"),
    "the name of data.text": ({"name": "text"}, r"data\.sources\[1\]\.name: 'text' is kept"),
    "a name twice": ({"name": "one"}, "data.sources has two of the name 'one'"),
    "no weight": ({"weight": 0.0}, r"data\.sources\[1\]\.weight is 0\.0; give a positive number"),
    "negative weight": ({"weight": -1.0}, r"data\.sources\[1\]\.weight is -1\.0"),
    "endless weight": ({"weight": float("inf")}, r"data\.sources\[1\]\.weight is inf"),
    "not a number": ({"weight": float("nan")}, r"data\.sources\[1\]\.weight is nan"),
    "negative epochs": ({"max_epochs": -1}, r"data\.sources\[1\]\.max_epochs is -1"),
    "no text": ({"text": ()}, r"data\.sources\[1\]\.text is empty"),
    "no such text": ({"text": ("gone.txt",)}, r"data\.sources\[1\]\.text=gone\.txt: no such file"),
    "misspelt key": ({"weigth": 1.0}, r"config\.data\.sources\[1\]\.weigth is not a key"),
    "wrong type": ({"weight": "much"}, r"config\.data\.sources\[1\]\.weight must be float, not 'much'"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_source_is_named(text, case):
    changes, message = BAD[case]
    with pytest.raises(UserError, match=message):
        experiment.resolve(mixture(text, **changes))


@pytest.mark.parametrize(
    "sets, message",
    [
        ([SetConfig("a b", ("python:docs",))], r"evaluation\.sets\[0\]\.name is 'a b'"),
        ([SetConfig("a", ("python:docs",))] * 2, "evaluation.sets has two of the name 'a'"),
        ([SetConfig("a", ("gone.txt",))], r"evaluation\.sets\[0\]\.text=gone\.txt: no such file"),
        ([SetConfig("a")], r"evaluation\.sets\[0\]\.text is empty"),
    ],
)
def test_bad_set_is_named(sets, message):
    with pytest.raises(UserError, match=message):
        sources.check(DataConfig(), sets)
        sources.find(DataConfig(), sets)


def test_text_of_a_shard_set_need_not_be_there():
    config = DataConfig(text=("gone",), sources=(SourceConfig("one", ("gone",)),), shards="data")
    sources.find(config, [SetConfig("a", ("gone",))])


def test_what_a_mixture_is_to_a_run(text):
    """Names, weights and epochs are; where the text lies is not; and without sources nothing has changed."""
    plain = configs.fingerprint(DataConfig())
    assert plain == configs.fingerprint(DataConfig(text_key="body", text=("elsewhere",)))
    base = SourceConfig("one", ("a.txt",), 2.0, 3)

    def fingerprint(*entries):
        return configs.fingerprint(DataConfig(sources=entries))

    moved = SourceConfig("one", ("moved.txt",), 2.0, 3)
    assert fingerprint(base) == fingerprint(moved) != plain
    others = [("two", (), 2.0, 3), ("one", (), 2.5, 3), ("one", (), 2.0, 4)]
    assert len({fingerprint(SourceConfig(*other)) for other in others} | {fingerprint(base)}) == 4
    assert not configs.differences(DataConfig(sources=(base,)), DataConfig(sources=(moved,)), True)
    assert "data.sources" not in dict(configs.leaves(experiment.Experiment(), only_identity=True))
