"""The rules of the house: who may import whom, who may touch what. Each rule is one test."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from importlib import import_module
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = ROOT / "python" / "microtome"

FLOORS = [
    {"errors", "_core", "tensors", "progress", "record", "budget"},
    {"store", "metrics"},
    {"capture", "dictionary", "evaluation"},
    {"diffing", "interpret", "circuits", "compression", "cluster"},
    {"report", "organism"},
    {"demo", "cli", "__main__"},
]
FLOOR = {room: level for level, rooms in enumerate(FLOORS) for room in rooms}

FORBIDDEN_CALLS = {"eval", "exec", "compile", "__import__"}
FORBIDDEN_MODULES = {"pickle", "cPickle", "dill", "joblib", "shelve", "marshal"}


def modules():
    return sorted(path for path in PACKAGE.rglob("*.py"))


def room(path: Path) -> str:
    part = path.relative_to(PACKAGE).parts[0]
    return part.removesuffix(".py")


def imports(tree: ast.AST):
    """(imported module, whether it is inside a function or a TYPE_CHECKING block)."""
    lazy = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) or (
            isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)
        ):
            lazy.update(id(inner) for inner in ast.walk(node))
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((alias.name, id(node) in lazy) for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield node.module, id(node) in lazy


def test_imports_run_downstairs():
    wrong = []
    for path in modules():
        here = room(path)
        if here == "__init__":
            continue
        for name, _ in imports(ast.parse(path.read_text())):
            if name.startswith("microtome."):
                there = name.split(".")[1]
                if there != here and FLOOR[there] > FLOOR[here]:
                    wrong.append(f"{path.relative_to(PACKAGE)} imports {name}")
    assert not wrong, wrong


def test_rooms_form_no_circle():
    edges: dict[str, set[str]] = {}
    for path in modules():
        here = room(path)
        for name, lazy in imports(ast.parse(path.read_text())):
            if name.startswith("microtome.") and not lazy and here != "__init__":
                edges.setdefault(here, set()).add(name.split(".")[1])
    seen: set[str] = set()

    def visit(node: str, trail: tuple[str, ...]):
        assert node not in trail, f"circle: {' -> '.join((*trail, node))}"
        if node not in seen:
            for other in edges.get(node, set()) - {node}:
                visit(other, (*trail, node))
            seen.add(node)

    for node in list(edges):
        visit(node, ())


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


def circles(sources: dict[str, str]) -> list[str]:
    """Files whose imports lead into a circle; none when there is none."""
    edges = {name: set(circuit_imports(source, sources)) & set(sources) for name, source in sources.items()}
    while leaves := [name for name, others in edges.items() if not others]:
        edges = {name: others.difference(leaves) for name, others in edges.items() if name not in leaves}
    return sorted(edges)


def test_rooms_of_circuits_import_downstairs():
    sources = circuit_sources()
    assert {name.split(".")[0] for name in sources} == set(CIRCUIT_FLOOR)
    assert not imports_upstairs(sources)


def test_files_of_circuits_form_no_circle():
    assert not circles(circuit_sources())


@pytest.mark.parametrize(
    ("name", "line", "circle"),
    [
        ("circuit.nodes", "import microtome.circuits.study.runner", True),
        ("forward.decoder", "from microtome.circuits.pairs.pair_set import PairBatch", True),
        ("ablation.causal", "from microtome.circuits.attribution.nodes import attribute", False),
        ("statistics", "from microtome.circuits.study import steps", True),
    ],
)
@pytest.mark.parametrize("where", ["{}", "def later():\n    {}", "if TYPE_CHECKING:\n    {}"])
def test_an_import_upstairs_is_seen_wherever_it_hides(name, line, circle, where):
    sources = circuit_sources()
    sources[name] += "\n" + where.format(line)
    assert [found.split()[0] for found in imports_upstairs(sources)] == [name]
    assert (name in circles(sources)) == circle


def test_a_circle_within_a_room_of_circuits_is_seen():
    sources = circuit_sources()
    sources["study.options"] += "\nfrom microtome.circuits.study.sides import Side"
    assert not imports_upstairs(sources)
    assert {"study.options", "study.sides"} <= set(circles(sources))


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


def test_importing_microtome_needs_numpy_and_polars_alone():
    heavy = ("torch", "transformers", "matplotlib", "typer", "rich", "jinja2", "safetensors")
    code = f"import sys, microtome.metrics, microtome.store; print([m for m in {heavy} if m in sys.modules])"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "[]"


@pytest.mark.parametrize("path", modules(), ids=lambda p: str(p.relative_to(PACKAGE)))
def test_nothing_on_disk_can_run_code(path):
    tree = ast.parse(path.read_text())
    assert not {name.split(".")[0] for name, _ in imports(tree)} & FORBIDDEN_MODULES
    for node in ast.walk(tree):
        if not isinstance(node, ast.Call):
            continue
        name = ast.unparse(node.func)
        keywords = {k.arg: ast.unparse(k.value) for k in node.keywords}
        assert name not in FORBIDDEN_CALLS, f"{name} at line {node.lineno}"
        assert not name.endswith("yaml.load"), f"{name} at line {node.lineno}"
        assert keywords.get("allow_pickle", "False") == "False", f"allow_pickle at line {node.lineno}"
        assert "trust_remote_code" not in keywords, f"trust_remote_code at line {node.lineno}"
        if name == "torch.load":
            assert keywords.get("weights_only") == "True", f"torch.load at line {node.lineno}"


def test_report_never_imports_torch():
    for path in (PACKAGE / "report").rglob("*.py"):
        names = {name.split(".")[0] for name, _ in imports(ast.parse(path.read_text()))}
        assert "torch" not in names, path


def rust(room_: str):
    return sorted((ROOT / "rust" / room_).rglob("*.rs"))


def code_of(path: Path) -> str:
    """Rust source without comments and without its test module."""
    text = re.sub(r"//.*", "", path.read_text())
    return text.split("#[cfg(test)]")[0]


def test_only_the_scan_starts_threads():
    users = [p for p in rust("core") if re.search(r"rayon|par_iter|thread::(spawn|scope)", code_of(p))]
    assert {p.relative_to(ROOT / "rust" / "core").as_posix() for p in users} <= {
        "scan.rs",
        "scan/ahead.rs",
    }, users


def test_only_fs_touches_files():
    users = [p for p in rust("core") if re.search(r"std::fs|OpenOptions|libc::open", code_of(p))]
    assert {p.name for p in users} <= {"fs.rs"}, users


def test_unsafe_lives_in_the_map_and_the_micro_kernels():
    users = {
        p.relative_to(ROOT / "rust" / "core").as_posix()
        for p in rust("core")
        if re.search(r"\bunsafe (\{|fn|impl|trait|extern)", code_of(p))
    }
    assert all(u.startswith("kernels/") or u in {"store/map.rs", "store/fs.rs"} for u in users), users


def test_the_core_knows_no_python():
    for path in [*rust("core"), ROOT / "Cargo.toml"]:
        text = path.read_text()
        assert "pyo3" not in text, path


def test_the_border_is_thin():
    for path in rust("py"):
        text = code_of(path)
        assert ".unwrap()" not in text, path
        for match in re.finditer(r"#\[pyclass([^\]]*)\]", text):
            assert "frozen" in match.group(1), f"{path}: pyclass must be frozen"


def test_rust_rooms_import_downstairs():
    allowed = {
        "kernels": {"kernels"},
        "metrics": {"kernels", "metrics", "scan"},  # scan.rs has the parallel primitives and knows no metric
        "store": {"store", "scan", "kernels"},  # scan.rs gives the trait Source; a checksum is arithmetic
    }
    for name, may in allowed.items():
        for path in (ROOT / "rust" / "core" / name).rglob("*.rs"):
            used = set(re.findall(r"crate::(kernels|metrics|store|scan)\b", code_of(path)))
            assert used <= may, f"{path}: {used - may}"


def test_files_stay_readable():
    long = {
        p.name: n
        for p in [*modules(), *rust("core"), *rust("py")]
        if (n := len(p.read_text().splitlines())) > 600
    }
    assert not long, long
