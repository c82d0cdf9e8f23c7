"""A row for every public function that is not a loss on (logits, labels): how to draw its arguments, and its definition.

The rows stand in `table_<family>.py`, one file per family; `test_functions.py` and `test_functions_everywhere.py` run
the same properties over all of them.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np


@dataclasses.dataclass(frozen=True, eq=False)  # hashable by identity, for jax.jit
class Row:
    """A public function with one setting of its keywords."""

    name: str  # as users write it behind `xentjax.`
    function: Callable  # (*arguments, **keywords[, where]) → array
    draw: Callable  # (rng, leading) → tuple of float64 or integer NumPy arrays
    value: Callable  # (*float64 arguments) → the result by its definition
    smooth: tuple[int, ...] = (0,)  # positions of the arguments with derivatives
    gradient: Callable | None = None  # (*float64 arguments) → d(sum of the result)/d(argument) for each of `smooth`; None: differences
    keywords: dict[str, Any] = dataclasses.field(default_factory=dict)  # for `function`; `value` and `gradient` know them
    masked: bool = True  # whether it takes `where`, of the shape of the result
    independent: bool = True  # whether examples do not see each other, so that there may be any leading axes
    half: bool = True  # whether bfloat16 arguments make sense
    label: str = ""  # to tell rows of one function apart

    def __str__(self) -> str:
        return "-".join(filter(None, [self.name, self.label]))

    def __call__(self, *arguments, **more):
        return self.function(*arguments, **{**self.keywords, **more})

    def arguments(self, rng, leading=(5,), dtype=jnp.float32) -> tuple:
        """JAX's arrays in `dtype`, integers as int32."""
        return tuple(
            jnp.asarray(x, dtype if np.issubdtype(x.dtype, np.floating) else jnp.int32) for x in map(np.asarray, self.draw(rng, leading))
        )

    def total(self, arguments) -> Callable:
        """The sum of the result as a function of the smooth arguments."""

        def run(*smooth):
            return jnp.sum(self(*replaced(arguments, self.smooth, smooth)))

        return run

    def exact(self, arguments) -> np.ndarray:
        """The definition of the same numbers in float64."""
        return np.asarray(self.value(*doubles(arguments)), np.float64)

    def exact_gradient(self, arguments, step=1e-6) -> tuple:
        """The closed form, or differences of the definition: error step²·f'''/6 and rounding eps/step, some 1e-9 of terms of order 1."""
        arguments = doubles(arguments)
        if self.gradient is not None:
            return tuple(np.asarray(g, np.float64) for g in self.gradient(*arguments))

        def at(position, index, shift):
            moved = arguments[position].copy()
            moved[index] += shift
            return np.sum(self.value(*replaced(arguments, (position,), (moved,))))

        def slope(position):
            x = arguments[position]
            found = [(at(position, i, step) - at(position, i, -step)) / (2 * step) for i in np.ndindex(x.shape)]
            return np.asarray(found, np.float64).reshape(x.shape)

        return tuple(map(slope, self.smooth))

    def slopes(self, arguments) -> tuple:
        """The gradients by JAX, of the smooth arguments."""
        return _slopes(self, arguments)


@functools.partial(jax.jit, static_argnums=0)
def _slopes(row, arguments):
    return jax.grad(row.total(arguments), tuple(range(len(row.smooth))))(*(arguments[i] for i in row.smooth))


@functools.partial(jax.jit, static_argnums=0)
def results(row, arguments) -> tuple:
    """The result, and the gradients of its sum by the smooth arguments; one program for both."""
    return row(*arguments), row.slopes(arguments) if row.smooth else ()


def replaced(arguments, positions, values) -> tuple:
    """`arguments` with others at these positions."""
    given = dict(zip(positions, values, strict=True))
    return tuple(given.get(i, x) for i, x in enumerate(arguments))


def doubles(arguments) -> tuple:
    """NumPy's arrays, floating ones in float64."""
    return tuple(np.asarray(x, np.float64 if jnp.issubdtype(x.dtype, jnp.floating) else None) for x in arguments)
