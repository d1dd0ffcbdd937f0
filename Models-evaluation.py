"""Evaluate trained networks: accuracy, log loss and calibration, without and with temperature
scaling, beside the students distilled from them.

Checkpoints say themselves what data, split and network they belong to. The temperature is fitted to
the validation split's log loss. Runs that differ in their seed alone are averaged: mean ± sample
standard deviation, the best of each data set and network in bold. Formulas: utils/evaluate.py.

GPU:  python Models-evaluation.py runs/cifar10
CPU:  python Models-evaluation.py runs/fashionmnist/shallownet --device cpu
"""

import json
import sys
from pathlib import Path

import pandas as pd
from tqdm import tqdm

from utils import checkpoint, tables
from utils.arguments import Parser, add_evaluation_flags
from utils.errors import InputError, run
from utils.evaluate import all_metrics
from utils.inference import Evaluated, evaluate_checkpoint


def tidy_rows(evaluated: Evaluated, ece_bins: int) -> list[dict]:
    """Four rows: the validation and the test split, without and with temperature scaling."""
    training, teacher = evaluated.training, evaluated.teacher or {}
    about = {
        "checkpoint": str(evaluated.path),
        "dataset": evaluated.data["dataset"],
        "model": evaluated.model_name,
        "training": tables.setting(training["method"], training["requested"]),
        "method": training["method"],
        "hyper_parameters": json.dumps(training["hyper_parameters"]),
        "recipe": json.dumps(training["recipe"]),
        "seed": training["seed"],
        "epoch": training["epoch"],
        "test_images": evaluated.data["splits"]["test"],
        "weights": evaluated.weights_hash,
        "teacher": teacher["weights"] if evaluated.is_student else None,
        "teacher_scaling": {True: "yes", False: "no"}.get(teacher.get("scaled")),
        "student_setting": tables.setting("", training["requested"]),
        "ece_bins": ece_bins,
    }
    rows = []
    for split in ("validation", "test"):
        logits, labels = evaluated.logits[split].double(), evaluated.labels[split]
        for scaling, temperature in (("no", 1.0), ("yes", evaluated.temperature)):
            metrics = all_metrics(logits / temperature, labels, ece_bins)
            rows.append(
                {**about, "split": split, "scaling": scaling, "temperature": temperature, **metrics}
            )
    return rows


def main() -> int:
    parser = Parser(__doc__)
    parser.add_argument(
        "checkpoints",
        nargs="+",
        metavar="CHECKPOINT_OR_FOLDER",
        help="best.pt files, or folders that are searched for them",
    )
    parser.add_argument(
        "--output_dir",
        default="evaluation",
        metavar="DIR",
        help="where results.csv (a row for each checkpoint, split and scaling), summary.csv and "
        "summary.md (mean ± sd over seeds) are written (default: %(default)s)",
    )
    add_evaluation_flags(parser)
    args = parser.parse_args()

    paths, rows, failures = checkpoint.find(args.checkpoints), [], 0
    for path in tqdm(paths, "evaluating", disable=None, unit="checkpoint"):
        try:
            evaluated = evaluate_checkpoint(path, args.data_dir, args.device)
            rows += tidy_rows(evaluated, args.ece_bins)
            for warning in evaluated.warnings:
                tqdm.write(f"{path}: {warning}", file=sys.stderr)
        except InputError as error:
            if len(paths) == 1:
                raise
            failures += 1
            tqdm.write(f"left out: {' '.join(str(error).split())}", file=sys.stderr)
    if not rows:
        raise InputError(f"none of the {len(paths)} checkpoints could be evaluated")
    # The same network given twice, as a file and in its folder, is still one seed.
    table = pd.DataFrame(rows).drop_duplicates(["weights", "training", "split", "scaling"])
    _refuse_other_test_images(table)
    summary = tables.summarise(tables.with_students(table))

    output = Path(args.output_dir)
    output.mkdir(parents=True, exist_ok=True)
    markdown = tables.to_markdown(summary, args.ece_bins)
    checkpoint.write_text(output / "results.csv", table.to_csv(index=False))
    checkpoint.write_text(output / "summary.csv", summary.to_csv(index=False))
    checkpoint.write_text(output / "summary.md", markdown)
    print(markdown)
    print(
        "Test split; temperature fitted to the validation split; mean ± sample standard deviation "
        "over seeds."
    )
    print(f"written: {output / 'results.csv'}, {output / 'summary.csv'}, {output / 'summary.md'}")
    if failures:
        print(f"{failures} of {len(paths)} checkpoints left out", file=sys.stderr)
    return 1 if failures else 0


def _refuse_other_test_images(table: pd.DataFrame) -> None:
    for dataset, group in table.groupby("dataset"):
        if group["test_images"].nunique() > 1:
            first, second = group.drop_duplicates("test_images")["checkpoint"].head(2)
            raise InputError(
                f"{first} and {second} were made with different test images of {dataset}; numbers "
                "of different images are not compared, evaluate them apart"
            )


if __name__ == "__main__":
    run(main)
