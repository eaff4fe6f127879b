"""The folders of the package and of benchmarks/, and imports that run one way.

attach -> hosts -> seams -> drops -> sampling, and in benchmarks/: programs -> claim, part -> measure, written
"""

import ast
from pathlib import Path

import pytest

import gaussmask

PACKAGE = Path(gaussmask.__file__).parent
FILES = sorted(PACKAGE.rglob("*.py"))
FLOORS = ["sampling", "drops", "seams", "hosts"]  # each may import those before it, and itself
GESTURES = {"attach", "describe", "functional", "plot", "__init__"}  # above all floors
BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
ROOMS = {"claim": {"measure", "written"}, "part": {"measure", "written"}, "measure": set(), "written": set()}
PROGRAMS = {"run", "report", "claims", "claim_report", "open_clip_program"}  # may import every room, and each other


def module_of(path):
    """The dotted name of a file below the package: () for its `__init__`."""
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    return parts[:-1] if parts[-1] == "__init__" else parts


MODULES = {module_of(path): path for path in FILES}


def imported(path):
    """The modules of the package that a file imports, at any place in it."""
    folder = module_of(path) if path.name == "__init__.py" else module_of(path)[:-1]
    for node in ast.walk(ast.parse(path.read_text("utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.level:
            base = (*folder[: len(folder) - node.level + 1], *(node.module.split(".") if node.module else ()))
            for alias in node.names:
                yield (*base, alias.name) if (*base, alias.name) in MODULES else base
        elif isinstance(node, (ast.Import, ast.ImportFrom)):
            for name in [node.module] if isinstance(node, ast.ImportFrom) else [alias.name for alias in node.names]:
                if name.partition(".")[0] == "gaussmask":
                    yield tuple(name.split(".")[1:])


BENCHMARK_MODULES = {path.relative_to(BENCHMARKS).with_suffix("").parts: path for path in BENCHMARKS.rglob("*.py")}


def imported_in_benchmarks(path):
    """The modules of benchmarks/ that a file there imports, at any place in it."""
    for node in ast.walk(ast.parse(path.read_text("utf-8"))):
        if isinstance(node, ast.ImportFrom):
            assert not node.level, f"{path} imports what depends on where it lies"
            base = tuple(node.module.split("."))
            names = [(*base, alias.name) if (*base, alias.name) in BENCHMARK_MODULES else base for alias in node.names]
        elif isinstance(node, ast.Import):
            names = [tuple(alias.name.split(".")) for alias in node.names]
        else:
            continue
        yield from (name for name in names if name in BENCHMARK_MODULES)


def test_the_reader_of_imports_sees_them():
    assert set(imported(PACKAGE / "attach.py")) == {
        ("drops",), ("hosts",), ("seams", "host"), ("seams", "link"), ("seams", "seam"), ("seams", "unsupported")
    }  # fmt: skip
    assert ("sampling", "grids") in imported(PACKAGE / "drops" / "base.py")
    assert ("hosts", "refusals") in imported(PACKAGE / "hosts" / "find.py")
    assert {("part", "step"), ("part", "drop_on_cuda"), ("measure", "machine"), ("report",)} < set(
        imported_in_benchmarks(BENCHMARKS / "run.py")
    )


def test_the_rooms_are_these():
    assert {name[0] for name in MODULES if name} - set(FLOORS) == GESTURES - {"__init__"}


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.relative_to(PACKAGE).as_posix())
def test_imports_run_one_way(path):
    module = module_of(path)
    floor = FLOORS.index(module[0]) if module and module[0] in FLOORS else len(FLOORS)
    for target in imported(path):
        assert target in MODULES
        if target and target[0] in FLOORS:
            assert FLOORS.index(target[0]) <= floor, f"{path} imports {'.'.join(target)}, which lies above it"
        else:
            assert floor == len(FLOORS), f"{path} imports {'.'.join(target)}, which lies above it"


def test_the_rooms_of_the_benchmarks_are_these():
    assert {name[0] for name in BENCHMARK_MODULES if len(name) > 1} == ROOMS.keys()
    assert {name[0] for name in BENCHMARK_MODULES if len(name) == 1} == PROGRAMS


@pytest.mark.parametrize("name", BENCHMARK_MODULES, ids="/".join)
def test_imports_of_the_benchmarks_run_one_way(name):
    reach = {name[0], *ROOMS[name[0]]} if len(name) > 1 else ROOMS.keys() | PROGRAMS
    for target in imported_in_benchmarks(BENCHMARK_MODULES[name]):
        assert target[0] in reach, f"{'/'.join(name)} imports {'/'.join(target)}"


@pytest.mark.parametrize(
    ("modules", "read"),
    [(MODULES, imported), (BENCHMARK_MODULES, imported_in_benchmarks)],
    ids=["gaussmask", "benchmarks"],
)
def test_no_two_files_import_each_other(modules, read):
    """Not by way of others either."""
    below = {name: set(read(path)) for name, path in modules.items()}
    finished = set()

    def walk(name, way):
        assert name not in way, " -> ".join(".".join(step) or "gaussmask" for step in (*way, name))
        if name not in finished:
            for target in below[name]:
                walk(target, (*way, name))
            finished.add(name)

    for name in below:
        walk(name, ())


@pytest.mark.parametrize("folder", FLOORS)
def test_a_folder_opens_with_its_picture(folder):
    text = ast.get_docstring(ast.parse((PACKAGE / folder / "__init__.py").read_text("utf-8")))
    assert 3 <= len(text.splitlines()) <= 12
    assert "-->" in text
