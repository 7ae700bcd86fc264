"""The recipes of docs/recipes.md compute what their papers define."""

import pytest
from recipe_definitions import RECIPES, assert_close_to_definition, read_recipes, run_recipe

MISTAKES = [(heading, mistake) for heading, recipe in RECIPES.items() for mistake in recipe.mistakes]


def test_every_recipe_has_a_definition():
    assert list(read_recipes()) == ["", *RECIPES]


@pytest.mark.parametrize("heading", RECIPES)
def test_recipe_computes_its_definition(heading):
    assert_close_to_definition(heading, run_recipe(heading))


@pytest.mark.parametrize(("heading", "mistake"), MISTAKES, ids=[f"{h}: {m[1]!r}" for h, m in MISTAKES])
def test_a_recipe_with_a_mistake_differs_from_its_definition(heading, mistake):
    with pytest.raises(AssertionError, match="error"):
        assert_close_to_definition(heading, run_recipe(heading, mistake=mistake))
