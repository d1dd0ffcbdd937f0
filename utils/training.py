"""How a training goes: seeds, combinations of hyper-parameters, epochs, the best one, the end.

`train_method` is what a script calls. It trains each seed (`train_trial`), each combination of
hyper-parameters of a seed (`fit`, which holds the one epoch loop), keeps the epoch and the
combination with the lowest validation log loss, and only then looks at the test split.

No loss is known here. A script gives `make_loss(trial, **hyper_parameters)`, which returns a
function (logits, batch) -> {"loss": scalar to minimise, other names: scalars to log beside it}.
"""

import argparse
import itertools
import json
import math
import os
import reprlib
import shlex
import shutil
import time
import warnings
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

import filelock
import pandas as pd
import torch
from torch import Tensor, nn
from tqdm import tqdm

from models import ImageClassifier, build_model, canonical_name
from utils import arguments, checkpoint, data_loader
from utils.data_loader import AUGMENTATIONS, Batch, ImageData, Splits
from utils.errors import DivergedError, InputError, Stopped, StopRequest
from utils.evaluate import all_metrics, fit_temperature
from utils.inference import collect_logits

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
    teacher: checkpoint.Checkpoint | None = None
    teacher_use: dict = field(default_factory=dict)  # how the teacher is used, kept on disk

    @cached_property
    def splits(self) -> Splits:
        return data_loader.split(self.data, self.recipe["tr_size"], self.seed)

    @cached_property
    def description(self) -> dict:
        """What a checkpoint says of its data."""
        mean, std = data_loader.pixel_statistics(self.data, self.splits.train)
        return {
            "dataset": self.data.name,
            "classes": list(self.data.classes),
            "image_size": self.image_size,
            "tr_size": self.recipe["tr_size"],
            "seed": self.seed,
            "fingerprint": self.data.fingerprint,
            "splits": self.splits.hashes(),
            "normalisation": {"mean": mean, "std": std},
        }

    @property
    def teacher_description(self) -> dict | None:
        if self.teacher is None:
            return None
        return {
            "weights": self.teacher.weights_hash,
            "model": self.teacher.model.name,
            "method": self.teacher.training["method"],
            "seed": self.teacher.training["seed"],
            **self.teacher_use,
        }

    def folder(self, method: str) -> Path:
        return self.output_dir / self.data.name / self.model_name / method / f"seed{self.seed}"

    def autocast(self):
        half = self.recipe["precision"] == "bfloat16"
        return torch.autocast(self.device.type, torch.bfloat16, enabled=half)

    def teacher_logits(self, batch: Batch) -> Tensor:
        """What the teacher says of the very batch that the network sees."""
        with torch.no_grad(), self.autocast():
            return self.teacher.model(batch.images)


# -------------------------------------------------------------------- methods, seeds, combinations


def train_method(
    method: str,
    args: argparse.Namespace,
    make_loss: Callable[..., LossFunction],
    find_teacher: Callable | None = None,
) -> None:
    """What a training script does: one training for each seed. See the module's docstring."""
    data = data_loader.load(args.dataset, args.data_dir, args.image_size)
    arguments.check_classes(args, data.classes)
    data = data.to(args.device)
    paths = []
    for seed in range(args.seed, args.seed + args.trials):
        trial = new_trial(
            args, data, canonical_name(args.model), seed, args.tr_size, args.image_size
        )
        if find_teacher:
            trial.teacher = find_teacher(trial, args)
        paths.append(train_trial(trial, method, requested_values(args), make_loss))
    print("\nNext, evaluate the checkpoint or distil it into the shallow student:")
    arguments.print_next(
        args,
        shlex.join(["Models-evaluation.py", str(Path(args.output_dir) / args.dataset)]),
        shlex.join(["Network-distillation.py", "--teacher", *map(str, paths)]),
    )


def new_trial(
    args: argparse.Namespace,
    data: ImageData,
    model_name: str,
    seed: int,
    tr_size: float,
    image_size: int | None,
) -> Trial:
    """A trial as the flags say that training and distillation share; the rest is given."""
    return Trial(
        data=data,
        image_size=image_size,
        model_name=model_name,
        seed=seed,
        recipe=arguments.recipe(args, data.name, tr_size),
        device=args.device,
        output_dir=Path(args.output_dir),
        ece_bins=args.ece_bins,
        overwrite=args.overwrite,
        save_every=args.save_every,
    )


