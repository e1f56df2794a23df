"""The README says what is so: its table is made from the results, its flags and commands exist."""

import re
import runpy
from pathlib import Path

import pytest

from mlx_edge.benchmark import make_parser as make_benchmark_parser
from mlx_edge.convert import make_parser as make_convert_parser
from mlx_edge.generate import make_parser
from mlx_edge.plan import make_parser as make_plan_parser
from mlx_edge.serving.flags import make_parser as make_serve_parser

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()


def test_benchmark_table_is_made_from_the_results() -> None:
    table = runpy.run_path(str(ROOT / "bench" / "table.py"))
    assert table["replaced"](README) == README


def test_flags_named_in_the_readme_exist() -> None:
    named = set(re.findall(r"(?<![\w-])--[a-z][a-z-]+", README)) - {"--editable"}
    parsers = [
        make_parser(),
        make_benchmark_parser(),
        make_convert_parser(),
        make_plan_parser(),
        make_serve_parser("serve"),
    ]
    known = {flag for p in parsers for action in p._actions for flag in action.option_strings}
    assert named <= known


@pytest.mark.parametrize("target", sorted(set(re.findall(r"`?make ([a-z]+)", README)) - {"it"}))
def test_make_targets_named_in_the_readme_exist(target: str) -> None:
    assert re.search(rf"^{target}:", (ROOT / "Makefile").read_text(), re.MULTILINE)


def test_local_links_lead_somewhere() -> None:
    for link in re.findall(r"\]\((?!https?:)([^)#]+)\)", README):
        assert (ROOT / link).exists(), link
