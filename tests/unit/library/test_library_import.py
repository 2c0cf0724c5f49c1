"""Where the library stands among the packages."""

from __future__ import annotations

import subprocess
import sys

import pytest

import library
import longreach
from tests.unit.test_architecture import SERVICES, offenders, sources


def test_attach_is_found_in_longreach_and_imported_only_when_asked_for() -> None:
    assert longreach.attach is library.attach
    code = "import sys, longreach, longreach.sdk; print('torch' in sys.modules, 'library' in sys.modules)"  # noqa: E501
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["False", "False"]


def test_other_names_are_no_attributes_of_longreach() -> None:
    with pytest.raises(AttributeError, match="no attribute 'detach'"):
        longreach.detach  # noqa: B018


@pytest.mark.parametrize("service", SERVICES)
def test_no_service_imports_the_library(service: str) -> None:
    assert offenders(sources(service), ("library", "evaluation")) == []


def test_the_library_imports_no_coordinator_and_no_evaluation() -> None:
    assert offenders(sources("library"), ("coordinator", "evaluation", "longreach.v1")) == []
