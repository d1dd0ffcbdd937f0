"""How a training goes: seeds, combinations of hyper-parameters, epochs, the best one, the end.

`train_method` is what a script calls. It trains each seed (`train_trial`), each combination of
hyper-parameters of a seed (`fit`, which holds the one epoch loop), selects one of them on the
validation split, and only then looks at the test split. Two protocols:

    ils  the official test split; of each training the epoch with the lowest validation log loss is
         kept; the network selected is the one that is tested
    lr   test split drawn anew for each seed; the last epoch is kept; the combination selected is
         trained again on training and validation split together, and that network is tested

No loss is known here. A script gives `make_loss(trial, **hyper_parameters)`, which returns a
function (logits, batch) -> {"loss": scalar to minimise, other names: scalars to log beside it}.
"""

import argparse
import itertools
import math
import os
import shlex
import shutil
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import NamedTuple

import pandas as pd
import torch
from torch import Tensor, nn
from tqdm import tqdm

from models import ImageClassifier, build_model, pretrained_normalisation
from utils import arguments, checkpoint, data_loader, distributed, run_folder
from utils.data_loader import AUGMENTATIONS, PURPOSES, Batch, ImageData, Splits
from utils.errors import DivergedError, InputError, Stopped, StopRequest
from utils.evaluate import all_metrics, fit_temperature
from utils.inference import StoredLogits, collect_logits
from utils.progress import Progress, restore_progress, save_progress

LossFunction = Callable[[Tensor, Batch], dict[str, Tensor]]


@dataclass
class Trial:
    """One seed's training, apart from the method: who is trained on what, how and where."""

    data: ImageData
    image_size: int | None
    model_name: str
    seed: int
    recipe: dict
    device: torch.device
    output_dir: Path
    ece_bins: int
    overwrite: bool = False
    save_every: float = 0.0  # minutes; 0 saves at the end of each epoch only
    select_by: str = "log_loss"  # which of several combinations of hyper-parameters is kept
    teacher: checkpoint.Checkpoint | None = None
    teacher_use: dict = field(default_factory=dict)  # how the teacher is used, kept on disk
    # Protocol lr: the network that was selected, whose like is trained on the validation split too
    selected: checkpoint.Checkpoint | None = None

    @cached_property
    def splits(self) -> Splits:
        recipe = self.recipe
        return data_loader.split(self.data, recipe["tr_size"], self.seed, recipe["protocol"])

    @property
    def trained_on(self) -> str:
        return "train+validation" if self.selected else "train"

    @cached_property
    def training_images(self) -> Tensor:
        return self.splits.of(self.trained_on)

    @cached_property
    def description(self) -> dict:
        """What a checkpoint says of its data."""
        if self.recipe["pretrained"]:
            normalisation = pretrained_normalisation(self.model_name, self.data.input_shape[0])
        else:
            mean, std = data_loader.pixel_statistics(self.data, self.training_images)
            normalisation = {"mean": mean, "std": std}
        return {
            "dataset": self.data.name,
            "classes": list(self.data.classes),
            "image_size": self.image_size,
            "protocol": self.recipe["protocol"],
            "tr_size": self.recipe["tr_size"],
            "seed": self.seed,
            "fingerprint": self.data.fingerprint,
            "splits": self.splits.hashes(),
            "normalisation": normalisation,
        }

    @property
    def teacher_description(self) -> dict | None:
        if self.teacher is None:
            return None
        return {
            "weights": self.teacher.weights_hash,
            "model": self.teacher.model.name,
            "method": self.teacher.training["method"],
            "trained_on": self.teacher.training["trained_on"],
            **{key: self.teacher.data[key] for key in ("seed", "protocol", "tr_size")},
            **self.teacher_use,
        }

    def folder(self, method: str) -> Path:
        names = (self.data.name, self.model_name, method)
        return run_folder.run_path(self.output_dir, *names, self.seed)

    def autocast(self):
        half = self.recipe["precision"] == "bfloat16"
        return torch.autocast(self.device.type, torch.bfloat16, enabled=half)

    @cached_property
    def teacher_logits(self) -> Callable[[Batch], Tensor]:
        """What the teacher says of the very batch that the network sees: float32 (B, K).

        Where an image comes in one or two forms only, as it is and flipped, the teacher is asked
        once for each and its answers are stored; otherwise it is asked for every batch.
        """
        network = self.compiled(self.teacher.model)
        augmentation = AUGMENTATIONS[self.recipe["augment"]]
        forms = 2 if augmentation.flip else 1
        size = forms * len(self.training_images) * len(self.data.classes) * 4  # float32
        with torch.no_grad(), self.autocast():
            if augmentation.padding == 0 and forms <= self.recipe["epochs"] and size <= 2**30:
                images, batch_size = self.training_images, self.recipe["batch_size"]
                return StoredLogits(network, self.data, images, forms == 2, batch_size)

        def ask(batch: Batch) -> Tensor:
            with torch.no_grad(), self.autocast():
                return network(batch.images).float()

        return ask

    def compiled(self, model: nn.Module) -> Callable[[Tensor], Tensor]:
        # dynamic: the last batch of an epoch is a second size, not the first of many
        return torch.compile(model, dynamic=False) if self.recipe["compile"] else model


