"""`model.shape` of a pre-training recipe: where the widest layers are."""

import pytest

from converters.pretraining.recipe import ModelRecipe, PretrainRecipe
from mlx_openelm.errors import OpenELMError
from mlx_openelm.layerwise_scaling import SHAPES
from mlx_openelm.recipe_loader import load_recipe


@pytest.mark.parametrize("shape", SHAPES)
def test_the_recipes_of_all_shapes_have_equal_cost(shape):
    """The same parameters, heads and FFN columns as the uniform layers."""
    built = [
        load_recipe(PretrainRecipe, f"pretrain/layerwise/{name}", {}).model.build(4097)
        for name in (shape, "uniform")
    ]
    cost = [(c.num_parameters, sum(c.num_query_heads), sum(c.ffn_dims)) for c in built]
    assert cost[0] == cost[1]
    widest = max(built[0].ffn_dims)
    places = [i for i, width in enumerate(built[0].ffn_dims) if width == widest]
    expected = {"layerwise": [11], "reverse": [0], "crown": [5, 6], "frame": [0, 11]}
    assert places == expected[shape]


def test_recipes_differ_in_nothing_but_the_shape():
    recipes = [
        load_recipe(PretrainRecipe, f"pretrain/layerwise/{shape}", {})
        for shape in SHAPES
    ]
    assert [recipe.model.shape for recipe in recipes] == list(SHAPES)
    assert (
        len({(recipe.optimizer, recipe.data, recipe.steps) for recipe in recipes}) == 1
    )


def test_an_unknown_shape_is_refused():
    with pytest.raises(OpenELMError, match="'round'; expected one of layerwise, rev"):
        ModelRecipe(shape="round")


def test_a_released_size_has_its_own_shape():
    with pytest.raises(OpenELMError, match=r"shape is crown, but .* 270M are fixed"):
        ModelRecipe(name="270M", shape="crown")
