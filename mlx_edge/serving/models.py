"""The models that are served: which names exist, which are loaded, and when one makes room for another.

A name is looked up among the names that there are, never joined to a path. Loads happen one at a time, first come,
first served; a model in use is never unloaded.
"""

import asyncio
import logging
import time
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from mlx_edge.decoding.constraints import make_constraint
from mlx_edge.decoding.grammars import GRAMMARS, read_grammar
from mlx_edge.engine.engine import Engine
from mlx_edge.engine.stats import EngineStats
from mlx_edge.errors import EngineClosedError, InvalidRequestError, MLXEdgeError, QueueFullError
from mlx_edge.serving.errors import broken_model, unknown_model
from mlx_edge.serving.metrics import Metrics
from mlx_edge.serving.settings import ModelSettings, Settings, parse_duration
from mlx_edge.text import Tokenizer

logger = logging.getLogger(__name__)

DEFAULT_NAMES = {"default", "default_model"}  # as mlx_lm.server calls the first model
ROOM_TIMEOUT_S = 120.0  # what a request waits for another model to be done
SWEEP_S = 1.0
MakeEngine = Callable[[ModelSettings], Engine]


@dataclass
class Served:
    """A loaded model."""

    settings: ModelSettings
    engine: Engine
    chat_template: str | None
    longest_piece: int = 0  # the most characters that a token stands for
    default_format: Mapping[str, str] | None = None  # of a request that brings none
    num_users: int = 0
    idle_since: float = field(default_factory=time.monotonic)

    @property
    def name(self) -> str:
        """Under which it is served."""
        return self.settings.name


def make_engine(settings: ModelSettings) -> Engine:
    """The engine of a model; it loads in a thread of its own."""
    loading: dict[str, Any] = {
        "precision": settings.precision,
        "use_mmap": settings.use_mmap,
        "mlock": settings.mlock,
    }
    if settings.revision is not None:
        loading["revision"] = settings.revision
    return Engine(settings.path, settings.engine, **loading)


