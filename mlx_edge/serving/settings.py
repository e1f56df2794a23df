"""What a server is told: a TOML file, and over it the flags. Loads neither MLX nor the server's libraries.

    [server]        host, port, keys, limits, timeouts        ServerSettings
    [defaults]      what a request that says nothing gets     Defaults
    [engine]        of every model                            EngineConfig
    [models.NAME]   path, loading, its own [models.NAME.engine] over [engine]

An unknown key is an error that names it. Flags have mlx_lm.server's names; those stand in `flags.py`.
"""

import difflib
import ipaddress
import os
import re
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Literal, TypeVar, get_args, get_origin, get_type_hints

from mlx_edge.engine.config import EngineConfig
from mlx_edge.errors import InvalidRequestError

KEY_VARIABLE = "MLX_EDGE_API_KEY"
UNITS = {"s": 1, "m": 60, "h": 3600}
Section = TypeVar("Section")


@dataclass(frozen=True)
class ServerSettings:
    """Where to listen, whom to answer, and how much of one client to bear."""

    host: str = "127.0.0.1"
    port: int = 8080
    allowed_hosts: tuple[str, ...] = ()
    allowed_origins: tuple[str, ...] = ()
    api_key: str | None = field(default=None, repr=False)
    api_key_file: str | None = None
    api_keys: tuple[str, ...] = field(default=(), repr=False)  # all that count, of `read_keys`
    model_dir: str | None = None
    lazy: bool = False
    keep_alive: str = "30m"
    max_loaded_models: int = 1
    max_body_bytes: int = 32 << 20
    max_images: int = 16
    body_timeout_s: float = 60.0
    head_timeout_s: float = 15.0
    write_timeout_s: float = 30.0
    idle_timeout_s: int = 30
    drain_timeout_s: int = 30
    max_connections: int = 1024
    log_level: Literal["DEBUG", "INFO", "WARNING", "ERROR", "CRITICAL"] = "INFO"
    log_prompts: bool = False


@dataclass(frozen=True)
class Defaults:
    """What a request that leaves a field out is given."""

    max_tokens: int = 512
    temp: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    chat_template_args: dict[str, Any] = field(default_factory=dict)
    grammar: str | None = None
    separate_reasoning: bool | None = None


@dataclass(frozen=True)
class ModelSettings:
    """One model that is served under `name`."""

    name: str
    path: str
    revision: str | None = None
    precision: Literal["int8", "float"] = "int8"
    use_mmap: bool = True
    mlock: bool = False
    chat_template: str | None = None
    engine: EngineConfig = field(default_factory=EngineConfig)


@dataclass(frozen=True)
class Settings:
    """All of it; `models[0]` answers a request that names none."""

    server: ServerSettings
    defaults: Defaults
    models: tuple[ModelSettings, ...]
    template: ModelSettings  # what a folder of --model-dir is served with


def read_settings(path: str | None, flags: Mapping[str, Mapping[str, Any]]) -> Settings:
    """The file, if there is one, and over it the flags: section -> key -> value; "model" is that of `--model`.

    Raises: InvalidRequestError that names the section and the key.
    """
    table = {} if path is None else _read_toml(Path(path))
    known = ("server", "defaults", "engine", "models")
    for name in table:
        if name not in known:
            raise InvalidRequestError(_unknown(f"{path}: section [{name}]", name, known))
        if not isinstance(table[name], dict):
            raise InvalidRequestError(f"{path}: {name} is no section, expected [{name}]")
    server = build(ServerSettings, {**table.get("server", {}), **flags.get("server", {})}, "server")
    defaults = build(
        Defaults, {**table.get("defaults", {}), **flags.get("defaults", {})}, "defaults"
    )
    loading = dict(flags.get("model", {}))
    engine_flags = dict(flags.get("engine", {}))
    engine = {**table.get("engine", {}), **engine_flags}
    wanted = loading.pop("path", None)
    models = [
        _build_model(name, _join(f"models.{name}", entry, loading), engine, engine_flags)
        for name, entry in table.get("models", {}).items()
    ]
    if wanted is not None or not models:
        first = str(wanted or "pocket")
        models = [m for m in models if m.name != _model_name(first)]
        models.insert(
            0, _build_model(_model_name(first), {"path": first, **loading}, engine, engine_flags)
        )
    template = _build_model("", {"path": "", **loading}, engine, engine_flags)
    return Settings(check_server(read_keys(server)), defaults, tuple(models), template)


def build(kind: type[Section], table: Mapping[str, Any], where: str) -> Section:
    """A dataclass of settings from a table; every key known, every value of its type."""
    hints = get_type_hints(kind)
    known = [f.name for f in fields(kind) if f.name != "api_keys"]  # type: ignore[arg-type]
    values = {}
    for name, value in table.items():
        if name not in known:
            raise InvalidRequestError(_unknown(f"[{where}] {name}", name, known))
        values[name] = _convert(hints[name], value, f"[{where}] {name}")
    try:
        return kind(**values)
    except TypeError as error:  # a field without a default
        raise InvalidRequestError(f"[{where}]: {error}") from None


def _build_model(
    name: str,
    table: Mapping[str, Any],
    engine: Mapping[str, Any],
    engine_flags: Mapping[str, Any],
) -> ModelSettings:
    where = f"models.{name}"
    own = {**engine, **_join(f"{where}.engine", table.get("engine", {}), engine_flags)}
    config = build(EngineConfig, own, f"{where}.engine")
    rest = {key: value for key, value in table.items() if key != "engine"}
    if "name" in rest:
        raise InvalidRequestError(f"[{where}] name: the section's own name is the model's")
    if "path" not in rest:
        raise InvalidRequestError(f"[{where}] has no path; say where the model is")
    model = build(ModelSettings, {"name": name, **rest}, where)
    return replace(model, engine=config)


