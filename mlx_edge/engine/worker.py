"""The engine's thread: loads the model, takes messages from other threads, lets the service go on, and never dies.

All of MLX happens here. Other threads leave messages and read counts; long texts and grammars are prepared beside it.
"""

import contextlib
import logging
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from queue import Empty, SimpleQueue

from mlx_edge.engine.config import EngineConfig
from mlx_edge.engine.delivery import LoopPost, Sink
from mlx_edge.engine.images.intake import PatchRoom
from mlx_edge.engine.intake import Prepared, is_quick, prepare
from mlx_edge.engine.memory.vision_sizes import MAX_ROOM_BYTES
from mlx_edge.engine.recorder import Recorder
from mlx_edge.engine.request import Request
from mlx_edge.engine.served import Served
from mlx_edge.engine.service import Service, tell
from mlx_edge.engine.task import Task
from mlx_edge.errors import EngineClosedError, QueueFullError

logger = logging.getLogger(__name__)

Message = Callable[[], None]
RETRY_S = 0.01  # until memory is asked for again that is on its way back
CLOSED = "the engine is closed; make a new one"
BROKEN_OFF = "the engine was closed before this request ended"


class Worker:
    """Owns the thread, and through it the model."""

    def __init__(self, load: Callable[[], Served], config: EngineConfig) -> None:
        self.post = LoopPost()
        self.recorder = Recorder(config)
        self.loaded = threading.Event()  # or failed
        self.served: Served | None = None
        self._load = load
        self._max_open = config.max_batch_size + config.max_queue_size
        self._inbox: SimpleQueue[Message] = SimpleQueue()
        self._door = threading.Lock()  # over the four below
        self._num_open = 0  # requests that have not ended
        self._next_key = 0
        self._is_closing = False
        self._error: BaseException | None = None  # why there is no engine any more
        self._service: Service | None = None  # in this thread alone, as all that follows
        self._must_stop = False
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="mlx_edge-prepare")
        # Images wait for room, which must not hold up texts.
        self._image_pool = ThreadPoolExecutor(1, thread_name_prefix="mlx_edge-images")
        self._room = PatchRoom(MAX_ROOM_BYTES)
        self.thread = threading.Thread(target=self._run, name="mlx_edge-engine", daemon=True)

    # From any thread.

    def submit(self, request: Request, sink: Sink, *, whole: bool) -> int:
        """Take a request; its key. Raises: EngineClosedError, QueueFullError, what loading failed with."""
        with self._door:
            if self._error is not None:
                raise self._error
            if self._is_closing:
                raise EngineClosedError(CLOSED)
            if self._num_open >= self._max_open:
                raise QueueFullError(
                    f"{self._num_open} requests are running or waiting, as many as there may be; try again later"
                )
            self._num_open += 1
            self._next_key += 1
            task = Task(self._next_key, request, sink, whole, time.monotonic())
            self._inbox.put(lambda: self._receive(task))
        return task.key

    def cancel(self, key: int) -> None:
        """End a request within a step; nothing where it has ended."""
        self._inbox.put(lambda: self._cancel(key))

    def close(self, *, drain: bool) -> None:
        """Take no more requests; end those that there are, or with `drain` let them end."""
        with self._door:
            self._is_closing = True
        self._inbox.put(self._wake if drain else self._stop)

    def check(self) -> None:
        """Raise what the engine has died of, if it has."""
        if self._error is not None:
            raise self._error

    # In the engine's thread.

    def _run(self) -> None:
        try:
            self.served = self._load()
            memory = self.served.memory
            if memory is not None and memory.vision is not None:
                self._room = PatchRoom(memory.vision.room_bytes)
            self._service = Service(self.served, self.recorder, self._count_end)
            self.recorder.begin(self.served)
        except BaseException as error:
            self._die(error)
            return
        self.loaded.set()
        while self._turn(self._service):
            pass
        self._end(self._service)

    def _turn(self, service: Service) -> bool:
        """One round: messages, admissions, a step. False when the engine is to end."""
        try:
            self._take_messages(self._wait_s(service))
            if self._is_done():
                return False
            if not service.advance() and service.scheduler.num_waiting:
                self._take_messages(min(RETRY_S, self._wait_s(service) or RETRY_S))
                service.scheduler.retry()
            self.recorder.publish(service.scheduler, self._num_open, service.caches)
        except Exception as error:  # our own mistake: everyone is told, and the engine goes on
            logger.exception("the engine failed, and fails all requests that it has")
            service.fail_all(error)
        self.post.flush()
        return True

    def _wait_s(self, service: Service) -> float | None:
        """How long to wait for a message: None for ever."""
        if self._is_done():
            return 0
        if not service.is_idle:
            return service.scheduler.company_s(time.monotonic())
        prefixes = service.served.prefixes
        while prefixes is not None and self._inbox.empty():  # time to write them to the disk
            if not prefixes.save_some():
                break
        return service.deadline_s(time.monotonic())

    def _is_done(self) -> bool:
        return self._must_stop or (self._is_closing and not self._num_open)

    def _take_messages(self, wait_s: float | None) -> None:
        """All messages that are there; wait for the first so long, None for ever."""
        inbox = self._inbox
        try:
            if wait_s is None or wait_s > 0:
                inbox.get(timeout=wait_s)()
            while not inbox.empty():
                inbox.get_nowait()()
        except Empty:
            pass
        self.post.flush()

    def _wake(self) -> None:
        """A message that says nothing."""

    def _stop(self) -> None:
        self._must_stop = True

    def _cancel(self, key: int) -> None:
        if self._service is not None:
            self._service.cut(key, "cancelled")

    def _count_end(self) -> None:
        with self._door:
            self._num_open -= 1

    def _receive(self, task: Task) -> None:
        """A request arrives: prepare it, beside this thread where that takes long."""
        service = self._service
        if service is None:  # loading has failed, or the engine has ended
            self._count_end()
            error = self._error or EngineClosedError(BROKEN_OFF)
            tell(task.sink.fail, _as_exception(error))
            return
        service.add(task)
        if self._must_stop:
            return  # it is failed with the others
        if is_quick(task.request):
            service.enter(task, _prepare(task.request, service.served))
        else:
            pool = self._image_pool if task.request.images else self._pool
            pool.submit(self._prepare_aside, task, service)

    def _prepare_aside(self, task: Task, service: Service) -> None:
        """In the pool's thread."""
        if not service.is_wanted(task):
            return
        result = _prepare(task.request, service.served, self._room)
        self._inbox.put(lambda: service.enter(task, result))

    def _die(self, error: BaseException) -> None:
        """Nothing can be served: tell whoever waits; whoever comes is told by `submit`."""
        with self._door:
            self._error = error
        self.loaded.set()
        self._take_messages(wait_s=0)
        self._shut_pools(wait=False)

    def _end(self, service: Service) -> None:
        """The thread ends: nobody is left waiting, and prefixes are kept where there is a place for them."""
        with self._door:
            self._is_closing = True
        with contextlib.suppress(Exception):
            self._take_messages(wait_s=0)
        service.fail_all(EngineClosedError(BROKEN_OFF))
        self.post.flush()
        self._shut_pools(wait=True)
        if service.served.prefixes is not None:
            service.served.prefixes.close()
        self.recorder.end()
        self._service = self.served = None

    def _shut_pools(self, *, wait: bool) -> None:
        self._room.close()
        for pool in (self._pool, self._image_pool):
            pool.shutdown(wait=wait, cancel_futures=wait)


def _prepare(
    request: Request, served: Served, room: PatchRoom | None = None
) -> Prepared | Exception:
    try:
        return prepare(request, served, room)
    except Exception as error:
        return error


def _as_exception(error: BaseException) -> Exception:
    return error if isinstance(error, Exception) else RuntimeError(f"loading ended: {error!r}")
