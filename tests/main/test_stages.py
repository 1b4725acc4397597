"""Recipes of several runs: what is refused before the first, and two stages in a row, broken off in between."""

import json
import random
import shutil

import pytest

from ftdist import compose, demo, stages
from ftdist.errors import UserError


def composed(small, *words):
    """The runs of a recipe, as `ftdist train` has them."""
    argv = [*small, "engine=single", "cluster.processes=1", *words]
    (config,) = compose.compose("train", argv)
    return stages.of("train", config, argv)


def test_a_recipe_that_goes_on_needs_its_folder(small):
    with pytest.raises(UserError, match=r"resume=auto: .* set run_dir=DIR"):
        composed(small, "then=['task=dpo']", "resume=auto")


@pytest.mark.parametrize("word", ["model.dtype=float32", "run_dir=x", "model=demo", "resume=auto"])
def test_words_that_mean_nothing_in_a_run_that_follows(small, word):
    with pytest.raises(UserError, match=f"then: {word}: not read"):
        composed(small, f"then=['task=dpo','{word}']")


def test_two_stages_and_the_second_again(verb, small, tmp_path):
    """One after the other, each in a folder of its own; what is there is not made again, what is lost is."""
    chance, folder = random.Random(3), tmp_path / "recipe"
    rows = [dict(zip(("prompt", "chosen", "rejected"), demo.greeting(chance), strict=True)) for _ in range(24)]
    (tmp_path / "pairs.jsonl").write_text("\n".join(map(json.dumps, rows)))
    second = ["task=dpo", f"data.path={tmp_path}/pairs.jsonl", "data.near_duplicates=off", "train.max_length=64"]
    words = ("engine=single", "cluster.processes=1", "train.packing=false", "train.max_steps=2", "export.parity=false",
             f"then={json.dumps(second)}", f"run_dir={folder}", "resume=auto")  # fmt: skip
    small = (*small, "train.bf16=false")
    made = verb("train", *small, *words)
    assert made.status == 0, made
    last = folder / "2-dpo"
    assert made.run_dir == last and made.stdout.count("\nrun: ") == 3 and "nothing was evaluated" in made.stdout
    assert f"path: {folder}/1-sft/final" in (last / "config.yaml").read_text() and (folder / "report.html").is_file()
    page = (folder / "report.html").read_text()
    assert "Runs of sft and dpo, in their order" in page and page.index("1-sft") < page.index("2-dpo")
    assert not list((folder / "plots").glob("loss*"))
    before = {name: (folder / name / "final" / "model.safetensors").read_bytes() for name in ("1-sft", "2-dpo")}
    shutil.rmtree(last)
    again = verb("train", *small, *words)
    assert again.status == 0 and again.stdout.count("nothing to train: the run is finished") == 1, again
    for name, weights in before.items():
        assert (folder / name / "final" / "model.safetensors").read_bytes() == weights, name
