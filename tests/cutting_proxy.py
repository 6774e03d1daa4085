"""A proxy between a reader and a server that cuts connections after so many bytes of an answer's body."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field


@dataclass
class Proxy:
    """`cuts[i]` is after how many body bytes connection i is cut; the last one holds for all that follow, None cuts nothing."""

    target_port: int
    cuts: Sequence[int | None]
    port: int = 0
    requests: list[str] = field(default_factory=list)
    """The heads of all requests."""
    bodies_bytes: list[int] = field(default_factory=list)
    """What each connection carried of answers' bodies."""

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        number = len(self.bodies_bytes)
        self.bodies_bytes.append(0)
        upstream_reader, upstream_writer = await asyncio.open_connection("127.0.0.1", self.target_port)
        try:
            while head := await _head(reader):
                self.requests.append(head.decode())
                upstream_writer.write(head)
                left = self.cuts[min(number, len(self.cuts) - 1)]
                if not await self._answer(upstream_reader, writer, number, left):
                    return
        finally:
            writer.close()
            upstream_writer.close()

    async def _answer(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, number: int, left: int | None) -> bool:
        head = await _head(reader)
        writer.write(head)
        lengths = [int(line[15:]) for line in head.lower().split(b"\r\n") if line.startswith(b"content-length:")]
        size = sum(lengths)
        passing = size if left is None else min(size, left)
        while passing:
            data = await reader.read(min(passing, 2**16))
            passing -= len(data)
            self.bodies_bytes[number] += len(data)
            writer.write(data)
            await writer.drain()
        return left is None or left >= size


async def _head(reader: asyncio.StreamReader) -> bytes:
    with suppress(asyncio.IncompleteReadError):
        return await reader.readuntil(b"\r\n\r\n")
    return b""


@asynccontextmanager
async def cutting_proxy(target_port: int, cuts: Sequence[int | None]) -> AsyncIterator[Proxy]:
    """A Proxy that listens; requests must have no body."""
    proxy = Proxy(target_port, cuts)
    server = await asyncio.start_server(proxy.serve, "127.0.0.1", 0)
    proxy.port = server.sockets[0].getsockname()[1]
    try:
        yield proxy
    finally:
        server.close()
