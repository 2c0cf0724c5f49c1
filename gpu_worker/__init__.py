"""GPU worker: runs the model with a small resident KV window. Only this package imports torch."""

import os

# Read once by OpenMP, when torch is imported. By default its threads spin between operators, which
# on a machine shared with retrieval nodes takes the cores that the others need: prefill on two
# busy cores ran five times faster without.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
# Read once, when grpc is imported: on this polling engine the calls of a decode step take a quarter
# less time than on gRPC's default (python -m benchmarks.rpc shows both).
os.environ.setdefault("GRPC_EXPERIMENTS", "-event_engine_client,-event_engine_listener")
