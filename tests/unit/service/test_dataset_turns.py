"""Who is checked next: several at once, the smallest first, and no turn is lost to one that left."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from hypothesis import given
from hypothesis import strategies as st

from service.dataset_intake import Turns
from tests.support.turns import settled


@given(at_once=st.integers(1, 4), sizes=st.lists(st.integers(0, 9), max_size=12), data=st.data())
def test_as_many_as_may_run_and_the_smallest_waiting_is_next(
    at_once: int, sizes: list[int], data: st.DataObject
) -> None:
    async def run() -> None:
        turns, running, ended = Turns(at_once), dict[int, asyncio.Event](), list[int]()

        async def check(number: int, size: int) -> None:
            async with turns.turn(size):
                running[number] = asyncio.Event()
                await running[number].wait()
                del running[number]
                ended.append(number)

        tasks = {number: asyncio.create_task(check(number, size)) for number, size in enumerate(sizes)}
        await settled()
        assert set(running) == set(range(min(at_once, len(sizes)))), "those that came while there was room"
        left = set(tasks)
        while left:
            assert len(running) == min(at_once, len(left))
            waiting = sorted(left - set(running), key=lambda number: (sizes[number], number))
            leaves: bool = data.draw(st.sampled_from([False, True])) if waiting else False
            if leaves:
                gone = data.draw(st.sampled_from(waiting))
                tasks[gone].cancel()
                left.discard(gone)
                waiting.remove(gone)
                await settled()
            ending = data.draw(st.sampled_from(sorted(running)))
            before = set(running)
            running[ending].set()
            left.discard(ending)
            await settled()
            assert set(running) - before == set(waiting[:1])
        await asyncio.gather(*tasks.values(), return_exceptions=True)
        assert turns._free == at_once

    asyncio.run(run())


def test_a_turn_given_to_one_that_leaves_in_the_same_moment_goes_on() -> None:
    async def run() -> None:
        turns = Turns(1)
        entered: list[str] = []

        async def check(name: str, then: Callable[[], object] = lambda: None) -> None:
            async with turns.turn(1):
                entered.append(name)
                then()

        async with turns.turn(1):
            second = asyncio.create_task(check("second"))
            third = asyncio.create_task(check("third"))
            await settled()
        second.cancel()  # the turn is its own by now, and it has not run yet
        await asyncio.gather(second, third, return_exceptions=True)
        assert entered == ["third"] and turns._free == 1

    asyncio.run(run())
