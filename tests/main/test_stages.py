"""Recipes of several runs: what is refused before the first, and two stages in a row, broken off in between."""

import pytest

from ftdist import compose, stages
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
