"""What the chart gives the services: names, ports, probes, rights, certificates."""

from __future__ import annotations

import pytest
from helm_python import Chart, HelmRenderError

from coordinator.server import GENERATION
from gpu_worker.server import SERVICE_NAME as WORKER_SERVICE
from longreach.cli.__main__ import build_parser
from longreach.security.peers import PeerIdentity, Role, identity_from_names
from retrieval_node.server import SERVICE_NAME as NODE_SERVICE
from tests.deploy.chart import CHART, MATRIX, Document, documents, environment, only, workloads


@pytest.mark.parametrize("name", ["defaults", "tls"])
def test_probes_ask_for_services_that_exist_on_ports_that_listen(
    rendered: dict[str, list[Document]], name: str
) -> None:
    services = {
        "coordinator": GENERATION,
        "worker": WORKER_SERVICE,
        "retrievalNode": NODE_SERVICE,
    }
    for service, spec in workloads(rendered[name]).items():
        container = spec["containers"][0]
        variables = environment(container)
        listens = "LONGREACH_HEALTH_LISTEN" if name == "tls" else "LONGREACH_LISTEN"
        port = int(variables[listens].rpartition(":")[2])
        assert container["readinessProbe"]["grpc"] == {"port": port, "service": services[service]}
        assert container["livenessProbe"]["grpc"] == {"port": port}
        assert container["startupProbe"]["grpc"] == {"port": port}
        assert port in {each["containerPort"] for each in container["ports"]}
    worker = workloads(rendered[name])["worker"]["containers"][0]["startupProbe"]
    assert worker["failureThreshold"] * worker["periodSeconds"] == 600


@pytest.mark.parametrize("name", ["defaults", "tls"])
def test_members_find_the_coordinator_before_it_is_ready(
    rendered: dict[str, list[Document]], name: str
) -> None:
    """It becomes ready by their reports: a service of ready pods would keep them waiting."""
    docs = rendered[name]
    members = only(docs, "Service", "demo-longreach-coordinator-members")["spec"]
    assert members["publishNotReadyAddresses"] is True
    assert members["clusterIP"] == "None"
    pods = workloads(docs)
    coordinator = environment(pods["coordinator"]["containers"][0])
    listens = coordinator["LONGREACH_CLUSTER_LISTEN" if name == "tls" else "LONGREACH_LISTEN"]
    for service in ("worker", "retrievalNode"):
        told = environment(pods[service]["containers"][0])["LONGREACH_COORDINATORS"]
        host, _, port = told.partition(":")
        assert host == "demo-longreach-coordinator-0.demo-longreach-coordinator-members.ai.svc"
        assert port == listens.rpartition(":")[2]
    stateful = only(docs, "StatefulSet", "demo-longreach-coordinator")["spec"]
    assert stateful["serviceName"] == "demo-longreach-coordinator-members"


def test_members_report_to_every_coordinator_and_those_share_a_catalog(
    rendered: dict[str, list[Document]],
) -> None:
    pods = workloads(rendered["three coordinators"])
    told = environment(pods["worker"]["containers"][0])["LONGREACH_COORDINATORS"].split(",")
    name = "demo-longreach-coordinator"
    assert told == [f"{name}-{n}.{name}-members.ai.svc:7300" for n in range(3)]
    assert "LONGREACH_CATALOG" in environment(pods["coordinator"]["containers"][0])
    alone = environment(workloads(rendered["defaults"])["coordinator"]["containers"][0])
    assert "LONGREACH_CATALOG" not in alone
    with pytest.raises(HelmRenderError, match=r"catalog\.url"):
        documents({"coordinator": {"replicas": 2}})


def test_nodes_advertise_the_names_that_their_service_gives_them(
    rendered: dict[str, list[Document]],
) -> None:
    docs = rendered["defaults"]
    stateful = only(docs, "StatefulSet", "demo-longreach-node")["spec"]
    service = only(docs, "Service", stateful["serviceName"])["spec"]
    variables = environment(stateful["template"]["spec"]["containers"][0])
    wanted = f"$(POD_NAME).{stateful['serviceName']}.ai.svc:7500"
    assert variables["LONGREACH_ADVERTISE"] == wanted
    assert service["publishNotReadyAddresses"] is True
    assert stateful["podManagementPolicy"] == "Parallel"
    assert [claim["metadata"]["name"] for claim in stateful["volumeClaimTemplates"]] == [
        "snapshots"
    ]
    disruption = only(docs, "PodDisruptionBudget", "demo-longreach-node")["spec"]
    assert disruption["maxUnavailable"] == 1
    names = [each["name"] for each in stateful["template"]["spec"]["containers"][0]["env"]]
    assert names.index("POD_NAME") < names.index("LONGREACH_ADVERTISE"), "expanded in order"


