"""Spans: they nest, add up, survive exceptions and threads, and cost nothing when off."""

import subprocess
import sys
import tracemalloc
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from mlx_edge import profiler
from mlx_edge.errors import InvalidRequestError
from mlx_edge.profiler import Profiler
from tests.profiler.ticking import Clock


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def watch(clock: Clock) -> Profiler:
    return Profiler(clock=clock, sample=None)


def test_spans_nest_and_add_up(watch: Profiler, clock: Clock) -> None:
    for _ in range(2):
        with watch.start("step"):
            clock.advance(10)
            with watch.start("layer_1"):
                clock.advance(30)
                with watch.start("linear"):
                    clock.advance(5)
            with watch.start("layer_2"):
                clock.advance(20)
    totals = watch.totals()
    assert {path: (t.calls, t.total_ns, t.self_ns) for path, t in totals.items()} == {
        ("step", "layer_1", "linear"): (2, 10, 10),
        ("step", "layer_1"): (2, 70, 60),
        ("step", "layer_2"): (2, 40, 40),
        ("step",): (2, 130, 20),
    }
    assert [event.path[-1] for event in watch.events()][:4] == [
        "linear",
        "layer_1",
        "layer_2",
        "step",
    ]


def test_phases_leave_out_only_the_phases_inside(watch: Profiler, clock: Clock) -> None:
    with watch.phase("decode"):
        clock.advance(100)
        assert watch.current_phase() == "decode"
        with watch.start("block", kind="op"):
            clock.advance(40)
            assert watch.current_phase() == "decode"
            with watch.phase("sample"):
                assert watch.current_phase() == "sample"
                clock.advance(7)
    assert watch.current_phase() is None
    totals = watch.totals()
    assert totals["decode",].phase_ns == 140
    assert totals["decode", "block", "sample"].phase_ns == 7
    assert watch.phases_wall_ns() == 147


def test_an_exception_ends_its_spans_and_is_named(watch: Profiler, clock: Clock) -> None:
    with pytest.raises(KeyError), watch.start("outer"), watch.start("inner"):
        clock.advance(3)
        raise KeyError("lost")
    assert [(e.path[-1], e.details) for e in watch.events()] == [
        ("inner", {"error": "KeyError"}),
        ("outer", {"error": "KeyError"}),
    ]
    with watch.start("after"):
        pass
    assert ("after",) in watch.totals()


def test_a_span_that_ends_before_the_one_inside_it_is_an_error(watch: Profiler) -> None:
    outer, inner = watch.start("outer"), watch.start("inner")
    outer.__enter__()
    inner.__enter__()
    with pytest.raises(InvalidRequestError, match="'outer' ended before 'inner'"):
        outer.__exit__(None, None, None)
    with pytest.raises(InvalidRequestError, match="'inner' is not open in this thread"):
        inner.__exit__(None, None, None)
    with watch.start("after"):
        pass
    assert list(watch.totals()) == [("after",)]


def test_threads_have_spans_of_their_own() -> None:
    watch = Profiler(sample=None)

    def work(index: int) -> None:
        with watch.start("request"):
            for _ in range(50):
                with watch.start(f"step {index % 2}"):
                    pass

    with watch.start("main"), ThreadPoolExecutor(4, thread_name_prefix="worker") as pool:
        list(pool.map(work, range(40)))
    totals = watch.totals()
    assert totals["main",].calls == 1
    assert totals["request",].calls == 40
    assert totals["request", "step 0"].calls == totals["request", "step 1"].calls == 1000
    names = watch.threads()
    assert names[1] == "MainThread"
    assert all(name.startswith("worker") for number, name in names.items() if number > 1)
    assert {event.thread for event in watch.events()} == set(names)


def test_wrap_keeps_name_and_result(watch: Profiler) -> None:
    def double(x: int) -> int:
        """Twice."""
        return 2 * x

    timed = watch.wrap("double", double)
    assert timed(4) == 8
    assert timed.__doc__ == "Twice."
    assert watch.totals()["double",].calls == 1


def test_beyond_the_limit_only_the_totals_go_on(clock: Clock) -> None:
    watch = Profiler(clock=clock, sample=None, max_events=3)
    for _ in range(10):
        with watch.start("step"):
            clock.advance(1)
    assert len(watch.events()) == 3
    assert watch.num_dropped == 7
    assert watch.totals()["step",].calls == 10


def test_reset_forgets_also_what_is_open(watch: Profiler, clock: Clock) -> None:
    with watch.start("old"):
        watch.reset()
        with watch.start("new"):
            clock.advance(2)
    assert list(watch.totals()) == [("new",)]


def test_off_does_nothing() -> None:
    def fail(*_args: Any) -> Any:
        raise AssertionError("called although the profiler is off")

    watch = Profiler(is_on=False, clock=fail, sample=fail)

    def work() -> None:
        for _ in range(1000):
            with watch.start("layer"), watch.phase("decode"):
                pass

    assert watch.start("a") is watch.phase("b")
    assert watch.wrap("work", work) is work
    work()
    tracemalloc.start()
    try:
        held, _ = tracemalloc.get_traced_memory()
        tracemalloc.reset_peak()
        work()
        after, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert after - held < 1024  # nothing per span is kept
    assert peak - held < 2048  # a frame's own at most
    assert watch.events() == []
    assert watch.totals() == {}


def test_the_default_profiler(tmp_path: Any) -> None:
    profiler.reset()
    try:
        with profiler.start("layer_1"):
            pass
        profiler.dump_report(tmp_path / "profile.json")
        assert list(profiler.DEFAULT.totals()) == [("layer_1",)]
        assert "layer_1" in (tmp_path / "profile.json").read_text()
    finally:
        profiler.reset()
    assert profiler.DEFAULT.totals() == {}


def test_importing_is_cheap_and_every_public_name_is_there() -> None:
    program = (
        "import sys\n"
        "from mlx_edge import profiler\n"
        "with profiler.start('a'): pass\n"
        "assert not {'mlx.core', 'numpy'} & set(sys.modules)\n"
        "assert all(getattr(profiler, name) is not None for name in profiler.__all__)\n"
        "assert not any(n.startswith(('mlx_edge.ops', 'mlx_edge.models')) for n in sys.modules)\n"
    )
    subprocess.run([sys.executable, "-c", program], check=True)
