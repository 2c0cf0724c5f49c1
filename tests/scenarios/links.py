"""Connections that can be cut, slowed and damaged, one (caller, callee) pair at a time.

Members advertise the address of a TCP proxy, one per callee. A proxy knows which process calls:
the kernel's socket tables lead from the connection's port to the process that holds it. What a
partition holds back is delivered when it heals, as TCP does; new connections wait likewise.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import threading
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future
from dataclasses import dataclass, field
from pathlib import Path

_CHUNK_BYTES = 1 << 16
_CLOSE_TIMEOUT_S = 5.0
_POLL_S = 0.02


@dataclass
class _Link:
    """How one caller reaches one callee."""

    open: asyncio.Event = field(default_factory=asyncio.Event)
    delay_s: float = 0.0
    damaged: bool = False

    def __post_init__(self) -> None:
        self.open.set()

    def damage(self, data: bytes) -> bytes:
        """The data with one bit flipped."""
        middle = len(data) // 2
        return data[:middle] + bytes([data[middle] ^ 0x10]) + data[middle + 1 :]


class Links:
    """The proxies of a deployment, on a thread of their own. A context manager.

    processes: the members' process ids by name, asked whenever somebody connects.
    """

    def __init__(self, processes: Callable[[], Mapping[int, str]]) -> None:
        self._processes = processes
        self._links: dict[tuple[str, str], _Link] = {}
        self._targets: dict[str, Callable[[], str]] = {}
        self._servers: list[asyncio.Server] = []
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="links", daemon=True)

    def __enter__(self) -> Links:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        with contextlib.suppress(TimeoutError):
            self._on_loop(self._close).result(_CLOSE_TIMEOUT_S)
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(_CLOSE_TIMEOUT_S)

    def listen(self, callee: str) -> str:
        """Opens the proxy of a member; returns the host:port to advertise."""

        async def serve() -> str:
            async def connected(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
                with contextlib.suppress(asyncio.CancelledError):  # The links are closing.
                    await self._carry(callee, reader, writer)

            server = await asyncio.start_server(connected, "127.0.0.1", 0, limit=_CHUNK_BYTES)
            self._servers.append(server)
            host, port = server.sockets[0].getsockname()
            return f"{host}:{port}"

        return asyncio.run_coroutine_threadsafe(serve(), self._loop).result()

    def aim(self, callee: str, address: Callable[[], str]) -> None:
        """Says what knows where the member itself listens, which changes with each of its lives.

        It is asked for each connection; while it gives an empty text the connection waits, for a
        member calls others before anybody has read its port.
        """
        self._targets[callee] = address

    def cut(self, caller: str, callee: str) -> None:
        """Stops all bytes of a link, both ways, connections and attempts to connect."""
        self._change(caller, callee, lambda link: link.open.clear())

    def slow(self, caller: str, callee: str, delay_s: float) -> None:
        """Holds every piece of data back for `delay_s` each way."""

        def change(link: _Link) -> None:
            link.delay_s = delay_s

        self._change(caller, callee, change)

    def damage(self, caller: str, callee: str) -> None:
        """Flips a bit in everything the callee sends to the caller."""

        def change(link: _Link) -> None:
            link.damaged = True

        self._change(caller, callee, change)

    def heal(self) -> None:
        """Makes every link good again."""

        async def change() -> None:
            for link in self._links.values():
                link.delay_s = 0.0
                link.damaged = False
                link.open.set()

        self._on_loop(change).result()

    def _change(self, caller: str, callee: str, change: Callable[[_Link], None]) -> None:
        async def apply() -> None:
            change(self._link(caller, callee))

        self._on_loop(apply).result()

    def _link(self, caller: str, callee: str) -> _Link:
        return self._links.setdefault((caller, callee), _Link())

    def _on_loop(self, work: Callable[[], object]) -> Future[object]:
        async def run() -> object:
            done = work()
            return await done if asyncio.iscoroutine(done) else done

        return asyncio.run_coroutine_threadsafe(run(), self._loop)

    async def _carry(
        self, callee: str, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> None:
        """One connection, from its first byte to its end."""
        caller = self._caller(writer.get_extra_info("peername"))
        link = self._link(caller, callee)
        away: asyncio.StreamWriter | None = None
        try:
            await link.open.wait()
            while not (address := self._targets[callee]()):
                await asyncio.sleep(_POLL_S)
            host, _, port = address.rpartition(":")
            back, away = await asyncio.open_connection(host, int(port), limit=_CHUNK_BYTES)
            there = asyncio.create_task(self._pump(reader, away, link, replies=False))
            here = asyncio.create_task(self._pump(back, writer, link, replies=True))
            await asyncio.wait([there, here], return_when=asyncio.FIRST_COMPLETED)
            for task in (there, here):
                task.cancel()
                with contextlib.suppress(asyncio.CancelledError):
                    await task
            await link.open.wait()
        except OSError:
            pass  # The member is down: its caller sees a connection that closes.
        finally:
            for end in (writer, away):
                if end is not None:
                    end.close()

    @staticmethod
    async def _pump(
        source: asyncio.StreamReader, sink: asyncio.StreamWriter, link: _Link, *, replies: bool
    ) -> None:
        with contextlib.suppress(OSError):
            while data := await source.read(_CHUNK_BYTES):
                if not link.open.is_set():
                    await link.open.wait()
                if link.delay_s:
                    await asyncio.sleep(link.delay_s)
                sink.write(link.damage(data) if replies and link.damaged else data)
                await sink.drain()

    def _caller(self, peer: tuple[str, int]) -> str:
        return process_of_port(peer[1], self._processes()) or "outside"

    async def _close(self) -> None:
        for server in self._servers:
            server.close()
        tasks = [t for t in asyncio.all_tasks() if t is not asyncio.current_task()]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


def process_of_port(port: int, processes: Mapping[int, str]) -> str:
    """Which of the processes holds the TCP socket with this local port; empty for none of them."""
    inodes = set(_inodes(port))
    for pid, name in processes.items():
        with contextlib.suppress(OSError):
            for entry in os.scandir(f"/proc/{pid}/fd"):
                with contextlib.suppress(OSError):
                    if os.readlink(entry.path).removeprefix("socket:[").rstrip("]") in inodes:
                        return name
    return ""


def _inodes(port: int) -> Iterator[str]:
    """Inodes of the sockets with this local port, IPv4 and IPv6."""
    for table in ("/proc/net/tcp", "/proc/net/tcp6"):
        with contextlib.suppress(OSError):
            for line in Path(table).read_text().splitlines()[1:]:
                fields = line.split()
                if int(fields[1].rpartition(":")[2], 16) == port:
                    yield fields[9]
