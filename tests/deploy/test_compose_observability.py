"""The profile `observability` of docker-compose.yml, without Docker: what its parts are given
exists, and they find each other and the services."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.deploy.promql import FOLDER, RULES_FILE, dashboards
from tests.deploy.promtool import promtool
from tests.deploy.test_compose import COMPOSE, ROOT, expanded

PARTS = {"collector", "prometheus", "grafana", "jaeger"}
SETTINGS = ROOT / "deploy" / "observability"
METRICS = {"coordinator": 9300, "worker": 9301, "worker-gpu": 9301} | {
    f"node-{n}": 9302 for n in range(3)
}


@pytest.fixture(scope="module")
def services() -> dict[str, Any]:
    found: dict[str, Any] = yaml.safe_load(expanded(COMPOSE.read_text()))["services"]
    return found


def settings(name: str) -> Any:
    return yaml.safe_load((SETTINGS / name).read_text())


def mounted(service: Any) -> dict[str, Path]:
    """Files and folders of the repository, by their place in the container."""
    volumes = [each.split(":") for each in service["volumes"] if each.startswith("./")]
    assert all(each[2] == "ro" for each in volumes)
    return {each[1]: ROOT / each[0] for each in volumes}


def test_the_profiles_add_to_a_cluster_that_is_whole_without_them(services: dict[str, Any]) -> None:
    profiles: dict[str, set[str]] = {}
    for name, service in services.items():
        for profile in service.get("profiles", [""]):
            profiles.setdefault(profile, set()).add(name)
    assert profiles["observability"] == PARTS
    assert profiles["gpu"] == {"worker-gpu"}
    assert not profiles[""] & PARTS
    for name in profiles[""]:
        needed = set(services[name].get("depends_on", {}))
        assert needed <= profiles[""], name


def test_images_are_pinned_and_each_part_says_whether_it_is_well(services: dict[str, Any]) -> None:
    for name in PARTS:
        service = services[name]
        image = service["image"]
        if "build" in service:
            text = (ROOT / service["build"]["context"] / service["build"]["dockerfile"]).read_text()
            images = re.findall(r"(?m)^FROM (\S+)", text)
        else:
            images = [image]
        assert all(re.search(r":v?\d+\.\d+\.\d+$", each) for each in images), name
        assert service["healthcheck"]["test"][:2] == ["CMD", "wget"]
        assert service["healthcheck"]["test"][-1].startswith("http://127.0.0.1:")
        assert service["read_only"] is True
        assert service["cap_drop"] == ["ALL"]
        assert re.fullmatch(r"\d+[mg]", service["mem_limit"])
        for port in service.get("ports", ()):
            assert port.startswith("127.0.0.1:"), "this machine only, by default"


def test_everything_mounted_exists(services: dict[str, Any]) -> None:
    for name in PARTS - {"jaeger"}:
        for path in mounted(services[name]).values():
            assert path.exists(), path
    declared = yaml.safe_load(COMPOSE.read_text())["volumes"]
    assert {"prometheus", "grafana"} <= set(declared)


def test_prometheus_scrapes_every_service_where_it_serves_metrics(services: dict[str, Any]) -> None:
    scraped: dict[str, int] = {}
    for job in settings("prometheus.yml")["scrape_configs"]:
        assert job["job_name"].startswith("longreach-"), "the alert on targets looks for these"
        for each in job.get("static_configs", ()):
            assert each["labels"] == {"release": "compose"}
            for target in each["targets"]:
                host, _, port = target.partition(":")
                scraped[host] = int(port)
        for each in job.get("dns_sd_configs", ()):
            scraped |= dict.fromkeys(each["names"], each["port"])
            assert job["relabel_configs"] == [{"target_label": "release", "replacement": "compose"}]
    assert scraped == METRICS
    for name, port in METRICS.items():
        environment = services[name]["environment"]
        assert environment["LONGREACH_METRICS_LISTEN"] == f"0.0.0.0:{port}"
        assert environment["LONGREACH_OTLP_ENDPOINT"] == "", "nothing is sent without being asked"
        assert not [each for each in services[name].get("ports", ()) if str(port) in each]


def test_prometheus_reads_its_configuration_and_the_charts_rules(services: dict[str, Any]) -> None:
    files = mounted(services["prometheus"])
    config = settings("prometheus.yml")
    assert files["/etc/prometheus/prometheus.yml"] == SETTINGS / "prometheus.yml"
    assert [files[each] for each in config["rule_files"]] == [RULES_FILE]
    assert "SUCCESS" in promtool(
        "check", "config", "--syntax-only", str(SETTINGS / "prometheus.yml")
    )


def test_grafana_finds_sources_and_dashboards(services: dict[str, Any]) -> None:
    files = mounted(services["grafana"])
    sources = settings("grafana/datasources.yaml")
    dashboards_from = settings("grafana/dashboards.yaml")
    assert files["/etc/grafana/provisioning/datasources/longreach.yaml"].exists()
    assert files["/etc/grafana/provisioning/dashboards/longreach.yaml"].exists()
    (provider,) = dashboards_from["providers"]
    assert files[provider["options"]["path"]] == FOLDER / "dashboards"
    home = services["grafana"]["environment"]["GF_DASHBOARDS_DEFAULT_HOME_DASHBOARD_PATH"]
    assert Path(home).parent == Path(provider["options"]["path"])
    assert Path(home).stem in dashboards.DASHBOARDS
    for source in sources["datasources"]:
        host = re.fullmatch(r"http://([a-z]+):\d+", source["url"])
        assert host
        assert host[1] == source["type"]
        assert host[1] in PARTS
    interval = next(each for each in sources["datasources"] if each["isDefault"])["jsonData"]
    assert interval["timeInterval"] == settings("prometheus.yml")["global"]["scrape_interval"]


def test_the_collector_takes_what_services_send_and_passes_traces_on(
    services: dict[str, Any],
) -> None:
    config = settings("collector.yaml")
    assert mounted(services["collector"]) == {
        "/etc/otelcol/config.yaml": SETTINGS / "collector.yaml"
    }
    text = (SETTINGS / "collector.Dockerfile").read_text()
    assert 'CMD ["--config", "/etc/otelcol/config.yaml"]' in text
    pipelines = config["service"]["pipelines"]
    assert set(pipelines) == {"traces", "metrics"}, "what services send over OTLP"
    used: dict[str, set[str]] = {"extensions": set(config["service"]["extensions"])}
    for pipeline in pipelines.values():
        for kind, names in pipeline.items():
            used.setdefault(kind, set()).update(names)
    assert used == {kind: set(config[kind]) for kind in used}
    assert set(config) == {*used, "service"}
    assert config["exporters"]["otlp/jaeger"]["endpoint"] == "jaeger:4317"
    assert pipelines["traces"]["exporters"] == ["otlp/jaeger"]
    assert config["receivers"]["otlp"]["protocols"]["grpc"]["endpoint"].endswith(":4317")
    asked = services["collector"]["healthcheck"]["test"][-1]
    port = config["extensions"]["health_check"]["endpoint"].rpartition(":")[2]
    assert asked == f"http://127.0.0.1:{port}/"
    assert "LONGREACH_OTLP_ENDPOINT=http://collector:4317" in COMPOSE.read_text()