@pytest.mark.parametrize("name", MATRIX)
def test_only_the_coordinator_has_a_token_and_pods_write_only_to_their_volumes(
    rendered: dict[str, list[Document]], name: str
) -> None:
    specs = [*workloads(rendered[name]).values()]
    specs.append(only(rendered[name], "Pod", "demo-longreach-test-ask")["spec"])
    for spec in specs:
        assert spec["securityContext"]["runAsNonRoot"] is True
        is_coordinator = spec["containers"][0]["name"] == "coordinator"
        asks = is_coordinator and MATRIX[name].get("kubernetes") != {"enabled": False}
        assert spec["automountServiceAccountToken"] is asks
        mounted = {volume["name"] for volume in spec["volumes"]}
        for container in spec["containers"]:
            security = container["securityContext"]
            assert security["readOnlyRootFilesystem"] is True
            assert security["allowPrivilegeEscalation"] is False
            assert security["capabilities"] == {"drop": ["ALL"]}
            assert container["resources"]["limits"]["memory"]
            assert "/tmp" in {mount["mountPath"] for mount in container["volumeMounts"]}
            assert mounted <= {m["name"] for m in container["volumeMounts"]}


def test_a_worker_gets_its_gpu_and_the_image_that_uses_it(
    rendered: dict[str, list[Document]],
) -> None:
    cuda = workloads(rendered["defaults"])["worker"]["containers"][0]
    assert cuda["resources"]["limits"]["nvidia.com/gpu"] == 1
    assert cuda["image"] == "longreach-worker:0.1.0-cuda"
    cpu = workloads(rendered["bare"])["worker"]["containers"][0]
    assert "nvidia.com/gpu" not in cpu["resources"]["limits"]
    assert cpu["image"] == "longreach-worker:0.1.0-cpu"
    far = workloads(rendered["everything"])["retrievalNode"]["containers"][0]
    assert far["image"] == "registry.example.com/ai/longreach-retrieval-node:1.2.3"


def test_the_http_api_is_reached_and_guarded(rendered: dict[str, list[Document]]) -> None:
    docs = rendered["keys"]
    spec = workloads(docs)["coordinator"]
    container = spec["containers"][0]
    variables = environment(container)
    listens = int(variables["LONGREACH_HTTP_LISTEN"].rpartition(":")[2])
    ports = {each["name"]: each["containerPort"] for each in container["ports"]}
    assert ports["http"] == listens
    service = only(docs, "Service", "demo-longreach-coordinator")["spec"]
    assert {each["name"]: each["targetPort"] for each in service["ports"]}["http"] == "http"
    policy = only(docs, "NetworkPolicy", "demo-longreach-coordinator")["spec"]["ingress"]
    assert listens in {port["port"] for rule in policy for port in rule["ports"]}
    folder, _, name = variables["LONGREACH_API_KEYS_FILE"].rpartition("/")
    mount = next(each for each in container["volumeMounts"] if each["name"] == "api-keys")
    volume = next(each for each in spec["volumes"] if each["name"] == "api-keys")
    assert (mount["mountPath"], name) == (folder, "keys")
    assert volume["secret"]["secretName"] == "who-may"
    test = only(docs, "Pod", "demo-longreach-test-ask")["spec"]["containers"][0]
    (shown,) = [each for each in test["env"] if each["name"] == "LONGREACH_API_KEY"]
    assert shown["valueFrom"]["secretKeyRef"] == {"name": "the-tests", "key": "api-key"}
    off = environment(workloads(rendered["bare"])["coordinator"]["containers"][0])
    assert "LONGREACH_HTTP_LISTEN" not in off
    assert "LONGREACH_API_KEYS_FILE" not in off


def test_draining_fits_into_the_time_before_the_kill(rendered: dict[str, list[Document]]) -> None:
    for name in ("defaults", "everything"):
        spec = workloads(rendered[name])["coordinator"]
        drain = float(environment(spec["containers"][0])["LONGREACH_DRAIN_GRACE_S"])
        (_, sleeps) = spec["containers"][0]["lifecycle"]["preStop"]["exec"]["command"]
        assert spec["terminationGracePeriodSeconds"] >= drain + float(sleeps) + 5
        # The node's drain, its sessions' grace and its server's.
        node = workloads(rendered[name])["retrievalNode"]
        drain = float(environment(node["containers"][0])["LONGREACH_DRAIN_S"])
        (_, sleeps) = node["containers"][0]["lifecycle"]["preStop"]["exec"]["command"]
        assert node["terminationGracePeriodSeconds"] >= drain + float(sleeps) + 10


