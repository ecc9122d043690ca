"""Promotion and rollback through the whole application: 200 when this replica serves the version, 202 with the reason
when it does not yet, and a version whose own files are at fault is refused."""

from __future__ import annotations

import asyncio
import contextlib
import json
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, closing
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from model_registry.db import Database
from model_registry.migrations import migrate
from model_registry.refs import ModelRef
from model_registry.registry import Registry
from model_registry.store import FileStore
from modeling.backbone import ingest
from modeling.testing import write_tiny_checkpoint
from service.api import models
from service.api.deps import Services
from service.inference.errors import ModelNotReady
from service.inference.registry_watcher import RegistryWatcher
from tests.support.asgi import STEADY_FOLDER, Answered, AppUnderTest
from tests.support.world import World


class Replica(AppUnderTest):
    """Sees the registry when something moves through it, and does not poll."""

    def __init__(self, world: World) -> None:
        self._world = world
        super().__init__()

    @asynccontextmanager
    async def _build(self) -> AsyncIterator[Services]:
        unused: Any = SimpleNamespace()
        async with self._world.bare_pool(metrics=self.metrics) as pool:
            watcher = RegistryWatcher(self._world.registry, pool, poll_s=0.01)
            await watcher.refresh()
            await pool.settled()
            yield Services(
                settings=self.settings,
                pool=pool,
                predictor=unused,
                watcher=watcher,
                registry=self._world.registry,
                removal=unused,
                jobs=unused,
                datasets=unused,
                intake=unused,
                imports=unused,
                store=self._world.store,
                metrics=self.metrics,
                drain=self.drain,
                events=unused,
                backbones={},
                folder=STEADY_FOLDER,
            )

    def move(self, version: int, expected: int | None) -> Answered:
        body = {"version": version, "expected_version": expected}
        return self.ask("/models/m/aliases/champion", json.dumps(body).encode(), method="PUT")

    def roll_back(self) -> Answered:
        return self.ask("/models/m/rollback", b"{}")

    def get(self, path: str) -> Any:
        answered = self.ask(path, b"", method="GET")
        assert answered.status == 200, answered.body
        return answered.document


@pytest.fixture
def world(tmp_path: Path) -> Iterator[World]:
    database = Database(f"sqlite:///{tmp_path / 'registry.db'}")
    migrate(database)
    store = FileStore(tmp_path / "store")
    backbone = ingest(store, write_tiny_checkpoint(tmp_path / "tiny"), name="tiny", source="file:tiny")
    yield World(Registry(database), store, backbone, tmp_path)
    database.dispose()


@pytest.fixture(autouse=True)
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(models, "_SERVED_S", 0.3)


@pytest.fixture
def replica(world: World) -> Iterator[Replica]:
    for seed in (1, 2):
        world.publish_baseline("m", seed=seed)
    with closing(Replica(world)) as found:
        yield found


class Away:
    """A version's files, which another process keeps from being read for a while."""

    def __init__(self, world: World, version: int) -> None:
        self._manifest = world.store.local_path(f"models/default/m/{version}/manifest.json")
        self._hidden = self._manifest.with_name("elsewhere")

    def __enter__(self) -> None:
        self._manifest.rename(self._hidden)
        self._manifest.mkdir()  # reading it fails with an OSError that may pass

    def __exit__(self, *_: object) -> None:
        self._manifest.rmdir()
        self._hidden.rename(self._manifest)


def test_a_version_that_is_served_is_answered_with_200(replica: Replica) -> None:
    moved = replica.move(2, 1)
    assert (moved.status, moved.document["object"], moved.document["version"]) == (200, "alias.change", 2)
    undone = replica.roll_back()
    assert (undone.status, undone.document["version"]) == (200, 1)
    row = replica.get("/models/m")
    assert (row["wanted"], row["serving"], row["reason"]) == (1, 1, None)
    state = {"wanted": 1, "serving": 1, "reason": None, "retry_at": None}
    assert row["alias_states"] == replica.get("/models/m/versions")["alias_states"] == {"champion": state}


