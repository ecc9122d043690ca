"""Turns of the event loop: what is ready runs, and no time is waited for."""

from __future__ import annotations

import asyncio


async def settled(turns: int = 5) -> None:
    """Returns once the loop has run what is ready, and what that made ready, `turns` times."""
    for _ in range(turns):
        await asyncio.sleep(0)
