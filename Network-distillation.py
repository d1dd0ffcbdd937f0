"""Distil trained networks into a shallow student (Hinton, Vinyals and Dean 2015).

    loss = α·T²·KL(softmax(u/T) ‖ softmax(z/T)) + (1 - α)·(-log p_y)

u are the teacher's logits of the very batch, augmentation included, that the student sees. The
teacher's checkpoint says all that is needed: data set, split, seed and network. Each teacher is
distilled twice, without and with temperature scaling, as in the ILS README's table, unless
--scale_teacher says otherwise.

GPU:  python Network-distillation.py --teacher runs/cifar10/resnet18
CPU:  python Network-distillation.py --teacher runs/fashionmnist/shallownet/vanilla/seed0/best.pt \\
          --epochs 5
"""

import argparse
import shlex
from pathlib import Path

from models import MODELS
from utils import arguments, checkpoint, data_loader, distributed
from utils.arguments import (
    Parser,
    add_hyper_parameter,
    network,
    number,
    one_of,
    path_name,
    temperatures,
    training_parser,
)
from utils.errors import InputError, run
from utils.losses import distillation_terms
from utils.teacher import check_leak, student_method
from utils.training import Trial, new_trial, requested_values, train_trial


def make_loss(trial, alpha, temperature):
    scaling = trial.teacher.temperature if trial.teacher_use["scaled"] else 1.0

    def loss(logits, batch):
        teacher_logits = trial.teacher_logits(batch) / scaling
        teacher_term, label_term = distillation_terms(
            logits, batch.labels, teacher_logits, temperature
        )
        return {
            "loss": alpha * teacher_term + (1 - alpha) * label_term,
            "distillation": teacher_term,
            "classification": label_term,
        }

    return loss


def find_teachers(args) -> list[Path]:
    """Raises InputError unless there are some, whose students have folders of their own."""
    named, of_folder = {*map(Path, args.teacher)}, {}
    for path in checkpoint.find(args.teacher):
        teacher = checkpoint.load(path)
        if teacher.is_student and path not in named:
            continue
        folder = (
            teacher.data["dataset"],
            student_method(teacher.model.name, teacher.training["method"], scaled=False),
            f"seed{student_seed(args, teacher)}",
        )
        if folder in of_folder:
            raise InputError(
                f"{of_folder[folder]} and {path} have students of one name, {'/'.join(folder)}; "
                "distil them one by one, with an --output_dir each"
            )
        of_folder[folder] = path
    if not of_folder:
        raise InputError(
            f"--teacher {' '.join(args.teacher)} holds students only, and students teach when "
            "their best.pt is named; that, or a folder with a network of a training script expected"
        )
    return [*of_folder.values()]


def student_seed(args, teacher) -> int:
    return teacher.training["seed"] if args.seed is None else args.seed


def student_trial(args, teacher) -> Trial:
    """The teacher's data set and split, and its seed unless --seed says otherwise."""
    arguments.check_streaming(args, {teacher.data["dataset"]})
    data, _ = data_loader.reload(
        teacher.data, args.data_dir, args.device, arguments.streaming(args)
    )
    as_teacher = {name: teacher.data[name] for name in ("protocol", "tr_size", "image_size")}
    args = argparse.Namespace(**vars(args), **as_teacher)
    trial = new_trial(args, data, args.student, student_seed(args, teacher))
    trial.teacher = teacher
    return trial


def make_parser() -> Parser:
    parser = training_parser(__doc__, "distillation")
    add = parser.add_argument
    add(
        "--teacher",
        type=path_name,
        nargs="+",
        required=True,
        metavar="CHECKPOINT",
        help="best.pt of one or more teachers, or folders to search for them (students in a folder "
        "are passed over)",
    )
    add(
        "--student",
        type=network,
        default="shallownet",
        metavar="NAME",
        help=f"{', '.join(MODELS)}, or timm/NAME: any network of timm, if it is installed "
        "(default: %(default)s)",
    )
    add(
        "--scale_teacher",
        type=one_of(["no", "yes", "both"]),
        default="both",
        metavar="NAME",
        help="divide the teacher's logits by the temperature fitted to its validation split: no "
        "(off), yes, or both: a student of each (default: %(default)s)",
    )
    add_hyper_parameter(
        parser,
        "--alpha",
        number(float, 0, 1),
        0.9,
        "weight α in [0, 1] of the teacher's term, the labels' has 1 - α; 0 is off",
    )
    add_hyper_parameter(
        parser,
        "--temperature",
        temperatures,
        20.0,
        "T > 0 that softens both networks' probabilities; 1 is off",
    )
    return parser


def main() -> None:
    given = make_parser().parse_args()
    given.device = distributed.start(given.device)

    for path in find_teachers(given):  # loaded again: all of them may not fit into memory
        teacher = checkpoint.load(path, given.device)
        print(f"\nteacher: {path}")
        args = arguments.settle(given, "distillation", teacher.data["dataset"], given.student)
        trial = student_trial(args, teacher)
        check_leak(teacher, trial.data, trial.splits)
        for scaled in {"no": [False], "yes": [True], "both": [False, True]}[args.scale_teacher]:
            trial.teacher_use = {"scaled": scaled}  # the same trial: the teacher is asked once
            method = student_method(teacher.model.name, teacher.training["method"], scaled)
            train_trial(trial, method, requested_values(args), make_loss)
    students = Path(given.output_dir).resolve()
    elsewhere = [t for t in given.teacher if not Path(t).resolve().is_relative_to(students)]
    print("\nNext, see teachers and students side by side:")
    arguments.print_next(given, shlex.join(["Models-evaluation.py", *elsewhere, given.output_dir]))
    distributed.end()


if __name__ == "__main__":
    run(main)
