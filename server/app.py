"""The composition root: every part of the server is made and joined here, and nowhere else.

`create_app` is one long function because it is one list: each part is made from those above it.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Iterable
from contextlib import asynccontextmanager
from typing import Any, cast

from litestar import Litestar
from litestar.di import Provide
from litestar.exceptions import HTTPException
from litestar.routes import HTTPRoute
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric

from atlas_jax.engine.api import EngineProtocol
from server.admission import Admission
from server.config.settings import ServerSection, Settings
from server.controllers.atlas import AtlasController, MemoryController
from server.controllers.conversations import ConversationsController
from server.controllers.health import HealthController
from server.controllers.llamacpp import LlamaCppController
from server.controllers.messages import MessagesController
from server.controllers.ollama import OllamaController
from server.controllers.openai import OpenAIController
from server.controllers.responses import ResponsesController
from server.controllers.root import RootController
from server.http import error_response, json_request
from server.lifecycle import Lifecycle
from server.middleware.asgi import App, AsgiMiddleware
from server.middleware.auth import KeyRing
from server.middleware.bodies import Bodies
from server.middleware.connections import Connections, connection_limit
from server.middleware.cors import Cors
from server.middleware.hosts import HostCheck
from server.middleware.rate_limits import FailureBudget, KeyLimits
from server.openapi import openapi_config
from server.prometheus import Metrics
from server.services.conversation_store import ConversationStore
from server.services.conversations import ConversationsService
from server.services.embeddings import EmbeddingService
from server.services.engine_supervisor import EngineSupervisor
from server.services.front_page import FrontPage
from server.services.generation import NO_CONTEXT, Generator
from server.services.inference import Inference
from server.services.llamacpp import LlamaCppService
from server.services.memory import MemoryService
from server.services.messages import MessagesService
from server.services.models import Models
from server.services.monitoring import Monitoring
from server.services.ollama import OllamaService
from server.services.persistence import Persistence
from server.services.response_sessions import ResponseSessions
from server.services.response_store import ResponseStore
from server.services.responses import ResponsesService
from server.services.runtime_config import RuntimeConfig
from server.services.stats import ServerStats
from server.services.thread_pools import ThreadPools
from server.services.tokenization import Tokenization

_LOOPBACK = ("127.0.0.1", "::1", "localhost")
_CONTROLLERS = (
    OpenAIController,
    ResponsesController,
    ConversationsController,
    MessagesController,
    OllamaController,
    AtlasController,
    MemoryController,
    HealthController,
    LlamaCppController,
    RootController,
)
EngineSource = EngineProtocol | Callable[[], EngineProtocol]


def create_app(settings: Settings, engine: EngineSource) -> tuple[Litestar, AsgiMiddleware]:
    """Builds the server.

    Args:
      engine: an engine, or a function that opens one. A function runs in a thread once the server listens, and until it
        has returned `/health` answers 503.

    Returns:
      The Litestar application, whose `state.lifecycle` is the `Lifecycle`, and the ASGI application to serve.

    Raises:
      KeyFileError: the keys file cannot be used.
    """
    server, atlas = settings.server, settings.atlas
    keys = KeyRing.from_file(server.api_keys_file) if server.api_keys_file else KeyRing()
    supervisor = EngineSupervisor()
    config = RuntimeConfig(settings)
    stats = ServerStats(config, atlas.metrics_history_size)
    admission = _admission(server, keys, server.max_concurrent)
    contexts = _admission(server, keys, atlas.context_pool_size or server.max_concurrent, exhausted=NO_CONTEXT)
    connections = Connections(
        limit=connection_limit(server.max_connections),
        header_timeout=server.header_timeout,
        stall_timeout=server.client_timeout,
        crowded=lambda: admission.waiting + contexts.waiting > 0,
    )
    pools = ThreadPools()
    limits = KeyLimits(server.rate_limit_requests, server.rate_limit_tokens)
    monitoring = Monitoring(supervisor=supervisor, stats=stats, config=config, contexts=contexts, settings=settings)
    metrics = Metrics(
        engine=monitoring.engine_stats, server=lambda: _figures(admission, contexts, connections, stats, persistence)
    )
    responses = ResponseStore(supervisor, pools)
    persistence = Persistence(
        supervisor=supervisor,
        config=config,
        settings=settings,
        owners=keys.owners,
        metrics=metrics,
        responses=responses,
    )
    tokenization = Tokenization(supervisor, pools)
    models = Models(supervisor, server.model_alias, strict=server.strict_model)
    front_page = FrontPage(supervisor, keys=not keys.open, memory=atlas.enabled)
    memory = MemoryService(supervisor, settings, config, metrics, pools)
    generator = Generator(
        supervisor=supervisor,
        admission=admission,
        contexts=contexts,
        limits=limits,
        stats=stats,
        metrics=metrics,
        config=config,
        ping_interval=server.ping_interval,
        max_answer_tokens=server.max_answer_tokens,
    )
    lifecycle = Lifecycle(
        supervisor=supervisor,
        admission=admission,
        contexts=contexts,
        pools=pools,
        monitoring=monitoring,
        persistence=persistence,
        config=config,
        load=engine if callable(engine) else lambda: engine,
        wait=not callable(engine),
        front_page=front_page,
        stats=stats,
    )
    inference = Inference(
        generator=generator,
        tokenization=tokenization,
        models=models,
        sampling=settings.sampling,
        config=config,
        memory_enabled=atlas.enabled,
    )
    embeddings = EmbeddingService(
        generator=generator, tokenization=tokenization, models=models, config=config, pools=pools
    )
    conversations, sessions = ConversationStore(responses), ResponseSessions(supervisor, pools, settings)
    app = Litestar(
        route_handlers=_CONTROLLERS,
        dependencies=_dependencies(
            inference=inference,
            responses=ResponsesService(
                inference=inference,
                supervisor=supervisor,
                tokenization=tokenization,
                store=responses,
                conversations=conversations,
                sessions=sessions,
                settings=settings,
            ),
            conversations=ConversationsService(conversations=conversations, responses=responses, sessions=sessions),
            embeddings=embeddings,
            models=models,
            memory=memory,
            monitoring=monitoring,
            config=config,
            supervisor=supervisor,
            front_page=front_page,
            metrics=metrics,
            llamacpp=LlamaCppService(
                inference=inference,
                supervisor=supervisor,
                tokenization=tokenization,
                models=models,
                sampling=settings.sampling,
            ),
            messages=MessagesService(
                inference=inference, supervisor=supervisor, tokenization=tokenization, models=models
            ),
            ollama=OllamaService(inference=inference, embeddings=embeddings, supervisor=supervisor, models=models),
        ),
        exception_handlers={HTTPException: error_response, Exception: error_response},
        lifespan=[_lifespan],
        openapi_config=openapi_config(),
        request_class=json_request(Bodies(pools, max_bytes=server.max_body_bytes)),
        request_max_body_size=server.max_body_bytes,
        logging_config=None,
    )
    app.state["lifecycle"], app.state["connections"] = lifecycle, connections
    return app, _middleware(app, server, keys, limits, metrics)


def _middleware(
    app: Litestar, server: ServerSection, keys: KeyRing, limits: KeyLimits, metrics: Metrics
) -> AsgiMiddleware:
    # A page that rebinds its name to this machine has no key, so with keys every name may be used.
    allowed_hosts = server.allowed_hosts or (() if keys.open else ("*",))
    return AsgiMiddleware(
        cast(App, app),
        hosts=HostCheck(allowed_hosts, bound=server.host),
        cors=Cors(server.cors_origins),
        keys=keys,
        limits=limits,
        failures=FailureBudget(server.failure_limit),
        metrics=metrics,
        public=_paths_marked(app, "public"),
        unmetered=_paths_marked(app, "unmetered"),
        max_body_bytes=server.max_body_bytes,
        client_timeout=server.client_timeout,
    )


def lifecycle_of(app: Litestar) -> Lifecycle:
    """The lifecycle of an application made by `create_app`."""
    lifecycle: Lifecycle = app.state["lifecycle"]
    return lifecycle


def connections_of(app: Litestar) -> Connections:
    """The registry of connections of an application made by `create_app`."""
    connections: Connections = app.state["connections"]
    return connections


@asynccontextmanager
async def _lifespan(app: Litestar) -> AsyncIterator[None]:
    lifecycle = lifecycle_of(app)
    await lifecycle.start()
    try:
        yield
    finally:
        await lifecycle.stop()


def _dependencies(**services: Any) -> dict[str, Provide]:
    return {name: Provide(_constant(service), sync_to_thread=False) for name, service in services.items()}


def _constant(value: Any) -> Callable[[], Any]:
    def provide() -> Any:
        return value

    return provide


def _paths_marked(app: Litestar, mark: str) -> set[str]:
    """Paths whose every handler carries this mark among its options."""
    return {
        route.path
        for route in app.routes
        if isinstance(route, HTTPRoute)
        # Litestar adds an OPTIONS handler of its own, which carries no options of ours.
        and all(handler.opt.get(mark) for handler in route.route_handlers if "OPTIONS" not in handler.http_methods)
    }


def _admission(server: ServerSection, keys: KeyRing, places: int, *, exhausted: str | None = None) -> Admission:
    """An admission, with room kept for others where there may be any: several keys, or without keys several addresses."""
    alone = server.host in _LOOPBACK if keys.open else keys.single
    per_key, reserve = server.max_waiting_per_key, server.reserved_concurrent
    if per_key is None:
        per_key = server.max_waiting if alone else max(1, server.max_waiting // 2)
    if reserve is None:
        reserve = 0 if alone else max(1, places // 4)
    return Admission(
        running=places,
        waiting=server.max_waiting,
        per_key=per_key,
        timeout=server.queue_timeout,
        reserve=reserve,
        exhausted=exhausted,
    )


def _figures(
    admission: Admission, contexts: Admission, connections: Connections, stats: ServerStats, persistence: Persistence
) -> Iterable[Metric]:
    for name, text, value in (
        ("atlas_admission_requests_running", "Places that are taken, one a sequence", admission.running),
        ("atlas_admission_requests_waiting", "HTTP requests that wait for a place", admission.waiting),
        ("atlas_contexts_in_use", "Memory contexts in use, one a sequence", contexts.running),
        ("atlas_contexts_waiting", "Requests of sessions that wait for a memory context", contexts.waiting),
        ("atlas_contexts_total", "Memory contexts there are", contexts.places),
        ("atlas_connections_open", "Connections of clients", len(connections)),
        ("atlas_uptime_seconds", "Seconds since the start", stats.uptime),
        ("atlas_snapshot_oldest_dirty_seconds", "Seconds since the last automatic save", persistence.age),
    ):
        yield GaugeMetricFamily(name, text, value=value)
    over = "Requests the server added more to than the latency budget"
    yield CounterMetricFamily("atlas_requests_over_budget", over, value=stats.over_budget)
