"""A cache of compiled programs. Each program is compiled from a function that takes a loss function as an argument.

There is one program for each combination of a loss function and settings. The cache stores the programs of a loss function under a weak
reference to that loss function. When the loss function is freed, its programs are freed too. So the cache does not grow when a loop creates
loss functions.
"""

import functools
import inspect
import numbers
import weakref
from collections.abc import Callable, Hashable
from typing import Any

import jax

_SETTINGS = 32  # largest number of settings of one function whose programs are kept
_of_function: weakref.WeakKeyDictionary[Callable, Callable[..., Callable]] = weakref.WeakKeyDictionary()


def compiled(run: Callable, loss_fn: Callable, *settings: Hashable, static: tuple[str, ...] = ()) -> Callable:
    """The cached `jax.jit(functools.partial(run, loss_fn, *settings))`.

    The same function with the same settings gets the same program. A `functools.partial` is identified by its function and its arguments,
    if the arguments are numbers, strings, None, or tuples of these. Other callable objects may change their state. So each call of
    `compiled` makes a new program for them.
    """
    function, args, keywords = loss_fn, (), {}
    if isinstance(loss_fn, functools.partial):
        function, args, keywords = loss_fn.func, loss_fn.args, loss_fn.keywords
    try:
        key = _key(args), tuple((name, _key(x)) for name, x in sorted(keywords.items()))
    except TypeError:
        key = None
    if key is None or not (inspect.isfunction(function) or isinstance(function, type(_example))):
        return jax.jit(functools.partial(run, loss_fn, *settings), static_argnames=static)
    if function not in _of_function:
        _of_function[function] = _programs(weakref.ref(function))
    jitted = _of_function[function](run, args, tuple(keywords.items()), settings, static, key)
    return functools.partial(_call, function, jitted)


def _programs(function: weakref.ref[Callable]) -> Callable[..., Callable]:
    """The cache of the programs of one function. The programs must not keep the function alive."""

    @functools.lru_cache(_SETTINGS)
    def program(run: Callable, args: tuple, keywords: tuple, settings: tuple, static: tuple[str, ...], _: Hashable) -> Callable:
        def loss_fn(*arrays: Any, **more: Any) -> Any:
            called = function()
            assert called is not None  # the caller of the program holds a reference to the function
            return called(*args, *arrays, **dict(keywords) | more)

        return jax.jit(functools.partial(run, loss_fn, *settings), static_argnames=static)

    return program


def _call(_: Callable, jitted: Callable, /, *args: Any, **keywords: Any) -> Any:
    """Call `jitted`. The first argument is the loss function: a partial of `_call` keeps it alive."""
    return jitted(*args, **keywords)


def _key(x: Any) -> Hashable:
    """`x` and its types, because 1 and 1.0 are equal. TypeError for objects that are not compared by value."""
    if isinstance(x, tuple):
        return type(x), tuple(map(_key, x))
    if x is None or isinstance(x, str | numbers.Number):
        return type(x), x
    raise TypeError


@jax.jit
def _example() -> None:
    """A function of the type that `jax.jit` returns."""
