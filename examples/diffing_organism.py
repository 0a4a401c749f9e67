"""How did the shipped language model learn to see? The questions, the three captured stores and the study, end to end.

    python examples/diffing_organism.py --out runs/organism --questions 1500

writes questions in words and in pictures as JSON lines, captures the base model on the words and the VLM on the pictures,
the VLM once more under a neutral prompt, and then runs, as a user would,

    microtome diff OUT/base OUT/vlm --spatial "task = 'spatial'" --cluster scene --neutral OUT/neutral \\
        --data OUT/vlm.jsonl --out OUT/diff
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from microtome import organism
from microtome.capture.data import capture_dataset, read_items

NEUTRAL = "<image> what is there ?"
"""The paper's "Describe the positions of all objects in the image." in the organism's 72 words: no thing, no relation."""


def write_questions(folder: Path, n: int, seed: int) -> None:
    """``n`` questions of each task, as JSON lines with the pictures beside them."""
    (folder / "images").mkdir(parents=True, exist_ok=True)
    lines: dict[str, list[dict[str, str]]] = {"base": [], "vlm": [], "neutral": []}
    for task in organism.TASKS:
        for form, name in (("textual", "base"), ("visual", "vlm")):
            for item in organism.questions(task, form, n, seed):
                row = {"id": item.id, "prompt": item.prompt, "task": item.task, "form": item.form}
                row |= {
                    "answer": item.answer,
                    "relation": item.relation,
                    "kind_of_question": item.question_kind,
                }
                row |= {"scene": item.pair_id or item.id}  # refusals come in pairs that share their picture
                if item.image is not None:
                    row["image"] = f"images/{item.id}.png"
                    item.image.save(folder / row["image"])
                lines[name].append(row)
    for row in lines["vlm"][::10]:
        lines["neutral"].append({**row, "prompt": NEUTRAL})
    for name, rows in lines.items():
        text = "".join(json.dumps(row) + "\n" for row in rows)
        (folder / f"{name}.jsonl").write_text(text)


def capture_all(folder: Path) -> None:
    """One store for each file of questions; what is there already is not captured again."""
    for name, which in (("base", "base_lm"), ("vlm", "vlm"), ("neutral", "vlm")):
        model = organism.load_model(which)
        processor = organism.load_tokenizer() if which == "base_lm" else organism.load_processor()
        items = read_items(folder / f"{name}.jsonl")
        hooks = ["blocks.*.hook_resid_post"]
        n = capture_dataset(model, processor, items, folder / name, hooks, batch_size=64)
        print(f"{name}: {n} questions captured")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("runs/organism"))
    parser.add_argument("--questions", type=int, default=1500, help="questions of each of the seven tasks")
    parser.add_argument("--seed", type=int, default=0)
    told = parser.parse_args()
    write_questions(told.out, told.questions, told.seed)
    capture_all(told.out)
    print(
        f"microtome diff {told.out}/base {told.out}/vlm --neutral {told.out}/neutral "
        f"""--spatial "task = 'spatial'" --cluster scene --data {told.out}/vlm.jsonl --out {told.out}/diff"""
    )


if __name__ == "__main__":
    main()
