"""Refusals for want of room, before a request has cost more than its parsing.

A server that is asked for twice what it can do refuses every other request, and on the processors that its engine
needs. So while it is overloaded, what came whole and is plainly an inference request is looked at by the protocol, by
the same rules as later: who calls, what is asked of which model, whether there is room. Where there is none, the answer
is what `DirectRoutes` would have sent; in all other cases the request goes the usual way, as if nobody had looked.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

from starlette.responses import Response

from model_registry.errors import InvalidReference
from model_registry.refs import ModelRef
from service.api.answers import reference
from service.api.auth import KeyAuthentication
from service.api.direct import JSON, DirectRoute, Serving, decoded
from service.api.guard import DrainState, request_id_in
from service.api.measure import Counts, inference_route
from service.api.problems import Problem


class Refuses(Protocol):
    @property
    def is_overloaded(self) -> bool: ...
    def refusal(self, tenant: str, ref: ModelRef, inputs: Any, /) -> Exception | None: ...


class Inference(Serving, Protocol):
    """What is needed of `deps.Services`."""

    @property
    def predictor(self) -> Refuses: ...


class EarlyRefusal:
    """`services` is asked only once the application has started."""

    def __init__(
        self,
        routes: Mapping[str, DirectRoute[Any]],
        services: Callable[[], Inference],
        authentication: KeyAuthentication,
        metrics: Counts,
        drain: DrainState,
    ) -> None:
        self._routes, self._services, self._drain = routes, services, drain
        self._authentication, self._metrics = authentication, metrics

    @property
    def is_due(self) -> bool:
        """Whether requests are worth a look."""
        return not self._drain.draining and self._services().predictor.is_overloaded

    def answer(self, path: str, headers: Sequence[tuple[bytes, bytes]], body: bytes) -> Response | None:
        """The refusal of a POST, counted; None where it shall go the usual way."""
        started = time.monotonic()
        by_name = dict(reversed(headers))
        found = inference_route(path)
        if found is None or by_name.get(b"content-type", b"").lower() not in JSON or b"content-encoding" in by_name:
            return None
        route, services = self._routes[found[0]], self._services()
        content = decoded(route, body)
        if content is None:
            return None
        named, inputs = route.asked(content)
        try:
            principal = self._authentication.admit(headers)
            ref = reference(found[1] or named, services.settings.default_model)
        except (Problem, InvalidReference):
            return None
        error = services.predictor.refusal(principal.tenant, ref, inputs) if principal.may("predict") else None
        if error is None:
            return None
        request_id = request_id_in(by_name)
        response = route.refuse(error, {"method": "POST", "path": path, "state": {"request_id": request_id}})
        if response is not None:
            response.raw_headers.append((b"x-request-id", request_id.encode()))
            labels = services.pool.labels_of(principal.tenant, ref)
            self._metrics.count_request(labels, status=response.status_code, seconds=time.monotonic() - started)
        return response
