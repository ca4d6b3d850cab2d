"""The ATLAS endpoints: status, memory, statistics, metrics, run-time configuration."""

from __future__ import annotations

from typing import Any

from litestar import Controller, Response, get, post
from litestar.di import NamedDependency
from litestar.params import FromQuery, JSONBody, SkipValidation

from server.errors import Forbidden
from server.http import HttpRequest, atlas_responses, context_of, event_stream, json_response
from server.schemas import atlas as schema
from server.schemas.runtime_config import ConfigChange, ConfigResponse
from server.services.memory import MemoryService
from server.services.monitoring import Monitoring
from server.services.runtime_config import RuntimeConfig
from server.validation import invalid, parse


class AtlasController(Controller):
    """State and figures of the memory subsystem."""

    path = "/v1/atlas"
    tags = ("ATLAS",)

    @get("/status", opt={"unmetered": True}, responses=atlas_responses(schema.StatusResponse))
    async def status(self, request: HttpRequest, monitoring: NamedDependency[Monitoring]) -> Response[Any]:
        """The memory subsystem at a glance."""
        return json_response(monitoring.status(context_of(request).identity.owner))

    @get("/stats", responses=atlas_responses(schema.StatsResponse))
    async def stats(self, monitoring: NamedDependency[Monitoring]) -> Response[Any]:
        """Counters since the start and exponential averages."""
        return json_response(monitoring.statistics())

    @get("/metrics", responses=atlas_responses(schema.MetricsResponse))
    async def metrics(self, monitoring: NamedDependency[Monitoring]) -> Response[Any]:
        """Counts and latencies of this moment."""
        return json_response(monitoring.metrics())

    @get("/metrics/stream", responses=atlas_responses(schema.MetricsEvent))
    async def metrics_stream(self, request: HttpRequest, monitoring: NamedDependency[Monitoring]) -> Response[Any]:
        """Server-sent events with the figures of every interval."""
        subscriber = monitoring.subscribe()
        context_of(request).cleanup.append(lambda: monitoring.unsubscribe(subscriber))
        return event_stream(subscriber.read())

    @get("/config", responses=atlas_responses(ConfigResponse))
    async def get_config(
        self, memory: NamedDependency[MemoryService], config: NamedDependency[RuntimeConfig]
    ) -> Response[Any]:
        """The defaults of the `atlas` object and the intervals."""
        memory.require()
        return json_response(ConfigResponse(status="success", data=config.shown(memory.dim)))

    @post("/config", status_code=200, responses=atlas_responses(ConfigResponse, body=True))
    async def set_config(
        self,
        request: HttpRequest,
        data: SkipValidation[JSONBody[ConfigChange]],
        memory: NamedDependency[MemoryService],
        config: NamedDependency[RuntimeConfig],
    ) -> Response[Any]:
        """Changes them, all or none; needs an admin key."""
        memory.require()
        if not context_of(request).identity.admin:
            raise Forbidden("This key may not change the configuration")
        config.change(parse(ConfigChange, data), memory.engine)
        return json_response(ConfigResponse(status="success", data=config.shown(memory.dim)))


class MemoryController(Controller):
    """The caller's sessions; an empty body is the same as `{}`, which never stands for something destructive."""

    path = "/v1/atlas/memory"
    tags = ("ATLAS memory",)

    @get("/", responses=atlas_responses(schema.MemoryResponse, 404))
    async def info(
        self, request: HttpRequest, memory: NamedDependency[MemoryService], session_id: FromQuery[str | None] = None
    ) -> Response[Any]:
        """State of one session's memory, or totals over all of the caller's."""
        return json_response(await memory.info(context_of(request).identity.owner, session_id))

    @post("/save", status_code=200, responses=atlas_responses(schema.SaveResponse, 404, 409, 507, body=True))
    async def save(
        self,
        request: HttpRequest,
        memory: NamedDependency[MemoryService],
        data: SkipValidation[JSONBody[schema.SaveRequest | None]] = None,
    ) -> Response[Any]:
        """Saves every session, one session, or a context with the caller's state."""
        return json_response(await memory.save(context_of(request).identity.owner, parse(schema.SaveRequest, data)))

    @post("/load", status_code=200, responses=atlas_responses(schema.LoadResponse, 404, 409, 507, body=True))
    async def load(
        self,
        request: HttpRequest,
        memory: NamedDependency[MemoryService],
        data: SkipValidation[JSONBody[schema.LoadRequest | None]] = None,
    ) -> Response[Any]:
        """Loads a file of sessions, or one context with the caller's state."""
        return json_response(await memory.load(context_of(request).identity.owner, parse(schema.LoadRequest, data)))

    @post("/list", status_code=200, responses=atlas_responses(schema.ListResponse, body=True))
    async def page(
        self,
        request: HttpRequest,
        memory: NamedDependency[MemoryService],
        data: SkipValidation[JSONBody[schema.ListRequest | None]] = None,
    ) -> Response[Any]:
        """Lists the caller's contexts, a page at a time."""
        return json_response(await memory.page(context_of(request).identity.owner, parse(schema.ListRequest, data)))

    @post("/rename", status_code=200, responses=atlas_responses(schema.RenameResponse, 404, 409, 507, body=True))
    async def rename(
        self,
        request: HttpRequest,
        data: SkipValidation[JSONBody[schema.RenameRequest]],
        memory: NamedDependency[MemoryService],
    ) -> Response[Any]:
        """Gives a session another name, with its save point; a name that is taken is refused."""
        wanted = parse(schema.RenameRequest, data)
        return json_response(await memory.rename(context_of(request).identity.owner, wanted))

    @post("/delete", status_code=200, responses=atlas_responses(schema.DeleteResponse, 404, 409, body=True))
    async def delete(
        self,
        request: HttpRequest,
        data: SkipValidation[JSONBody[schema.DeleteRequest]],
        memory: NamedDependency[MemoryService],
    ) -> Response[Any]:
        """Removes one context and its files."""
        wanted = parse(schema.DeleteRequest, data)
        return json_response(await memory.delete(context_of(request).identity.owner, wanted))

    @post("/fork", status_code=200, responses=atlas_responses(schema.ForkResponse, 404, 409, 507, body=True))
    async def fork(
        self,
        request: HttpRequest,
        data: SkipValidation[JSONBody[schema.ForkRequest]],
        memory: NamedDependency[MemoryService],
    ) -> Response[Any]:
        """Begins a session where another is; the two go on apart."""
        return json_response(await memory.fork(context_of(request).identity.owner, parse(schema.ForkRequest, data)))

    @post("/reset", status_code=200, responses=atlas_responses(schema.ResetResponse, 404, 409, 507, body=True))
    async def reset(
        self,
        request: HttpRequest,
        memory: NamedDependency[MemoryService],
        data: SkipValidation[JSONBody[schema.ResetRequest | None]] = None,
    ) -> Response[Any]:
        """Empties one session's memory, or with `{"all": true}` those of all the caller's; an empty body is neither."""
        memory.require(endpoints=True)
        wanted = parse(schema.ResetRequest, data)
        if wanted.all and wanted.session_id is not None:
            raise invalid("all", "cannot be combined with session_id")
        if not wanted.all and wanted.session_id is None:
            raise invalid("session_id", 'required field is missing; {"all": true} resets every session')
        return json_response(await memory.reset(context_of(request).identity.owner, wanted.session_id))