def requested_values(args: argparse.Namespace) -> dict[str, list]:
    """The values of each hyper-parameter of the method that the command line asks for."""
    return {name: getattr(args, name) for name in args.hyper_parameters}


def train_trial(
    trial: Trial, method: str, requested: dict[str, list], make_loss: Callable[..., LossFunction]
) -> Path:
    """Trains one seed of a method, or goes on where an earlier process was stopped.

    requested: values of each hyper-parameter; of several combinations the one with the lowest
    validation log loss is kept. Returns the path of best.pt.
    """
    _choose_algorithms(trial.recipe)
    folder = trial.folder(method)
    train, validation, test = map(len, trial.splits)
    print(
        f"\n{method} · {trial.data.name} · {trial.model_name} · seed {trial.seed} · {train} "
        f"training, {validation} validation, {test} test images · {trial.device}",
        flush=True,
    )
    settings = {
        "dataset": trial.data.name,
        "image_size": trial.image_size,
        "fingerprint": trial.description["fingerprint"],
        "model": trial.model_name,
        "method": method,
        "hyper_parameters": requested,
        "seed": trial.seed,
        "recipe": trial.recipe,
        "teacher": trial.teacher_description,
    }
    _check_network(trial)
    with _run_folder(folder, settings, trial):
        best, metrics_file = folder / "best.pt", folder / "metrics.json"
        if metrics_file.exists():
            print(f"finished earlier, nothing to do (--overwrite starts anew): {best}")
            _print_metrics(metrics_file)
        else:
            _train_combinations(trial, method, requested, make_loss, folder)
            checkpoint.write_json(metrics_file, _final_metrics(trial, best))
            _print_metrics(metrics_file)
            print(f"checkpoint: {best}", flush=True)
        shutil.rmtree(folder / "candidates", ignore_errors=True)
    return best


def _train_combinations(trial, method, requested, make_loss, folder: Path) -> None:
    combinations = [
        dict(zip(requested, values, strict=True))
        for values in itertools.product(*requested.values())
    ]
    if len(combinations) == 1:
        fit(trial, method, combinations[0], requested, make_loss, folder)
    else:
        _train_candidates(trial, method, combinations, requested, make_loss, folder)


def _train_candidates(trial, method, combinations, requested, make_loss, folder: Path) -> None:
    """Trains every combination in a folder of its own and brings the best one's files here."""
    rows = []
    for hyper_parameters in combinations:
        name = ",".join(f"{key}={value}" for key, value in hyper_parameters.items())
        print(f"candidate {len(rows) + 1} of {len(combinations)}: {name}", flush=True)
        candidate = folder / "candidates" / name
        progress = fit(trial, method, hyper_parameters, requested, make_loss, candidate)
        rows.append(
            {
                **hyper_parameters,
                "best_epoch": progress.best_epoch,
                "validation_log_loss": progress.best_loss,
            }
        )
    table = pd.DataFrame(rows)
    chosen = int(table["validation_log_loss"].idxmin())
    table["selected"] = table.index == chosen
    selected = ", ".join(f"{key} {value}" for key, value in combinations[chosen].items())
    print(f"selected by validation log loss {table.validation_log_loss[chosen]:.4f}: {selected}")
    checkpoint.write_text(folder / "search.csv", table.to_csv(index=False))
    name = ",".join(f"{key}={value}" for key, value in combinations[chosen].items())
    for file in ("history.csv", "last.pt", "best.pt"):
        checkpoint.copy_file(folder / "candidates" / name / file, folder / file)


# --------------------------------------------------------------------------------- the run's folder


RUN_FILES = ("config.json", "metrics.json", "best.pt", "last.pt", "history.csv", "search.csv")


