"""Evaluate trained networks: accuracy, log loss and calibration, without and with temperature
scaling, beside the students distilled from them.

Checkpoints say themselves what data, split and network they belong to. The temperature is fitted to
the validation split's log loss. Runs that differ in their seed alone are averaged: mean ± sample
standard deviation, the best of each data set and network in bold. Formulas: utils/evaluate.py;
files, columns, intervals and tests: docs/evaluation.md.

GPU:  python Models-evaluation.py runs/cifar10 --bootstrap 1000 --compare
CPU:  python Models-evaluation.py runs/fashionmnist/shallownet --device cpu
"""

import argparse
import json
import sys
from pathlib import Path

import pandas as pd
from tqdm import tqdm

from utils import checkpoint, comparison, inspector, plots, report, tables
from utils.arguments import (
    Parser,
    add_evaluation_flags,
    check_streaming,
    path_name,
    resamples,
    streaming,
)
from utils.distributed import refuse_torchrun
from utils.errors import InputError, run
from utils.evaluate import all_metrics, calibrated_ece_by_chance
from utils.inference import Evaluated, evaluate_checkpoint


def main() -> int:
    refuse_torchrun("evaluation is of one process")
    args = parse_arguments()
    networks, left_out = evaluate_all(args)
    check_streaming(args, {network.data["dataset"] for network in networks})
    if args.plots:
        plots.choose_all_classes(networks, args.tsne_classes)
    if args.inspect is not None:
        inspector.choose_teacher(networks, args.inspect)
    results = pd.DataFrame([row for net in networks for row in tidy_rows(net, args.ece_bins)])
    # The same network given twice, as a file and in its folder, is still one seed.
    results = results.drop_duplicates(["weights", "training", "recipe", "split", "scaling"])
    results = tables.with_differences(results)
    for warning in tables.counted_as_one(results):
        print(f"warning: {warning}", file=sys.stderr)
    comparison.check_test_images(results)
    rows = tables.with_students(results)
    single = rows.drop_duplicates(["weights", "training", "scaling"])
    if args.compare is not None:
        comparison.find_reference(single, args.compare)  # refused before the resamples

    images = samples(networks) if args.bootstrap or args.compare is not None else {}
    bootstrap = None
    if args.bootstrap:
        bootstrap = comparison.Bootstrap(images, args.ece_bins, args.bootstrap)
        results = tables.with_intervals(results, bootstrap)
    compared, ranks, unequal = None, None, []
    if args.compare is not None:
        compared = comparison.compare(single, args.compare, images, bootstrap)
        ranks = comparison.rank(single)
        unequal = comparison.unequal_recipes(single, compared)
        for warning in unequal:
            print(f"warning: {warning}", file=sys.stderr)

    folder = Path(args.output_dir)
    tables.remove_earlier(folder, ("students", "comparison", "comparison_ranks", "figures"))
    checkpoint.write_text(folder / "results.csv", results.to_csv(index=False))
    summary = tables.summarise(rows, bootstrap)
    texts = tables.write_all(folder, summary, compared, unequal, args.ece_bins, args.bootstrap)
    drawings = []
    if ranks is not None and len(ranks):
        drawings += draw_ranks(folder, ranks)
    if args.plots:
        drawings += plots.write_all(networks, folder, args.tsne_classes, args.ece_bins)
    if args.inspect is not None:
        texts["One image"], drawing = inspector.inspect(
            networks, args.inspect, args.data_dir, args.device, folder, streaming(args)
        )
        drawings.append(drawing)
    if drawings:
        checkpoint.write_text(folder / "figures.md", plots.in_markdown(drawings))
    print("\n".join(texts.values()))
    if args.report:
        report.write(args.report, texts, drawings, networks)
    print(f"written to {folder}" + f" and {args.report}" * bool(args.report))
    if left_out:
        print(f"{left_out} of {left_out + len(networks)} checkpoints left out", file=sys.stderr)
    return 1 if left_out else 0


def parse_arguments() -> argparse.Namespace:
    parser = Parser(__doc__)
    add = parser.add_argument
    add(
        "checkpoints",
        type=path_name,
        nargs="+",
        metavar="CHECKPOINT_OR_FOLDER",
        help="best.pt files, or folders that are searched for them",
    )
    add(
        "--output_dir",
        type=path_name,
        default="evaluation",
        metavar="DIR",
        help="where the tables are written: results.csv (a row for each checkpoint, split and "
        "scaling), summary, students and comparison (each .csv, .md, .tex) (default: %(default)s)",
    )
    add(
        "--bootstrap",
        type=resamples,
        default=0,
        metavar="N",
        help="95 %% intervals from N resamples of test images and seeds; 1000 will do, fewer are "
        "for a first look; 0 is off (default: %(default)s)",
    )
    add(
        "--compare",
        type=training_name,
        nargs="?",
        const="vanilla",
        metavar="METHOD",
        help="paired differences to this method, runs of one seed being paired, and average ranks "
        "where there are several data sets or networks (default: off; vanilla if no METHOD is "
        "given)",
    )
    add(
        "--plots",
        action="store_true",
        help="write the figures of docs/figures.md, as PNG and PDF (default: off)",
    )
    add(
        "--tsne_classes",
        nargs="+",
        metavar="CLASS",
        help="names or numbers of the classes in the t-SNE (default: the three that the vanilla "
        "network confuses most)",
    )
    add(
        "--report",
        type=Path,
        metavar="FILE",
        help="write one self-contained HTML page: tables, figures, configurations (default: off)",
    )
    add(
        "--inspect",
        type=int,
        metavar="INDEX",
        help="show what the papers' losses ask of the network for this image of the test split, "
        "counted from 0 (default: off)",
    )
    add_evaluation_flags(parser)
    args = parser.parse_args()
    if args.report and args.report.is_dir():
        parser.error(f"--report {args.report} is a folder, a file such as report.html expected")
    if args.tsne_classes and not args.plots:
        parser.error("--tsne_classes does nothing without --plots")
    return args


