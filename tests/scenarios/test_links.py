"""The proxies: who is calling, and what a cut, a delay and damage do to bytes under way."""

from __future__ import annotations

import contextlib
import os
import socket
import threading
import time
from collections.abc import Iterator

import pytest

from tests.scenarios.links import Links, process_of_port

ME = "me"


@pytest.fixture
def echo() -> Iterator[str]:
    """A server that sends back what it gets."""

    def answer(connection: socket.socket) -> None:
        with connection, contextlib.suppress(OSError):
            while data := connection.recv(1 << 16):
                connection.sendall(data)

    def serve() -> None:
        with contextlib.suppress(OSError):
            while True:
                threading.Thread(target=answer, args=(server.accept()[0],), daemon=True).start()

    server = socket.create_server(("127.0.0.1", 0))
    threading.Thread(target=serve, daemon=True).start()
    yield f"127.0.0.1:{server.getsockname()[1]}"
    server.close()


@pytest.fixture
def links(echo: str) -> Iterator[Links]:
    with Links(lambda: {os.getpid(): ME}) as links:
        yield links


@pytest.fixture
def line(links: Links, echo: str) -> Iterator[socket.socket]:
    """A connection through the proxy of member "echo"."""
    host, _, port = links.listen("echo").rpartition(":")
    links.aim("echo", lambda: echo)
    with socket.create_connection((host, int(port)), timeout=5) as line:
        yield line


def say(line: socket.socket, words: bytes) -> bytes:
    line.sendall(words)
    return line.recv(1 << 16)


def test_a_port_leads_to_the_process_that_holds_it(line: socket.socket) -> None:
    port = line.getsockname()[1]
    assert process_of_port(port, {os.getppid(): "parent", os.getpid(): ME}) == ME
    assert process_of_port(port, {os.getppid(): "parent"}) == ""


def test_a_cut_holds_bytes_back_until_it_heals(links: Links, line: socket.socket) -> None:
    assert say(line, b"before") == b"before"
    links.cut(ME, "echo")
    line.sendall(b"during")
    line.settimeout(0.3)
    with pytest.raises(TimeoutError):
        line.recv(10)
    line.settimeout(5)
    links.heal()
    assert line.recv(10) == b"during"


def test_a_cut_concerns_its_own_pair_only(links: Links, line: socket.socket) -> None:
    links.cut("another", "echo")
    links.cut(ME, "elsewhere")
    assert say(line, b"hello") == b"hello"


def test_a_slow_link_delays_each_way(links: Links, line: socket.socket) -> None:
    links.slow(ME, "echo", 0.1)
    began = time.monotonic()
    assert say(line, b"hello") == b"hello"
    assert time.monotonic() - began >= 0.2


def test_damage_flips_one_bit_of_what_comes_back(links: Links, line: socket.socket) -> None:
    links.damage(ME, "echo")
    sent = bytes(100)
    assert sum(byte.bit_count() for byte in say(line, sent)) == 1
    links.heal()
    assert say(line, sent) == sent


def test_nobody_behind_the_proxy_closes_the_connection(links: Links) -> None:
    host, _, port = links.listen("nobody").rpartition(":")
    links.aim("nobody", lambda: "127.0.0.1:1")
    with socket.create_connection((host, int(port)), timeout=5) as line:
        assert line.recv(1) == b""
