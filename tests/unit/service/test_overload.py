"""More work than the engine can do, in virtual time: what is admitted is done in time, the rest is refused at once."""

from __future__ import annotations

import asyncio
import random
from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest

from modeling.tasks import Options
from service.inference.capacity import AdmissionController, CostModel
from service.inference.engine_worker import BatchLimits
from service.inference.errors import DeadlineExceeded, QueueFull
from service.inference.predictor import Predictor
from service.inference.queue import Batch
from service.metrics import ServingMetrics
from service.settings import ServingSettings
from tests.support.lanes import WordLane, WordModel
from tests.support.uncollected import uncollected
from tests.support.virtual import elapse, run_virtually, virtual_runtime

FIXED_S, PER_TOKEN_S, MAX_TOKENS, MAX_DELAY_S = 2e-3, 1e-4, 512, 2.0
BATCH_S = FIXED_S + PER_TOKEN_S * MAX_TOKENS
PEAK_TOKENS_PER_S = MAX_TOKENS / BATCH_S


class Service:
    """The path of a request over an engine that takes its time by the cost model, give or take a tenth."""

    def __init__(self, *, max_inputs: int = 100_000, max_delay_s: float = MAX_DELAY_S, slowness: float = 1.0) -> None:
        draw = random.Random(3)

        def engine_s(work: Any) -> float:
            if not isinstance(work, Batch):
                return 0.0
            return slowness * (FIXED_S + PER_TOKEN_S * work.tokens) * draw.uniform(0.9, 1.1)

        runtime = virtual_runtime(
            engine_s, lambda call: 1e-4 + 2e-5 * sum(len(ticket.inputs) for _, ticket in call.burst)
        )
        self.now = runtime.clock
        self.lane = WordLane(BatchLimits(MAX_TOKENS, 128), runtime=runtime)
        self.lane.worker.start()
        self.lane.worker.calibrate(CostModel(slowness * FIXED_S, slowness * PER_TOKEN_S, 20), MAX_TOKENS)
        self.admission = AdmissionController(max_inputs=max_inputs, max_queue_delay_s=max_delay_s)
        self.metrics = ServingMetrics()
        self.model: Any = WordModel(self.lane)
        self.predictor = Predictor(
            self.admission, self.metrics, max_inputs=256, preprocessor_threads=2, runtime=runtime
        )
        self.latencies: list[float] = []
        self.tokens = 0
        self.refusals: list[tuple[Exception, float]] = []

    async def ask(self, *lengths: int, seconds: float = 30.0) -> None:
        """Keeps how long the answer took, or the refusal and how long that took."""
        started = self.now()
        try:
            await self.predictor.predict(
                self.model,
                ["w " * length for length in lengths],
                Options(),
                deadline=started + seconds,
            )
        except (QueueFull, DeadlineExceeded) as error:
            self.refusals.append((error, self.now() - started))
            return
        self.latencies.append(self.now() - started)
        self.tokens += sum(lengths)

    async def load(self, factor: float, *, seconds: float, length: Callable[[], int], timeout_s: float = 30.0) -> float:
        """An open loop at `factor` times the peak, in bursts; the tokens answered per second until all is done."""
        draw, tasks, started = random.Random(5), set(), self.now()
        mean = sum(length() for _ in range(2000)) / 2000
        while self.now() < started + seconds:
            size = 1 if draw.random() < 0.9 else 20
            tasks |= {asyncio.create_task(self.ask(length(), seconds=timeout_s)) for _ in range(size)}
            await elapse(draw.expovariate(factor * PEAK_TOKENS_PER_S / mean / 2.9))
        await asyncio.gather(*tasks)
        return self.tokens / (self.now() - started)

    def percentile(self, share: float) -> float:
        return sorted(self.latencies)[int(share * len(self.latencies))]


def mixed(seed: int) -> Callable[[], int]:
    draw = random.Random(seed)
    return lambda: max(4, min(256, int(draw.lognormvariate(4, 0.8))))


@pytest.mark.parametrize("factor", [2.0, 5.0])
def test_far_too_much_work_leaves_goodput_and_latency_as_promised(factor: float) -> None:
    async def scenario() -> Service:
        service = Service()
        goodput = await service.load(factor, seconds=20, length=mixed(1))
        assert goodput >= 0.9 * PEAK_TOKENS_PER_S
        await service.lane.worker.stop()
        return service

    service = run_virtually(scenario())
    assert service.percentile(0.99) <= MAX_DELAY_S + BATCH_S
    assert service.refusals
    for error, took in service.refusals:
        assert isinstance(error, QueueFull)
        assert took == 0
        assert error.retry_after_s and 0 < error.retry_after_s < 10


def test_with_less_than_the_engine_can_do_nobody_is_refused() -> None:
    async def scenario() -> Service:
        service = Service()
        await service.load(0.8, seconds=20, length=mixed(2))
        await service.lane.worker.stop()
        return service

    service = run_virtually(scenario())
    assert service.refusals == []
    assert service.percentile(0.5) < 10 * BATCH_S


