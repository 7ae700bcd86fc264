"""The recipes of docs/recipes.md through the generated kernels."""

from functools import partial

import pytest
from recipe_definitions import RECIPES, assert_close_to_definition, run_recipe

from flexdecode import DecodeOptions, cache_info, flex_decode


@pytest.mark.parametrize("heading", RECIPES)
def test_kernel_computes_the_definition(heading):
    before = cache_info()
    recipe = run_recipe(heading, partial(flex_decode, options=DecodeOptions(backend="triton")))
    assert cache_info().calls > before.calls
    assert_close_to_definition(heading, recipe)
