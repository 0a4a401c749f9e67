"""The rules of the house: who may import whom, who may touch what. Each rule is one test."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = ROOT / "python" / "microtome"

FLOORS = [
    {"errors", "_core", "tensors", "progress", "record", "arguments", "threads", "whole"},
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


PACKAGES = sorted(path.name for path in PACKAGE.iterdir() if (path / "__init__.py").exists())


def module_name(path: Path) -> str:
    parts = path.relative_to(PACKAGE.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def used(tree: ast.AST, known: set[str]) -> set[str]:
    """Modules that are imported wherever the code runs: at the top or inside a function, not for types alone."""
    typing = {
        id(inner)
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)
        for inner in ast.walk(node)
    }
    names: set[str] = set()
    for node in ast.walk(tree):
        if id(node) in typing:
            continue
        if isinstance(node, ast.Import):
            names.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            whole = (f"{node.module}.{alias.name}" for alias in node.names)
            names.update(name if name in known else node.module for name in whole)
    return names & known


def circle_in(edges: dict[str, set[str]]) -> list[str]:
    """A circle of imports, beginning and ending with one module; empty where there is none."""
    done: set[str] = set()

    def visit(node: str, trail: list[str]) -> list[str]:
        if node in trail:
            return [*trail[trail.index(node) :], node]
        if node in done:
            return []
        found = next((c for other in sorted(edges[node]) if (c := visit(other, [*trail, node]))), [])
        done.add(node)
        return found

    return next((circle for node in sorted(edges) if (circle := visit(node, []))), [])


@pytest.mark.parametrize("package", PACKAGES)
def test_modules_of_a_package_form_no_circle(package):
    trees = {module_name(path): ast.parse(path.read_text()) for path in (PACKAGE / package).rglob("*.py")}
    edges = {name: used(tree, set(trees)) - {name} for name, tree in trees.items()}
    circle = circle_in(edges)
    assert not circle, f"circle: {' -> '.join(circle)}"


def test_a_circle_is_found_wherever_its_imports_stand():
    inside = ast.parse("def f():\n    from p import b")
    types = ast.parse("if TYPE_CHECKING:\n    from p.a import A")
    known = {"p", "p.a", "p.b"}
    assert used(inside, known) == {"p.b"}
    assert used(types, known) == set()
    assert circle_in({"p": {"p.a"}, "p.a": {"p.b"}, "p.b": {"p.a"}}) == ["p.a", "p.b", "p.a"]
    assert circle_in({"p": {"p.a", "p.b"}, "p.a": {"p.b"}, "p.b": set()}) == []


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


def test_unsafe_lives_in_the_maps_and_the_micro_kernels():
    users = {
        p.relative_to(ROOT / "rust" / "core").as_posix()
        for p in rust("core")
        if re.search(r"\bunsafe (\{|fn|impl|trait|extern)", code_of(p))
    }
    assert all(
        u.startswith("kernels/") or u in {"memory.rs", "store/map.rs", "store/fs.rs"} for u in users
    ), users


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
