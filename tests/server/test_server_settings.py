"""Settings: sources, precedence, names, errors, and the command line."""

from __future__ import annotations

import argparse
import json
import re
import socket
import struct
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from server.cli import main
from server.config.settings import SettingsError
from server.config.sources import add_flags, load, options
from server.serve import StartError, listen
from tests.patience import PATIENCE

ROOT = Path(__file__).parents[2]

MISSION = {
    "server": {"host": "0.0.0.0", "port": 8080, "threads": 8},
    "atlas": {
        "enabled": True,
        "auto_load_memory": True,
        "auto_save_memory": True,
        "memory_save_interval": 300,
        "enable_memory_endpoints": True,
        "enable_realtime_stats": True,
        "log_atlas_operations": False,
        "default_config": {
            "window_size": 512,
            "blend_ratio": 0.5,
            "learning_rate": 0.001,
            "polynomial_degree": 3,
            "use_muon": True,
            "warmup_tokens": 128,
        },
    },
}


def written(tmp_path: Path, content: Any) -> str:
    path = tmp_path / "config.json"
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    return str(path)


def parsed(*arguments: str) -> dict[str, Any]:
    parser = argparse.ArgumentParser(allow_abbrev=False)
    add_flags(parser)
    return vars(parser.parse_args(arguments))


def test_the_missions_file_loads_unchanged(tmp_path: Path) -> None:
    settings = load(config=written(tmp_path, MISSION), environ={})
    assert (settings.server.host, settings.server.threads) == ("0.0.0.0", 8)
    assert settings.atlas.default_config.polynomial_degree == 3
    assert settings.atlas.default_config.use_muon is True


def test_precedence(tmp_path: Path) -> None:
    config = written(tmp_path, {"server": {"port": 1, "threads": 1, "max_waiting": 1, "host": "file"}})
    environ = {"ATLAS_THREADS": "2", "ATLAS_MAX_WAITING": "2", "ATLAS_HOST": "env"}
    settings = load(config=config, environ=environ, flags=parsed("--max-waiting", "3", "--host", "flag"))
    server = settings.server
    assert (server.max_concurrent, server.port, server.threads) == (32, 1, 2)
    assert (server.max_waiting, server.host) == (3, "flag")


def test_the_file_may_be_named_by_the_environment(tmp_path: Path) -> None:
    assert load(environ={"ATLAS_CONFIG": written(tmp_path, {"server": {"port": 7}})}).server.port == 7


def test_the_contracts_names() -> None:
    environ = {
        "ATLAS_ENABLED": "0",
        "ATLAS_MEMORY_PATH": "/data",
        "ATLAS_AUTO_SAVE_INTERVAL": "60",
        "ATLAS_MAX_CONCURRENT": "5",
        "ATLAS_LATENCY_BUDGET_MS": "7.5",
        "ATLAS_METRICS_INTERVAL": "250",
        "ATLAS_API_KEYS_FILE": "/keys",
    }
    settings = load(environ=environ)
    assert not settings.atlas.enabled
    assert (settings.atlas.memory_path, settings.atlas.memory_save_interval) == ("/data", 60)
    assert (settings.server.max_concurrent, settings.atlas.latency_budget_ms) == (5, 7.5)
    assert (settings.atlas.metrics_interval, settings.server.api_keys_file) == (250, "/keys")
    flags = parsed(
        *("--model", "m.gguf", "--host", "h", "--port", "1", "--no-atlas", "--atlas-window", "256"),
        *("--atlas-blend", "0.25", "--atlas-memory-file", "f.atlas", "--no-atlas-memory-persist"),
    )
    settings = load(environ={}, flags=flags)
    assert (settings.server.model, settings.server.host, settings.server.port) == ("m.gguf", "h", 1)
    assert (settings.atlas.enabled, settings.atlas.memory_persist) == (False, False)
    assert settings.atlas.default_config.window_size == 256
    assert settings.atlas.default_config.blend_ratio == 0.25
    assert settings.atlas.memory_file == "f.atlas"


@pytest.mark.parametrize("flag", ["-hf", "-hfr", "--hf-repo"])
def test_a_repository_is_named_as_for_llama_server(flag: str) -> None:
    server = load(environ={}, flags=parsed(flag, "org/name:Q8_0", "--offline")).server
    assert (server.hf_repo, server.offline, server.model) == ("org/name:Q8_0", True, None)