# -------------------------------------------------------------------- methods, seeds, combinations


class Method(NamedTuple):
    """What a training script says of itself.

    Each has a function `method(*given)` that returns this; given are the arguments of argparse's
    parse_args, none for the command line.
    """

    name: str
    args: argparse.Namespace
    make_loss: Callable[..., LossFunction]
    find_teacher: Callable | None = None


def train_method(method: Method) -> None:
    """What a training script does: one training for each seed. See the module's docstring."""
    args = method.args
    args.device = distributed.start(args.device)  # before anything is said
    args = arguments.settle(args, method.name, args.dataset, args.model)
    data = load_data(args)
    paths = []
    for seed in range(args.seed, args.seed + args.trials):
        trial = new_trial(args, data, args.model, seed)
        if method.find_teacher:
            trial.teacher = method.find_teacher(trial, args)
        paths.append(train_trial(trial, method.name, requested_values(args), method.make_loss))
    elsewhere = ["--output_dir", args.output_dir] if args.output_dir != "runs" else []
    print("\nNext, evaluate the checkpoint or distil it into the shallow student:")
    arguments.print_next(
        args,
        shlex.join(["Models-evaluation.py", str(Path(args.output_dir) / args.dataset)]),
        shlex.join(["Network-distillation.py", "--teacher", *map(str, paths), *elsewhere]),
    )
    distributed.end()


def new_trial(args: argparse.Namespace, data: ImageData, model_name: str, seed: int) -> Trial:
    """A trial as the flags of a training say. Distillation takes some from its teacher."""
    return Trial(
        data=data,
        image_size=args.image_size,
        model_name=model_name,
        seed=seed,
        recipe=arguments.recipe(args, data.name),
        device=args.device,
        output_dir=Path(args.output_dir),
        ece_bins=args.ece_bins,
        overwrite=args.overwrite,
        save_every=args.save_every,
        select_by=args.select_by,
    )


def load_data(args: argparse.Namespace) -> ImageData:
    """The data set that the flags name. Raises InputError if another flag contradicts it."""
    arguments.check_streaming(args, {args.dataset})
    data = data_loader.load(
        args.dataset, args.data_dir, args.image_size, args.device, arguments.streaming(args)
    )
    if args.num_classes not in (None, len(data.classes)):
        raise InputError(
            f"--num_classes {args.num_classes} given, but {args.dataset} has {len(data.classes)} "
            "classes; leave the flag out or give that number"
        )
    return data


def requested_values(args: argparse.Namespace) -> dict[str, list]:
    """The values of each hyper-parameter of the method that the command line asks for."""
    return {name: getattr(args, name) for name in args.hyper_parameters}