@contextmanager
def _run_folder(folder: Path, settings: dict, trial: Trial):
    """Holds the folder for this process, with the settings written down in its config.json."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = filelock.FileLock(folder / ".lock")
        lock.acquire(timeout=0)
    except filelock.Timeout:
        raise InputError(f"another process is training in {folder}; wait for its end") from None
    except (OSError, NotImplementedError) as error:  # the latter: no locks on this file system
        raise InputError(f"cannot use the output folder {folder}: {error}") from None
    with lock:
        for place in (folder, *folder.glob("candidates/*")):
            checkpoint.remove_temporaries(place)
        if trial.overwrite:
            _remove_run(folder)
        elif any((folder / name).exists() for name in RUN_FILES):
            _check_settings(folder / "config.json", settings)
        # What a finished run says of its making stays as it is.
        if not (folder / "metrics.json").exists():
            made_by = checkpoint.environment(trial.device)
            checkpoint.write_json(
                folder / "config.json", {"settings": settings, "environment": made_by}
            )
        yield


def _remove_run(folder: Path) -> None:
    """Removes an earlier run, in an order that leaves something usable wherever it is killed.

    Until all last.pt are gone the old run is finished or can go on; from then on the same settings
    start anew. config.json is not removed but replaced, after everything that belongs to it.
    """
    try:
        for path in (folder / "last.pt", *folder.glob("candidates/*/last.pt")):
            path.unlink(missing_ok=True)
        for name in ("metrics.json", "best.pt", "history.csv", "search.csv"):
            (folder / name).unlink(missing_ok=True)
        if (folder / "candidates").exists():
            shutil.rmtree(folder / "candidates")
    except OSError as error:
        raise InputError(f"cannot remove the earlier run in {folder}: {error}") from None


def _read_json(path: Path, limit: int = 2**24) -> dict:
    """What write_json wrote. Raises InputError for anything else."""
    try:
        if path.stat().st_size > limit:
            raise ValueError("it is too large")
        content = json.loads(path.read_bytes())
        if not isinstance(content, dict):
            raise TypeError("it holds no dictionary")
        return content
    except (OSError, ValueError, TypeError, RecursionError) as error:
        raise _damaged(path, error) from None


def _damaged(path: Path, error: Exception) -> InputError:
    return InputError(
        f"{path} is damaged ({type(error).__name__}: {error}); give another --output_dir, or "
        "--overwrite to start anew"
    )


def _check_settings(config: Path, settings: dict) -> None:
    here = _flat(settings)
    try:
        there = _flat(_read_json(config).get("settings"))
    except RecursionError as error:
        raise _damaged(config, error) from None
    for name in here | there:
        if here.get(name) != there.get(name):
            raise InputError(
                f"{config.parent} holds another configuration: {name} is "
                f"{reprlib.repr(there.get(name))} there and {reprlib.repr(here.get(name))} here; "
                "give another --output_dir, or --overwrite to start anew"
            )


def _flat(settings, prefix: str = "") -> dict:
    """{"recipe": {"lr": 0.1}} as {"recipe.lr": 0.1}, values as JSON has them."""
    if not isinstance(settings, dict):
        return {prefix: json.loads(json.dumps(settings))}
    inside = [_flat(value, f"{prefix}.{key}".lstrip(".")) for key, value in settings.items()]
    return {key: value for part in inside for key, value in part.items()}


# ------------------------------------------------------------------------------------ one training


@dataclass
class Progress:
    """How far a training has come. Saved in last.pt."""

    epoch: int = 0  # epochs completed
    step: int = 0  # batches done of the epoch in hand
    best_epoch: int = 0
    best_loss: float = math.inf
    waited: int = 0  # epochs since the best one
    history: list[dict] = field(default_factory=list)  # a row an epoch
    terms: list[tuple[int, dict[str, Tensor]]] = field(default_factory=list)  # of each batch done

    def finished(self, recipe: dict) -> bool:
        stopped = recipe["estop"] and self.waited >= recipe["estop"]
        return bool(self.epoch >= recipe["epochs"] or stopped)

    def check(self, epochs: int, steps: int) -> None:
        """Raises ValueError, or what wrong types raise, unless a training of that many epochs and
        steps an epoch can have come this far."""
        for count, most in (
            (self.epoch, epochs),
            (self.step, steps),
            (self.best_epoch, self.epoch),
            (self.waited, self.epoch),
        ):
            if type(count) is not int or not 0 <= count <= most:
                raise ValueError(f"{reprlib.repr(count)} where 0 to {most} is expected")
        rows = [{**row} for row in self.history]
        if [row.pop("epoch") for row in rows] != list(range(1, self.epoch + 1)):
            raise ValueError("its history has not a row for each epoch")
        if not all(
            type(value) is float and name.isidentifier()
            for row in rows
            for name, value in row.items()
        ):
            raise ValueError("its history holds something else than named numbers")
        if type(self.best_loss) is not float or len(self.terms) != self.step:
            raise ValueError("its losses are not numbers, or not one for each step")
        for count, values in self.terms:
            if type(count) is not int or not 0 < count < 2**31 or "loss" not in values:
                raise ValueError("its terms of the loss are not those of a batch")
            for name, value in values.items():
                if not name.isidentifier() or value.shape != () or value.dtype != torch.float32:
                    raise ValueError("its terms of the loss are not named numbers")


def fit(
    trial: Trial,
    method: str,
    hyper_parameters: dict,
    requested: dict,
    make_loss: Callable[..., LossFunction],
    folder: Path,
) -> Progress:
    """Trains one network to the end, from where last.pt in the folder left it if there is one.

    Leaves best.pt, last.pt and history.csv in the folder.
    """
    recipe, data, splits = trial.recipe, trial.data, trial.splits
    description = {
        "method": method,
        "hyper_parameters": hyper_parameters,
        "requested": requested,
        "seed": trial.seed,
        "recipe": recipe,
        # Epoch and combination, and the temperature: evaluation refuses any other split here.
        "selected_on": "validation",
        "temperature_fitted_on": "validation",
    }
    loss_function = make_loss(trial, **hyper_parameters)
    torch.manual_seed(trial.seed)  # initial weights and dropout: the same for every method
    model = _new_model(trial)
    optimizer = _new_optimizer(model, recipe)
    schedule = _new_schedule(optimizer, recipe)
    progress = Progress()
    if (folder / "last.pt").exists():
        progress = _restore(folder / "last.pt", trial, model, optimizer, schedule)
        print(f"continued after epoch {progress.epoch}, step {progress.step}", flush=True)

    def save() -> None:
        _save(folder / "last.pt", trial.device, model, optimizer, progress)

    with StopRequest() as stop:
        while not progress.finished(recipe) and not stop.number:
            started = saved = time.monotonic()
            model.train()
            for batch in _with_bar(trial, progress):
                with trial.autocast():
                    logits = model(batch.images)
                terms = loss_function(logits, batch)
                optimizer.zero_grad(set_to_none=True)
                terms["loss"].backward()
                optimizer.step()
                progress.terms.append(
                    (len(batch.labels), {k: v.detach() for k, v in terms.items()})
                )
                progress.step += 1
                due = trial.save_every and time.monotonic() - saved > 60 * trial.save_every
                if stop.number or due:
                    save()
                    saved = time.monotonic()
                    if stop.number:
                        raise Stopped(stop.number, saved=True)
            row = {"epoch": progress.epoch + 1, "learning_rate": schedule.get_last_lr()[0]}
            row |= _means(progress.terms, row)
            logits, labels = collect_logits(model, data, splits.validation)
            if not logits.isfinite().all():
                raise _diverged("a validation logit", row)
            metrics = all_metrics(logits, labels, trial.ece_bins)
            row |= {f"validation_{name}": metrics[name] for name in ("log_loss", "accuracy", "ece")}
            schedule.step()
            progress.history.append(row)
            progress.epoch, progress.step, progress.terms = row["epoch"], 0, []
            progress.waited += 1
            if metrics["log_loss"] < progress.best_loss:
                progress.best_epoch, progress.best_loss = row["epoch"], metrics["log_loss"]
                progress.waited = 0
                training = {**description, "epoch": row["epoch"]}
                _save_best(folder / "best.pt", trial, model, training, logits, labels, metrics)
            history = pd.DataFrame(progress.history).to_csv(index=False)
            checkpoint.write_text(folder / "history.csv", history)
            save()  # last: what it says is done is on disk, and what it does not is done again
            _print_epoch(row, recipe, progress, time.monotonic() - started)
    return progress


def _with_bar(trial: Trial, progress: Progress):
    """The epoch's batches, with a progress bar where somebody watches."""
    recipe, count = trial.recipe, len(trial.splits.train)
    batches = data_loader.shuffled_batches(
        trial.data,
        trial.splits.train,
        recipe["batch_size"],
        AUGMENTATIONS[recipe["augment"]],
        trial.seed,
        progress.epoch,
        first=progress.step,
    )
    total = data_loader.steps_per_epoch(count, recipe["batch_size"])
    return tqdm(
        batches,
        f"epoch {progress.epoch + 1}",
        total,
        initial=progress.step,
        leave=False,
        disable=None,
        unit="batch",
    )


