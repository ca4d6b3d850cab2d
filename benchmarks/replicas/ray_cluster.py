"""Runs `deploy/ray` on this machine: two replicas of a model on one object store, and what happens when they come and go."""

from __future__ import annotations

import asyncio
import json
import os
import socket
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import httpx

ROOT = Path(__file__).parents[2]
_APP = ROOT / "deploy" / "ray"
_PATIENCE = 300.0
_SESSIONS = 12
_LONG = 4000
"""Tokens of the answer that runs while its replica is told to leave."""


async def run_on_ray(settings: Mapping[str, Any], environ: Mapping[str, str], scratch: Path) -> int:
    """Prints what holds, a line each; 1 where something does not.

    Args:
      settings: by their dotted names, as serve.yaml has them.
      environ: what the replicas need of the environment.
      scratch: for Ray's own files; a short path, for it makes sockets there.
    """
    os.environ.update(environ)
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ["PYTHONPATH"] = os.pathsep.join([str(ROOT), str(_APP), os.environ.get("PYTHONPATH", "")])
    sys.path.insert(0, str(_APP))
    import ray
    from ray import serve

    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    ray.init(
        num_cpus=8,  # places, not cores
        include_dashboard=False,
        log_to_driver=False,
        logging_level="error",
        object_store_memory=100 << 20,
        _node_ip_address="127.0.0.1",
        _temp_dir=str(scratch),
    )
    try:
        serve.start(http_options={"host": "127.0.0.1", "port": port, "request_timeout_s": _PATIENCE})
        async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{port}", timeout=_PATIENCE) as client:
            return await _Trial(serve, dict(settings), client).run()
    finally:
        serve.shutdown()
        ray.shutdown()


