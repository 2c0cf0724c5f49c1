"""What `longreach eval` asks where no flag says otherwise."""

from __future__ import annotations

from dataclasses import dataclass, fields

from coordinator.config import CoordinatorConfig
from gpu_worker.config import WorkerConfig

QUICK_LIMIT_S = 240.0
"""After this, --quick asks nothing more; with start and report it ends within five minutes."""


@dataclass(frozen=True, slots=True)
class Selection:
    """Values of --tasks, --lengths (tokens), --methods and --n."""

    tasks: tuple[str, ...]
    lengths: tuple[int, ...]
    methods: tuple[str, ...]
    n: int


def _default(config: type, name: str) -> str:
    (value,) = [each.default for each in fields(config) if each.name == name]
    return str(value)


BUDGET = _default(CoordinatorConfig, "default_budget")
PREFILL = _default(WorkerConfig, "prefill_pattern")
DEFAULT_METHOD = f"local/auto:{BUDGET}" + ("" if PREFILL == "dense" else f"@{PREFILL}")
"""What a cluster does for a request that says nothing, in this process."""

_INDEXES = (
    "local/flat:top_k=100",  # exact nearest neighbours
    "local/roargraph:top_k=100",  # RetrievalAttention
    "local/ivf:top_k=100",
    "local/hnsw:top_k=100",
)
_BUDGETS = (
    "local/auto:top_k=20",
    "local/auto:top_k=400",
    "local/auto:top_k=100+tail",
    "local/auto:mass=0.95[64,1024]+tail",
    "local/auto:beta=8",
)
_PUBLISHED = (
    # Sink and window as ours, or about 2048 keys: several times what our default attends.
    "local/streaming_llm:sink=128,window=512",
    "local/dilated:sink=128,window=2048,interval=1",
    "local/strided",
    "local/static_top_k:top_k=1000",
    "local/snapkv:capacity=2048",
    "local/quest:budget=2048",
    "local/infllm:window=512,blocks=16",
)
_PREFILLS = tuple(
    f"local/full@{pattern}"
    for pattern in (
        *("a_shape", "dilated", "strided", "top_k"),
        *("vertical_slash", "block_sparse", "minference", "adaptive"),
    )
)

DEFAULT = Selection(
    tasks=("mixed", "needle", "diffuse"),
    lengths=(4096, 8192, 16_384, 32_768, 65_536, 131_072),
    methods=tuple(
        dict.fromkeys(
            (
                *("full", DEFAULT_METHOD, f"local/auto:{BUDGET}", f"local/auto:{BUDGET}@adaptive"),
                *_INDEXES,
                *_BUDGETS,
                *_PUBLISHED,
                *_PREFILLS,
            )
        )
    ),
    n=2,
)
QUICK = Selection(
    tasks=("mixed", "diffuse"),
    lengths=(16_384,),
    methods=(
        *("full", DEFAULT_METHOD, "local/streaming_llm:sink=128,window=512"),
        f"cluster:{BUDGET}",
    ),
    n=1,
)