def _means(terms: list[tuple[int, dict[str, Tensor]]], row: dict) -> dict[str, float]:
    """Averages over the epoch's images. One read from the device an epoch, not one a step."""
    counts = torch.tensor([count for count, _ in terms], dtype=torch.float64)
    means = {}
    if any(values.keys() != terms[-1][1].keys() for _, values in terms):
        raise InputError("last.pt was made with another loss; --overwrite starts anew")
    for name in terms[0][1]:
        values = torch.stack([values[name] for _, values in terms]).double().cpu()
        broken = (~values.isfinite()).nonzero()
        if len(broken):
            raise _diverged("the training loss", row, f", step {int(broken[0]) + 1}")
        means[f"train_{name}"] = float(values @ counts / counts.sum())
    return means


def _diverged(what: str, row: dict, step: str = "") -> DivergedError:
    return DivergedError(
        f"{what} became NaN or infinite in epoch {row['epoch']}{step} at learning rate "
        f"{row['learning_rate']:g}; most often the learning rate is too high, try a smaller --lr; "
        "the checkpoint of the best epoch before it, if any, is kept"
    )


def _choose_algorithms(recipe: dict) -> None:
    """With --deterministic the same bits on CUDA too. Not the default, as it costs time."""
    if recipe["deterministic"]:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # read when cuBLAS starts
        torch.use_deterministic_algorithms(True)
        torch.backends.cudnn.benchmark = False


