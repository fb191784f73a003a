"""How the loops of the compiled offload engine are compiled.

`_nrt` off: they allocate nothing, and without it no call counts references to the arrays it is handed (atomic operations,
which took half the time). Functions have a signature, or are inlined: without one numba compiles a function once more for
each constant that it is called with.
"""

from __future__ import annotations

from typing import Any

COMPILED: dict[str, Any] = {"cache": True, "nogil": True, "_nrt": False}
INLINED: dict[str, Any] = COMPILED | {"inline": "always"}
