"""Which network teaches, and where it is."""

import argparse
import sys
from dataclasses import replace
from pathlib import Path

from utils import checkpoint, run_folder
from utils.checkpoint import Checkpoint
from utils.data_loader import ImageData, Splits, seen_by_teacher
from utils.errors import InputError
from utils.losses import cross_entropy_loss
from utils.training import Trial, train_trial

VANILLA = "vanilla"


def make_cross_entropy(trial: Trial):
    """The loss of the vanilla network: of Vanilla-cross-entropy.py, and of teachers."""

    def loss(logits, batch):
        return {"loss": cross_entropy_loss(logits, batch.labels)}

    return loss


def find_or_train_teacher(trial: Trial, args: argparse.Namespace) -> Checkpoint:
    """The teacher of an instance-based method.

    --teacher if it is given; else the vanilla network of the same data set, model and seed, which
    is trained first when there is none.
    """
    # With protocol lr the one that has not seen the images on which its pupils are selected.
    kept = run_folder.selected_network(trial.recipe["protocol"])
    if args.teacher:
        path = _named_teacher(args.teacher, trial.seed, kept)
    else:
        folder = trial.folder(VANILLA)
        if not (folder / "metrics.json").exists():
            print(f"no vanilla teacher in {folder}: it is trained first")
            # --overwrite is of the run that was asked for.
            train_trial(replace(trial, overwrite=False), VANILLA, {}, make_cross_entropy)
        path = folder / kept
        if (folder / "best.pt").exists() and not path.exists():
            raise InputError(
                f"the teacher {folder / 'best.pt'} was not trained with --protocol lr; another "
                "--output_dir, where a teacher is trained first, or --teacher expected"
            )
    teacher = checkpoint.load(path, trial.device)
    check_teacher(teacher, trial.data)
    check_leak(teacher, trial.data, trial.splits)
    there = teacher.training["recipe"]
    differs = [key for key, here in trial.recipe.items() if there.get(key) != here]
    otherwise = ", ".join(f"{key} {there.get(key)}" for key in differs)
    print(f"teacher: {path}" + f", trained with {otherwise}" * bool(differs))
    return teacher


def _named_teacher(names: list[str], seed: int, kept: str) -> Path:
    """One file teaches all seeds; of several, and of those in a folder, each seed has its own.

    kept: which network is taken of a run that is found in a folder, if it is there.
    """
    paths = checkpoint.find(names)
    if paths == [Path(names[0])]:
        return paths[0]
    found = []
    for path in paths:
        if f"seed{seed}" in (path.parent.name, path.parent.parent.name):
            beside = path.parent / kept
            found.append(beside if path not in map(Path, names) and beside.exists() else path)
    if len(found) != 1:
        raise InputError(
            f"--teacher names {len(found)} checkpoints for seed {seed}; one file for all "
            "seeds, or one in a folder seed<N> for each expected"
        )
    return found[0]


def check_teacher(teacher: Checkpoint, data: ImageData) -> None:
    """Raises InputError unless the teacher was trained on this data set."""
    there = teacher.data
    for what, given, expected in (
        ("the data set", there["dataset"], data.name),
        ("classes", teacher.model.num_classes, len(data.classes)),
        ("an input of (channels, height, width)", teacher.model.input_shape, data.input_shape),
        ("the class names", tuple(there["classes"]), data.classes),
        ("images with the SHA-256", there["fingerprint"], data.fingerprint),
    ):
        if given != expected:
            raise InputError(
                f"the teacher {teacher.path} does not fit: it has {what} {given}, "
                f"and {expected} is needed"
            )


def student_method(teacher_model: str, teacher_method: str, scaled: bool) -> str:
    """The method of a student, as its folder is named."""
    # A student of a student says so either way: its teacher's name may end in -scaled, too.
    unscaled = "-unscaled" if teacher_method.startswith("distilled-") else ""
    return f"distilled-{teacher_model}-{teacher_method}" + ("-scaled" if scaled else unscaled)


def check_leak(teacher: Checkpoint, data: ImageData, splits: Splits) -> None:
    """Raises InputError if the teacher was trained on images that test its student.

    Of images that validate it a warning is enough.
    """
    trained_on = teacher.training["trained_on"]
    there = {**teacher.data, "trained_on": trained_on}
    validation, test = seen_by_teacher(there, data, splits)
    if test:
        raise InputError(
            f"the teacher {teacher.path} was trained on {test} of the {len(splits.test)} test "
            "images of this run; a teacher of the same seed, --tr_size and --protocol would do"
        )
    if validation:
        if trained_on == "train":
            instead = "the teacher's own seed and --tr_size avoid this"
        else:
            instead = "that in its folder selection has not seen them"
        print(
            f"warning: the teacher {teacher.path} was trained on {validation} of the "
            f"{len(splits.validation)} validation images of this run; validation metrics with it "
            f"are too good, and so is what they select ({instead})",
            file=sys.stderr,
        )
