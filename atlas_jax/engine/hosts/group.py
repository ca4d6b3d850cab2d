"""How processes find one another: JAX's distributed runtime for the devices, a TCP connection each for the log of steps."""

from __future__ import annotations

import contextlib
import hashlib
import logging
import secrets
import socket
import struct
import threading
import time
from dataclasses import dataclass

import jax
import numpy as np

from atlas_jax import __version__, _platform
from atlas_jax.config import ConfigError
from atlas_jax.engine import cache_folder
from atlas_jax.engine.compile_cache import use_cache
from atlas_jax.engine.config import EngineConfig
from atlas_jax.engine.hosts.connection import Connection
from atlas_jax.engine.hosts.follower import Follower, follow
from atlas_jax.engine.hosts.leader import HostsError, LeaderRunner, StepLog
from atlas_jax.engine.kernels import kernels_of
from atlas_jax.engine.loader import Opened, open_model
from atlas_jax.engine.runner.pretrained import PretrainedRunner

log = logging.getLogger("atlas.engine")

_SECRET_WORDS = 4
_CONNECT_SECONDS = 60.0
_KNOCK = struct.Struct(f"<{_SECRET_WORDS + 1}I")
_SAME = (
    *("memory_enabled", "max_concurrent", "max_context", "max_window", "memory_dim", "memory_budget", "weight_dtype"),
    *("kv_dtype", "speculate", "native_kernels", "gpu_kernels", "mesh_data", "mesh_model"),
)
"""Settings of which the programs are made."""


@dataclass
class Group:
    """The processes of an engine, as one of them sees them.

    Attributes:
      process_id: of this process; 0 serves.
      processes: how many there are.
      step_log: process 0's.
      connection: to process 0, of any other.
    """

    process_id: int
    processes: int
    step_log: StepLog | None = None
    connection: Connection | None = None

    @property
    def failure(self) -> str | None:
        """Why the processes no longer work together, or None."""
        return None if self.step_log is None else self.step_log.failure

    def lead(self, config: EngineConfig, opened: Opened) -> LeaderRunner:
        """The runner through which process 0 uses the devices of all, once all are ready; raises HostsError."""
        assert self.step_log is not None
        runner = _divided(opened)
        self.step_log.agree(_facts(config, opened, runner))
        log.info("%d processes with %d devices are ready", self.processes, jax.device_count())
        return LeaderRunner(runner, self.step_log)

    def end(self, timeout: float) -> None:
        """Ends the other processes, if they still follow, and waits for them up to `timeout` seconds; idempotent."""
        until = time.monotonic() + timeout
        if self.step_log is not None:
            self.step_log.end(timeout)
        if self.failure is None and jax.distributed.is_initialized():
            # it waits for all processes, however long
            leaving = threading.Thread(target=jax.distributed.shutdown, name="atlas-leave", daemon=True)
            leaving.start()
            leaving.join(max(until - time.monotonic(), 0.0))


def join(config: EngineConfig) -> Group:
    """Waits until all processes are there; to be called before JAX has run anything.

    Raises:
      ConfigError: the settings do not say who they are, or the mesh does not have the devices of all.
      HostsError: the others cannot be reached.
    """
    _platform.limit_threads(config.threads)
    _platform.limit_lapack()
    _platform.compile_alone()
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    jax.config.update("jax_enable_preemption_service", False)  # it takes SIGTERM for itself
    if not jax.distributed.is_initialized():
        log.info("Waiting for the other processes")
        try:
            jax.distributed.initialize(config.coordinator_address, config.num_processes, config.process_id)
        except (ValueError, RuntimeError, OSError) as error:
            raise ConfigError(
                "coordinator_address, num_processes and process_id: what is not given cannot be found out, or the others "
                f"cannot be reached: {' '.join(str(error).split())}"
            ) from error
    count = jax.device_count()
    if config.devices != count:
        raise ConfigError(
            f"mesh_data ({config.mesh_data}) times mesh_model ({config.mesh_model}) must be {count}, the devices of all "
            f"{jax.process_count()} processes"
        )
    group = Group(jax.process_index(), jax.process_count())
    host = _coordinator(config)
    try:
        if group.process_id == 0:
            group.step_log = StepLog(_accept(host, group.processes))
        else:
            group.connection = _connect(host, group.process_id)
    except OSError as error:
        raise HostsError(f"the processes cannot reach one another at {host}: {error}") from error
    return group