def train_trial(
    trial: Trial,
    method: str,
    requested: dict[str, list],
    make_loss: Callable[..., LossFunction],
    combinations: list[dict] | None = None,
    candidates: Path | None = None,
) -> Path:
    """Trains one seed of a method, or goes on where an earlier process was stopped.

    requested: values of each hyper-parameter. Of several combinations the one that is best on the
    validation split by `trial.select_by` is kept. combinations: those to choose from, all of the
    requested values when not given. candidates: the folder in which each is trained, kept if it is
    given. Returns the path of best.pt.
    """
    folder = trial.folder(method)
    train, validation, test = map(len, trial.splits)
    print(
        f"\n{method} · {trial.data.name} · {trial.model_name} · seed {trial.seed} · {train} "
        f"training, {validation} validation, {test} test images · {trial.device} · "
        f"{trial.recipe['precision']}",
        flush=True,
    )
    size = _check(trial, method, requested)
    if size != trial.data.input_shape[1:]:
        print("images are enlarged to {}x{} pixels for the network".format(*size))
    teacher = trial.teacher and trial.teacher.path.resolve()
    if trial.overwrite and teacher and folder.resolve() in teacher.parents:
        raise InputError(
            f"--overwrite would remove the teacher {trial.teacher.path}, which is of this run; "
            "another --output_dir expected"
        )
    combinations = combinations or all_combinations(requested)
    settings = _run_settings(trial, method, requested)
    with run_folder.held(folder, settings, trial.device, trial.overwrite):
        best, metrics_file = folder / "best.pt", folder / "metrics.json"
        if metrics_file.exists():
            print(f"finished earlier, nothing to do (--overwrite starts anew): {best}")
        else:
            one = trial.recipe["protocol"] == "ils" and len(combinations) == 1
            if one and candidates is None:
                _train(trial, method, combinations[0], make_loss, folder)
            else:
                place = candidates or folder / "candidates"
                _search(trial, method, combinations, requested, make_loss, folder, place)
            checkpoint.write_json(metrics_file, _final_metrics(trial, folder))
        _print_metrics(metrics_file)
        print(f"checkpoint: {best}", flush=True)
        if distributed.is_first():
            shutil.rmtree(folder / "candidates", ignore_errors=True)
    return best


def check_trial(trial: Trial, method: str, requested: dict[str, list]) -> None:
    """Raises InputError for what `train_trial` would refuse. Nothing is written."""
    _check(trial, method, requested)
    run_folder.check(trial.folder(method), _run_settings(trial, method, requested))


def all_combinations(requested: dict[str, list]) -> list[dict]:
    return [
        dict(zip(requested, values, strict=True))
        for values in itertools.product(*requested.values())
    ]


def combination_name(hyper_parameters: dict) -> str:
    """The name of the folder of a candidate."""
    return ",".join(f"{key}={value}" for key, value in hyper_parameters.items()) or "single"


def _settings(trial: Trial, method: str, requested: dict) -> dict:
    """What a run's files depend on: the same settings may go on with them, others may not."""
    return {
        "dataset": trial.data.name,
        "image_size": trial.image_size,
        "fingerprint": trial.data.fingerprint,
        "model": trial.model_name,
        "method": method,
        "hyper_parameters": requested,
        "seed": trial.seed,
        "recipe": trial.recipe,
        "ece_bins": trial.ece_bins,
        "teacher": trial.teacher_description,
    }


def _run_settings(trial: Trial, method: str, requested: dict) -> dict:
    # One training without hyper-parameters leaves nothing to select.
    select_by = trial.select_by if requested else None
    return {**_settings(trial, method, requested), "select_by": select_by}


def train_candidate(
    trial: Trial, method: str, hyper_parameters: dict, make_loss: Callable, candidates: Path
) -> Iterator[Progress]:
    """Trains one combination in a folder of its own below `candidates`. Yields as `fit` does."""
    folder = candidates / combination_name(hyper_parameters)
    values = {name: [value] for name, value in hyper_parameters.items()}
    with run_folder.held(folder, _settings(trial, method, values), trial.device):
        yield from fit(trial, method, hyper_parameters, make_loss, folder)


