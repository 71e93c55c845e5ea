"""A control server over a real socket, with a fake node behind it, for the tests of both."""

from __future__ import annotations

import asyncio
import itertools
import json
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path
from typing import Any

from nbdmirror.codec import admin
from nbdmirror.config import Limits
from nbdmirror.engine.control import ControlServer

from .fake_node import FakeNode

Session = Callable[[FakeNode, asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]]
Tell = Callable[[str, str, str], None]


def run_session(
    path: Path,
    session: Session,
    limits: Limits | None = None,
    owners: tuple[int, ...] | None = None,
    uids: Iterator[int] | None = None,
    refused: Tell = lambda listener, who, why: None,
) -> list[Any]:
    """Runs a session against a fake node; returns the defects that the loop was told of.
    ``uids``: of those who connect, one after the other; 1000 all."""
    users = uids or itertools.repeat(1000)
    defects: list[Any] = []

    async def run() -> None:
        node = FakeNode()
        loop = asyncio.get_running_loop()
        loop.set_exception_handler(lambda loop, context: defects.append(context))
        server = ControlServer(
            node, limits or Limits(), lambda transport: next(users), owners=owners, refused=refused
        )
        listener = await loop.create_unix_server(server.connection, str(path))
        reader, writer = await asyncio.open_unix_connection(str(path))
        async with asyncio.timeout(20):
            await session(node, reader, writer)
        writer.close()
        listener.close()
        await server.close()

    asyncio.run(run())
    return defects


def send(writer: asyncio.StreamWriter, method: str, request_id: Any = 1, **params: Any) -> None:
    writer.write(admin.encode_request(method, params, request_id))


async def receive(reader: asyncio.StreamReader) -> Any:
    return json.loads(await reader.readline())


async def ask(
    reader: asyncio.StreamReader, writer: asyncio.StreamWriter, method: str, **params: Any
) -> Any:
    send(writer, method, **params)
    return await receive(reader)
