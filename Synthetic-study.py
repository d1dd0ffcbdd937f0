"""Train every method on data of known probabilities (the experiment of the ILS paper's appendix).

Three classes of two Gaussians each, 50 training, 50 validation and 5000 test points a class, and a
feed-forward network of five hidden layers of 64. As the truth P(. | x) is known, a network p with
prediction k and confidence c = p_k is judged not by labels alone:

    true calibration error  Σ_B |B|/N |mean over B of P(k | x) - mean over B of c|,  bins B of c
    pointwise               mean |P(k | x) - c|
    divergence              mean KL(P(. | x) ‖ p) = log loss - the least possible log loss

Each data set is drawn anew and has a vanilla network of its own, the teacher of the instance-based
methods. Every combination of a method's values is trained (Adam, the whole training split a step,
the epoch of the lowest validation log loss kept), and each data set keeps the combination of the
lowest validation log loss; the vanilla networks have nothing to choose. All data sets are trained
at once on the CPU. What came of it: docs/synthetic.md.

15 minutes, CPU:  python Synthetic-study.py
2 minutes, CPU:   python Synthetic-study.py --replicas 10 --curve_bins 0
"""

from functools import partial
from pathlib import Path

import pandas as pd
import torch
from tqdm import tqdm

from utils import checkpoint, losses, smoothing_curves, synthetic
from utils.arguments import (
    PARAMS,
    Parser,
    bins,
    non_negative_float,
    non_negative_int,
    number,
    path_name,
    positive_float,
    positive_int,
    temperatures,
)
from utils.errors import run
from utils.losses import BY_TRUE_CLASS, class_average_logits, instance_based_smoothing_loss
from utils.replicas import Candidate, Trained, search
from utils.training import all_combinations

SMOOTHINGS = [0.001, 0.005, *(x / 100 for x in range(1, 20, 2))]
CURVE_SMOOTHINGS = [0.01, 0.03, 0.07, 0.11, 0.15, 0.19, 0.25, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9]


def candidates(args, labels, teacher_logits, calibrated_logits) -> dict[str, list[Candidate]]:
    """Each method's loss for every combination of its hyper-parameters, all but vanilla."""

    def grid(*names):
        return all_combinations({name: getattr(args, name) for name in names})

    def plain(loss, name):
        return [Candidate(h, partial(loss, reduction="none", **h)) for h in grid(name)]

    def instance_based(variant, *names):
        logits = calibrated_logits if variant in BY_TRUE_CLASS else teacher_logits
        loss = partial(instance_based_smoothing_loss, variant=variant, reduction="none")
        return [Candidate(h, partial(loss, **h), logits) for h in grid(*names)]

    def class_based():
        found = []
        for temperature in args.temperature:
            # The teacher of a point is what its network says of the point's class on average.
            averages = [
                class_average_logits(u, y, temperature)[y]
                for u, y in zip(teacher_logits, labels, strict=True)
            ]
            for each in instance_based("class", "smoothing"):
                hyper_parameters = {**each.hyper_parameters, "temperature": temperature}
                found.append(Candidate(hyper_parameters, each.loss, torch.stack(averages)))
        return found

    return {
        synthetic.LABEL_SMOOTHING: plain(losses.label_smoothing_loss, "smoothing"),
        "instance-based-ils1": instance_based("ils1", "shift", "slope"),
        "instance-based-ils2": instance_based("ils2", "smoothing", "temperature"),
        "instance-based-ils": instance_based("ils", "shift", "slope", "temperature"),
        "instance-based-scores": instance_based("scores", "smoothing"),
        "instance-based-class": class_based(),
        "label-relaxation": plain(losses.label_relaxation_loss, "alpha"),
        "focal": plain(losses.focal_loss, "gamma"),
        "confidence-penalty": plain(losses.confidence_penalty_loss, "beta"),
    }


