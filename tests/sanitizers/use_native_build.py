"""A pytest plugin that tests the native module of a build folder instead of the installed one.

`PYTHONPATH=tests/sanitizers LONGREACH_NATIVE_BUILD=build/address pytest -p use_native_build ...`
"""

from __future__ import annotations

import importlib.util
import os
import sys
from pathlib import Path

import retrieval_node

NAME = "retrieval_node._native"


def load(folder: str) -> None:
    """Put the module built in `folder` where `import retrieval_node._native` finds it."""
    [path] = Path(folder).glob("_native*.so")
    spec = importlib.util.spec_from_file_location(NAME, path)
    if spec is None or spec.loader is None:
        raise ImportError(f"{path} is not a module")
    module = importlib.util.module_from_spec(spec)
    sys.modules[NAME] = module
    spec.loader.exec_module(module)
    retrieval_node._native = module


load(os.environ["LONGREACH_NATIVE_BUILD"])
