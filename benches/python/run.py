"""The table of ratios: every bench of this folder, each in a process of its own.

    make bench                                  # all
    python benches/python/run.py encode cka     # some

A ratio above 1 says how many times faster microtome is (for capture and attribution: what it costs; for the store: the
share of the read bandwidth). Both sides alternate in one process; medians, with the least and the largest ratio, then the
ratios of wall and of processor time. Peers that are not installed are left out.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import timing

HERE = Path(__file__).parent
NAMES = (
    "encode",
    "features",
    "analyse",
    "cka",
    "cosine",
    "sets",
    "store",
    "capture",
    "training",
    "attribution",
)


def lines_of(name: str) -> list[dict]:
    """The rows of ``bench_<name>.py``, measured in a fresh process."""
    code = f"import json, bench_{name}; print(json.dumps(bench_{name}.rows(), default=float))"
    done = subprocess.run([sys.executable, "-c", code], cwd=HERE, capture_output=True, text=True)
    if done.returncode:
        print(f"{name}: {(done.stderr.strip().splitlines() or ['failed'])[-1]}")
        return []
    return json.loads(done.stdout.strip().splitlines()[-1])


def show(line: dict) -> None:
    """One line of the table, in Markdown."""
    cells = [line["name"], line["shape"], line["peer"], f"{line['ratio']:.2f}"]
    cells += [f"{line['min']:.2f} to {line['max']:.2f}", number(line, "wall"), number(line, "cpu")]
    cells += [number(line, "bar", "g"), timing.reached(line), line.get("remarks", "")]
    print("| " + " | ".join(cells) + " |", flush=True)


def number(line: dict, key: str, form: str = ".2f") -> str:
    """A number of a row, empty where it has none."""
    return "" if line.get(key) is None else format(line[key], form)


def main(names: list[str]) -> None:
    """Print the table."""
    timing.refuse_debug()
    print("| what | shape | against | ratio | spread | wall | processor | bar | reached | remarks |")
    print("| --- | --- | --- | --- | --- | --- | --- | --- | --- | --- |", flush=True)
    for name in names or NAMES:
        for line in lines_of(name):
            show(line)


if __name__ == "__main__":
    main(sys.argv[1:])