def _search(trial, method, combinations, requested, make_loss, folder: Path, place: Path) -> None:
    """Trains every combination, selects one, and brings it here or trains it again.

    What diverges is left out; when all of it does, the last of it is raised.
    """
    trained, rows, diverged = [], [], None
    for number, hyper_parameters in enumerate(combinations, 1):
        name = combination_name(hyper_parameters)
        if len(combinations) > 1:
            print(f"candidate {number} of {len(combinations)}: {name}", flush=True)
        try:
            *_, progress = train_candidate(trial, method, hyper_parameters, make_loss, place)
        except DivergedError as error:
            print(f"diverged: {error}", flush=True)
            diverged = error.with_traceback(None)  # which would keep its network in memory
            continue
        trained.append(hyper_parameters)
        rows.append({**hyper_parameters, **progress.kept})
    if not trained:
        raise diverged
    table = pd.DataFrame(rows)
    chosen = select(table, trial.select_by)
    table["selected"] = table.index == chosen
    checkpoint.write_text(folder / "search.csv", table.to_csv(index=False))
    name = combination_name(trained[chosen])
    value = table.loc[chosen, f"validation_{trial.select_by}"]
    if len(combinations) > 1:
        print(f"selected by validation {trial.select_by.replace('_', ' ')} {value:.4f}: {name}")
    if trial.recipe["protocol"] == "ils":
        for file in ("history.csv", "last.pt", "best.pt"):
            checkpoint.copy_file(place / name / file, folder / file)
    else:
        for file in ("history.csv", "best.pt"):
            checkpoint.copy_file(place / name / file, folder / "selection" / file)
        print("trained again on the training and the validation split together", flush=True)
        selected = checkpoint.load(folder / "selection" / "best.pt", trial.device)
        whole = replace(trial, selected=selected)
        _train(whole, method, trained[chosen], make_loss, folder)
    # Seeds of one search may select differently, and are averaged all the same.
    best = folder / "best.pt"
    searched = {"requested": requested, "select_by": trial.select_by}
    checkpoint.update(best, training={**checkpoint.read_tensors(best)["training"], **searched})


def select(table: pd.DataFrame, by: str) -> int:
    """The row with the best validation metric: highest accuracy, lowest log_loss or ece.

    Among equals, as accuracies often are, that with the lowest log loss.
    """
    order = table.sort_values(
        [f"validation_{by}", "validation_log_loss"], ascending=[by != "accuracy", True]
    )
    return int(order.index[0])


def _train(*arguments) -> None:
    for _ in fit(*arguments):
        pass


# ------------------------------------------------------------------------------------ one training


