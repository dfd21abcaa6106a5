"""Counting the products of a traced function."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import jax


def products(function: Callable[..., Any], *args: Any) -> int:
    """Return the FLOPs of all products of a function of `args`, two a multiply-add."""
    return count(jax.make_jaxpr(function)(*args).jaxpr)


def count(jaxpr: Any) -> int:
    """Return the FLOPs of all products of a traced program."""
    total = 0
    for equation in jaxpr.eqns:
        if equation.primitive.name == "dot_general":
            (contracted, _), _ = equation.params["dimension_numbers"]
            shape = equation.invars[0].aval.shape
            inner = math.prod(shape[axis] for axis in contracted)
            total += 2 * inner * math.prod(equation.outvars[0].aval.shape)
        for value in jax.tree.leaves(equation.params, is_leaf=lambda v: hasattr(v, "eqns")):
            value = getattr(value, "jaxpr", value)
            total += count(value) if hasattr(value, "eqns") else 0
    return total
