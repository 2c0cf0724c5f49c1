"""Retrieval node: stores offloaded KV, indexes it and answers partial attention. No torch here."""

import os

# Read once, when grpc is imported: on this polling engine the calls of a decode step take a quarter
# less time than on gRPC's default (python -m benchmarks.rpc shows both).
os.environ.setdefault("GRPC_EXPERIMENTS", "-event_engine_client,-event_engine_listener")