def fit(
    trial: Trial,
    method: str,
    hyper_parameters: dict,
    make_loss: Callable[..., LossFunction],
    folder: Path,
) -> Iterator[Progress]:
    """Trains one network to the end, from where last.pt in the folder left it if there is one.

    Yields its progress as it is found, and after each epoch, when the epoch's files are on disk.
    Leaves best.pt, last.pt and history.csv in the folder.
    """
    recipe = trial.recipe
    keeps_last = recipe["protocol"] == "lr"
    description = _description(trial, method, hyper_parameters)
    loss_function = make_loss(trial, **hyper_parameters)
    torch.manual_seed(trial.seed)  # initial weights: the same for every method
    model = new_model(trial)
    optimizer = new_optimizer(model, recipe)
    schedule = new_schedule(optimizer, recipe)
    progress = Progress()
    if (folder / "last.pt").exists():
        progress = restore_progress(
            folder / "last.pt", recipe, _steps(trial), trial.device, model, optimizer, schedule
        )
        if not progress.finished(recipe):
            print(f"continued after epoch {progress.epoch}, step {progress.step}", flush=True)
        if not distributed.is_first():  # steps that one process has done count once
            progress.terms = [(0, values) for _, values in progress.terms]

    network = distributed.over_processes(model)  # the same parameters, called another way
    network = trial.compiled(network)
    alone = distributed.shard().count == 1

    def save() -> None:
        save_progress(folder / "last.pt", trial.device, model, optimizer, progress)

    with StopRequest() as stop:
        yield progress
        while not progress.finished(recipe) and not stop.number:
            started = saved = time.monotonic()
            _seed_dropout(trial, progress)
            model.train()
            for batch in _epoch_batches(trial, progress):
                terms = _step(trial, network, optimizer, loss_function, batch)
                progress.terms.append((len(batch.labels), terms))
                progress.step += 1
                due = trial.save_every and time.monotonic() - saved > 60 * trial.save_every
                if (stop.number or due) and alone:  # others would be at another step
                    save()
                    saved = time.monotonic()
                if stop.number:
                    raise Stopped(stop.number, saved=alone)
            row = {"epoch": progress.epoch + 1, "learning_rate": schedule.get_last_lr()[0]}
            row |= _means(progress.terms, row, trial.device)
            validated = None if trial.selected else _validate(trial, model, row)
            schedule.step()
            progress.history.append(row)
            progress.epoch, progress.step, progress.terms = row["epoch"], 0, []
            progress.waited += 1
            log_loss = row.get("validation_log_loss", math.inf)
            if keeps_last or log_loss < progress.best_loss:
                progress.best_epoch, progress.best_loss = row["epoch"], log_loss
                progress.waited = 0
                if not keeps_last or progress.finished(recipe):
                    training = {**description, "epoch": row["epoch"]}
                    _save_best(folder / "best.pt", trial, model, training, validated)
            history = pd.DataFrame(progress.history).to_csv(index=False)
            checkpoint.write_text(folder / "history.csv", history)
            save()  # last: what it says is done is on disk, and what it does not is done again
            _print_epoch(row, recipe, progress, time.monotonic() - started)
            yield progress


def _description(trial: Trial, method: str, hyper_parameters: dict) -> dict:
    """What a checkpoint says of its training, but for the epoch."""
    return {
        "method": method,
        "hyper_parameters": hyper_parameters,
        "requested": {name: [value] for name, value in hyper_parameters.items()},
        "seed": trial.seed,
        "recipe": trial.recipe,
        "trained_on": trial.trained_on,
        # Epoch and combination, and the temperature: evaluation refuses any other split here.
        "selected_on": "validation",
        "temperature_fitted_on": "validation",
    }


def _step(trial: Trial, network, optimizer, loss_function: LossFunction, batch: Batch) -> dict:
    """One step of the optimizer. Returns the terms of the loss, float32 numbers on the device."""
    with trial.autocast():
        logits = network(batch.images)
    terms = loss_function(logits, batch)
    optimizer.zero_grad()
    (terms["loss"] * _weight(batch)).backward()
    optimizer.step()
    return {
        name: torch.as_tensor(value, dtype=torch.float32, device=trial.device).detach().reshape(())
        for name, value in terms.items()
    }


def _seed_dropout(trial: Trial, progress: Progress) -> None:
    """An epoch's dropout is a function of (seed, epoch, process), as its order of the images is."""
    rank, count = distributed.shard()
    if progress.step == 0 or count > 1:  # within an epoch last.pt has the state of one process
        stream = data_loader.stream_seed(trial.seed, PURPOSES["dropout"], progress.epoch, rank)
        torch.manual_seed(stream)


def _weight(batch: Batch) -> float:
    """1, or what makes the average over processes that over images where shares are unequal."""
    return len(batch.labels) * distributed.shard().count / batch.count


def _validate(trial: Trial, model: nn.Module, row: dict) -> tuple[Tensor, Tensor, dict]:
    """Logits, labels and metrics of the validation split; the row gets the metrics."""
    with trial.autocast():
        logits, labels = collect_logits(model, trial.data, trial.splits.validation)
    if not logits.isfinite().all():
        raise _diverged("a validation logit", row)
    metrics = all_metrics(logits, labels, trial.ece_bins)
    row |= {f"validation_{name}": metrics[name] for name in ("log_loss", "accuracy", "ece")}
    return logits, labels, metrics