def test_every_setting_has_its_own_flag_and_variable_and_says_what_it_does() -> None:
    every = options()
    assert len({option.flag for option in every}) == len({option.env for option in every}) == len(every)
    assert all(option.help for option in every)
    assert all(option.env.startswith("ATLAS_") for option in every)


def test_every_setting_can_be_set_by_flag_and_by_environment() -> None:
    samples = {bool: "true", int: "256", float: "0.5", str: "info"}
    special = {
        "atlas.default_config.memory_layers": "2",
        "atlas.default_config.polynomial_degree": "1",
        "atlas.default_config.batch_size": "2",
        "atlas.default_config.cache_strategy": "lru",
        "atlas.memory_save_interval": "5",
        "server.max_body_bytes": "2048",
        "server.shutdown_grace": "2",
        "atlas.max_window": "1024",
        "atlas.memory_dim": "64",
        "server.weight_dtype": "float32",
        "server.kv_dtype": "float32",
        "server.pooling": "last",
        "atlas.session_store": "s3://bucket/prefix",
        "atlas.session_store_endpoint": "http://127.0.0.1:8333",
        "atlas.default_config.learning_rate": "0.0005",
    }
    for option in options():
        text = special.get(option.key, samples[option.kind])
        from_env = load(environ={option.env: text})
        flags = parsed(option.flag) if option.kind is bool else parsed(option.flag, text)
        assert load(environ={}, flags=flags) == from_env


@pytest.mark.parametrize(
    ("content", "named"),
    [
        ({"server": {"prot": 1}}, "server.prot"),
        ({"serve": {}}, "serve"),
        ({"atlas": {"default_config": {"memory_dim": 1}}}, "atlas.default_config.memory_dim"),
        ({"atlas": {"memory_dim": 20}}, "'atlas.memory_dim': value must be a multiple of 8 between 8 and 128"),
        ({"server": {"port": "8080"}}, "server.port"),
        ({"server": {"port": 70_000}}, "server.port"),
        ({"atlas": {"default_config": {"window_size": 100}}}, "window_size"),
        ({"atlas": {"default_config": {"window_size": 4096}}}, "window_size"),
        ({"atlas": {"default_config": {"update_frequency": 100}}}, "update_frequency"),
        ({"atlas": {"memory_file": "../x"}}, "atlas.memory_file"),
        ("[]", "object"),
        ("{", "truncated"),
        ("key: value", "malformed"),
        ("[" * 10_000, "recursion"),
    ],
)
def test_files_that_are_refused(tmp_path: Path, content: Any, named: str) -> None:
    with pytest.raises(SettingsError) as caught:
        load(config=written(tmp_path, content), environ={})
    assert named in str(caught.value)


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    loop = tmp_path / "loop"
    loop.symlink_to(loop)
    big = tmp_path / "big"
    with big.open("wb") as file:
        file.truncate(1 << 30)
    for path in (loop, big, tmp_path, tmp_path / "none"):
        with pytest.raises(SettingsError):
            load(config=str(path), environ={})


@pytest.mark.parametrize(
    ("environ", "named"),
    [
        ({"ATLAS_PROT": "1"}, "ATLAS_PROT"),
        ({"ATLAS_PORT": "x"}, "ATLAS_PORT"),
        ({"ATLAS_PORT": "1\n"}, "ATLAS_PORT"),
        ({"ATLAS_ENABLED": "maybe"}, "ATLAS_ENABLED"),
        ({"ATLAS_BLEND_RATIO": "2"}, "blend_ratio"),
    ],
)
def test_environments_that_are_refused(environ: dict[str, str], named: str) -> None:
    with pytest.raises(SettingsError) as caught:
        load(environ=environ)
    assert named in str(caught.value)


def test_a_kubernetes_service_called_atlas_does_no_harm() -> None:
    load(environ={"ATLAS_SERVICE_HOST": "10.0.0.1", "ATLAS_PORT_8080_TCP": "tcp://10.0.0.1:8080"})


def test_lists_and_nulls() -> None:
    settings = load(environ={"ATLAS_ALLOWED_HOSTS": "a.example, b.example", "ATLAS_USE_MUON": "null"})
    assert settings.server.allowed_hosts == ("a.example", "b.example")
    assert settings.atlas.default_config.use_muon is None


