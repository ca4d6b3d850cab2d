"""atlas-jax as a Ray Serve application: replicas on one object store, sessions that stay on their replica, autoscaling.

`serve run serve.yaml` from this folder; `docs/guides/replicas.md` says more.
"""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from typing import Any

from ray import serve
from ray.serve.config import AutoscalingConfig, RequestRouterConfig
from ray.serve.experimental.consistent_hash_router import ConsistentHashRouter

from server.config.settings import Settings, SettingsError
from server.config.sources import load
from server.embed import AtlasServer
from server.middleware.asgi import Receive, Scope, Send

_QUEUED = 32
"""Requests a replica takes beyond those it runs: it queues them by key, and refuses with words of its own."""
_DRAIN_SECONDS = 120.0
"""What the answers of a replica that leaves get to end."""


class Replica:
    """One replica: a server with an engine of its own."""

    async def __init__(self, flags: Mapping[str, Any]) -> None:
        """Loads the model; the replica gets requests once that is done.

        Args:
          flags: settings as `settings_of` reads them.
        """
        # copies of sessions are one process's own, and several replicas may be on one machine
        self._copies = tempfile.TemporaryDirectory(prefix="atlas-")
        self._server = AtlasServer(settings_of({**flags, "atlas.memory_path": self._copies.name}))
        await self._server.__aenter__()

    def __serve_build_asgi_app__(self) -> Any:
        """What answers the requests."""
        return self._answer

    async def _answer(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "lifespan":
            await self._server(scope, receive, send)
            return
        while True:  # the engine's life is this object's
            kind = (await receive())["type"]
            await send({"type": f"{kind}.complete"})
            if kind == "lifespan.shutdown":
                return

    async def check_health(self) -> None:
        """Raises where the engine has died: Ray starts another replica then."""
        if self._server.lifecycle.supervisor.dead:
            raise RuntimeError("the engine has died")

    async def __del__(self) -> None:
        """Saves the sessions, after the last answer or when Ray's patience ends."""
        await self._server.__aexit__(None, None, None)
        self._copies.cleanup()


def settings_of(flags: Mapping[str, Any]) -> Settings:
    """Settings by their dotted names (`atlas.session_store`), over those of ATLAS_CONFIG and of the environment."""
    return load(flags=flags)


def build(args: dict[str, Any]) -> serve.Application:
    """The application; `args` in serve.yaml are settings by their dotted names.

    Raises:
      SettingsError: a setting is wrong, or replicas would keep their sessions apart.
    """
    settings = settings_of(args)
    if settings.atlas.enabled and settings.atlas.memory_persist and not settings.atlas.session_store:
        raise SettingsError("atlas.session_store is not set: replicas have nowhere to share their sessions")
    places = settings.server.max_concurrent
    deployment = serve.deployment(
        name="atlas",
        max_ongoing_requests=places + _QUEUED,
        autoscaling_config=AutoscalingConfig(min_replicas=1, max_replicas=4, target_ongoing_requests=0.75 * places),
        # the header X-Session-ID; requests without it go anywhere
        request_router_config=RequestRouterConfig(request_router_class=ConsistentHashRouter),
        graceful_shutdown_timeout_s=_DRAIN_SECONDS,
        health_check_period_s=5.0,
    )(serve.ingress()(Replica))
    return deployment.bind(args)