def _epoch_batches(trial: Trial, progress: Progress):
    """The epoch's batches, with a progress bar where somebody watches."""
    recipe, shard = trial.recipe, distributed.shard()
    batches = data_loader.shuffled_batches(
        trial.data,
        trial.training_images,
        recipe["batch_size"],
        AUGMENTATIONS[recipe["augment"]],
        trial.seed,
        progress.epoch,
        first=progress.step,
        shard=shard,
    )
    total = _steps(trial)
    return tqdm(
        batches,
        f"epoch {progress.epoch + 1}",
        total,
        initial=progress.step,
        leave=False,
        disable=True if shard.rank else None,  # None: where nobody watches
        unit="batch",
    )


def _steps(trial: Trial) -> int:
    images, processes = len(trial.training_images), distributed.shard().count
    return data_loader.steps_per_epoch(images, trial.recipe["batch_size"], processes)


def _means(
    terms: list[tuple[int, dict[str, Tensor]]], row: dict, device: torch.device
) -> dict[str, float]:
    """Averages over the epoch's images. One read from the device an epoch, not one a step."""
    counts = torch.tensor([count for count, _ in terms], dtype=torch.float64)
    means = {}
    first = terms[0][1]
    for _, values in terms:
        if values.keys() != first.keys():
            raise InputError(
                f"the loss gave {', '.join(first)} for one batch and {', '.join(values)} for "
                "another, the same names for each expected; if it was changed on the way, "
                f"{run_folder.START_ANEW}"
            )
    for name in first:
        values = torch.stack([values[name] for _, values in terms]).double().cpu()
        broken = (~values.isfinite()).nonzero()
        step = f", step {int(broken[0]) + 1}" if len(broken) else ""
        sums = torch.stack([values @ counts, counts.sum()])
        sum_of_values, count = distributed.total(sums, device)
        if not sum_of_values.isfinite():
            raise _diverged("the training loss", row, step)
        means[f"train_{name}"] = float(sum_of_values / count)
    return means


def _diverged(what: str, row: dict, step: str = "") -> DivergedError:
    return DivergedError(
        f"{what} became NaN or infinite in epoch {row['epoch']}{step} at learning rate "
        f"{row['learning_rate']:g}; most often the learning rate is too high, try a smaller --lr; "
        "the checkpoint of the best epoch before it, if any, is kept"
    )


def choose_algorithms(recipe: dict, device: torch.device) -> None:
    """With --deterministic the same bits on CUDA too. Not the default, as it costs time."""
    if recipe["deterministic"]:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # read when cuBLAS starts
        torch.use_deterministic_algorithms(True)
    torch.backends.cudnn.benchmark = not recipe["deterministic"]  # images are of one size
    if recipe["compile"]:
        try:
            torch.compile(torch.sin)(torch.ones(2, device=device))
        except Exception as error:  # what is missing, a C++ compiler or Triton, shows here alone
            raise InputError(
                f"--compile does not work on {device} here ({type(error).__name__}: "
                f"{' '.join(str(error).split())[:200]}); leave it out, or install a C++ compiler "
                "(CPU), or Triton, a C compiler and Python's headers (CUDA)"
            ) from None


def _check(trial: Trial, method: str, requested: dict[str, list]) -> tuple[int, int]:
    """What would fail in the first step, or when best.pt is read, fails before anything is written.

    Returns the (height, width) at which images enter the network.
    """
    model = _check_network(trial)
    training = _description(trial, method, all_combinations(requested)[0])
    training |= {"requested": requested, "epoch": 1}
    try:
        checkpoint.check(_contents(trial, model, training, 1.0, {}))
    except ValueError as error:
        raise InputError(
            f"the checkpoint of this training could not be read: {error}; docs/your-own.md says "
            "what a network, a loss and a data set must keep to"
        ) from None
    return model.network_size