def follow_process_0(config: EngineConfig, group: Group) -> None:
    """Opens the model and follows process 0 until that ends.

    Raises:
      HostsError: process 0 is gone, or has opened something else.
      ConfigError, HubError, GGUFError, UnsupportedModel, AdapterError: as for `Engine.open`.
    """
    assert group.connection is not None
    cache = cache_folder.usable(config.cache_folder)
    if cache is not None:
        use_cache(cache / "compiled")
    try:
        with kernels_of(config).scope():
            opened = open_model(config, cache)
        runner = _divided(opened)
        log.info("Following process 0")
        follow(Follower(runner), group.connection, _facts(config, opened, runner))
    finally:
        group.connection.close()
    jax.distributed.shutdown()


def _divided(opened: Opened) -> PretrainedRunner:
    if not isinstance(opened.runner, PretrainedRunner):
        raise ConfigError("num_processes must be 1: a model with its own memory runs on one device")
    return opened.runner


def _facts(config: EngineConfig, opened: Opened, runner: PretrainedRunner) -> dict[str, str]:
    facts = {name: str(getattr(config, name)) for name in _SAME}
    adapter = "none" if opened.layout is None else str(opened.layout.header()["adapter"])
    made = {"version": __version__, "jax": jax.__version__, "model": opened.info.fingerprint, "adapter": adapter}
    made["LoRA adapters"] = ", ".join(one.digest for one in opened.info.lora) or "none"
    return facts | made | {"bigram table": hashlib.sha256(runner.successors().tobytes()).hexdigest()}


# --- connections --------------------------------------------------------------------------------------------------
def _coordinator(config: EngineConfig) -> str:
    """The host of process 0."""
    address = config.coordinator_address
    if address is None:
        from jax._src import distributed  # what JAX has found has no public name

        address = distributed.global_state.coordinator_address or "127.0.0.1"
    return address.rpartition(":")[0].strip("[]") or address


def _accept(host: str, processes: int) -> dict[int, Connection]:
    """Connections to all other processes; anybody may knock, so they bring a secret that only they know."""
    try:
        listener = socket.create_server((host, 0))
    except OSError:  # the name of a service, not of an interface
        listener = socket.create_server(("", 0))
    secret = struct.unpack(f"<{_SECRET_WORDS}I", secrets.token_bytes(4 * _SECRET_WORDS))
    found: dict[int, Connection] = {}
    with listener:
        _broadcast((listener.getsockname()[1], *secret))
        until = time.monotonic() + _CONNECT_SECONDS
        while len(found) < processes - 1:
            listener.settimeout(max(until - time.monotonic(), 0.01))
            one, _ = listener.accept()
            one.settimeout(5.0)
            with contextlib.suppress(OSError):
                *given, process = _KNOCK.unpack(one.recv(_KNOCK.size, socket.MSG_WAITALL).ljust(_KNOCK.size))
                packed = (struct.pack(f"<{_SECRET_WORDS}I", *words) for words in (given, secret))
                if secrets.compare_digest(*packed) and 0 < process < processes:
                    found[process] = Connection(one)
                    continue
            one.close()
    return found


def _connect(host: str, process: int) -> Connection:
    port, *secret = _broadcast((0,) * (1 + _SECRET_WORDS))
    one = socket.create_connection((host, port), timeout=_CONNECT_SECONDS)
    one.sendall(_KNOCK.pack(*secret, process))
    return Connection(one)


def _broadcast(words: tuple[int, ...]) -> list[int]:
    """What process 0 says, everywhere."""
    from jax.experimental import multihost_utils  # which only this needs

    said = multihost_utils.broadcast_one_to_all(np.asarray(words, np.uint32))
    return [int(word) for word in np.asarray(said)]
