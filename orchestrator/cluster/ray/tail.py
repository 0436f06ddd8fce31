"""A job's log as it grows, over the dashboard's web socket."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Iterator, Mapping

from orchestrator.errors import TransientError, gist

BEAT_S = 20.0
"""Between two questions whether the dashboard is still there."""


def tail(url: str, headers: Mapping[str, str]) -> Iterator[str]:
    """Pieces of the log from its start until the other side closes. Raises TransientError where it breaks off."""
    loop = asyncio.new_event_loop()
    pieces = _pieces(url, headers)
    try:
        while True:
            yield loop.run_until_complete(anext(pieces))
    except StopAsyncIteration:
        return
    finally:
        loop.run_until_complete(pieces.aclose())
        loop.run_until_complete(loop.shutdown_asyncgens())
        loop.close()


async def _pieces(url: str, headers: Mapping[str, str]) -> AsyncGenerator[str, None]:
    import aiohttp

    try:
        async with (
            aiohttp.ClientSession(headers=dict(headers)) as session,
            session.ws_connect(url, heartbeat=BEAT_S, max_msg_size=0) as socket,
        ):
            async for message in socket:
                if message.type is aiohttp.WSMsgType.TEXT:
                    yield message.data
                elif message.type is aiohttp.WSMsgType.ERROR:
                    raise TransientError(f"the log broke off ({socket.exception()})")
    except (aiohttp.ClientError, OSError) as error:
        raise TransientError(f"the log broke off ({gist(error)})") from None
