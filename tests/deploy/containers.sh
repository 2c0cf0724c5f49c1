#!/usr/bin/env bash
# Builds the images and runs docker-compose.yml for real: `bash tests/deploy/containers.sh`.
#
# Uses the Docker daemon that answers; without one, and as root, starts a daemon of its own for the
# run (Debian: apt-get install docker.io docker-compose iptables). Where the base image cannot be
# pulled, a stand-in is made once with debootstrap (apt-get install debootstrap): the Dockerfile
# stays what a user needs. STANDIN_COPY names further folders and files that the stand-in needs,
# such as pip's configuration of a machine without an index.
set -euo pipefail
cd "$(dirname "$0")/../.."

WORK=${WORK:-$(mktemp -d)}
BASE=$(sed -n 's/^ARG PYTHON_IMAGE=//p' deploy/docker/Dockerfile)
DOCKERFILE=deploy/docker/Dockerfile
export LONGREACH_TAG=test LONGREACH_PORT=${LONGREACH_PORT:-17300}
export DOCKER_BUILDKIT=1 COMPOSE_PROJECT_NAME=longreach-test
DAEMON=

say() { echo "== $*" >&2; }

compose() {
  if docker compose version >/dev/null 2>&1; then docker compose "$@"; else docker-compose "$@"; fi
}

finish() {
  status=$?
  if [ $status != 0 ]; then compose logs --tail 40 >&2 || true; fi
  compose --profile observability down --volumes --timeout 20 >/dev/null 2>&1 || true
  if [ -n "$DAEMON" ]; then kill "$DAEMON" && wait "$DAEMON" || true; fi
  exit $status
}
trap finish EXIT

need_daemon() {
  if docker info >/dev/null 2>&1; then return; fi
  say "no Docker daemon answers: starting one in $WORK"
  export DOCKER_HOST=unix://$WORK/docker.sock
  dockerd --data-root "$WORK/data" --exec-root "$WORK/exec" -H "$DOCKER_HOST" -p "$WORK/pid" \
    --default-ulimit nofile=4096:4096 >"$WORK/dockerd.log" 2>&1 &
  DAEMON=$!
  for _ in $(seq 60); do
    if docker info >/dev/null 2>&1; then return; fi
    sleep 0.5
  done
  tail "$WORK/dockerd.log" >&2
  return 1
}

need_base() {
  if docker image inspect "$BASE" >/dev/null 2>&1 || docker pull "$BASE" >/dev/null 2>&1; then
    return
  fi
  say "$BASE cannot be pulled: making a stand-in"
  root=$WORK/rootfs
  if [ ! -e "$root/usr/bin/python3" ]; then
    debootstrap --variant=minbase --include=python3,python3-dev,python3-pip,python3-venv,ca-certificates \
      bookworm "$root" >"$WORK/debootstrap.log"
  fi
  ln -sf python3 "$root/usr/bin/python"
  cp /etc/ssl/certs/ca-certificates.crt "$root/etc/ssl/certs/ca-certificates.crt"
  for path in ${STANDIN_COPY:-}; do
    mkdir -p "$root$(dirname "$path")" && cp -a "$path" "$root$path"
  done
  tar -C "$root" -c . | docker import - "$BASE" >/dev/null
}

need_valkey() {
  image=$(sed -n 's/^ *image: \(valkey\/.*\)/\1/p' docker-compose.yml)
  if docker image inspect "$image" >/dev/null 2>&1 || docker pull "$image" >/dev/null 2>&1; then
    return
  fi
  say "$image cannot be pulled: Debian's Redis stands in"
  docker build --network host -t "$image" - >"$WORK/valkey.log" 2>&1 <<END
FROM $BASE
RUN apt-get update && apt-get install --yes --no-install-recommends redis-server
RUN ln -s redis-server /usr/bin/valkey-server && ln -s redis-cli /usr/bin/valkey-cli
RUN install --directory --owner=999 --group=1000 /data
END
}

need_prometheus() {
  image=$(sed -n 's/^ *image: \(prom\/.*\)/\1/p' docker-compose.yml)
  if docker image inspect "$image" >/dev/null 2>&1 || docker pull "$image" >/dev/null 2>&1; then
    return
  fi
  say "$image cannot be pulled: Debian's Prometheus stands in"
  docker build --network host -t "$image" - >"$WORK/prometheus.log" 2>&1 <<END
FROM $BASE
RUN apt-get update && apt-get install --yes --no-install-recommends prometheus wget
RUN install --directory --owner=65534 --group=65534 /prometheus
USER 65534:65534
ENTRYPOINT ["prometheus"]
END
}