def training_name(text: str) -> str:
    """A type for argparse: a method or a training; not the first of the checkpoints' paths."""
    if "/" in text:
        raise argparse.ArgumentTypeError(
            f"{text!r} given, which is a path; a method expected, as in `--compare vanilla {text}`"
        )
    return text


def evaluate_all(args: argparse.Namespace) -> tuple[list[Evaluated], int]:
    """The networks, and how many checkpoints could not be used; stderr says which and why."""
    paths, networks = checkpoint.find(args.checkpoints), []
    for path in tqdm(paths, "evaluating", disable=None, unit="checkpoint"):
        try:
            network = evaluate_checkpoint(path, args.data_dir, args.device, streaming(args))
            comparison.check_selection(network.training)
            networks.append(network)
        except InputError as error:
            reason = str(error) if str(path) in str(error) else f"{path}: {error}"
            if len(paths) == 1:
                raise InputError(reason) from None
            tqdm.write(f"left out: {' '.join(reason.split())}", file=sys.stderr)
    if not networks:
        raise InputError(f"none of the {len(paths)} checkpoints could be evaluated")
    for network in networks:
        leak = comparison.teacher_warning(network)
        for warning in [*network.warnings, *filter(None, [leak])]:
            print(f"warning: {network.path}: {warning}", file=sys.stderr)
    return networks, len(paths) - len(networks)


def tidy_rows(evaluated: Evaluated, ece_bins: int) -> list[dict]:
    """Validation (but with --protocol lr) and test split, without and with temperature scaling."""
    training, teacher, splits = evaluated.training, evaluated.teacher or {}, evaluated.splits
    about = {
        "checkpoint": str(evaluated.path),
        "dataset": evaluated.data["dataset"],
        "model": evaluated.model_name,
        "training": tables.setting(training["method"], training["requested"]),
        "method": training["method"],
        "hyper_parameters": json.dumps(training["hyper_parameters"]),
        "recipe": json.dumps(evaluated.recipe),
        "seed": training["seed"],
        "epoch": training["epoch"],
        "test_images": evaluated.data["splits"]["test"],
        "test_per_training_image": len(splits.test) / len(splits.of(training["trained_on"])),
        "weights": evaluated.weights_hash,
        "teacher": teacher["weights"] if evaluated.is_student else None,
        "teacher_scaling": {True: "yes", False: "no"}.get(teacher.get("scaled")),
        "student_setting": tables.setting("", training["requested"]),
        "ece_bins": ece_bins,
    }
    rows = []
    for split, logits in evaluated.logits.items():
        labels = evaluated.labels[split]
        similarity = comparison.class_similarity(logits, labels)
        for scaling, temperature in evaluated.temperatures.items():
            scaled = evaluated.scaled(split, scaling)
            rows.append(
                {
                    **about,
                    "split": split,
                    "scaling": scaling,
                    "temperature": temperature,
                    **all_metrics(scaled, labels, ece_bins),
                    "ece_by_chance": calibrated_ece_by_chance(scaled, ece_bins),
                    "class_similarity": similarity,
                }
            )
    return rows


def samples(networks: list[Evaluated]) -> dict[comparison.Run, tuple]:
    """The hash of each network's test split, and what each of its images adds to the metrics."""
    return {
        (network.weights_hash, scaling): (
            network.data["splits"]["test"],
            comparison.per_image(network.scaled("test", scaling), network.labels["test"]),
        )
        for network in networks
        for scaling in network.temperatures
    }


def draw_ranks(folder: Path, ranks: pd.DataFrame) -> list[plots.Drawing]:
    checkpoint.write_text(folder / "comparison_ranks.csv", ranks.to_csv(index=False))
    drawings = []
    for (scaling, metric), group in ranks.groupby(["scaling", "metric"], sort=False):
        scaled = {"no": "", "yes": "-scaled"}[scaling]
        title = (
            f"Average rank by {metric.replace('_', ' ')}{scaled.replace('-', ', ')}, "
            f"{group['blocks'].iloc[0]} pairs of data set and network"
        )
        figure = plots.critical_difference_diagram(
            list(group["training"]),
            list(group["average_rank"]),
            group["critical_difference"].iloc[0],
            title,
        )
        caption = "Methods joined by a bar do not differ by more than the critical difference."
        name = f"critical-difference-{metric}{scaled}"
        drawings.append(plots.save(figure, folder, name, title, caption))
    return drawings


if __name__ == "__main__":
    run(main)