def _check_network(trial: Trial) -> ImageClassifier:
    """A new network, if it can take a step. Chooses the algorithms that it will be trained by."""
    choose_algorithms(trial.recipe, trial.device)
    processes = distributed.shard().count
    smallest = min(trial.recipe["batch_size"], len(trial.splits.train))
    if smallest < processes:
        raise InputError(
            f"--batch_size {trial.recipe['batch_size']} and {len(trial.splits.train)} training "
            f"images, but {processes} processes: at least one image for each expected"
        )
    model = new_model(trial)
    if smallest == 1 and any(
        isinstance(module, nn.modules.batchnorm._BatchNorm) for module in model.modules()
    ):
        raise InputError(
            f"--batch_size {trial.recipe['batch_size']} and {len(trial.splits.train)} training "
            f"images make batches of 1, but {trial.model_name} has batch norm, which needs the "
            "variance over a batch; 2 or more expected of both"
        )
    unable = distributed.not_synchronised(model)
    if processes > 1 and unable:
        raise InputError(
            f"{trial.model_name} has {', '.join(sorted(unable))}, whose statistics {processes} "
            "processes cannot share; one process, or a network with torch's own batch norm expected"
        )
    return model


def new_model(trial: Trial) -> ImageClassifier:
    try:
        model = build_model(
            trial.model_name,
            trial.data.input_shape,
            len(trial.data.classes),
            **trial.description["normalisation"],
            pretrained=trial.recipe["pretrained"],
        )
    except ValueError as error:
        raise InputError(str(error)) from None
    return model.to(trial.device, memory_format=torch.channels_last)


def new_optimizer(model: nn.Module, recipe: dict) -> torch.optim.Optimizer:
    # fused: one kernel for all of the update, on the CPU too, where it is most of a small step
    settings = {"lr": recipe["lr"], "weight_decay": recipe["weight_decay"], "fused": True}
    if recipe["optimizer"] == "adam":
        return torch.optim.Adam(model.parameters(), **settings)
    return torch.optim.SGD(model.parameters(), momentum=0.9, nesterov=True, **settings)


def new_schedule(optimizer: torch.optim.Optimizer, recipe: dict):
    """A schedule that is advanced once an epoch."""
    epochs = recipe["epochs"]
    if recipe["schedule"] == "cosine":
        return torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs)
    # 30, 60 and 90 of the 100 epochs of the ILS README, and the same shares of any other number.
    shares = [max(1, round(share * epochs)) for share in (0.3, 0.6, 0.9)]
    falls = (recipe["milestones"] or shares) if recipe["schedule"] == "steps" else []
    return torch.optim.lr_scheduler.MultiStepLR(optimizer, falls, recipe["fall"])


def measure(trial: Trial, loss_function: LossFunction, steps: int = 10) -> tuple:
    """What a training will take, by a few steps of one. Nothing is written.

    Returns the seconds of a step and of a validation, the steps of an epoch, and the bytes of
    best.pt and of last.pt.
    """
    _check_network(trial)
    torch.manual_seed(trial.seed)
    model = new_model(trial)
    optimizer = new_optimizer(model, trial.recipe)
    network, times = trial.compiled(model), []
    progress = Progress()
    while len(times) <= steps:
        for batch in _epoch_batches(trial, progress):
            _step(trial, network, optimizer, loss_function, batch)
            if trial.device.type == "cuda":
                torch.cuda.synchronize(trial.device)
            times.append(time.monotonic())
            if len(times) > steps:
                break
    step = (times[-1] - times[0]) / (len(times) - 1)  # without the first, which warms up
    started = time.monotonic()
    _validate(trial, model, {"epoch": 1, "learning_rate": trial.recipe["lr"]})
    seconds = time.monotonic() - started
    weights = sum(tensor.nbytes for tensor in model.state_dict().values())
    memory = sum(value.nbytes for state in optimizer.state.values() for value in state.values())
    return step, seconds, _steps(trial), weights, weights + memory


