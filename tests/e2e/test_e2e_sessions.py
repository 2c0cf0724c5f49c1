"""Sessions do not see each other, broken clients leave nothing behind, bad input is refused."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from longreach.errors import InvalidRequest, LongreachError, NotFound, Unavailable
from longreach.local_cluster import LocalCluster
from longreach.sdk import Client
from tests.e2e.conftest import WORKER_FLAGS
from tests.e2e.test_e2e_exactness import random_ids

pytestmark = pytest.mark.cluster
VOCAB = 512


@pytest.fixture(scope="module")
def cluster(
    tiny_model: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[LocalCluster]:
    directory = tmp_path_factory.mktemp("cluster")
    with LocalCluster(
        tiny_model("llama"), nodes=2, data_dir=directory, worker_flags=WORKER_FLAGS, tls=True
    ) as cluster:
        yield cluster


@pytest.fixture
def client(cluster: LocalCluster) -> Iterator[Client]:
    with cluster.client(timeout_s=120) as client:
        yield client


def ask(client: Client, context: str, seed: int, tokens: int = 24) -> list[int]:
    generation = client.generate(
        random_ids(5, VOCAB, seed), context=context, max_tokens=tokens, budget="exact",
        ignore_eos=True,
    )  # fmt: skip
    return [token.id for token in generation.tokens]


def sessions_open(client: Client) -> int:
    return sum(member.sessions for member in client.status().members)


def wait_until(condition: Callable[[], bool], what: str, timeout_s: float = 20.0) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, f"{what} did not happen within {timeout_s} s"
        time.sleep(0.1)


def test_concurrent_sessions_answer_as_each_would_alone(client: Client) -> None:
    contexts = [client.contexts.create(tokens=random_ids(500 + i, VOCAB, i)).id for i in (1, 2)]
    questions = [(context, seed) for context in contexts for seed in (11, 12, 13)]
    alone = [ask(client, *each) for each in questions]
    with ThreadPoolExecutor(len(questions)) as pool:
        together = list(pool.map(lambda each: ask(client, *each), questions))
    assert together == alone
    assert len({tuple(tokens) for tokens in alone}) == len(alone)


def test_an_identical_context_is_found_and_a_deleted_one_is_gone(client: Client) -> None:
    tokens = random_ids(300, VOCAB, 77)
    first = client.contexts.create(tokens=tokens, name="once")
    again = client.contexts.create(tokens=tokens)
    assert (again.id, again.found, first.found) == (first.id, True, False)
    assert client.contexts.delete(first) > 0
    with pytest.raises(NotFound, match=first.id):
        client.generate([9], context=first)


def test_a_client_that_leaves_frees_everything(client: Client) -> None:
    context = client.contexts.create(tokens=random_ids(400, VOCAB, 5))
    assert sessions_open(client) == 0
    with client.stream(
        random_ids(4, VOCAB, 6), context=context, max_tokens=2000, ignore_eos=True
    ) as stream:
        next(iter(stream))
        wait_until(lambda: sessions_open(client) > 0, "opening the session")
    wait_until(lambda: sessions_open(client) == 0, "closing the session")
    assert ask(client, context.id, 3)


def test_a_creation_that_is_cancelled_leaves_no_bytes(client: Client) -> None:
    def node_bytes() -> int:
        return sum(m.used_bytes for m in client.status().members if m.kind == "node")

    for context in client.contexts.list():
        client.contexts.delete(context)
    wait_until(lambda: node_bytes() == 0, "freeing the nodes")
    started = threading.Event()

    class StopNowError(Exception):
        pass

    def leave(context: object) -> None:
        started.set()
        raise StopNowError

    with pytest.raises(StopNowError):
        client.contexts.create(tokens=random_ids(3000, VOCAB, 8), on_progress=leave)
    assert started.is_set()
    wait_until(lambda: node_bytes() == 0 and client.contexts.list() == (), "dropping the context")


def test_a_prompt_without_a_context_is_answered_too(client: Client) -> None:
    ids = random_ids(300, VOCAB, 21)
    context = client.contexts.create(tokens=ids[:-5])
    kept = client.generate(ids[-5:], context=context, max_tokens=12, budget="exact")
    plain = client.generate(ids, max_tokens=12, budget="exact")
    assert [t.id for t in plain.tokens] == [t.id for t in kept.tokens]


@pytest.mark.parametrize(
    ("call", "error", "says"),
    [
        (lambda c: c.generate("", max_tokens=1), InvalidRequest, "empty"),
        (lambda c: c.generate([5] * 100_000, max_tokens=1), InvalidRequest, "100,?000"),
        (lambda c: c.generate([5], max_tokens=10**6), InvalidRequest, "1,?000,?000"),
        (lambda c: c.generate([VOCAB + 7]), InvalidRequest, str(VOCAB + 7)),
        (lambda c: c.generate([5], context="ctx-missing"), NotFound, "ctx-missing"),
        (lambda c: c.generate([5], model="no-such-model"), LongreachError, "no-such-model"),
        (lambda c: c.generate([5], temperature=-1.0), InvalidRequest, "temperature"),
        (lambda c: c.generate([5], top_p=2.0), InvalidRequest, "top_p"),
        (lambda c: c.generate([5], min_coverage=3.0), InvalidRequest, "coverage"),
        (lambda c: c.contexts.create(tokens=[]), InvalidRequest, "empty|no tokens"),
        (lambda c: c.contexts.create(tokens=[VOCAB + 7]), InvalidRequest, str(VOCAB + 7)),
        (lambda c: c.contexts.create(tokens=[5], placement="nowhere"), InvalidRequest, "nowhere"),
        (lambda c: c.contexts.get("ctx-missing"), NotFound, "ctx-missing"),
    ],
)
def test_bad_input_is_refused_clearly_and_the_next_request_works(
    client: Client, call: Callable[[Client], object], error: type[Exception], says: str
) -> None:
    with pytest.raises(error, match=says):
        call(client)
    assert len(client.generate([9, 8, 7], max_tokens=3, ignore_eos=True).tokens) == 3


def test_sampling_with_a_seed_repeats_and_another_seed_differs(client: Client) -> None:
    context = client.contexts.create(tokens=random_ids(300, VOCAB, 31))

    def draw(seed: int) -> list[int]:
        generation = client.generate(
            [9, 8], context=context, temperature=1.0, seed=seed, max_tokens=20, ignore_eos=True
        )
        return [token.id for token in generation.tokens]

    assert draw(1) == draw(1) != draw(2)


def test_the_worker_cannot_answer_when_the_nodes_are_stopped(
    tiny_model: Callable[[str], Path], tmp_path: Path
) -> None:
    with (
        LocalCluster(
            tiny_model("llama"),
            nodes=2,
            data_dir=tmp_path,
            worker_flags=WORKER_FLAGS,
            coordinator_flags={"failover_patience_s": 3},
            tls=True,
        ) as cluster,
        cluster.client(timeout_s=60) as client,
    ):
        context = client.contexts.create(tokens=random_ids(500, VOCAB, 41))
        stream = client.stream([9, 8, 7], context=context, max_tokens=3000, ignore_eos=True)
        next(iter(stream))
        for name in ("node-0", "node-1"):
            cluster.process(name).kill()
        with pytest.raises(Unavailable):
            list(stream)
        with pytest.raises(Unavailable):
            client.generate([9, 8, 7], context=context, max_tokens=3)


def test_a_restarted_cluster_finds_its_contexts(
    tiny_model: Callable[[str], Path], tmp_path: Path
) -> None:
    tokens = random_ids(500, VOCAB, 51)
    answers = []
    for _ in range(2):
        with (
            LocalCluster(
                tiny_model("llama"), nodes=2, data_dir=tmp_path, worker_flags=WORKER_FLAGS, tls=True
            ) as cluster,
            cluster.client(timeout_s=60) as client,
        ):
            context = client.contexts.create(tokens=tokens)
            answers.append((context.id, context.found, ask(client, context.id, 52)))
            # Snapshots are written behind the answer; stopping in order completes them.
    assert [found for _, found, _ in answers] == [False, True]
    assert answers[0][0] == answers[1][0]
    assert answers[0][2] == answers[1][2]