def test_only_members_reach_nodes_and_only_the_coordinator_workers(
    rendered: dict[str, list[Document]],
) -> None:
    def allowed(name: str) -> list[tuple[set[str], int]]:
        rules = only(rendered["defaults"], "NetworkPolicy", name)["spec"]["ingress"]
        component = "app.kubernetes.io/component"
        return [
            (
                {
                    peer["podSelector"].get("matchLabels", {}).get(component, "any")
                    for peer in rule["from"]
                },
                rule["ports"][0]["port"],
            )
            for rule in rules
        ]

    scrapers = {"any"}  # test_chart_observability.py says who
    assert allowed("demo-longreach-node") == [
        ({"coordinator", "worker"}, 7500),
        (scrapers, 9302),
    ]
    assert allowed("demo-longreach-worker") == [({"coordinator"}, 7400), (scrapers, 9301)]
    assert ({"any"}, 7300) in allowed("demo-longreach-coordinator")


def test_certificates_carry_the_names_that_members_check(
    rendered: dict[str, list[Document]],
) -> None:
    roles = {
        "coordinator": Role.COORDINATOR,
        "worker": Role.WORKER,
        "retrievalNode": Role.NODE,
    }
    for service, spec in workloads(rendered["tls"]).items():
        volume = next(each for each in spec["volumes"] if each["name"] == "tls")
        attributes = volume["csi"]["volumeAttributes"]
        pod = "demo-longreach-pod-0"
        uri = attributes["csi.cert-manager.io/uri-names"].replace("${POD_NAME}", pod)
        assert identity_from_names([uri]) == PeerIdentity(roles[service], pod)
        names = attributes["csi.cert-manager.io/dns-names"].replace("${POD_NAME}", pod).split(",")
        assert {roles[service].server_name, PeerIdentity(roles[service], pod).server_name} <= set(
            names
        )
        identity = {"coordinator": "COORDINATOR_ID", "worker": "WORKER_ID"}.get(service, "NODE_ID")
        assert environment(spec["containers"][0])[f"LONGREACH_{identity}"] == "$(POD_NAME)"


def test_the_secret_is_made_once_and_kept(rendered: dict[str, list[Document]]) -> None:
    secret = only(rendered["defaults"], "Secret", "demo-longreach-cluster")
    assert secret["metadata"]["annotations"]["helm.sh/resource-policy"] == "keep"
    assert len(secret["data"]["cluster-secret"]) >= 48
    assert not [doc for doc in rendered["bare"] if doc["kind"] == "Secret"]
    reference = workloads(rendered["bare"])["worker"]["containers"][0]["env"]
    secrets = [each["valueFrom"]["secretKeyRef"]["name"] for each in reference
               if "secretKeyRef" in each.get("valueFrom", {})]  # fmt: skip
    assert secrets == ["mine"]


def test_helm_test_asks_through_the_command_line(rendered: dict[str, list[Document]]) -> None:
    pod = only(rendered["defaults"], "Pod", "demo-longreach-test-ask")
    assert pod["metadata"]["annotations"]["helm.sh/hook"] == "test"
    container = pod["spec"]["containers"][0]
    command: list[str] = [*container["command"], *container["args"]]
    assert command[0] == "longreach"
    assert build_parser().parse_args(command[1:]).question == "What is stored here?"
    address = environment(container)["LONGREACH_ADDRESS"]
    service = only(rendered["defaults"], "Service", "demo-longreach-coordinator")
    assert address == f"demo-longreach-coordinator.ai.svc:{service['spec']['ports'][0]['port']}"


def test_notes_tell_the_first_command() -> None:
    notes = Chart.load(str(CHART)).render({}, name="demo", namespace="ai")
    text = next(text for name, text in notes.items() if name.endswith("NOTES.txt"))
    assert "longreach ask" in text
    assert "helm test demo --namespace ai" in text


def test_every_service_serves_metrics_on_its_port_unless_told_not_to(
    rendered: dict[str, list[Document]],
) -> None:
    wanted = {"coordinator": 9300, "worker": 9301, "retrievalNode": 9302}
    for service, spec in workloads(rendered["everything"]).items():
        container = spec["containers"][0]
        variables = environment(container)
        assert variables["LONGREACH_METRICS_LISTEN"] == f"0.0.0.0:{wanted[service]}"
        assert variables["LONGREACH_OTLP_ENDPOINT"] == "http://collector.observability:4317"
        assert {"name": "metrics", "containerPort": wanted[service]} in container["ports"]
    for spec in workloads(rendered["bare"]).values():
        variables = environment(spec["containers"][0])
        assert not {"LONGREACH_METRICS_LISTEN", "LONGREACH_OTLP_ENDPOINT"} & variables.keys()
