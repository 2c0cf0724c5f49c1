"""An upgrade from each released chart: its values still work, and nothing that Kubernetes refuses
to change has changed. A release adds its values.yaml and immutable fields to `released/`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from helm_python import Chart

from tests.deploy.chart import CHART, documents, only

RELEASED = Path(__file__).parent / "released"
VALUES = sorted(RELEASED.glob("values-*.yaml"))
IMMUTABLE = sorted(RELEASED.glob("immutable-*.json"))


def leaves(values: Any, path: tuple[str, ...] = ()) -> list[tuple[tuple[str, ...], Any]]:
    if isinstance(values, dict) and values:
        return [leaf for key, each in values.items() for leaf in leaves(each, (*path, key))]
    return [(path, values)]


def test_there_is_a_release_to_upgrade_from() -> None:
    assert len(VALUES) == len(IMMUTABLE) >= 1


@pytest.mark.parametrize("path", VALUES, ids=lambda each: each.stem)
def test_every_released_value_is_still_accepted_and_renders(path: Path) -> None:
    """All of them at once, as `helm upgrade --reuse-values` brings them."""
    values = yaml.safe_load(path.read_text())
    Chart.load(str(CHART)).validate_schema(values)
    assert only(documents(values), "StatefulSet", "demo-longreach-node")


@pytest.mark.parametrize("path", VALUES, ids=lambda each: each.stem)
def test_no_released_key_has_vanished(path: Path) -> None:
    now = {leaf for leaf, _ in leaves(yaml.safe_load((CHART / "values.yaml").read_text()))}
    inner = {leaf[:length] for leaf in now for length in range(1, len(leaf) + 1)}
    for leaf, _ in leaves(yaml.safe_load(path.read_text())):
        assert leaf in inner, ".".join(leaf)


@pytest.mark.parametrize("path", IMMUTABLE, ids=lambda each: each.stem)
def test_what_kubernetes_cannot_change_is_what_it_was(path: Path) -> None:
    docs = documents({})
    for which, released in json.loads(path.read_text()).items():
        kind, name = which.split("/")
        spec = only(docs, kind, name)["spec"]
        for field, value in released.items():
            assert spec.get(field) == value, f"{which}: {field}"
