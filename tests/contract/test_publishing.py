"""A version takes the champion's place only where the champion is still the one it was compared with."""

from __future__ import annotations

from typing import Any

import pytest

from finetune.worker.supervisor import promotion_of
from model_registry.db import Database
from model_registry.manifest import ModelManifest
from model_registry.registry import Promotion, Registry


@pytest.fixture
def registry(database: Database) -> Registry:
    return Registry(database)


def publish(registry: Registry, promotion: Promotion | None = None) -> tuple[int, bool]:
    with registry.transaction() as connection:
        version = registry.reserve(
            connection, tenant="default", name="m", task="text-classification", kind="head", method="x", job_id=None
        )
        manifest = ModelManifest(
            tenant="default",
            name="m",
            version=version,
            kind="head",
            method="x",
            labels=("a", "b"),
            created_at=0.0,
            files=(),
        )
        return version, registry.publish(connection, manifest, actor="ann", promotion=promotion)


def champion(registry: Registry) -> int | None:
    found = registry.champion("default", "m")
    return None if found is None else found.version


def over(version: int | None, is_wanted: bool = True) -> Promotion:
    return Promotion(is_wanted=is_wanted, over=version, reason="passed every gate")


def test_it_moves_over_the_champion_it_was_judged_against(registry: Registry) -> None:
    assert champion(registry) is None
    assert publish(registry) == (1, True)
    assert publish(registry, over(1)) == (2, True)
    assert champion(registry) == 2
    change = registry.history(tenant="default", name="m")[0]
    assert (change.from_version, change.to_version, change.reason) == (1, 2, "passed every gate")


def test_a_champion_that_moved_meanwhile_stays(registry: Registry) -> None:
    publish(registry)
    publish(registry, over(1))
    assert publish(registry, over(1)) == (3, False)
    assert champion(registry) == 2


def test_a_champion_that_came_meanwhile_stays(registry: Registry) -> None:
    publish(registry)
    assert publish(registry, over(None)) == (2, False)
    assert champion(registry) == 1


def test_a_first_version_that_missed_its_minimum_is_registered_but_not_champion(registry: Registry) -> None:
    assert publish(registry, over(None, is_wanted=False)) == (1, False)
    assert champion(registry) is None
    assert publish(registry, over(None)) == (2, True)


@pytest.mark.parametrize(
    ("judged", "expected"),
    [
        (None, None),
        ({"wanted": "manual", "champion": None, "is_passed": True}, None),
        ({"wanted": "manual", "champion": None, "is_passed": False}, (False, None)),
        ({"wanted": "if_better", "champion": 4, "is_passed": True}, (True, 4)),
        ({"wanted": "if_better", "champion": 4, "is_passed": False}, (False, 4)),
        ({"wanted": "if_better", "champion": None, "is_passed": True}, (True, None)),
    ],
)
def test_what_the_gates_outcome_means(judged: dict[str, Any] | None, expected: tuple[bool, int | None] | None) -> None:
    found = promotion_of(judged)
    assert (None if found is None else (found.is_wanted, found.over)) == expected


@pytest.mark.parametrize("judged", [None, {"wanted": "manual", "champion": None, "is_passed": True}])
def test_the_version_of_a_cancelled_job_is_no_first_champion(registry: Registry, judged: dict[str, Any] | None) -> None:
    assert publish(registry, promotion_of(judged, may_be_first=False)) == (1, False)
    assert champion(registry) is None


def test_it_may_take_the_place_of_one_that_it_was_compared_with(registry: Registry) -> None:
    publish(registry)
    judged = {"wanted": "if_better", "champion": 1, "is_passed": True}
    assert publish(registry, promotion_of(judged, may_be_first=False)) == (2, True)