def _join(where: str, table: Any, over: Mapping[str, Any]) -> dict[str, Any]:
    if not isinstance(table, dict):
        raise InvalidRequestError(f"[{where}] is {table!r}, expected a section of its own")
    return {**table, **over}


def read_keys(server: ServerSettings) -> ServerSettings:
    """The keys of the flag, of the file (one a line) and of the environment, together."""
    keys = [server.api_key, os.environ.get(KEY_VARIABLE)]
    if server.api_key_file is not None:
        try:
            keys += Path(server.api_key_file).read_text("utf-8").splitlines()
        except (OSError, ValueError) as error:
            words = error.strerror if isinstance(error, OSError) else "it is no text"
            raise InvalidRequestError(
                f"--api-key-file {server.api_key_file} cannot be read: {words}"
            ) from None
    found = tuple(dict.fromkeys(key.strip() for key in keys if key and key.strip()))
    if server.api_key_file is not None and not found:
        raise InvalidRequestError(f"--api-key-file {server.api_key_file} holds no key")
    for key in found:
        if not re.fullmatch(r"[!-~]+", key):
            raise InvalidRequestError(
                "an API key has a space or a character outside ASCII; choose another"
            )
    return replace(server, api_keys=found)


def check_server(server: ServerSettings) -> ServerSettings:
    """The same settings. Raises: InvalidRequestError for those that would leave the door open, or shut."""
    if not is_loopback(server.host) and not server.api_keys:
        raise InvalidRequestError(
            f"{server.host} can be reached from other machines and no API key is set; set {KEY_VARIABLE} or "
            "--api-key-file, or listen on 127.0.0.1"
        )
    if "*" in server.allowed_origins and not server.api_keys:
        raise InvalidRequestError(
            "--allowed-origins '*' lets every web page use this server and no API key is set; name the origins, or "
            f"set {KEY_VARIABLE}"
        )
    for origin in server.allowed_origins:
        if origin != "*" and not re.fullmatch(r"[a-z][a-z0-9+.-]*://[!-~]*[^/]", origin):
            raise InvalidRequestError(
                f"--allowed-origins {origin!r} is no origin, expected http://HOST:PORT without a path"
            )
    parse_duration(server.keep_alive)
    limits = {f.name: getattr(server, f.name) for f in fields(server)}
    for name, value in limits.items():
        if (name.endswith(("_s", "_bytes")) or name.startswith("max_")) and value <= 0:
            raise InvalidRequestError(f"[server] {name} is {value}, expected more than 0")
    if not 0 <= server.port < 1 << 16:
        raise InvalidRequestError(f"[server] port is {server.port}, expected 0 to 65535")
    return server


def parse_duration(text: str) -> float | None:
    """Seconds of "300", "5m", "1h"; None for "-1", which is for ever. "0" is at once."""
    if text == "-1":
        return None
    match = re.fullmatch(r"(\d+(?:\.\d+)?)([smh]?)", text)
    if match is None:
        raise InvalidRequestError(
            f"--keep-alive is {text!r}, expected seconds, 5m, 1h, 0 (unload at once) or -1 (never)"
        )
    return float(match[1]) * UNITS[match[2] or "s"]


def is_loopback(host: str) -> bool:
    """Whether only this machine can mean itself by it."""
    if host == "localhost" or host.endswith(".localhost"):
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def _model_name(path: str) -> str:
    """A hub id as it is, a folder by its last part."""
    folder = Path(path)
    return folder.resolve().name if folder.is_dir() else path


def _read_toml(path: Path) -> dict[str, Any]:
    try:
        return tomllib.loads(path.read_text("utf-8"))
    except OSError as error:
        raise InvalidRequestError(f"--config {path} cannot be read: {error.strerror}") from None
    except ValueError as error:
        raise InvalidRequestError(f"{path} cannot be read as TOML: {error}") from None


def _unknown(what: str, name: str, known: Any) -> str:
    near = difflib.get_close_matches(name, list(known), 1)
    return f"{what} is not known; " + (
        f"did you mean {near[0]!r}?" if near else f"expected one of: {', '.join(known)}"
    )


def _convert(hint: Any, value: Any, where: str) -> Any:
    """The value as its field has it: TOML's list as a tuple, a whole number as a float."""
    if get_origin(hint) is UnionType:
        options = [option for option in get_args(hint) if option is not NoneType]
        return value if value is None else _convert(options[0], value, where)
    if get_origin(hint) is Literal:
        if value not in get_args(hint):
            raise InvalidRequestError(
                f"{where} is {value!r}, expected one of: {', '.join(get_args(hint))}"
            )
        return value
    if get_origin(hint) is tuple:
        if isinstance(value, list | tuple) and all(isinstance(item, str) for item in value):
            return tuple(value)
        raise InvalidRequestError(f"{where} is {value!r}, expected a list of strings")
    plain = get_origin(hint) or hint
    if plain is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if plain is str and where.endswith("keep_alive") and isinstance(value, int):
        return str(value)
    if not isinstance(value, plain) or (plain is int and isinstance(value, bool)):
        raise InvalidRequestError(f"{where} is {value!r}, expected {plain.__name__}")
    return value
