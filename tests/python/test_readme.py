"""The README says what is true: its example runs, its links lead somewhere."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")), ROOT / "benches" / "README.md"]


def examples(page: Path) -> list[str]:
    return re.findall(r"```python\n(.*?)```", page.read_text(), flags=re.DOTALL)


def test_readme_example_runs_in_twenty_lines(tmp_path, monkeypatch, capsys):
    [example] = examples(ROOT / "README.md")
    assert len(example.strip().splitlines()) <= 20
    monkeypatch.chdir(tmp_path)
    exec(compile(example, "README.md", "exec"), {})
    feature, cka = capsys.readouterr().out.split()
    assert 0 <= int(feature) < 1024
    assert 0 < float(cka) <= 1


@pytest.mark.parametrize("page", PAGES, ids=lambda p: str(p.relative_to(ROOT)))
def test_links_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)#]+)\)", page.read_text()):
        if "://" not in target:
            assert (page.parent / target).exists(), f"{page.name} links to {target}"


@pytest.mark.parametrize("page", PAGES[1:], ids=lambda p: str(p.relative_to(ROOT)))
def test_examples_of_the_guides_are_python(page):
    for example in examples(page):
        compile(example, str(page), "exec")


def test_every_public_name_is_on_the_api_page_of_its_room():
    import microtome as mt

    rooms = set(
        re.findall(r"^::: (microtome\.\w+)$", (ROOT / "docs" / "api.md").read_text(), flags=re.MULTILINE)
    )
    for name in set(mt.__all__) - {"__version__", "errors", "num_threads", "set_num_threads"}:
        value = getattr(mt, name)
        room = ".".join(value.__module__.split(".")[:2]) if hasattr(value, "__module__") else value.__name__
        assert room in rooms, f"{name} lives in {room}"
        assert value.__doc__, name
