"""Requests come, leave, expire and fail, engines hang, break and are replaced, in any order: nothing is ever lost.

Every entry that is queued ends exactly once, every request is answered, everything taken is given back, and the engine
never stands still while something waits that it could compute. The whole path is under test, in virtual time.
"""

from __future__ import annotations

import asyncio
from typing import Any

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from modeling.errors import InputTooLong
from modeling.tasks import Options
from service.inference.capacity import AdmissionController, CostModel
from service.inference.engine_worker import BatchLimits
from service.inference.errors import DeadlineExceeded, InferenceFailed, ModelNotReady, QueueFull
from service.inference.predictor import Predictor
from service.inference.queue import Batch, QueueEntry, Ticket
from service.metrics import ServingMetrics
from tests.support.lanes import NOT_A_NUMBER, POISON, WordLane, WordModel
from tests.support.virtual import VirtualLoop, elapse, virtual_runtime

EXPECTED = (InferenceFailed, DeadlineExceeded, ModelNotReady, QueueFull, InputTooLong, asyncio.CancelledError)
RUN_S, TIMEOUT_S = 0.1, 5.0
TEXTS = st.lists(
    st.one_of(st.integers(1, 40).map(lambda count: "w " * count), st.sampled_from([POISON, NOT_A_NUMBER, "w " * 200])),
    min_size=1,
    max_size=6,
)


class Requests(RuleBasedStateMachine):
    @initialize(max_delay_s=st.sampled_from([0.0, 0.05]))
    def open(self, max_delay_s: float) -> None:
        self.faults: list[str] = []
        self.entries: list[QueueEntry] = []
        self.tasks: list[asyncio.Task[Any]] = []
        self.hangs = 0
        self.max_delay_s = max_delay_s
        self.is_stopped = False
        self.loop = VirtualLoop()
        self.loop.set_exception_handler(lambda loop, context: self.faults.append(str(context)))
        self.loop.run_until_complete(self._open(BatchLimits(100, 4, max_delay_s, TIMEOUT_S)))

    async def _open(self, limits: BatchLimits) -> None:
        runtime = virtual_runtime(self._engine_s, lambda burst: 0.01)
        self.lane = WordLane(limits, runtime=runtime, max_length=100)
        self.lane.worker.start()
        self.lane.worker.calibrate(CostModel(RUN_S / 2, RUN_S / 200, 20), limits.max_tokens)
        put = self.lane.worker.put

        def recording(tickets: list[Ticket]) -> None:
            put(tickets)
            self.entries += [entry for ticket in tickets for entry in ticket.entries]

        self.lane.worker.put = recording  # type: ignore[method-assign, assignment]
        self.model: Any = WordModel(self.lane)
        self.admission = AdmissionController(max_inputs=40, max_queue_delay_s=3.0)
        self.predictor = Predictor(
            self.admission,
            ServingMetrics(),
            max_inputs=8,
            preprocessor_threads=2,
            runtime=runtime,
        )

    def _engine_s(self, work: Any) -> float:
        if isinstance(work, Batch) and self.hangs:
            self.hangs -= 1
            return 20.0  # it comes back long after it was given up
        return RUN_S if isinstance(work, Batch) else 0.01

    def _pass(self, seconds: float) -> None:
        self.loop.run_until_complete(elapse(seconds))

    @rule(texts=TEXTS, seconds=st.sampled_from([0.05, 0.3, 2.0, 30.0]), truncate=st.booleans())
    def ask(self, texts: list[str], seconds: float, truncate: bool) -> None:
        request = self.predictor.predict(
            self.model, texts, Options(truncate=truncate), deadline=self.loop.time() + seconds
        )
        self.tasks.append(self.loop.create_task(request))

    @precondition(lambda self: self.tasks)
    @rule(which=st.integers(0, 50))
    def leave(self, which: int) -> None:
        self.tasks[which % len(self.tasks)].cancel()

    @rule(seconds=st.sampled_from([0.0, 0.005, 0.02, 0.1, 1.0]))
    def wait(self, seconds: float) -> None:
        self._pass(seconds)

    @rule()
    def hang_next(self) -> None:
        self.hangs = 1

    @rule(is_broken=st.booleans())
    def break_or_mend(self, is_broken: bool) -> None:
        self.lane.is_broken = is_broken

    @rule()
    def replace_engine(self) -> None:
        self.lane.is_broken = False
        self.loop.call_soon(self.lane.worker.supervisor.resume)

    @rule()
    def calibrate(self) -> None:
        self.lane.worker.calibrate(CostModel(RUN_S, 1e-4, 20), 60)

    @precondition(lambda self: not self.is_stopped)
    @rule()
    def stop(self) -> None:
        self.is_stopped = True
        self.loop.run_until_complete(self.lane.worker.stop())

    @invariant()
    def nothing_went_wrong_in_the_loop(self) -> None:
        assert self.faults == []

    @invariant()
    def the_engine_is_never_idle_while_work_waits(self) -> None:
        self._pass(0)  # what has been put is seen by the thread
        self._pass(0)
        worker = self.lane.worker
        waiting = [e for e in worker._queue._entries if e.ticket.deadline > self.loop.time() and not e.ticket.is_over]
        if waiting and not self.is_stopped and worker.supervisor.failure is None and not self.max_delay_s:
            assert worker._current is not None

    def teardown(self) -> None:
        if not hasattr(self, "loop"):
            return
        try:
            self._settle()
        finally:
            self.loop.close()

    def _settle(self) -> None:
        self._pass(120)  # every deadline is over
        for task in self.tasks:
            assert task.done()
            error = asyncio.CancelledError() if task.cancelled() else task.exception()
            assert error is None or isinstance(error, EXPECTED), error
        worker = self.lane.worker
        assert (worker._queue.announced_tokens, len(worker._queue), worker._queue.tokens) == (0, 0, 0)
        if not self.is_stopped:
            self.loop.run_until_complete(worker.stop())
        assert [entry for entry in self.entries if not entry.is_ended] == []  # and `end` refuses a second time
        assert (self.admission.inputs, self.model.leases) == (0, 0)
        self.nothing_went_wrong_in_the_loop()


TestRequests = Requests.TestCase
TestRequests.settings = settings(max_examples=150, stateful_step_count=40, deadline=None)