def _check_network(trial: Trial) -> None:
    """What would fail in the first step fails here, before anything is written."""
    smallest = min(trial.recipe["batch_size"], len(trial.splits.train))
    if smallest == 1 and any(
        isinstance(module, nn.modules.batchnorm._BatchNorm)
        for module in _new_model(trial).modules()
    ):
        raise InputError(
            f"--batch_size {trial.recipe['batch_size']} and {len(trial.splits.train)} training "
            f"images make batches of 1, but {trial.model_name} has batch norm, which needs the "
            "variance over a batch; 2 or more expected of both"
        )


def _new_model(trial: Trial) -> ImageClassifier:
    model = build_model(
        trial.model_name,
        trial.data.input_shape,
        len(trial.data.classes),
        **trial.description["normalisation"],
    )
    return model.to(trial.device, memory_format=torch.channels_last)


def _new_optimizer(model: nn.Module, recipe: dict) -> torch.optim.Optimizer:
    settings = {"lr": recipe["lr"], "weight_decay": recipe["weight_decay"]}
    if recipe["optimizer"] == "adam":
        return torch.optim.Adam(model.parameters(), **settings)
    return torch.optim.SGD(model.parameters(), momentum=0.9, nesterov=True, **settings)


def _new_schedule(optimizer: torch.optim.Optimizer, recipe: dict):
    """A schedule that is advanced once an epoch."""
    epochs = recipe["epochs"]
    if recipe["schedule"] == "cosine":
        return torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs)
    # 30, 60 and 90 of the 100 epochs of the ILS README, and the same shares of any other number.
    falls = [max(1, round(share * epochs)) for share in (0.3, 0.6, 0.9)]
    falls = falls if recipe["schedule"] == "steps" else []
    return torch.optim.lr_scheduler.MultiStepLR(optimizer, falls, gamma=0.1)


# ------------------------------------------------------------------------------- stopping, resuming


def _save_best(path: Path, trial: Trial, model, training: dict, logits, labels, metrics) -> None:
    with warnings.catch_warnings():  # said once, at the end, not in every epoch
        warnings.simplefilter("ignore")
        temperature = fit_temperature(logits, labels)
    content = checkpoint.contents(
        model,
        training,
        trial.description,
        trial.teacher_description,
        temperature,
        {"validation": metrics},
    )
    checkpoint.write_tensors(path, content)