class _Trial:
    """One application, and what is asked of it."""

    def __init__(self, serve: Any, settings: dict[str, Any], client: httpx.AsyncClient) -> None:
        self._serve, self._settings, self._client = serve, settings, client
        self._failed = 0

    async def run(self) -> int:
        await self._deploy(replicas=2)
        await self._sticks()
        await self._moves()
        await self._drains()
        await self._scales()
        return 1 if self._failed else 0

    async def _sticks(self) -> None:
        names = [f"s{number}" for number in range(_SESSIONS)]
        for name in names:
            await self._turn(name, "first")
        hits = [(await self._turn(name, "second"))["atlas_stats"]["cache_hit"] for name in names]
        self._say("sessions whose second turn was on the replica of the first", sum(hits), len(names))
        hits = [
            (await self._turn(f"b{number}", "first", header=False))["atlas_stats"] is not None for number in range(4)
        ]
        self._say("requests without the header that were answered", sum(hits), 4)

    async def _moves(self) -> None:
        """A replica is killed: its sessions go on with all that was answered."""
        before = await self._tokens()
        await self._kill()
        after = {name: (await self._turn(name, "after the kill"))["usage"] for name in before if name.startswith("s")}
        now = await self._tokens()
        kept = sum(now[name] > before[name] for name in after)
        self._say("sessions that had everything after a replica was killed", kept, len(after))

    async def _drains(self) -> None:
        """Answers that run while there are to be fewer replicas end as if nothing had been."""
        await self._until(lambda: self._ready(2))
        streams = [asyncio.create_task(self._stream(f"d{number}")) for number in range(6)]
        await asyncio.sleep(1.0)
        await self._deploy(replicas=1)
        whole = [await one for one in streams]
        self._say("answers that ended whole while their replicas left", sum(whole), len(whole))
        await self._until(lambda: self._ready(1))
        told = [
            (await self._turn(f"s{number}", "after the leaving"))["usage"] is not None for number in range(_SESSIONS)
        ]
        self._say("sessions that went on after the leaving", sum(told), len(told))

    async def _scales(self) -> None:
        """There are more replicas while there is more to do."""
        await self._deploy(autoscaling={"min_replicas": 1, "max_replicas": 2, "target_ongoing_requests": 1})
        stop = asyncio.Event()

        async def work(number: int) -> None:
            while not stop.is_set():
                await self._turn(f"w{number}", "more")

        workers = [asyncio.create_task(work(number)) for number in range(6)]
        begin = time.monotonic()
        grown = await self._until(lambda: self._ready(2))
        stop.set()
        await asyncio.gather(*workers)
        self._say(f"replicas once there was work for two ({time.monotonic() - begin:.0f} s)", 2 if grown else 1, 2)

    # --- the application ----------------------------------------------------------------------------------------------
    async def _deploy(self, replicas: int | None = None, autoscaling: dict[str, Any] | None = None) -> None:
        from atlas_ray import build

        application = build(self._settings)
        options: dict[str, Any] = {"graceful_shutdown_timeout_s": 60.0, "ray_actor_options": {"num_cpus": 1}}
        if replicas is not None:
            options |= {"num_replicas": replicas, "autoscaling_config": None}
        else:
            options |= {
                "autoscaling_config": {"upscale_delay_s": 2.0, "metrics_interval_s": 1.0, **(autoscaling or {})}
            }
        changed = application._bound_deployment.options(**options).bind(self._settings)
        await asyncio.to_thread(self._serve.run, changed, name="atlas", route_prefix="/")

    def _ready(self, count: int) -> bool:
        (found,) = self._serve.status().applications["atlas"].deployments.values()
        return dict(found.replica_states) == {"RUNNING": count}

    async def _kill(self) -> None:
        """Kills the process of one replica."""
        import ray

        actors = [one for one in ray.util.list_named_actors(all_namespaces=True) if "SERVE_REPLICA" in one["name"]]
        ray.kill(ray.get_actor(actors[0]["name"], namespace=actors[0]["namespace"]))

    # --- requests -----------------------------------------------------------------------------------------------------
    async def _turn(self, session: str, text: str, *, header: bool = True) -> dict[str, Any]:
        body: dict[str, Any] = {"prompt": text, "max_tokens": 4, "temperature": 0}
        headers = {"X-Session-ID": session} if header else {}
        if not header:
            body["atlas"] = {"session_id": session}
        end = time.monotonic() + _PATIENCE
        while True:
            try:
                answer = await self._client.post("/v1/completions", json=body, headers=headers)
            except httpx.TransportError:
                answer = None
            if answer is not None and answer.status_code == 200:
                return dict(answer.json())
            # its replica has died, another takes its place, or another has gone on with the session
            assert answer is None or answer.status_code in (409, 500, 503), answer.text
            assert time.monotonic() < end, "no answer"
            await asyncio.sleep(0.2)

    async def _stream(self, session: str) -> bool:
        body = {"prompt": "begin", "max_tokens": _LONG, "temperature": 0, "stream": True, "ignore_eos": True}
        finished, ended = "", False
        try:
            async with self._client.stream(
                "POST", "/v1/completions", json=body, headers={"X-Session-ID": session}
            ) as answer:
                async for line in answer.aiter_lines():
                    ended = ended or line == "data: [DONE]"
                    if line.startswith("data: {"):
                        event = json.loads(line.removeprefix("data: "))
                        finished = (
                            next((one.get("finish_reason") for one in event.get("choices", [])), None) or finished
                        )
        except httpx.TransportError:
            return False
        return ended and finished == "length"

    async def _tokens(self) -> dict[str, int]:
        rows = (await self._client.post("/v1/atlas/memory/list", json={"limit": 1000})).json()["contexts"]
        return {row["context_id"]: row["tokens"] for row in rows}

    # --- saying -------------------------------------------------------------------------------------------------------
    def _say(self, what: str, held: int, count: int) -> None:
        self._failed += held != count
        print(f"{'ok  ' if held == count else 'FAIL'} {what}: {held} of {count}", flush=True)

    async def _until(self, condition: Callable[[], bool]) -> bool:
        end = time.monotonic() + _PATIENCE
        while time.monotonic() < end:
            if condition():
                return True
            await asyncio.sleep(0.2)
        return False
