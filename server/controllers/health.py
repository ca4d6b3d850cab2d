"""Health, readiness and Prometheus metrics."""

from __future__ import annotations

from typing import Any

from litestar import Controller, Response, get, head
from litestar.di import NamedDependency
from msgspec import UNSET

from server.errors import Unavailable
from server.http import json_response, openai_responses
from server.prometheus import CONTENT_TYPE, Metrics
from server.schemas.llamacpp import Health
from server.services.engine_supervisor import EngineSupervisor
from server.services.monitoring import Monitoring, fitting_progress

_PUBLIC = {"public": True}
_UNMETERED = {"unmetered": True}


class HealthController(Controller):
    """For supervisors and balancers; the health checks need no key."""

    tags = ("Operations",)

    @get(["/health", "/v1/health"], opt=_PUBLIC, responses=openai_responses(Health, 500, public=True))
    async def health(self, supervisor: NamedDependency[EngineSupervisor]) -> Response[Any]:
        """200 while the server works, 503 while the model loads, 500 once the engine has died."""
        return _health(supervisor)

    @head(["/health", "/v1/health"], opt=_PUBLIC, include_in_schema=False)
    async def health_head(self, supervisor: NamedDependency[EngineSupervisor]) -> Response[None]:
        """The same without a body."""
        return Response(None, status_code=_health(supervisor).status_code)

    @get("/ready", opt=_PUBLIC, responses=openai_responses(Health, public=True))
    async def ready(self, supervisor: NamedDependency[EngineSupervisor]) -> Response[Any]:
        """200 while new requests are accepted, 503 while loading, draining or broken. Tells of a memory being fitted."""
        if supervisor.ready:
            return json_response(Health(status="ready", fitting=fitting_progress(supervisor.engine.fitting()) or UNSET))
        if supervisor.state == "loading":
            raise Unavailable("The model is still loading", code="loading", retry_after=2.0)
        raise Unavailable("The server does not accept requests", code="draining", retry_after=5.0)

    @get("/metrics", media_type="text/plain", opt=_UNMETERED, responses=openai_responses(str))
    async def prometheus(
        self, metrics: NamedDependency[Metrics], monitoring: NamedDependency[Monitoring]
    ) -> Response[Any]:
        """Prometheus metrics."""
        monitoring.require_metrics()
        return Response(metrics.render(), headers={"content-type": CONTENT_TYPE}, media_type="text/plain")


def _health(supervisor: EngineSupervisor) -> Response[Any]:
    if supervisor.dead:
        return json_response(Health(status="error"), status=500)
    if supervisor.state == "loading":
        raise Unavailable("The model is still loading", code="loading", retry_after=2.0)
    return json_response(Health(status="ok"))
