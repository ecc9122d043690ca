"""What ends a wait from outside, and that nothing else is taken for it."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any

import pytest
from starlette.types import Scope

from service.api.cancellation import CONNECTION_LOST, Interrupt, unless_gone
from service.api.problems import Problem
from tests.support.turns import settled


class Client:
    """A client's connection, told of by the server's future."""

    def __init__(self) -> None:
        self.lost: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self.scope: Scope = {"extensions": {CONNECTION_LOST: {"future": self.lost}}}

    def leave(self) -> None:
        self.lost.set_result(None)

    async def wait_for(self, work: Any) -> Any:
        return await unless_gone(self.scope, work)


class Work:
    """Something that takes until it is told, and notes its end."""

    def __init__(self) -> None:
        self.done = asyncio.Event()
        self.ended = ""

    async def run(self) -> str:
        self.ended = "cancelled"
        await self.done.wait()
        self.ended = "done"
        return "answer"


Scenario = Callable[[Client, Work], Awaitable[None]]


@pytest.fixture
def play() -> Callable[[Scenario], None]:
    def run(scenario: Scenario) -> None:
        async def main() -> None:
            await scenario(Client(), Work())
            await settled()
            assert asyncio.all_tasks() == {asyncio.current_task()}

        asyncio.run(main(), debug=True)

    return run


def test_work_that_ends_is_returned(play: Any) -> None:
    async def scenario(client: Client, work: Work) -> None:
        asyncio.get_running_loop().call_soon(work.done.set)
        assert await client.wait_for(work.run()) == "answer"
        client.leave()
        await settled()  # what comes later does not reach this task

    play(scenario)


def test_work_that_fails_is_raised(play: Any) -> None:
    async def scenario(client: Client, work: Work) -> None:
        async def fail() -> None:
            await settled(1)
            raise KeyError("x")

        with pytest.raises(KeyError):
            await client.wait_for(fail())

    play(scenario)


def test_a_client_that_leaves_cancels_the_work(play: Any) -> None:
    async def scenario(client: Client, work: Work) -> None:
        asyncio.get_running_loop().call_soon(client.leave)
        with pytest.raises(Problem) as refused:
            await client.wait_for(work.run())
        assert (refused.value.status, work.ended) == (499, "cancelled")
        task = asyncio.current_task()
        assert task is not None and task.cancelling() == 0
        await settled()

    play(scenario)


def test_a_client_that_has_left_before(play: Any) -> None:
    async def scenario(client: Client, work: Work) -> None:
        client.leave()
        with pytest.raises(Problem):
            await client.wait_for(work.run())

    play(scenario)


def test_the_work_cleans_up_before_the_refusal(play: Any) -> None:
    async def scenario(client: Client, work: Work) -> None:
        cleaned = []

        async def careful() -> None:
            try:
                await work.run()
            finally:
                await settled(1)
                cleaned.append(True)

        asyncio.get_running_loop().call_soon(client.leave)
        with pytest.raises(Problem):
            await client.wait_for(careful())
        assert cleaned == [True]

    play(scenario)


def test_a_cancellation_by_others_stays_one(play: Any) -> None:
    async def scenario(client: Client, work: Work) -> None:
        for also_leaves in (False, True):
            task = asyncio.create_task(client.wait_for(work.run()))
            await settled()
            task.cancel()
            if also_leaves:
                client.leave()
            with pytest.raises(asyncio.CancelledError):
                await task
            assert work.ended == "cancelled"

    play(scenario)


def test_a_client_that_leaves_as_the_work_ends_does_not_disturb_what_follows(play: Any) -> None:
    async def scenario(client: Client, work: Work) -> None:
        loop = asyncio.get_running_loop()
        loop.call_soon(work.done.set)
        loop.call_soon(client.leave)
        assert await client.wait_for(work.run()) == "answer"
        await settled()

    play(scenario)


def test_a_timeout_within_the_work_and_one_around_it(play: Any) -> None:
    async def scenario(client: Client, work: Work) -> None:
        async def hurried() -> None:
            async with asyncio.timeout(0):
                await work.run()

        with pytest.raises(TimeoutError):
            await client.wait_for(hurried())
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0):
                await client.wait_for(work.run())
        asyncio.get_running_loop().call_soon(client.leave)
        with pytest.raises(Problem):
            async with asyncio.timeout(60):
                await client.wait_for(work.run())

    play(scenario)


def test_an_interrupt_that_is_disarmed_does_nothing() -> None:
    async def main() -> None:
        interrupt = Interrupt()
        asyncio.get_running_loop().call_soon(interrupt)
        interrupt.disarm()
        await settled()
        assert not interrupt.is_cause()

    asyncio.run(main())