def _save_best(path: Path, trial: Trial, model, training: dict, validated) -> None:
    if validated is None:  # none left to validate on: what is known is of the network selected
        temperature, metrics = trial.selected.temperature, trial.selected.metrics["validation"]
    else:
        logits, labels, metrics = validated
        temperature = _temperature(logits, labels)
    checkpoint.write_tensors(path, _contents(trial, model, training, temperature, metrics))


def _contents(trial: Trial, model, training: dict, temperature: float, metrics: dict) -> dict:
    return checkpoint.contents(
        model,
        training,
        trial.description,
        trial.teacher_description,
        temperature,
        {"validation": metrics},
    )


def _temperature(logits: Tensor, labels: Tensor) -> float:
    with warnings.catch_warnings():  # said once, by evaluation, not in every epoch
        warnings.simplefilter("ignore")
        return fit_temperature(logits, labels)


# ------------------------------------------------------------------------------------- what is said


def _print_epoch(row: dict, recipe: dict, progress: Progress, seconds: float) -> None:
    said = [
        f"epoch {row['epoch']:3}/{recipe['epochs']}  lr {row['learning_rate']:.3g}  train",
        *(
            f"{name.removeprefix('train_')} {value:.4f}"
            for name, value in row.items()
            if name.startswith("train_")
        ),
    ]
    if "validation_log_loss" in row:
        said += [
            f"validation log loss {row['validation_log_loss']:.4f}",
            f"accuracy {100 * row['validation_accuracy']:.2f} %",
        ]
    said.append(f"{seconds:.1f} s")
    if progress.waited == 0 and recipe["protocol"] == "ils":
        said.append("best so far")
    print("  ".join(said), flush=True)


def _final_metrics(trial: Trial, folder: Path) -> dict:
    """Validation and test metrics of the network kept, without and with temperature scaling.

    In float32, whatever it was trained in; best.pt gets the temperature that belongs to that. With
    protocol lr the validation metrics, and the temperature, are of the network selected, which has
    not seen that split.
    """
    kept = folder / "best.pt"
    selection = folder / run_folder.selected_network(trial.recipe["protocol"])
    validator = checkpoint.load(selection, trial.device)
    logits, labels = collect_logits(validator.model, trial.data, trial.splits.validation)
    temperature = _temperature(logits, labels)

    def both(logits: Tensor, labels: Tensor) -> dict:
        return {
            "unscaled": all_metrics(logits, labels, trial.ece_bins),
            "scaled": all_metrics(logits.double() / temperature, labels, trial.ece_bins),
        }

    validation = both(logits, labels)
    metrics = {"validation": validation["unscaled"]}
    for path in sorted({selection, kept}):
        checkpoint.update(path, temperature=temperature, metrics=metrics)
    network = validator if kept == selection else checkpoint.load(kept, trial.device)
    return {
        "epoch": network.training["epoch"],
        "ece_bins": trial.ece_bins,
        "temperature": temperature,
        "validation": validation,
        "test": both(*collect_logits(network.model, trial.data, trial.splits.test)),
    }


def _print_metrics(path: Path) -> None:
    metrics = run_folder.read_json(path)
    try:
        fitted = "fitted to the validation split"
        if metrics["temperature"] == 1:  # `fit_temperature` found no minimum
            fitted = "not fitted: every validation label has the largest logit"
        lines = [
            f"epoch {metrics['epoch']:d}, temperature {metrics['temperature']:.3f} {fitted}",
            f"{'':24}accuracy   log loss   ECE ({metrics['ece_bins']:d} bins)",
        ]
        for split in ("validation", "test"):
            for scaling in ("unscaled", "scaled"):
                row = metrics[split][scaling]
                lines.append(
                    f"{split:11}{scaling:11}{100 * row['accuracy']:8.2f} %"
                    f"{row['log_loss']:11.4f}{row['ece']:11.4f}"
                )
    except (KeyError, TypeError, ValueError, OverflowError) as error:
        raise run_folder.damaged(path, error) from None
    print("\n".join(lines), flush=True)