def main() -> None:
    args = parse_arguments()
    folder = Path(args.output_dir)
    data = synthetic.draw(args.replicas, args.seed)
    aside = ("output_dir", "given")
    settings = {name: value for name, value in vars(args).items() if name not in aside}
    made_by = checkpoint.environment(torch.device("cpu"))
    checkpoint.write_json(folder / "config.json", {"settings": settings, "environment": made_by})
    synthetic.data_figure(data.training, folder)

    start = synthetic.new_networks(data.training, args.seed)
    recipe = {"lr": args.lr, "epochs": args.epochs, "patience": args.estop}
    rows = synthetic.bayes_rows(data, args.seed, args.ece_bins)

    def train(method: str, combinations: list[Candidate]) -> Trained:
        shown = tqdm(combinations, method, disable=None, leave=False)
        trained = search(start, data.training, data.validation, shown, **recipe)
        rows.extend(synthetic.tidy_rows(method, trained, data, args.seed, args.ece_bins))
        loss = float(trained.loss.mean())
        print(f"{method}: best of {len(combinations)}, validation log loss {loss:.4f}", flush=True)
        return trained

    plain = Candidate({}, partial(losses.cross_entropy_loss, reduction="none"))
    vanilla = train(synthetic.VANILLA, [plain])
    teacher_logits = vanilla.networks.predict(data.training.images)
    scaling = torch.tensor(synthetic.temperatures(vanilla.networks, data.validation))
    calibrated = teacher_logits / scaling[:, None, None]
    methods = candidates(args, data.training.labels, teacher_logits, calibrated)
    for method, combinations in methods.items():
        train(method, combinations)
    print(synthetic.write_tables(pd.DataFrame(rows), folder, args.ece_bins))
    if args.curve_bins:
        smoothing_curves.write_all(
            start, data, vanilla, scaling, args.curve_smoothing, args.curve_bins, recipe, folder
        )
    print(f"written to {folder}")


def parse_arguments():
    parser = Parser(__doc__)
    add = parser.add_argument
    add("--replicas", type=number(int, 2, 10**6), default=100, metavar="N",
        help="sampled data sets (default: %(default)s)")  # fmt: skip
    add("--seed", type=non_negative_int, default=0, metavar="N",
        help="of the first data set and its first weights; the others follow it, and that of 0 is "
        "the --dataset gaussians of the other scripts (default: %(default)s)")  # fmt: skip
    share = number(float, 0, 1, open_high=True)
    inside = number(float, 0, 1, open_low=True, open_high=True)
    grids = PARAMS["grids"]["lr"] | PARAMS["grids"]["ils"]
    ils1, penalty = grids["instance-based-ils1"], grids["confidence-penalty"]
    for flag, kind, values, what in (
        ("--smoothing", share, SMOOTHINGS, "ε of label smoothing, ILS2, scores and class"),
        ("--temperature", temperatures, [1, 2, 4, 6], "T of ILS2, ILS and class"),
        ("--shift", number(float, 0, 1), ils1["shift"], "P1 of ILS1 and ILS"),
        ("--slope", non_negative_float, ils1["slope"], "P2 of ILS1 and ILS"),
        ("--alpha", inside, grids["label-relaxation"]["alpha"], "α of label relaxation"),
        ("--gamma", non_negative_float, grids["focal"]["gamma"], "γ of the focal loss"),
        ("--beta", non_negative_float, penalty["beta"], "β of the confidence penalty"),
    ):
        add(flag, type=kind, nargs="+", default=values, metavar="X",
            help=f"{what}, to choose from (default: {' '.join(f'{v:g}' for v in values)})",
        )  # fmt: skip
    add("--lr", type=positive_float, default=0.01, help="of Adam (default: %(default)s)")
    add("--epochs", type=positive_int, default=500, metavar="N",
        help="most epochs (default: %(default)s)")  # fmt: skip
    add("--estop", type=non_negative_int, default=10, metavar="N",
        help="epochs without a better validation log loss before a network's training stops; 0 "
        "turns it off (default: %(default)s)")  # fmt: skip
    add("--ece_bins", type=bins, default=15, metavar="N",
        help="equal-width bins of the calibration errors (default: %(default)s)")  # fmt: skip
    add("--curve_bins", type=non_negative_int, default=10, metavar="N",
        help="bins of the teacher's probability in the smoothing-factor curves, 3 or more; 0 "
        "leaves the curves out (default: %(default)s)")  # fmt: skip
    add("--curve_smoothing", type=share, nargs="+", default=CURVE_SMOOTHINGS, metavar="X",
        help="ε to choose from in each bin, beside 0 (default: "
        f"{' '.join(f'{v:g}' for v in CURVE_SMOOTHINGS)})")  # fmt: skip
    add("--output_dir", type=path_name, default="synthetic", metavar="DIR",
        help="where tables and figures are written (default: %(default)s)")  # fmt: skip
    args = parser.parse_args()
    if args.curve_bins in (1, 2):
        parser.error(f"argument --curve_bins: {args.curve_bins} given, 0 or 3 and more expected")
    return args


if __name__ == "__main__":
    run(main)