def test_print_config_hides_secrets(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ATLAS_API_KEYS_FILE", "/run/secrets/keys")
    assert main(["serve", "--print-config", "--port", "9"]) == 0
    shown = capsys.readouterr().out
    assert json.loads(shown)["server"]["port"] == 9
    assert "/run/secrets" not in shown


def test_the_printed_configuration_is_a_configuration(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main(["--print-config", "--atlas-blend", "0.75"])
    path = written(tmp_path, capsys.readouterr().out)
    assert load(config=path, environ={}).atlas.default_config.blend_ratio == 0.75


def test_wrong_command_lines_end_with_a_message(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert main(["--port", "x"]) == 2
    assert "--port" in capsys.readouterr().err
    assert main([]) == 2
    assert "no model" in capsys.readouterr().err
    assert main(["--model", model_file(tmp_path), "--api-keys-file", str(tmp_path / "none")]) == 2
    assert "keys file" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--prot", "1"], "unknown flag --prot; did you mean --port?"),
        (["--por=1"], "unknown flag --por; did you mean --port?"),
        (["serve", "--max_wating", "8"], "unknown flag --max_wating; did you mean --max-waiting?"),
        (["--atlas-memry-path", "64"], "unknown flag --atlas-memry-path; did you mean --atlas-memory-path?"),
        (["--memory-path", "64"], "unknown flag --memory-path; did you mean --atlas-memory-path?"),
        (["--no-speculat"], "unknown flag --no-speculat; did you mean --no-speculate?"),
        (["--zzzzzz"], "unknown flag --zzzzzz"),
        (["sevre"], "unknown command 'sevre'; did you mean serve?"),
        (["fly"], "unknown command 'fly'; there are serve, chat, generate, inspect, sessions, bench, eval and completion"),
        (["--port", "1", "64"], "unexpected argument '64'"),
        (["--port"], "--port: expected one argument"),
        (["--temperature", "hot"], "flag --temperature: expected float, got 'hot'"),
        (["--temperature", "101"], "settings: Validation error in field 'sampling.temperature': "
                                   "value must be between 0 and 100"),
    ],
)  # fmt: skip
def test_a_mistake_is_one_line_that_says_what_was_meant(
    capsys: pytest.CaptureFixture[str], arguments: list[str], said: str
) -> None:
    assert main(arguments) == 2
    shown = capsys.readouterr()
    assert (shown.out, shown.err) == ("", f"atlas-jax: error: {said}\n")


def model_file(folder: Path, content: bytes = struct.pack("<4sIQQ", b"GGUF", 3, 0, 0)) -> str:
    path = folder / "model.gguf"
    path.write_bytes(content)
    return str(path)


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (None, "No such file or directory"),
        (b"", "model.gguf is empty"),
        (b"\x89PNG and more of it than a header is long", "no GGUF file"),
        (b"GGUF", "left in the file"),
    ],
)
def test_a_file_that_is_no_model_is_one_line_before_anything_listens(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, content: bytes | None, said: str
) -> None:
    path = str(tmp_path / "none.gguf") if content is None else model_file(tmp_path, content)
    assert main(["--model", path]) == 2
    shown = capsys.readouterr().err
    assert shown.startswith(f"atlas-jax: error: model {path}: ")
    assert said in shown
    assert shown.count("\n") == 1


def test_a_folder_is_no_model_and_an_adapter_must_be_there(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert main(["--model", str(tmp_path)]) == 2
    assert capsys.readouterr().err == (
        f"atlas-jax: error: model {tmp_path}: '{tmp_path.name}' is a folder without a config.json\n"
    )
    missing = str(tmp_path / "none")
    assert main(["--model", model_file(tmp_path), "--atlas-adapter", missing]) == 2
    assert capsys.readouterr().err == f"atlas-jax: error: adapter {missing}: No such file or directory\n"


def test_an_extra_that_is_not_installed_is_named(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setitem(sys.modules, "uvicorn", None)
    monkeypatch.delitem(sys.modules, "server.serve", raising=False)
    assert main(["serve", "--model", model_file(tmp_path)]) == 1
    said = "uvicorn is not installed; it comes with the extra 'serve': pip install 'atlas-jax[serve]'"
    assert capsys.readouterr().err == f"atlas-jax: error: {said}\n"


def test_a_port_that_is_taken_is_one_line(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        command = [sys.executable, "-m", "server", "--model", model_file(tmp_path), "--port", str(port)]
        ended = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=PATIENCE)
    assert ended.returncode == 1
    assert ended.stderr == f"atlas-jax: error: cannot listen on 127.0.0.1:{port}: address already in use\n"


def test_an_address_that_is_not_ours_is_one_line() -> None:
    for host in ("192.0.2.1", "no.such.host.invalid"):
        with pytest.raises(StartError, match=f"^cannot listen on {host}:1: "):
            listen(host, 1)


def test_port_0_is_the_same_port_on_every_address() -> None:
    sockets = listen("localhost", 0)
    ports = {one.getsockname()[1] for one in sockets}
    for one in sockets:
        one.close()
    assert len(ports) == 1
    assert ports != {0}


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ({"server": {"prot": 1}}, "unknown key 'server.prot'; did you mean server.port?"),
        ({"sever": {}}, "unknown key 'sever'"),
        ({"server": {"temperature": 1}}, "unknown key 'server.temperature'; did you mean sampling.temperature?"),
        ({"atlas": {"window_size": 1}}, "unknown key 'atlas.window_size'; did you mean atlas.default_config.window_size?"),
        ({"atlas": {"default_config": {"blend_ration": 1}}},
         "unknown key 'atlas.default_config.blend_ration'; did you mean atlas.default_config.blend_ratio?"),
    ],
)  # fmt: skip
def test_an_unknown_key_of_the_file_is_one_line_with_the_nearest(tmp_path: Path, content: Any, said: str) -> None:
    path = written(tmp_path, content)
    with pytest.raises(SettingsError) as caught:
        load(config=path, environ={})
    assert str(caught.value) == f"{path}: {said}"


