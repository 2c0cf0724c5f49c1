"""Fixtures of the deployment tests."""

from __future__ import annotations

import pytest

from tests.deploy.chart import MATRIX, Document, documents


@pytest.fixture(scope="session")
def rendered() -> dict[str, list[Document]]:
    """Every document of the chart, for each entry of the matrix of values."""
    return {name: documents(values) for name, values in MATRIX.items()}
