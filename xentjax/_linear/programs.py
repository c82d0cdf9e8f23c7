"""Compiled programs of functions that take a loss: one for each loss function and its settings, however often it is requested.

The programs of a function are stored under a weak reference to it and freed with it. So a function made in a loop leaves nothing behind.
"""

import functools
import inspect
import numbers
import weakref
from collections.abc import Callable, Hashable
from typing import Any

import jax

_SETTINGS = 32  # whose programs are kept for one function
_of_function: weakref.WeakKeyDictionary[Callable, Callable] = weakref.WeakKeyDictionary()


def compiled(run: Callable, loss_fn: Callable, *settings: Hashable, static: tuple[str, ...] = ()) -> Callable:
    """`jax.jit(functools.partial(run, loss_fn, *settings))`, the same program for the same function.

    A `functools.partial` counts as its function and its arguments, if these are numbers, strings, None, or tuples of them. Other callables,
    whose state may change, get a new program.
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


def _programs(function):
    """The programs of one function; they must not keep the function alive."""

    @functools.lru_cache(_SETTINGS)
    def program(run, args, keywords, settings, static, _):
        def loss_fn(*arrays, **more):
            called = function()
            assert called is not None  # whoever calls the program holds the function
            return called(*args, *arrays, **dict(keywords) | more)

        return jax.jit(functools.partial(run, loss_fn, *settings), static_argnames=static)

    return program


def _call(_, jitted, /, *args, **keywords):
    """A call of `jitted`; the first argument is the loss function, which this reference keeps alive."""
    return jitted(*args, **keywords)


def _key(x: Any) -> Hashable:
    """`x` with its types, because 1 and 1.0 are equal; TypeError for objects that are not compared by value."""
    if isinstance(x, tuple):
        return type(x), tuple(map(_key, x))
    if x is None or isinstance(x, str | numbers.Number):
        return type(x), x
    raise TypeError


@jax.jit
def _example():
    """A function of the type that `jax.jit` returns."""
