"""The bench of predicted memory: its cells, its prompts and its summary; no process is started."""

import pytest

from bench.memory_cell import Cell, count_new_tokens, make_prompts
from bench.memory_plan import CELLS, QUICK, format_table, summarise


def test_there_are_thirty_cells_and_none_twice() -> None:
    assert len(CELLS) == len(set(CELLS)) == 30
    assert all(0 <= index < 30 for index in QUICK)


def test_the_first_sequence_outlives_the_reading_of_all_prompts() -> None:
    for cell in CELLS:
        steps = cell.batch * -(-(cell.context - count_new_tokens(cell)) // cell.chunk)
        assert steps <= count_new_tokens(cell) < cell.context, cell


def test_prompts_have_no_beginning_in_common() -> None:
    prompts = list(make_prompts(16, 40, 2048))
    assert len({prompt[0] for prompt in prompts}) == 16
    assert {len(prompt) for prompt in prompts} == {40}
    assert all(4 <= token < 2048 for prompt in prompts for token in prompt)


@pytest.mark.parametrize(
    ("errors", "p95"), [([0.01] * 29 + [0.2], 0.01), ([0.01] * 28 + [-0.2] * 2, 0.2)]
)
def test_one_cell_of_thirty_may_be_off(errors: list[float], p95: float) -> None:
    found = summarise([{"error": error} for error in errors])
    assert found["plan_error_p95"] == p95 and found["plan_error_max"] == 0.2
    assert found["worst_under"] == max(0.0, -min(errors))


def test_a_row_says_what_was_asked_for() -> None:
    cell = Cell("pocket", 512, 4, kv_bits=8, chunk=128)
    row = {**vars(cell), "predicted": 30_000_000, "measured": 29_000_000, "error": 1 / 29}
    assert (
        format_table([row]).splitlines()[-1]
        == "| pocket | 512 | 4 | 8 bit, chunk 128 | 30.0 | 29.0 | +3.4% |"
    )
