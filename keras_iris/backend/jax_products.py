"""Products of matrices in the form that XLA for CPUs is fast at."""

from collections.abc import Callable
from typing import Any

import jax
import keras
from jax.extend.core import ClosedJaxpr, Literal
from jax.extend.core.primitives import dot_general_p, remat_p


def fold_products(function: Callable[..., Any]) -> Callable[..., Any]:
    """The same function; its layers' products have all rows on one axis.

    The gradient of a layer's kernel sums over all axes of the inputs but the
    last. Where these are two, rows and time, XLA for CPUs (jaxlib 0.10) copies
    the transpose of one factor first; where they are one, it doesn't.

    Args:
        function: Of pytrees of arrays, without side effects.
    """

    def folded(*arguments: Any) -> Any:
        leaves, structure = jax.tree.flatten(arguments)
        leaves = [keras.ops.convert_to_tensor(leaf) for leaf in leaves]
        closed, result = jax.make_jaxpr(function, return_shape=True)(
            *jax.tree.unflatten(structure, leaves)
        )
        outputs = _run(closed, *leaves)
        return jax.tree.unflatten(jax.tree.structure(result), outputs)

    return folded


def _run(closed: ClosedJaxpr, *arguments: Any) -> list[Any]:
    """Runs a function's equations, with products folded."""
    jaxpr = closed.jaxpr
    variables = [*jaxpr.constvars, *jaxpr.invars]
    values = dict(zip(variables, [*closed.consts, *arguments], strict=True))

    def read(atom: Any) -> Any:
        return atom.val if isinstance(atom, Literal) else values[atom]

    for equation in jaxpr.eqns:
        if equation.primitive is remat_p:
            outputs = _rematerialised(**equation.params)(
                *map(read, equation.invars)
            )
        elif equation.primitive is dot_general_p:
            factors = map(read, equation.invars)
            outputs = [_product(*factors, **equation.params)]
        else:
            # JAX knows how to call what isn't a plain operation.
            inputs = [a for a in equation.invars if not isinstance(a, Literal)]
            alone = jaxpr.replace(
                constvars=[],
                invars=inputs,
                outvars=equation.outvars,
                eqns=[equation],
            )
            outputs = jax.core.eval_jaxpr(alone, [], *map(read, inputs))
        values |= zip(equation.outvars, outputs, strict=True)
    return [read(atom) for atom in jaxpr.outvars]


def _rematerialised(
    *, jaxpr: Any, prevent_cse: Any, policy: Any, **_: Any
) -> Callable[..., list[Any]]:
    """The function of a `jax.checkpoint`, with products folded."""

    def run(*arguments: Any) -> list[Any]:
        return _run(ClosedJaxpr(jaxpr, []), *arguments)

    return jax.checkpoint(run, prevent_cse=prevent_cse, policy=policy)


def _product(
    left: jax.Array, right: jax.Array, *, dimension_numbers: Any, **options: Any
) -> jax.Array:
    """`dot_general` with the left factor's leading axes folded to one."""
    (left_axes, right_axes), batch_axes = dimension_numbers
    rows = min(left_axes, default=left.ndim)
    is_layer = not any(batch_axes) and rows + len(left_axes) == left.ndim
    if not is_layer or rows < 2:
        return jax.lax.dot_general(left, right, dimension_numbers, **options)
    shape = left.shape[:rows]
    product = jax.lax.dot_general(
        left.reshape(-1, *left.shape[rows:]),
        right,
        (([axis - rows + 1 for axis in left_axes], right_axes), batch_axes),
        **options,
    )
    return product.reshape(*shape, *product.shape[1:])
