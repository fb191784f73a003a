"""Arrays without their reference counts, and the lowest set bit of a word: what compiled loops need beside numba.

A helper that takes a tuple of arrays counts a reference to each of them up and down around every loop it holds
(atomic instructions; seven eighths of the time of the task loop). Views without an owner have nothing to count.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from numba.core import cgutils, types
from numba.extending import intrinsic
from numba.np.arrayobj import make_array


def _borrow(typing_context: Any, array: Any) -> tuple[Any, Callable[..., Any]]:
    """A view of an array that owns nothing; valid as long as the caller's array, and never to be returned."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        view = make_array(signature.args[0])(context, builder, arguments[0])
        view.meminfo = cgutils.get_null_value(view.meminfo.type)
        view.parent = cgutils.get_null_value(view.parent.type)
        return view._getvalue()

    return array(array), generate


def _lowest_bit(typing_context: Any, word: Any) -> tuple[Any, Callable[..., Any]]:
    """The place of the lowest set bit of a uint64 that is not 0."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.cttz(arguments[0], cgutils.true_bit)

    return types.int64(types.uint64), generate


borrow: Any = intrinsic(_borrow)
lowest_bit: Any = intrinsic(_lowest_bit)
