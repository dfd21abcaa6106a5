"""Taking leaves out of a tree by a mask, and putting them back."""

from __future__ import annotations

import jax
import pytest

from mae_jax.train.partition import merge, restrict, select

TREE = {"encoder": {"block": {"kernel": 1, "bias": 2}, "norm": {"scale": 3}}, "head": {"bias": 4}}
MASK = {
    "encoder": {"block": {"kernel": False, "bias": True}, "norm": {"scale": False}},
    "head": {"bias": True},
}


def test_leaves_of_the_mask_are_taken_and_empty_dictionaries_left_out():
    assert select(TREE, MASK) == {"encoder": {"block": {"bias": 2}}, "head": {"bias": 4}}


def test_nothing_or_everything_can_be_taken():
    assert select(TREE, None) is TREE
    assert select(TREE, jax.tree.map(lambda _: True, TREE)) == TREE
    assert select(TREE, jax.tree.map(lambda _: False, TREE)) == {}


def test_leaves_at_the_places_of_others_are_found():
    part = {"encoder": {"block": {"bias": "x"}}, "head": {"bias": "y"}}
    assert restrict(TREE, part) == {"encoder": {"block": {"bias": 2}}, "head": {"bias": 4}}
    assert restrict(TREE, {}) == {}
    with pytest.raises(KeyError):
        restrict(TREE, {"decoder": {"bias": 1}})


def test_selected_leaves_are_put_back_in_their_places():
    changed = {"encoder": {"block": {"bias": 20}}, "head": {"bias": 40}}
    merged = merge(TREE, changed)
    assert merged == {
        "encoder": {"block": {"kernel": 1, "bias": 20}, "norm": {"scale": 3}},
        "head": {"bias": 40},
    }
    assert TREE["head"] == {"bias": 4}, "merging changed the tree it was given"
    assert merge(TREE, {}) == TREE
    assert merge(TREE, select(TREE, MASK)) == TREE


def test_merged_tree_has_the_structure_of_the_whole():
    # The state of a run must keep it, for it is donated to the next step.
    assert jax.tree.structure(merge(TREE, select(TREE, MASK))) == jax.tree.structure(TREE)


def test_a_mask_of_other_parameters_is_an_error():
    with pytest.raises(KeyError):
        select(TREE, {"encoder": {"block": {"kernel": True}}})