def _save(path: Path, device: torch.device, model, optimizer, progress: Progress) -> None:
    """Everything needed to go on that does not follow from the settings.

    The schedule does, given the epoch; and so does the optimizer, but for what it remembers of
    each parameter. What is not in the file cannot be wrong in it.
    """
    random = {"cpu": torch.get_rng_state()}
    if device.type == "cuda":
        random["cuda"] = torch.cuda.get_rng_state(device)
    checkpoint.write_tensors(
        path,
        {
            "model": model.state_dict(),
            "optimizer": optimizer.state_dict()["state"],
            "progress": vars(progress),
            "random": random,
        },
    )


def _restore(path: Path, trial: Trial, model, optimizer, schedule) -> Progress:
    """Puts back what _save saved. Raises InputError if that is not what the file holds."""
    state = checkpoint.read_tensors(path)
    try:
        progress = Progress(**state["progress"])
        steps = data_loader.steps_per_epoch(len(trial.splits.train), trial.recipe["batch_size"])
        progress.check(trial.recipe["epochs"], steps)
        if progress.best_epoch and not path.with_name("best.pt").exists():
            raise ValueError("no best.pt beside it")
        # A first step, here of no length, is what gives an optimizer its memory.
        for parameter in model.parameters():
            parameter.grad = torch.zeros_like(parameter)
        optimizer.step()
        memory = optimizer.state_dict()["state"]
        for index, saved in state["optimizer"].items():
            _fill(memory[index], saved)
        _fill(model.state_dict(), state["model"])
        for _ in range(progress.epoch):
            schedule.step()
        for _, values in progress.terms:
            values.update({name: value.to(trial.device) for name, value in values.items()})
        torch.set_rng_state(state["random"]["cpu"])
        if trial.device.type == "cuda" and "cuda" in state["random"]:  # the device may change
            torch.cuda.set_rng_state(state["random"]["cuda"], trial.device)
    except (KeyError, TypeError, ValueError, RuntimeError, AttributeError) as error:
        raise _damaged(path, error) from None
    return progress


@torch.no_grad()
def _fill(tensors: dict[str, Tensor], saved: dict[str, Tensor]) -> None:
    """Overwrites the tensors with those of the same name that were saved."""
    if saved.keys() != tensors.keys():
        raise ValueError("tensors are missing, or of another network or optimizer")
    for name, tensor in tensors.items():
        there = saved[name]
        if there.shape != tensor.shape or there.dtype != tensor.dtype:
            raise ValueError(f"{name} is of {there.dtype} {tuple(there.shape)}")
        if name == "step" and there < 1:
            raise ValueError("an optimizer that has made no step")
        tensor.copy_(there)


# ------------------------------------------------------------------------------------- what is said


def _print_epoch(row: dict, recipe: dict, progress: Progress, seconds: float) -> None:
    mark = "  best so far" if progress.waited == 0 else ""
    terms = "  ".join(
        f"{name.removeprefix('train_')} {value:.4f}"
        for name, value in row.items()
        if name.startswith("train_")
    )
    tqdm.write(
        f"epoch {row['epoch']:3}/{recipe['epochs']}  lr {row['learning_rate']:.3g}  "
        f"train {terms}  validation log loss {row['validation_log_loss']:.4f}  "
        f"accuracy {100 * row['validation_accuracy']:.2f} %  {seconds:.1f} s{mark}"
    )


def _final_metrics(trial: Trial, best: Path) -> dict:
    """Validation and test metrics of the best epoch, without and with temperature scaling."""
    trained = checkpoint.load(best, trial.device)
    result: dict = {
        "epoch": trained.training["epoch"],
        "ece_bins": trial.ece_bins,
        "temperature": trained.temperature,
    }
    for name in ("validation", "test"):
        logits, labels = collect_logits(trained.model, trial.data, getattr(trial.splits, name))
        result[name] = {
            "unscaled": all_metrics(logits, labels, trial.ece_bins),
            "scaled": all_metrics(logits.double() / trained.temperature, labels, trial.ece_bins),
        }
    return result


def _print_metrics(path: Path) -> None:
    metrics = _read_json(path)
    try:
        lines = [
            f"best epoch {metrics['epoch']:d}, temperature {metrics['temperature']:.3f} fitted to "
            "the validation split",
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
        raise _damaged(path, error) from None
    print("\n".join(lines), flush=True)
