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

from models import ImageClassifier, build_model
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
        trial = new_trial(args, data, seed)
        if find_teacher:
            trial.teacher = find_teacher(trial, args)
        paths.append(train_trial(trial, method, requested_values(args), make_loss))
    print("\nNext, evaluate the checkpoint or distil it into the shallow student:")
    print(f"  python Models-evaluation.py {Path(args.output_dir) / args.dataset}")
    print(f"  python Network-distillation.py --teacher {' '.join(map(str, paths))}")


def new_trial(args: argparse.Namespace, data: ImageData, seed: int) -> Trial:
    recipe = arguments.recipe(args, args.dataset, args.tr_size)
    return Trial(
        data=data,
        image_size=args.image_size,
        model_name=arguments.model_name(args),
        seed=seed,
        recipe=recipe,
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
            _print_metrics(json.loads(metrics_file.read_text()))
            return best
        combinations = [
            dict(zip(requested, values, strict=True))
            for values in itertools.product(*requested.values())
        ]
        if len(combinations) == 1:
            fit(trial, method, combinations[0], requested, make_loss, folder)
        else:
            _train_candidates(trial, method, combinations, requested, make_loss, folder)
        metrics = _final_metrics(trial, best)
        checkpoint.write_json(metrics_file, metrics)
        _print_metrics(metrics)
        shutil.rmtree(folder / "candidates", ignore_errors=True)
        print(f"checkpoint: {best}", flush=True)
    return best


def _train_candidates(trial, method, combinations, requested, make_loss, folder: Path) -> None:
    """Trains every combination in a folder of its own and brings the best one's files here."""
    rows = []
    for hyper_parameters in combinations:
        name = ",".join(f"{key}={value}" for key, value in hyper_parameters.items())
        print(f"candidate {len(rows) + 1} of {len(combinations)}: {name}", flush=True)
        candidate = folder / "candidates" / name
        candidate.mkdir(parents=True, exist_ok=True)
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
        content = (folder / "candidates" / name / file).read_bytes()
        checkpoint.write_file(folder / file, lambda target, content=content: target.write(content))


# --------------------------------------------------------------------------------- the run's folder


@contextmanager
def _run_folder(folder: Path, settings: dict, trial: Trial):
    """Holds the folder for this process, with the settings written down in its config.json."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = filelock.FileLock(folder / ".lock")
        lock.acquire(timeout=0)
    except filelock.Timeout:
        raise InputError(f"another process is training in {folder}; wait for its end") from None
    except OSError as error:
        raise InputError(f"cannot use the output folder {folder}: {error}") from None
    with lock:
        config = folder / "config.json"
        if config.exists() and trial.overwrite:
            for name in ("metrics.json", "last.pt", "best.pt", "history.csv", "search.csv"):
                (folder / name).unlink(missing_ok=True)
            shutil.rmtree(folder / "candidates", ignore_errors=True)
        elif config.exists():
            _check_settings(config, settings)
        checkpoint.write_json(
            config, {"settings": settings, "environment": checkpoint.environment(trial.device)}
        )
        yield


def _check_settings(config: Path, settings: dict) -> None:
    try:
        there = json.loads(config.read_text())["settings"]
        if not isinstance(there, dict):
            raise TypeError("settings is no dictionary")
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(
            f"{config} is damaged ({error}); give another --output_dir, or --overwrite"
        ) from None
    there, here = _flat(there), _flat(settings)
    differing = [name for name in here | there if here.get(name) != there.get(name)]
    if differing:
        name = differing[0]
        raise InputError(
            f"{config.parent} holds another configuration: {name} is {there.get(name)} there and "
            f"{here.get(name)} here; give another --output_dir, or --overwrite to start anew"
        )


def _flat(settings: dict) -> dict:
    """{"recipe": {"lr": 0.1}} as {"recipe.lr": 0.1}, values as JSON has them."""
    flat = pd.json_normalize(json.loads(json.dumps(settings))).to_dict("records")[0]
    return dict(flat)


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
    loss_function = make_loss(trial, **hyper_parameters)
    torch.manual_seed(trial.seed)  # initial weights and dropout: the same for every method
    model = _new_model(trial)
    optimizer = _new_optimizer(model, recipe)
    schedule = _new_schedule(optimizer, recipe)
    progress = Progress()
    if (folder / "last.pt").exists():
        _restore(folder / "last.pt", trial.device, model, optimizer, schedule, progress)
        print(f"continued after epoch {progress.epoch}, step {progress.step}", flush=True)

    def save() -> None:
        _save(folder / "last.pt", trial.device, model, optimizer, schedule, progress)

    with StopRequest() as stop:
        while not progress.finished(recipe):
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
                training = {
                    "method": method,
                    "hyper_parameters": hyper_parameters,
                    "requested": requested,
                    "seed": trial.seed,
                    "epoch": row["epoch"],
                    "recipe": recipe,
                }
                temperature = _quiet_temperature(logits, labels)
                best = checkpoint.contents(
                    model,
                    training,
                    trial.description,
                    trial.teacher_description,
                    temperature,
                    {"validation": metrics},
                )
                checkpoint.write_tensors(folder / "best.pt", best)
            save()
            history = pd.DataFrame(progress.history).to_csv(index=False)
            checkpoint.write_text(folder / "history.csv", history)
            _print_epoch(row, recipe, progress, time.monotonic() - started)
            if stop.number:
                raise Stopped(stop.number, saved=True)
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


def _quiet_temperature(logits: Tensor, labels: Tensor) -> float:
    with warnings.catch_warnings():  # said once, at the end, not in every epoch
        warnings.simplefilter("ignore")
        return fit_temperature(logits, labels)


def _check_network(trial: Trial) -> None:
    """What would fail in the first step fails here, before anything is written."""
    if trial.recipe["batch_size"] == 1 and any(
        isinstance(module, nn.modules.batchnorm._BatchNorm)
        for module in _new_model(trial).modules()
    ):
        raise InputError(
            f"--batch_size 1 given, but {trial.model_name} has batch norm, which needs the "
            "variance over a batch; 2 or more expected"
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
    falls = [round(share * epochs) for share in (0.3, 0.6, 0.9)]
    falls = falls if recipe["schedule"] == "steps" else []
    return torch.optim.lr_scheduler.MultiStepLR(optimizer, falls, gamma=0.1)


# ------------------------------------------------------------------------------- stopping, resuming


def _save(path: Path, device, model, optimizer, schedule, progress: Progress) -> None:
    random = {"cpu": torch.get_rng_state()}
    if device.type == "cuda":
        random["cuda"] = torch.cuda.get_rng_state(device)
    checkpoint.write_tensors(
        path,
        {
            "model": model.state_dict(),
            "optimizer": optimizer.state_dict(),
            "schedule": schedule.state_dict(),
            "progress": vars(progress),
            "random": random,
        },
    )


def _restore(path: Path, device, model, optimizer, schedule, progress: Progress) -> None:
    state = checkpoint.read_tensors(path)
    try:
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        schedule.load_state_dict(state["schedule"])
        for name in vars(progress):
            setattr(progress, name, state["progress"][name])
        torch.set_rng_state(state["random"]["cpu"])
        if device.type == "cuda":
            torch.cuda.set_rng_state(state["random"]["cuda"], device)
    except (KeyError, TypeError, ValueError, RuntimeError) as error:
        raise InputError(
            f"{path} is damaged ({type(error).__name__}: {error}); --overwrite starts anew"
        ) from None


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


def _print_metrics(metrics: dict) -> None:
    print(
        f"best epoch {metrics['epoch']}, temperature {metrics['temperature']:.3f} fitted to the "
        "validation split"
    )
    print(f"{'':24}accuracy   log loss   ECE ({metrics['ece_bins']} bins)")
    for split in ("validation", "test"):
        for scaling in ("unscaled", "scaled"):
            row = metrics[split][scaling]
            print(
                f"{split:11}{scaling:11}{100 * row['accuracy']:8.2f} %{row['log_loss']:11.4f}"
                f"{row['ece']:11.4f}"
            )
