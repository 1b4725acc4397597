"""A strategy in somebody else's package: one function and one YAML, no edit in ftdist."""

import json

import plugin
import pytest
from safetensors.torch import load_file

SOURCE = '''
    from ftdist.strategies import Base, Recipe

    def last_layers(base: Base, *, layers: int, head: bool) -> Recipe:
        """The last layers, and the head if wanted."""
        numbers = sorted({int(name.split(".")[2]) for name in base.shapes if name.startswith("model.layers.")})
        wanted = tuple(f"model.layers.{number}." for number in numbers[-layers:])
        names = {name for name in base.shapes if name.startswith(wanted) or head and name.startswith("lm_head.")}
        return Recipe(trainable=frozenset(names))
'''
YAML = """\
    # only the last layers are trained
    name: last_layers
    layers: 1
    head: true
"""


@pytest.fixture(scope="module")
def installed(tmp_path_factory):
    return plugin.install(tmp_path_factory.mktemp("site"), "other_people", SOURCE, last_layers=YAML)


def test_it_is_listed_with_its_meaning(run, verb, installed):
    assert "last_layers  only the last layers are trained" in run("ls", "strategy", env=installed).stdout
    assert "last_layers" not in verb("ls", "strategy").stdout
    assert verb("completion", "words", "ftdist train strategy=last", env=installed).stdout == "last_layers\n"


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["strategy.layer=2"], ("strategy.layer", "strategy.layers")),
        (["+strategy.foo=2"], ("strategy.foo",)),
        (["strategy.layers=two"], ("strategy.layers=two", "integer")),
        (["strategy.head=perhaps"], ("strategy.head=perhaps", "boolean")),
    ],
)
def test_its_signature_is_the_schema(verb, installed, tmp_path, words, said):
    verb("train", "strategy=last_layers", *words, env=installed, cwd=tmp_path).refused(*said)
    assert list(tmp_path.iterdir()) == []


def test_without_the_package_it_is_unknown(verb):
    verb("plan", "strategy=last_layers").refused("strategy=last_layers")


def test_it_trains_exactly_what_it_names(verb, small, model, installed, tmp_path):
    words = (
        "strategy=last_layers",
        "strategy.head=false",
        "engine=zero2",
        "cluster.processes=2",
        "cluster.oversubscribe=true",
        "train.max_steps=3",
        "train.logging_steps=5",  # more than there are: a run without a logged step is a run too
    )
    finished = verb("train", *small, *words, f"run_dir={tmp_path / 'run'}", env=installed)
    assert finished.status == 0, finished.stderr
    base, tuned = load_file(model / "model.safetensors"), load_file(finished.run_dir / "final" / "model.safetensors")
    changed = {name for name in base if not base[name].equal(tuned[name])}
    assert changed == {name for name in base if name.startswith("model.layers.3.")}
    plan = json.loads((finished.run_dir / "plan.json").read_text())
    assert plan["trainable_parameters"] == sum(base[name].numel() for name in changed)
