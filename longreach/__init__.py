"""longreach: serve long-context language models whose KV cache does not fit the GPU.

`longreach.attach` puts the same methods on a transformers model in this process (docs/library.md);
it needs torch and transformers, which nothing else here does.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from library import Attached, attach

__version__ = "0.1.0"
__all__ = ["Attached", "__version__", "attach"]

_LIBRARY = ("Attached", "attach")


def __getattr__(name: str) -> Any:
    """`attach` is imported when it is first asked for: it brings torch."""
    if name not in _LIBRARY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    try:
        import library
    except ModuleNotFoundError as error:
        raise ImportError(
            f"longreach.{name} needs {error.name}: install longreach with its worker's packages, "
            "pip install 'longreach[worker]'"
        ) from error
    return getattr(library, name)
