"""The table of ratios: every bench of this folder, each in a process of its own.

    make bench                                  # all
    python benches/python/run.py encode cka     # some

A ratio above 1 says how many times faster microtome is (for capture: what it costs). Both sides alternate in one process;
medians, with the least and the largest ratio. Peers that are not installed are named and left out.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

from microtome import _core

HERE = Path(__file__).parent
NAMES = ("encode", "features", "cka", "cosine", "sets", "capture")


def lines_of(name: str) -> list[dict]:
    """The rows of ``bench_<name>.py``, measured in a fresh process."""
    code = f"import json, bench_{name}; print(json.dumps(bench_{name}.rows(), default=float))"
    done = subprocess.run([sys.executable, "-c", code], cwd=HERE, capture_output=True, text=True)
    if done.returncode:
        print(f"{name}: {(done.stderr.strip().splitlines() or ['failed'])[-1]}")
        return []
    return json.loads(done.stdout.strip().splitlines()[-1])


def spread_of(line: dict) -> tuple[float, float]:
    """The least and the largest ratio of a line."""
    return tuple(line["spread"]) if "spread" in line else (line["min"], line["max"])


def show(line: dict) -> None:
    """One line of the table, in Markdown."""
    low, high = spread_of(line)
    bar, candidates, escaped = (line.get(key) for key in ("bar", "candidates_per_k", "escape_rate"))
    print(
        f"| {line['name']} | {line['shape']} | {line['peer']} | {line['ratio']:.2f} | {low:.2f} to {high:.2f} "
        f"| {'' if not bar else f'{bar:g}'} | {'' if candidates is None else f'{candidates:.2f}'} "
        f"| {'' if escaped is None else f'{escaped:.2%}'} |",
        flush=True,
    )


def main(names: list[str]) -> None:
    """Print the table."""
    if _core.BUILD_PROFILE != "release":
        raise SystemExit("benches: expected a release build, found a debug build. Run make bench")
    print(
        "| what | shape | against | ratio | spread | bar | candidates/k | escaped |\n"
        "| --- | --- | --- | --- | --- | --- | --- | --- |",
        flush=True,
    )
    for name in names or NAMES:
        for line in lines_of(name):
            show(line)


if __name__ == "__main__":
    main(sys.argv[1:])