build() {
  for image in coordinator:coordinator:test retrieval-node:retrieval-node:test worker-cpu:worker:test-cpu; do
    target=${image%%:*} name=longreach-${image#*:}
    say "building $name"
    docker build --network host -f "$DOCKERFILE" --target "$target" -t "$name" ${BUILD_FLAGS:-} .
  done
}

wait_healthy() {
  say "waiting until every container is healthy"
  for _ in $(seq 120); do
    ids=$(compose ps -q)
    waiting=$(docker inspect --format '{{.State.Health.Status}}' $ids | grep -vc '^healthy$' || true)
    if [ "$waiting" = 0 ]; then return; fi
    sleep 2
  done
  docker ps >&2
  return 1
}

expect() { # expect WHAT PATTERN TEXT
  if ! grep -Eq "$2" <<<"$3"; then
    say "FAILED: $1: no '$2' in: $3"
    return 1
  fi
  say "ok: $1"
}

need_daemon
need_base
need_valkey
need_prometheus
build
compose up --detach --no-build
wait_healthy

ask_http() { # ask_http PATH [JSON]
  compose exec -T coordinator python - "$@" <<'END'
import sys, urllib.request
body = sys.argv[2].encode() if len(sys.argv) > 2 else None
print(urllib.request.urlopen("http://127.0.0.1:8000" + sys.argv[1], body, 60).read().decode())
END
}

ask_doc() { compose exec -T coordinator longreach ask --json --context doc --max-tokens 4 "$1" 2>&1; }

# What a fault leaves behind is mended in a while: asks until a question is answered.
asked_again() {
  for _ in $(seq 30); do
    answer=$(ask_doc 'Which walk?') && echo "$answer" && return
    sleep 2
  done
  echo "$answer"
}

expect "every member is alive" '4' \
  "$(compose exec -T coordinator longreach status --json | grep -c '"state": "alive"')"
expect "a question is answered" '"(text|tokens)"' \
  "$(compose exec -T coordinator longreach ask --json --max-tokens 4 'What is stored here?')"
expect "a document is stored" 'ctx-' \
  "$(compose exec -T coordinator longreach ingest - --name doc <docs/architecture.md 2>&1)"
expect "and asked" '"coverage": 1' "$(ask_doc 'Which walk?')"
expect "OpenAI's API lists the model" '"object": "list"' "$(ask_http /v1/models)"
expect "and completes" '"finish_reason": "(stop|length)"' \
  "$(ask_http /v1/completions '{"prompt": "What is stored here?", "max_tokens": 4}')"

ask_prometheus() { # ask_prometheus QUERY
  compose exec -T coordinator python - "$1" <<'END'
import sys, urllib.parse, urllib.request
url = "http://prometheus:9090/api/v1/query?" + urllib.parse.urlencode({"query": sys.argv[1]})
print(urllib.request.urlopen(url, None, 60).read().decode())
END
}

say "starting Prometheus beside it"
compose up --detach --no-build prometheus
for _ in $(seq 30); do
  found=$(ask_prometheus 'sum(up{release="compose"})' 2>&1 || true)
  if grep -q '"5"' <<<"$found"; then break; fi
  sleep 2
done
expect "Prometheus finds every service" '"5"' "$found"
expect "and what they count" '"3"' "$(ask_prometheus 'count(longreach:memory_limit_bytes)')"

say "killing a node: its copies are on the others"
compose kill node-0
expect "asked without it" '"coverage": 1' "$(ask_doc 'Which walk?')"
compose start node-0
wait_healthy
expect "asked with it again" '"coverage": 1' "$(asked_again)"

say "restarting every node: they serve their snapshots again"
compose restart node-0 node-1 node-2
wait_healthy
expect "asked after the restart" '"coverage": 1' "$(asked_again)"
say "restarting the coordinator: the catalog has what it knew"
compose restart coordinator
wait_healthy
expect "the document is listed by its name" 'doc' \
  "$(compose exec -T coordinator longreach contexts list --json)"

for service in coordinator worker node-0; do
  expect "$service runs without root" '^10001$' "$(compose exec -T $service id -u)"
  expect "$service has a read-only root" 'Read-only' \
    "$(compose exec -T $service sh -c 'touch /opt/x 2>&1 || true')"
done
for service in coordinator node-0; do
  expect "$service has no torch" 'No module named' \
    "$(compose exec -T $service python -c 'import torch' 2>&1 || true)"
done
say "packages in each image, MiB, and whole images"
for service in coordinator node-0 worker; do
  echo "$service $(compose exec -T $service du -sm /opt/longreach | cut -f1)"
done
docker images --format '{{.Repository}}:{{.Tag}} {{.Size}}' | grep longreach
say "all of it works"
