"""A plan as values of the Helm chart: `longreach plan ... --values > my-values.yaml`."""

from __future__ import annotations

from longreach.planning.plan import Plan
from longreach.planning.quantities import bytes_text

_MIB = 2**20
_GIB = 2**30
_SERVICE_BYTES = 512 * _MIB
"""A Python process with its libraries, beside what it stores."""


def plan_values(plan: Plan) -> str:
    """values.yaml of the sizes that the plan computed, each with where it comes from."""
    work, node, nodes = plan.workload, plan.node, plan.nodes
    slots = min(work.resident.max_sessions, work.concurrency)
    node_memory = nodes.memory_bytes + _SERVICE_BYTES
    disk = int(plan.disk_bytes * nodes.fullest_share)
    host = plan.device.weights + _SERVICE_BYTES + 4 * _GIB
    return f"""\
# {work.shape.name}: {work.contexts} context(s) of {work.context:,} tokens, {work.concurrency} \
session(s) at a time.
# Written by `longreach plan`; pass it to `helm install -f`.
worker:
  # {bytes_text(plan.device.total)} on each {work.accelerator.name}: weights \
{bytes_text(plan.device.weights)}, resident KV {bytes_text(plan.device.resident_kv)}, prefill \
{bytes_text(plan.device.prefill)}.
  replicas: {plan.workers}
  gpus: 1
  config:
    dtype: {work.shape.dtype}
    max_sessions: {slots}
    sink_tokens: {work.resident.sink_tokens}
    window_tokens: {work.resident.window_tokens}
    max_row_tokens: {work.resident.max_row_tokens}
  # Weights pass through host memory when the model is loaded.
  resources:
    requests: {{cpu: "4", memory: {_mebibytes(host)}}}
    limits: {{memory: {_mebibytes(host)}}}
retrievalNode:
  # {nodes.why}.
  replicas: {nodes.count}
  # Over all nodes: {nodes.copies} copies, K and V {bytes_text(node.contexts)}, index reserve 25%, \
tails {bytes_text(node.tails)}.
  # A node gives 80% of its limit to them.
  resources:
    # One core is left to the machine's own services.
    requests: {{cpu: "{max(1, nodes.cores - 1)}", memory: {_mebibytes(node_memory)}}}
    limits: {{memory: {_mebibytes(node_memory)}}}
  snapshots:
    # The fullest node's snapshots, twice: a new file is whole before the old one goes.
    size: {max(1, -(-2 * disk // _GIB))}Gi
coordinator:
  config:
    placement: {nodes.policy}
    replicas: {nodes.copies}
    default_budget: "{work.budget}"
"""


def _mebibytes(nbytes: int) -> str:
    return f"{-(-nbytes // _MIB)}Mi"
