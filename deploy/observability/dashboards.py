"""Writes the Grafana dashboards: `python deploy/observability/dashboards.py [--check]`.

Three views, described in dashboard_*.py as rows of panels and written as Grafana's JSON into the
chart, which Compose mounts too. A test holds every query to the metrics that services export.
`--check` writes nothing and fails where a file differs.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

from dashboard_cluster import CLUSTER
from dashboard_quality import QUALITY
from dashboard_users import USERS
from grafana_json import grafana

ROOT = Path(__file__).resolve().parents[2]
FOLDER = ROOT / "deploy" / "helm" / "longreach" / "observability" / "dashboards"

DASHBOARDS = {"users": USERS, "cluster": CLUSTER, "quality": QUALITY}


def stale_files() -> dict[Path, str]:
    """Files that differ from this description, with the text that they should have."""
    wanted = {
        FOLDER / f"{name}.json": json.dumps(grafana(dashboard), indent=1) + "\n"
        for name, dashboard in DASHBOARDS.items()
    }
    return {
        path: text for path, text in wanted.items() if not path.exists() or path.read_text() != text
    }


def main() -> int:
    """Writes or checks; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--check", action="store_true", help="fail where files differ")
    check = parser.parse_args().check
    for path, text in (stale := stale_files()).items():
        print(f"{path.relative_to(ROOT)} {'differs from its description' if check else 'written'}")
        if not check:
            path.write_text(text)
    return 1 if check and stale else 0


if __name__ == "__main__":
    sys.exit(main())
