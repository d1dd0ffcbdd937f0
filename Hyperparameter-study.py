"""Tune methods on the validation split, over several seeds, and compare what was selected.

Every method and seed is a search: one training for each combination of the method's values, of
which the best on the validation split is kept (--protocol ils) or trained again on training and
validation split (--protocol lr). At the end the table of Models-evaluation.py comes out, and one of
the selected values. The same command again goes on where it was stopped; the same command on other
machines, with a --storage and an --output_dir that all of them reach, shares the work. See
docs/studies.md.

A method is the name of its script, or its first words, or the path of your own; in quotes with
flags of that script, for values of your own:

    --methods vanilla "label-smoothing --smoothing 0.01 0.1" "instance-based --variant ils1"
    --methods vanilla "label-smoothing --smoothing 0.001..0.3:log" --sampler tpe

GPU:   python Hyperparameter-study.py --dataset cifar10 --model resnet18 --seeds 0 1 2
CPU:   python Hyperparameter-study.py --dataset digits --model simple_dense --epochs 5 --seeds 0 1
plan:  python Hyperparameter-study.py --dataset cifar10 --model resnet18 --seeds 0 1 2 --dry_run
"""

import sys
from pathlib import Path

from utils.arguments import (
    Parser,
    non_negative_int,
    one_of,
    path_name,
    positive_int,
    training_parser,
)
from utils.distributed import refuse_torchrun
from utils.errors import InputError, run
from utils.methods import GRIDS, PRUNERS, SAMPLERS, read_methods, student_flags
from utils.training import load_data

METHODS = (
    "vanilla",
    "label-smoothing",
    "instance-based",
    "label-relaxation",
    "focal",
    "confidence-penalty",
)


def make_parser() -> Parser:
    parser = training_parser(__doc__, study=True)
    group = parser.add_argument_group("study")
    add = group.add_argument
    add(
        "--methods",
        nargs="+",
        default=METHODS,
        metavar="METHOD",
        help=f"see above (default: {' '.join(METHODS)}); vanilla is added where a method needs it "
        "for a teacher",
    )
    add(
        "--seeds",
        nargs="+",
        type=non_negative_int,
        default=[0],
        metavar="N",
        help="each method is tuned for each of them by itself (default: 0)",
    )
    add(
        "--grids",
        type=one_of(GRIDS),
        metavar="NAME",
        help=f"whose values of the hyper-parameters, {', '.join(GRIDS)} of params.json; "
        "a method that is not among them has those of another (default: --protocol)",
    )
    add(
        "--sampler",
        type=one_of(SAMPLERS),
        default="grid",
        metavar="NAME",
        help="grid: every combination; tpe or random: --n_trials of them, from lists or ranges "
        "(default: %(default)s)",
    )
    add(
        "--n_trials",
        type=positive_int,
        default=20,
        metavar="N",
        help="trainings of a method and seed with --sampler tpe or random (default: %(default)s)",
    )
    add(
        "--pruner",
        type=one_of(PRUNERS),
        default="none",
        metavar="NAME",
        help="stop trainings whose validation log loss is behind that of the others: median, "
        "hyperband, or none (off) (default: %(default)s)",
    )
    add(
        "--storage",
        type=path_name,
        metavar="ADDRESS",
        help="where the workers meet: a SQLite file, for one machine, or "
        "postgresql://user@host/database or mysql+pymysql://... (default: study.db below "
        "--output_dir)",
    )
    add(
        "--study_name",
        default="study",
        metavar="NAME",
        help="tells this study from others in the storage (default: %(default)s)",
    )
    add(
        "--heartbeat",
        type=positive_int,
        default=60,
        metavar="SECONDS",
        help="between two signs of life of a worker; after twice that without one its training is "
        "taken up by another (default: %(default)s)",
    )
    add(
        "--keep_candidates",
        type=path_name,
        metavar="DIR",
        help="train there what is selected from, and keep it: another study, with an --output_dir "
        "of its own and another --select_by, can select from the same trainings (default: they are "
        "below --output_dir, and removed when one is selected)",
    )
    add(
        "--distil",
        metavar="STUDENT",
        help="distil what was selected into this network; in quotes with flags of "
        "Network-distillation.py (default: off)",
    )
    add(
        "--mlflow",
        type=path_name,
        metavar="ADDRESS",
        help="of an MLflow server, or a local folder (default: off)",
    )
    add(
        "--tensorboard",
        type=path_name,
        metavar="DIR",
        help="write TensorBoard's files there (default: off)",
    )
    add(
        "--dry_run",
        action="store_true",
        help="print how many trainings these are, how long they take, by a few steps measured "
        "here, and the disk space, and do nothing else (default: off)",
    )
    return parser


def main() -> int:
    parser = make_parser()
    args = parser.parse_args()
    refuse_torchrun(
        "a study's workers each train by themselves; start the same command several times instead"
    )
    if "n_trials" in args.given and args.sampler == "grid":
        raise InputError(
            f"--n_trials {args.n_trials} does nothing with --sampler grid, which trains every "
            "combination; tpe or random would"
        )
    if args.distil is not None:
        student_flags(args.distil)  # what is wrong with them is said now, not after all trainings
    methods = read_methods(args.methods, args)
    if args.params == "published":  # which is the same for all of them
        settled = vars(methods[0][0].args)
        vars(args).update({name: settled[name] for name in settled.keys() & vars(args).keys()})
    try:
        from utils import study
    except ModuleNotFoundError as error:
        raise InputError(f"a study needs Optuna ({error}): pip install optuna") from None
    address = study.storage_address(args.storage or str(Path(args.output_dir, "study.db")))
    if address.password:  # not into config.json, nor onto the screen
        sys.argv = [word.replace(args.storage, str(address)) for word in sys.argv]

    data = load_data(args)
    study.print_plan(methods, args)
    if args.dry_run:
        study.print_estimate(methods, data, args)
        return 0
    return study.run_study(methods, data, address, args)


if __name__ == "__main__":
    run(main)
