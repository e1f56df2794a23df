"""The drawing in the README is the house: every module stands in its tree, none is too long, floors hold."""

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "mlx_edge"
MAX_LINES = 400
MAX_FUNCTION_LINES = 60

# A module may import from lower floors and from its own folder. The first entry that fits decides.
FLOORS = {
    "errors": 0,
    "runtime": 0,
    "profiler": 0,
    "_native": 0,  # the CPU kernels' extension, not a module of Python
    "ops": 1,
    "text": 1,
    "quant": 2,
    "weights": 2,
    "cache": 2,
    "models": 3,
    "decoding": 4,
    "calibration": 5,
    "engine": 5,
    "conversion": 6,
    "serving": 6,
    "command": 0,
    "options": 5,
    "generate": 7,
    "chat": 7,
    "cache_prompt": 7,
    "benchmark": 7,
    "convert": 7,
    "plan": 7,
    "serve": 7,
    "__main__": 7,
}
GROUND = {"errors", "runtime"}  # everything stands on them
MODULES = sorted(PACKAGE.rglob("*.py"))
SCRIPTS = sorted(
    p for room in ("scripts", "bench", "metal_emulator") for p in (ROOT / room).glob("*.py")
)


def room(module: str) -> str:
    """The part of mlx_edge that a dotted name belongs to; "" for the package itself."""
    return module.split(".")[1] if "." in module else ""


def dotted(path: Path) -> str:
    parts = list(path.relative_to(ROOT).with_suffix("").parts)
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imports(path: Path, *, at_top_only: bool = False) -> list[str]:
    """The mlx_edge modules that a file imports, those for type checking alone left out."""
    tree = ast.parse(path.read_text())
    nodes = tree.body if at_top_only else list(ast.walk(tree))
    for_types = {
        inner
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test)
        for inner in ast.walk(node)
    }
    found = []
    for node in nodes:
        if node in for_types:
            continue
        if isinstance(node, ast.Import):
            found += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module == "mlx_edge":
            found += [f"mlx_edge.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module:
            found.append(node.module)
    return [name for name in found if name == "mlx_edge" or name.startswith("mlx_edge.")]


def readme_tree() -> str:
    text = (ROOT / "README.md").read_text()
    match = re.search(r"```text\n(mlx_edge/\n.*?)```", text, re.DOTALL)
    assert match, "README.md has no tree that begins with mlx_edge/"
    return match[1]


def tree_paths() -> set[str]:
    """Every file that the README's tree draws; two spaces of indentation are one folder."""
    paths, folders = set(), []
    for line in readme_tree().splitlines():
        name = line.split()[0] if line.strip() else ""
        depth = (len(line) - len(line.lstrip())) // 2
        folders = folders[:depth]
        if name.endswith("/"):
            folders.append(name.rstrip("/"))
            continue
        for word in line.split():
            if not re.fullmatch(r"[\w.-]+\.(py|metal)", word):
                break
            paths.add("/".join([*folders, word]))
    return paths


def test_readme_tree_draws_every_module_and_no_other() -> None:
    real = {
        str(path.relative_to(ROOT))
        for path in [*MODULES, *SCRIPTS, *(ROOT / "metal_kernels").glob("*.metal")]
        if not (path.name == "__init__.py" and path.parent != PACKAGE)
    }
    assert tree_paths() == real


@pytest.mark.parametrize("path", [*MODULES, *SCRIPTS], ids=lambda p: str(p.relative_to(ROOT)))
def test_files_and_functions_are_short_and_explained(path: Path) -> None:
    text = path.read_text()
    tree = ast.parse(text)
    assert len(text.splitlines()) <= MAX_LINES
    assert ast.get_docstring(tree), "a module opens with what it is"
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            assert node.end_lineno is not None
            length = node.end_lineno - node.lineno + 1
            assert length <= MAX_FUNCTION_LINES, f"{node.name} has {length} lines"


@pytest.mark.parametrize("path", MODULES, ids=lambda p: str(p.relative_to(ROOT)))
def test_no_import_goes_up_a_floor(path: Path) -> None:
    own = room(dotted(path))
    if not own:  # the package itself names what is public
        return
    for name in imports(path):
        other = room(name)
        assert other, f"{path.name} imports the package itself"
        is_own = own in {other, "__main__"}
        assert is_own or other in GROUND or FLOORS[other] < FLOORS[own], name


def test_no_import_cycle() -> None:
    graph = {dotted(path): imports(path, at_top_only=True) for path in MODULES}
    done: set[str] = set()

    def visit(module: str, trail: tuple[str, ...]) -> None:
        assert module not in trail, " -> ".join((*trail, module))
        if module in done or module not in graph:
            return
        for other in graph[module]:
            # A package's __init__ runs before its modules; its modules may import each other, not it.
            visit(other, (*trail, module))
        done.add(module)

    for module in graph:
        visit(module, ())