def test_a_move_from_elsewhere_is_refused_as_before(replica: Replica) -> None:
    assert replica.move(2, 7).status == 409
    assert replica.get("/models/m")["wanted"] == 1


def test_a_version_that_cannot_be_read_for_a_while_is_answered_with_202(replica: Replica, world: World) -> None:
    with Away(world, 2):
        moved = replica.move(2, 1)
        assert moved.status == 202
        pending = moved.document
        assert (pending["object"], pending["model"], pending["alias"]) == ("alias.pending", "m", "champion")
        assert (pending["wanted"], pending["serving"]) == (2, 1)
        assert "manifest.json" in pending["reason"]
        assert pending["retry_at"] is None or pending["retry_at"] > 0, "None: the next attempt has begun"
        assert (pending["change"]["from_version"], pending["change"]["version"]) == (1, 2)
        row = replica.get("/models/m")
        assert (row["wanted"], row["serving"], row["reason"]) == (2, 1, pending["reason"])


def test_a_rollback_to_a_version_that_does_not_load_is_not_answered_as_if_it_served(world: World) -> None:
    for seed in (1, 2):
        world.publish_baseline("m", seed=seed, promote=seed == 2)
    with closing(Replica(world)) as replica, Away(world, 1):
        undone = replica.roll_back()
        assert undone.status == 202
        assert (undone.document["wanted"], undone.document["serving"]) == (1, 2)
        assert "manifest.json" in undone.document["reason"]


def test_a_version_whose_files_are_altered_is_refused_and_the_alias_stays(replica: Replica, world: World) -> None:
    weights = world.store.local_path("models/default/m/2/baseline.safetensors")
    weights.write_bytes(weights.read_bytes()[:-4])
    refused = replica.move(2, 1)
    assert (refused.status, refused.document["code"]) == (409, "artifact_invalid")
    row = replica.get("/models/m")
    assert (row["wanted"], row["serving"], row["reason"]) == (1, 1, None)


def test_a_name_registered_a_moment_ago_is_found_without_a_poll(world: World) -> None:
    async def scenario() -> tuple[bool, bool]:
        async with world.bare_pool() as pool:
            watcher = RegistryWatcher(world.registry, pool, poll_s=0.01)
            await watcher.refresh()
            world.publish_baseline("m", seed=1)
            before = pool.status.alias(("default", "m", "champion"), 1).serving
            await asyncio.gather(*(watcher.look() for _ in range(50)))
            await pool.settled()
            return before is None, pool.status.alias(("default", "m", "champion"), 1).serving == 1

    assert asyncio.run(scenario()) == (True, True)


def test_right_after_a_registration_a_replica_that_hardly_polls_says_503_and_then_answers(world: World) -> None:
    """Whatever a client has been told of by another replica is not unknown here."""

    async def scenario() -> list[int | None]:
        async with world.bare_pool() as pool:
            watcher = RegistryWatcher(world.registry, pool, poll_s=60)
            pool.look_again = watcher.look
            await watcher.refresh()
            world.publish_baseline("m", seed=1)
            served: list[int | None] = []
            for name in ("m", "m:1", "m@champion"):
                with contextlib.suppress(ModelNotReady):
                    served.append((await pool.find("default", ModelRef.parse(name))).version)
            await pool.settled()
            return [*served, (await pool.find("default", ModelRef.parse("m"))).version]

    started = time.monotonic()
    served = asyncio.run(scenario())
    assert set(served) == {1}
    assert time.monotonic() - started < 30, "as long as a poll"


def test_the_backbone_that_hides_a_model_is_told_by_both(world: World) -> None:
    world.publish("tiny", seed=1)

    class WithBackbone(Replica):
        @asynccontextmanager
        async def _build(self) -> AsyncIterator[Services]:
            async with super()._build() as services:
                await services.pool.add_backbone("tiny", self._world.backbone)
                await services.watcher.refresh()
                services.backbones["tiny"] = self._world.backbone  # type: ignore[index]
                yield services

    with closing(WithBackbone(world)) as replica:
        backbone, model = replica.get("/models")["data"]
        assert "hides the model" in backbone["reason"]
        assert "tiny:1" in model["reason"]
