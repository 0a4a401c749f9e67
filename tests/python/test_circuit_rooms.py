"""The rooms of ``microtome.circuits`` import downstairs, and say what is in them."""

from __future__ import annotations

import ast
import re
from importlib import import_module

import pytest

from test_architecture import PACKAGE, imports

CIRCUIT_FLOORS = [
    {"statistics", "circuit"},
    {"forward"},
    {"pairs"},
    {"attribution", "ablation", "backpatch"},
    {"faithfulness"},
    {"interchange"},
    {"study"},
]
CIRCUIT_FLOOR = {room: level for level, rooms in enumerate(CIRCUIT_FLOORS) for room in rooms}


def circuit_sources() -> dict[str, str]:
    """Dotted name inside ``microtome.circuits`` -> source; rooms' and the package's own ``__init__`` left out."""
    root = PACKAGE / "circuits"
    files = (p for p in root.rglob("*.py") if p.name != "__init__.py")
    return {".".join(p.relative_to(root).with_suffix("").parts): p.read_text() for p in files}


def circuit_imports(source: str, names):
    """Files of ``microtome.circuits`` that a file imports, also inside functions and TYPE_CHECKING blocks."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module:
            below = [f"{node.module}.{alias.name}" for alias in node.names]
            files = [name for name in below if name.removeprefix("microtome.circuits.") in names]
            found = files or [node.module]
        else:
            continue
        yield from (
            n.removeprefix("microtome.circuits.") for n in found if n.startswith("microtome.circuits.")
        )


def imports_upstairs(sources: dict[str, str]) -> list[str]:
    wrong = []
    for name, source in sources.items():
        here = name.split(".")[0]
        for other in circuit_imports(source, sources):
            there = other.split(".")[0]
            if there != here and CIRCUIT_FLOOR[there] >= CIRCUIT_FLOOR[here]:
                wrong.append(f"{name} imports {other}")
    return wrong


def test_rooms_of_circuits_import_downstairs():
    sources = circuit_sources()
    assert {name.split(".")[0] for name in sources} == set(CIRCUIT_FLOOR)
    assert not imports_upstairs(sources)


@pytest.mark.parametrize(
    ("name", "line"),
    [
        ("circuit.nodes", "import microtome.circuits.study.runner"),
        ("forward.decoder", "from microtome.circuits.pairs.pair_set import PairBatch"),
        ("ablation.causal", "from microtome.circuits.attribution.nodes import attribute"),
        ("statistics", "from microtome.circuits.study import steps"),
    ],
)
@pytest.mark.parametrize("where", ["{}", "def later():\n    {}", "if TYPE_CHECKING:\n    {}"])
def test_an_import_upstairs_is_seen_wherever_it_hides(name, line, where):
    sources = circuit_sources()
    sources[name] += "\n" + where.format(line)
    assert [found.split()[0] for found in imports_upstairs(sources)] == [name]


def test_every_room_of_circuits_says_what_is_in_which_file():
    root = PACKAGE / "circuits"
    told = ast.get_docstring(ast.parse((root / "__init__.py").read_text()))
    for room in CIRCUIT_FLOOR:
        assert re.search(rf"^ .*\b{room}\b", told, re.MULTILINE), room
        if (root / room).is_dir():
            text = ast.get_docstring(ast.parse((root / room / "__init__.py").read_text()))
            named = set(re.findall(r"``(\w+)``", text))
            files = {p.stem for p in (root / room).glob("*.py")} - {"__init__"}
            assert files <= named, (room, files - named)


def test_circuits_and_statistics_are_numpy_alone():
    root = PACKAGE / "circuits"
    for path in [*(root / "circuit").glob("*.py"), root / "statistics.py", root / "backpatch" / "choice.py"]:
        names = {name.split(".")[0] for name, _ in imports(ast.parse(path.read_text()))}
        assert "torch" not in names, path


@pytest.mark.parametrize(
    "path",
    [
        "ablation.ablate_heads", "attribution.attribute", "backpatch.back_patch", "circuit.Circuit",
        "faithfulness.faithfulness", "interchange.interchange", "statistics.jackknife", "study.run",
        "study.command.study",
    ],
)  # fmt: skip
def test_paths_that_documents_name_can_be_imported(path):
    module, name = f"microtome.circuits.{path}".rsplit(".", 1)
    assert callable(getattr(import_module(module), name))