def test_an_unknown_variable_is_named_with_the_nearest() -> None:
    with pytest.raises(
        SettingsError, match=r"^unknown environment variable ATLAS_TEMPRATURE; did you mean ATLAS_TEMPERATURE\?"
    ):
        load(environ={"ATLAS_TEMPRATURE": "1"})


def test_the_help_is_short_and_that_of_the_command_has_every_flag_in_its_group(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert main(["--help"]) == 0
    short = capsys.readouterr().out
    assert len(short.splitlines()) < 45
    assert "--model" in short
    assert "atlas-jax serve --help" in short
    with pytest.raises(SystemExit) as caught:
        main(["serve", "--help"])
    assert caught.value.code == 0
    full = capsys.readouterr().out
    groups = dict(re.findall(r"^(\w[^\n]*):\n((?:  .*\n|\n)+)", full, re.MULTILINE))
    flags = {
        title.partition(":")[0]: set(re.findall(r"^  (--[a-z0-9-]+)", body, re.MULTILINE))
        for title, body in groups.items()
    }
    assert {"--temperature", "--top-k", "--top-p", "--min-p", "--repeat-penalty"} <= flags["Sampling"]
    assert {"--api-keys-file", "--allowed-hosts"} <= flags["Security"]
    assert {"--rate-limit-requests", "--max-concurrent"} <= flags["Limits"]
    assert {"--atlas", "--atlas-max-window"} <= flags["Memory"]
    assert {"--atlas-window", "--atlas-blend"} <= flags["Memory of a request"]
    assert {option.flag for option in options()} <= set().union(*flags.values())


def test_a_list_may_be_given_by_repeating_its_flag() -> None:
    flags = parsed("--model-alias", "a, b", "--model-alias", "c", "--allowed-hosts", "*")
    server = load(environ={}, flags=flags).server
    assert (server.model_alias, server.allowed_hosts) == (("a", "b", "c"), ("*",))


def test_other_packages_are_heard_only_where_something_is_wrong() -> None:
    code = """
import logging
from server.cli import _configure_logging
_configure_logging(LEVEL)
jax, ours, uvicorn = (logging.getLogger(name) for name in ("jax._src.xla_bridge", "atlas.server", "uvicorn.error"))
jax.info("Unable to initialize backend 'tpu'"), jax.debug("noise"), uvicorn.info("Started"), uvicorn.warning("Invalid HTTP")
jax.warning("falling back to cpu"), ours.info("ready"), ours.debug("detail")
"""
    tpu = "Unable to initialize backend 'tpu'"
    for level, expected in (
        ("debug", ["falling back to cpu", "ready", "detail"]),
        ("info", ["falling back to cpu", "ready"]),
        ("error", []),
        ("trace", [tpu, "noise", "Started", "Invalid HTTP", "falling back to cpu", "ready", "detail"]),
    ):  # fmt: skip
        ended = subprocess.run(
            [sys.executable, "-c", code.replace("LEVEL", repr(level))],
            cwd=ROOT,
            capture_output=True,
            text=True,
            timeout=PATIENCE,
        )
        assert [line.split(" ", 4)[4] for line in ended.stderr.splitlines()] == expected, level