async def patient_clients(service: Service, *, seconds: float) -> None:
    """64 of them, each with a request of one text of 64 tokens after the other, and time enough."""

    async def client() -> None:
        while service.now() < seconds:
            refused = len(service.refusals)
            await service.ask(64)
            await elapse(1.0 if len(service.refusals) > refused else 0.01)

    await asyncio.gather(*(client() for _ in range(64)))
    await service.lane.worker.stop()


@pytest.mark.parametrize("slowness", [1, 5, 10])
def test_patient_clients_are_not_refused_by_default_on_a_slow_machine(slowness: float) -> None:
    """On one ten times slower, which computes 15 such texts a second, the last of 64 waits some 4 s."""
    max_delay_s = ServingSettings().max_queue_delay_ms / 1000

    async def scenario() -> Service:
        service = Service(max_delay_s=max_delay_s, slowness=slowness)
        await patient_clients(service, seconds=60)
        return service

    service = run_virtually(scenario())
    assert service.refusals == []
    assert service.percentile(0.99) < max_delay_s


def test_under_overload_what_is_admitted_meets_its_deadline() -> None:
    async def scenario() -> Service:
        service = Service()
        await service.load(2.0, seconds=20, length=mixed(4), timeout_s=0.8)
        await service.lane.worker.stop()
        return service

    service = run_virtually(scenario())
    late = [took for _, took in service.refusals if took > 0]
    assert len(late) < 0.05 * len(service.latencies)
    assert service.tokens > 0.85 * 20 * PEAK_TOKENS_PER_S


def test_a_request_that_cannot_be_in_time_is_refused_at_once_and_not_computed() -> None:
    async def scenario() -> tuple[Service, int]:
        service = Service()
        backlog = [asyncio.create_task(service.ask(200, 200)) for _ in range(10)]
        await elapse(0.01)
        await service.ask(7, seconds=0.1)
        await asyncio.gather(*backlog)
        await service.ask(100, seconds=0.005)  # even alone it takes 12 ms
        computed = sum(len(text.split()) == 7 for batch in service.lane.seen for text in batch)
        await service.lane.worker.stop()
        return service, computed

    service, computed = run_virtually(scenario())
    assert [(type(error), took) for error, took in service.refusals] == [(DeadlineExceeded, 0), (DeadlineExceeded, 0)]
    assert computed == 0
    rejected = [
        sample.value
        for sample in service.metrics.rejected_total.collect()[0].samples
        if sample.labels["model"] == "m" and sample.labels["reason"] == "deadline"
    ]
    assert rejected == [2]


def test_a_burst_cannot_slip_in_while_its_first_part_is_being_tokenised() -> None:
    async def scenario() -> Service:
        service = Service()
        await asyncio.gather(*(service.ask(200) for _ in range(500)))  # 100,000 tokens in one moment, 11 s of work
        await service.lane.worker.stop()
        return service

    service = run_virtually(scenario())
    assert service.percentile(1 - 1e-9) <= MAX_DELAY_S + BATCH_S
    assert len(service.refusals) > 350


def test_ten_thousand_clients_are_answered_or_sent_away_without_a_wait() -> None:
    async def scenario() -> Service:
        service = Service(max_inputs=512)
        tasks = [asyncio.create_task(service.ask(20)) for _ in range(10_000)]
        await elapse(0.001)
        assert service.admission.inputs <= 512
        assert len(service.refusals) + service.admission.inputs == 10_000
        await asyncio.gather(*tasks)
        await service.lane.worker.stop()
        return service

    service = run_virtually(scenario())
    assert len(service.latencies) + len(service.refusals) == 10_000
    assert all(took == 0 for _, took in service.refusals)


def test_clients_that_leave_cost_nothing_further() -> None:
    async def scenario() -> tuple[int, float]:
        service = Service(max_inputs=512)
        tasks = [asyncio.create_task(service.ask(60)) for _ in range(300)]
        await elapse(0.08)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        assert service.admission.inputs == 0
        batches = len(service.lane.seen)
        await elapse(1)
        await service.lane.worker.stop()
        return len(service.lane.seen) - batches, service.lane.worker.forecast().wait_s

    more, wait_s = run_virtually(scenario())
    assert more <= 1  # the run that had begun
    assert wait_s == 0


def test_requests_leave_nothing_to_the_garbage_collector() -> None:
    async def scenario() -> tuple[Service, Counter[str]]:
        service = Service(max_inputs=20)
        await service.ask(5)
        with uncollected() as kinds:
            await asyncio.gather(*(service.ask(5, 6) for _ in range(30)))
        await service.lane.worker.stop()
        return service, kinds

    service, kinds = run_virtually(scenario())
    assert len(service.refusals) == 20
    assert sum(kinds.values()) < 10, kinds
