"""A TCP relay that holds every byte back for a while: a long line, on loopback.

Arguments: a port to listen on, one to connect to, and milliseconds for each direction. What it
holds is bounded, far above what such a line has under way.
"""

from __future__ import annotations

import asyncio
import sys
from collections import deque

_PIECE = 256 * 1024
_MAXIMUM_HELD_BYTES = 64 * 1024 * 1024


async def _carry(
    source: asyncio.StreamReader, target: asyncio.StreamWriter, seconds: float
) -> None:
    held: deque[tuple[float, bytes]] = deque()
    size = 0
    changed = asyncio.Event()
    loop = asyncio.get_running_loop()

    async def send() -> None:
        nonlocal size
        while True:
            while not held:
                changed.clear()
                await changed.wait()
            due, data = held[0]
            wait = due - loop.time()
            if wait > 0:
                await asyncio.sleep(wait)
            held.popleft()
            if not data:
                target.write_eof()
                return
            size -= len(data)
            target.write(data)
            await target.drain()

    sending = asyncio.create_task(send())
    try:
        while data := await source.read(_PIECE):
            held.append((loop.time() + seconds, data))
            size += len(data)
            changed.set()
            while size > _MAXIMUM_HELD_BYTES:
                await asyncio.sleep(seconds)
        held.append((loop.time() + seconds, b""))
        changed.set()
        await sending
    except OSError:
        sending.cancel()
        target.close()


async def main(port: int, destination: int, milliseconds: float) -> None:
    """Relay until killed."""

    async def connection(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        far_reader, far_writer = await asyncio.open_connection(
            "127.0.0.1", destination, limit=4 * _PIECE
        )
        seconds = milliseconds / 1000
        await asyncio.gather(
            _carry(reader, far_writer, seconds), _carry(far_reader, writer, seconds)
        )
        far_writer.close()
        writer.close()

    server = await asyncio.start_server(connection, "127.0.0.1", port, limit=4 * _PIECE)
    async with server:
        await server.serve_forever()


if __name__ == "__main__":
    asyncio.run(main(int(sys.argv[1]), int(sys.argv[2]), float(sys.argv[3])))