class Models:
    """All names, and the engines of those that are loaded."""

    def __init__(self, settings: Settings, make: MakeEngine = make_engine) -> None:
        """Know the names; load nothing yet."""
        self._settings, self._make = settings, make
        self._loaded: dict[str, Served] = {}
        self._turn, self._idle = asyncio.Lock(), asyncio.Event()
        self._keep_alive_s = parse_duration(settings.server.keep_alive)
        self._is_closed = False
        self.started = int(time.time())
        self.metrics = Metrics(self.read_stats)

    def known(self) -> dict[str, ModelSettings]:
        """Every model by its name: those of the settings, then the folders of --model-dir."""
        found = {model.name: model for model in self._settings.models}
        if self._settings.server.model_dir is not None:
            root = Path(self._settings.server.model_dir)
            for config in sorted([*root.glob("*/config.json"), *root.glob("*/*/config.json")]):
                name = config.parent.relative_to(root).as_posix()
                model = replace(self._settings.template, name=name, path=str(config.parent))
                found.setdefault(name, model)
        return found

    def find(self, name: str | None) -> ModelSettings:
        """The model of that name, the first one for None. Raises: ApiError 404."""
        if name is None or name in DEFAULT_NAMES:
            return self._settings.models[0]
        named = next((model for model in self._settings.models if model.name == name), None)
        if named is not None:
            return named
        known = self.known()  # looks into --model-dir
        if name not in known:
            raise unknown_model(name, list(known))
        return known[name]

    def loaded(self) -> dict[str, Served]:
        """Those in memory."""
        return dict(self._loaded)

    def read_stats(self) -> dict[str, EngineStats]:
        """Snapshots of those in memory."""
        return {name: served.engine.stats() for name, served in self.loaded().items()}

    def preload(self) -> None:
        """Load the first model and wait for it. Raises: MLXEdgeError as `load` does."""
        self._load_now(self._settings.models[0])

    @asynccontextmanager
    async def use(self, name: str | None) -> AsyncIterator[Served]:
        """The loaded model of that name, which stays loaded within.

        Raises: ApiError 404, QueueFullError when other models stay in use too long, and what `load` raises.
        """
        settings = self.find(name)
        async with self._turn:
            served = self._loaded.get(settings.name)
            if served is None:
                served = await self._load(settings)
            served.num_users += 1
        try:
            yield served
        finally:
            served.num_users -= 1
            served.idle_since = time.monotonic()
            self._idle.set()

    async def sweep(self) -> None:
        """Unload what was idle for longer than the keep-alive, for ever."""
        while self._keep_alive_s is not None:
            await asyncio.sleep(min(SWEEP_S, self._keep_alive_s or 0.05))
            limit = time.monotonic() - self._keep_alive_s
            async with self._turn:
                for served in list(self._loaded.values()):
                    if not served.num_users and served.idle_since <= limit:
                        await self._unload(served)

    async def close(self, timeout_s: float) -> None:
        """Unload all; what still runs is given so many seconds together."""
        self._is_closed = True
        for served in list(self._loaded.values()):
            await self._unload(served, timeout_s)

    async def _load(self, settings: ModelSettings) -> Served:
        if self._is_closed:
            raise EngineClosedError("the server is closing; no model is loaded any more")
        await self._make_room()
        task = asyncio.ensure_future(asyncio.to_thread(self._load_now, settings))
        try:
            return await asyncio.shield(task)
        except MLXEdgeError as error:
            raise broken_model(settings.name, error) from error
        except asyncio.CancelledError:
            while not task.done():  # a load cannot be broken off; until then it is this one's turn
                with suppress(asyncio.CancelledError, Exception):
                    await asyncio.wait({task})
            raise

    def _load_now(self, settings: ModelSettings) -> Served:
        begun = time.monotonic()
        engine = self._make(settings)
        try:
            engine.wait_ready()
            template = _read_template(settings.chat_template, engine.tokenizer)
            form = _read_default_format(self._settings.defaults.grammar, engine.tokenizer)
        except BaseException:
            engine.close()
            raise
        engine.watch(self.metrics.listener(settings.name))
        served = Served(settings, engine, template, _longest_piece(engine.tokenizer), form)
        self._loaded[settings.name] = served
        logger.info("loaded %s in %.1f s", settings.name, time.monotonic() - begun)
        return served

    async def _make_room(self) -> None:
        try:
            async with asyncio.timeout(ROOM_TIMEOUT_S):
                while len(self._loaded) >= self._settings.server.max_loaded_models:
                    idle = [served for served in self._loaded.values() if not served.num_users]
                    if idle:
                        await self._unload(min(idle, key=lambda served: served.idle_since))
                        continue
                    self._idle.clear()
                    await self._idle.wait()
        except TimeoutError:
            raise QueueFullError(
                f"{', '.join(self._loaded)} stayed in use for {ROOM_TIMEOUT_S:g} s and leaves no room for another "
                "model; try again, or start the server with --max-loaded-models"
            ) from None

    async def _unload(self, served: Served, timeout_s: float = 0.0) -> None:
        self._loaded.pop(served.name, None)
        await served.engine.aclose(drain=timeout_s > 0, timeout_s=timeout_s or None)
        logger.info("unloaded %s", served.name)


def _longest_piece(tokenizer: Tokenizer) -> int:
    return max(len(tokenizer.id_to_token(index) or "") for index in range(tokenizer.vocab_size))


def _read_default_format(value: str | None, tokenizer: Tokenizer) -> Mapping[str, str] | None:
    """`response_format` of the grammar of --grammar, tried on this vocabulary. Raises: InvalidRequestError."""
    if value is None:
        return None
    source = read_grammar(value, tokenizer)
    make_constraint(tokenizer, lark=source)
    return {"type": "grammar", "grammar": value if value in GRAMMARS else source}


def _read_template(value: str | None, tokenizer: Tokenizer) -> str | None:
    """A template, its file, or the name of one of the model's. Raises: InvalidRequestError for anything else."""
    if value is None or "{" in value or tokenizer.read_chat_template(value) != value:
        return value
    try:
        return Path(value).read_text("utf-8")
    except (OSError, ValueError):
        raise InvalidRequestError(
            f"--chat-template {value[:100]} is no file, no template, and none of the model's; give one of them"
        ) from None
