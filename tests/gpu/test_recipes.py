"""The recipes of docs/recipes.md on a GPU."""

import pytest
import torch
from recipe_definitions import RECIPES, assert_close_to_definition, run_recipe

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("heading", RECIPES)
def test_recipe_on_a_gpu_computes_its_definition(heading):
    with torch.device("cuda"):
        recipe = run_recipe(heading)
    assert_close_to_definition(heading, recipe)
