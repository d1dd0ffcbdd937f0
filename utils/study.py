"""Who trains what, and when is a study done? Any number of workers, one plan, no training twice.

A study is made of searches: one for each method and seed, each an Optuna study of its own in one
storage. All trials of a search are planned before the first is trained, as waiting trials: with a
grid their values too, otherwise the sampler gives them when the trial is taken. A worker takes a
waiting trial, trains it in a folder of its own, tells the result, and takes the next;
who finds a search without any left selects and finishes it (`training.train_trial`).

Two things keep workers apart. A file lock in the run's folder orders what changes a search's plan,
and the lock of the candidate's own folder (`run_folder.held`) lets one process alone train there.
What has died is known by its heartbeat, which Optuna looks after.
"""

import argparse
import contextlib
import functools
import importlib.util
import json
import math
import os
import socket
import statistics
import subprocess
import sys
import threading
import time
import warnings
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import optuna
import pandas as pd
import sqlalchemy
import torch
from optuna.exceptions import StorageInternalError, UpdateFinishedTrialError
from optuna.trial import FrozenTrial, TrialState

from utils import arguments, tables, tracking, training
from utils.checkpoint import ROOT
from utils.data_loader import ImageData
from utils.errors import DivergedError, InputError, Stopped
from utils.methods import SHARED, Range, Space, needs_teacher, student_flags
from utils.progress import Progress
from utils.run_folder import InUse, exclusive, run_path
from utils.teacher import VANILLA, make_cross_entropy, student_method
from utils.tracking import Tracker
from utils.training import (
    Method,
    Trial,
    all_combinations,
    combination_name,
    new_trial,
    train_candidate,
    train_trial,
)

# ----------------------------------------------------------------------------------------- storage


def open_storage(address: sqlalchemy.URL, heartbeat: int, lock: Path) -> optuna.storages.RDBStorage:
    """The database that the workers share.

    heartbeat: seconds between two signs of life of a worker; after two without any it is dead.
    lock: a file that keeps workers that start at once from making the tables at once.
    """
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
    warnings.filterwarnings("ignore", "Heartbeat of storage is supposed")  # see _Heart
    options: dict = {"pool_pre_ping": True}
    if address.drivername.startswith("sqlite"):
        options["connect_args"] = {"timeout": 60}  # seconds to wait while another worker writes
    elif address.drivername == "postgresql" and importlib.util.find_spec("psycopg2"):
        address = address.set(drivername="postgresql+psycopg2")  # SQLAlchemy's choice varies
    try:
        with exclusive(lock):
            return optuna.storages.RDBStorage(
                address.render_as_string(hide_password=False),
                engine_kwargs=options,
                heartbeat_interval=heartbeat,
                grace_period=2 * heartbeat,
            )
    except ImportError as error:
        raise InputError(
            f"--storage {address} needs a driver: {error.__cause__}; "
            "pip install psycopg2-binary (PostgreSQL) or pymysql (MySQL, mysql+pymysql://)"
        ) from None
    except (StorageInternalError, sqlalchemy.exc.SQLAlchemyError, RuntimeError) as error:
        reason = str(getattr(error, "orig", None) or error.__cause__ or error)
        raise InputError(f"--storage {address} cannot be used: {reason}") from None


def storage_address(url: str) -> sqlalchemy.URL:
    """Raises InputError for what is no address. Its str() hides the password."""
    try:
        if "://" not in url:
            return sqlalchemy.URL.create("sqlite", database=url)
        address = sqlalchemy.make_url(url)
        if address.get_backend_name() not in ("sqlite", "postgresql", "mysql"):
            raise ValueError
    except (sqlalchemy.exc.ArgumentError, ValueError):
        raise InputError(
            f"--storage {url} given, a SQLite file, postgresql://user@host/database or "
            "mysql+pymysql://user@host/database expected"
        ) from None
    return address


class _Heart(threading.Thread):
    """Says every few seconds that the worker of a trial lives, as Optuna's own loop would.

    A database that is away for a moment is asked again at the next beat.
    """

    def __init__(self, storage: optuna.storages.RDBStorage, trial: optuna.Trial) -> None:
        super().__init__(daemon=True)
        self.storage, self.trial_id, self.stopped = storage, trial._trial_id, threading.Event()

    def run(self) -> None:
        while not self.stopped.wait(self.storage.heartbeat_interval):
            with contextlib.suppress(StorageInternalError, sqlalchemy.exc.SQLAlchemyError):
                self.storage.record_heartbeat(self.trial_id)

    def __enter__(self) -> None:
        self.start()

    def __exit__(self, *_) -> None:
        self.stopped.set()
        self.join()


# --------------------------------------------------------------------------------------- one search


def plan(space: Space, options: argparse.Namespace) -> list[dict]:
    """For each trial of a search the values that are fixed beforehand."""
    ranges = any(isinstance(values, Range) for values in space.values())
    grid = [] if ranges else all_combinations(space)
    if options.sampler == "grid" or len(grid) == 1:
        return grid
    return [{} for _ in range(options.n_trials if ranges else min(options.n_trials, len(grid)))]


@dataclass(eq=False)
class Search:
    """One method and one seed: what is to be tried, and what has come of it."""

    method: Method
    space: Space
    seed: int
    data: ImageData
    options: argparse.Namespace  # of Hyperparameter-study.py
    storage: optuna.storages.RDBStorage
    trackers: list[Tracker]
    teacher: "Search | None" = None  # whose network must be there before
    failed: bool = False  # nothing came of it: its trainings, or its teacher's, diverged
    checked: bool = False  # whether its folder may be used

    @property
    def folder(self) -> Path:
        return self._folder_in(self.options.output_dir)

    @property
    def candidates(self) -> Path:
        """Where the trainings are: until one is selected, or for good and for other studies."""
        if self.options.keep_candidates:  # by a name that no run removes
            return self._folder_in(self.options.keep_candidates) / "kept-candidates"
        return self.folder / "candidates"

    def _folder_in(self, place: str) -> Path:
        return run_path(place, self.data.name, self.options.model, self.method.name, self.seed)

    @property
    def name(self) -> str:
        return f"{self.method.name}/seed{self.seed}"

    @cached_property
    def planned(self) -> list[dict]:
        return plan(self.space, self.options)

    @property
    def settled(self) -> bool:
        """Whether nothing is left to do. The candidates are removed last."""
        finished = self.checked and (self.folder / "metrics.json").exists()
        return self.failed or (finished and not (self.folder / "candidates").exists())

    @cached_property
    def requested(self) -> dict[str, list]:
        return {
            name: [str(values)] if isinstance(values, Range) else values
            for name, values in self.space.items()
        }

    # ------------------------------------------------------------------ plan

    @cached_property
    def study(self) -> optuna.Study:
        """Raises InputError if the storage holds a study of that name with other settings."""
        args, options = self.method.args, self.options
        recipe = arguments.recipe(args, self.data.name)
        settings = {
            "fingerprint": self.data.fingerprint,
            "image_size": args.image_size,
            "output_dir": str(Path(args.output_dir).resolve()),
            "candidates": str(self.candidates.resolve()),
            "hyper_parameters": self.space,
            "sampler": options.sampler,
            "trials": len(self.planned),
            "pruner": options.pruner,
            "select_by": args.select_by,
            "ece_bins": args.ece_bins,
            **recipe,
        }
        settings = json.loads(json.dumps(settings))
        name = f"{options.study_name}/{self.data.name}/{args.model}/{self.name}"
        study = optuna.create_study(
            storage=self.storage,
            study_name=name,
            pruner=_pruner(options.pruner, args.epochs),
            load_if_exists=True,
        )
        there = study.user_attrs.get("settings")
        if there is None:
            study.set_user_attr("settings", settings)
        elif there != settings:
            key = next(key for key in settings | there if settings.get(key) != there.get(key))
            raise InputError(
                f"the study {name} in --storage has other settings: {key} is {there.get(key)} "
                f"there and {settings.get(key)} here; give another --study_name and --output_dir"
            )
        return study

    def take(self) -> optuna.Trial | None:
        """A trial for this worker to train, or None: all are in hands, or have ended."""
        with exclusive(self.folder / ".plan.lock"):
            self._mend_plan()
            if not self._trials(TrialState.WAITING):
                return None
            trial = self.study.ask()
            self.storage.record_heartbeat(trial._trial_id)
            trial.set_user_attr("worker", f"{socket.gethostname()}:{os.getpid()}")
        return trial

    def _mend_plan(self) -> None:
        """Sees to it that each planned trial waits, runs or has ended, once.

        It makes the plan where there is none yet, and takes up what dead or stopped workers left:
        a trial that failed, but did not diverge, is planned again with the values that it had.
        """
        optuna.storages.fail_stale_trials(self.study)
        for trial in self._trials(TrialState.RUNNING):
            if "worker" not in trial.user_attrs:  # died in take, before its first heartbeat
                self.study.tell(trial.number, state=TrialState.FAIL)
        trials = self._newest()
        for point, values in enumerate(self.planned):
            trial = trials.get(point)
            if trial is None:
                self.study.enqueue_trial(values, {"point": point})
            elif trial.state == TrialState.FAIL and "diverged" not in trial.user_attrs:
                kept = {key: value for key, value in trial.user_attrs.items() if key != "worker"}
                self.study.enqueue_trial({**values, **trial.params}, kept)

    def _trials(self, *states: TrialState) -> list[FrozenTrial]:
        return self.study.get_trials(deepcopy=False, states=states or None)

    def count(self) -> tuple[Counter, list[float]]:
        """How many trials are in which state, and how many seconds those took that are complete."""
        trials = self._newest().values()
        names = {TrialState.PRUNED: "pruned", TrialState.RUNNING: "running"}
        states = Counter(names.get(trial.state, "") for trial in trials)
        states["diverged"] = sum("diverged" in trial.user_attrs for trial in trials)
        states["done"] = sum(map(_ended, trials))
        complete = [trial for trial in trials if trial.state == TrialState.COMPLETE]
        return states, [trial.duration.total_seconds() for trial in complete]

    # -------------------------------------------------------------- training

    def check(self) -> None:
        """Once, as soon as its teacher is there, which is part of the settings of a run.

        Raises InputError if the settings cannot be trained with, or the folder holds a run,
        finished or not, of others.
        """
        if self.checked or self.failed or (self.teacher and not self.teacher.settled):
            return
        if self.teacher and self.teacher.failed:
            self.failed = True
        else:
            training.check_trial(_trial(self), self.method.name, self.requested)
            self.checked = True

    def advance(self) -> bool:
        """Does the next thing that can be done, a training or the end. False: there is none."""
        if not self.checked:  # as its teacher is not there
            return False
        trial = self.take()
        if trial:
            self.train(trial)
            return True
        if not all(map(_ended, self._newest().values())):
            return False
        return self.finish()

    def _newest(self) -> dict[int, FrozenTrial]:
        """The last trial of each point of the plan, in the plan's order."""
        trials = {trial.user_attrs["point"]: trial for trial in self._trials()}
        return dict(sorted(trials.items()))

    def train(self, trial: optuna.Trial) -> None:
        """Trains a trial that was taken, and tells what came of it."""
        # What is stopped has failed without having diverged, so it is taken up again.
        state, error, said = TrialState.FAIL, None, "stopped"
        told: list[Tracker] = []  # of the start, and so of the end
        try:
            with _Heart(self.storage, trial):
                values = self._suggest(trial)
                print(f"\n{self.name} trial {trial.number}: {combination_name(values)}", flush=True)
                for tracker in self.trackers:
                    tracker.start(self, trial, values)
                    told.append(tracker)
                kept = self._follow(trial, values)
            for name, value in kept.items():
                trial.set_user_attr(name, value)
            state, said = TrialState.COMPLETE, "finished"
            error = _error(kept, self.method.args.select_by)
        except optuna.TrialPruned:
            state, said = TrialState.PRUNED, "pruned"
            print("pruned: worse than the others were by then", flush=True)
        except DivergedError as diverged:
            said = "diverged"
            print(f"diverged: {diverged}", flush=True)
            with contextlib.suppress(UpdateFinishedTrialError):
                trial.set_user_attr("diverged", str(diverged))
        except UpdateFinishedTrialError:
            print("taken for dead, and given to another worker", flush=True)
        finally:
            with contextlib.suppress(UpdateFinishedTrialError):
                self.study.tell(trial, error, state, skip_if_finished=True)
            for tracker in told:
                tracker.end(said, self.candidates / combination_name(values))

    def _suggest(self, trial: optuna.Trial) -> dict:
        # A function of seed and point, whoever asks: two workers must not draw the same.
        seeds = np.random.SeedSequence([self.seed, trial.user_attrs["point"]])
        self.study.sampler = _sampler(self.options.sampler, int(seeds.generate_state(1)[0]))
        suggested = {}
        for name, values in self.space.items():
            if not isinstance(values, Range):
                suggested[name] = trial.suggest_categorical(name, values)
            elif isinstance(values.low, int):
                suggested[name] = trial.suggest_int(name, values.low, values.high, log=values.log)
            else:
                suggested[name] = trial.suggest_float(name, values.low, values.high, log=values.log)
        return suggested

    def _follow(self, trial: optuna.Trial, values: dict) -> dict:
        """Trains, and reports each epoch. Returns the epoch that is kept and its metrics."""
        method, waits = self.method, False
        while True:
            try:
                epochs = train_candidate(
                    _trial(self), method.name, values, method.make_loss, self.candidates
                )
                with contextlib.closing(epochs):
                    return self._watch(trial, epochs)
            except InUse as error:
                if not waits:  # whoever was taken for dead may live, or not be quite dead yet
                    print(f"waiting: {error}", flush=True)
                waits = True
                time.sleep(1)

    def _watch(self, trial: optuna.Trial, epochs: Iterator[Progress]) -> dict:
        reported = 0
        for progress in epochs:
            for row in progress.history[reported:]:
                trial.report(row["validation_log_loss"], row["epoch"])
                for tracker in self.trackers:
                    tracker.epoch(row)
            reported = len(progress.history)
            if not progress.finished(_trial(self).recipe) and trial.should_prune():
                raise optuna.TrialPruned
        return progress.kept

    # ------------------------------------------------------------------- end

    def finish(self) -> bool:
        """Selects, trains again if the protocol says so, and tests. False: another worker does."""
        trials = self._newest().values()
        complete = [t.params for t in trials if t.state == TrialState.COMPLETE]
        combinations = [{name: params[name] for name in self.space} for params in complete]
        if not combinations and not (self.folder / "metrics.json").exists():
            self.failed = True
            return True
        distinct = {combination_name(values): values for values in combinations}
        with exclusive(self.folder / ".lock", wait=False) as free:
            if not free:  # before anything is said or made for it, as it is asked again and again
                return False
        try:
            train_trial(
                _trial(self), self.method.name, self.requested, self.method.make_loss,
                [*distinct.values()], self.candidates,
            )  # fmt: skip
        except InUse:
            return False
        except DivergedError as diverged:  # trained again on more images, with --protocol lr
            print(f"diverged: {diverged}", flush=True)
            self.failed = True
        return True


@functools.lru_cache(maxsize=1)  # a teacher's stored answers are large: those of one search
def _trial(search: Search) -> Trial:
    args = search.method.args
    trial = new_trial(args, search.data, args.model, search.seed)
    if search.method.find_teacher:
        trial.teacher = search.method.find_teacher(trial, args)
    return trial


def _ended(trial: FrozenTrial) -> bool:
    diverged = trial.state == TrialState.FAIL and "diverged" in trial.user_attrs
    return diverged or trial.state in (TrialState.COMPLETE, TrialState.PRUNED)


def _error(kept: dict, select_by: str) -> float:
    """What the sampler minimises."""
    value = kept[f"validation_{select_by}"]
    return 1 - value if select_by == "accuracy" else value


def _sampler(name: str, seed: int) -> optuna.samplers.BaseSampler:
    if name == "tpe":  # liar: what others are training now counts as bad, so it is not drawn again
        return optuna.samplers.TPESampler(seed=seed, constant_liar=True)
    return optuna.samplers.RandomSampler(seed=seed)  # with a grid every value is fixed


def _pruner(name: str, epochs: int) -> optuna.pruners.BasePruner:
    if name == "median":
        return optuna.pruners.MedianPruner(n_startup_trials=3)
    if name == "hyperband":
        return optuna.pruners.HyperbandPruner(max_resource=epochs)
    return optuna.pruners.NopPruner()


# ----------------------------------------------------------------------------------- a whole study


def run_study(
    methods: list[tuple[Method, Space]],
    data: ImageData,
    address: sqlalchemy.URL,
    options: argparse.Namespace,
) -> int:
    """Trains, or has others train, until all is done; then the tables. Returns the exit status."""
    folder, started = Path(options.output_dir), time.time()
    block = f"{options.dataset}/{options.model}"
    storage = open_storage(address, options.heartbeat, folder / ".study.lock")
    with exclusive(folder / ".study.lock"):  # the first worker makes what the others find
        trackers: list[Tracker] = []
        if options.mlflow:
            trackers.append(tracking.MLflow(options.mlflow, options.study_name, block))
        if options.tensorboard:
            trackers.append(tracking.TensorBoard(Path(options.tensorboard, block)))
    searches: list[Search] = []
    for method, space in methods:
        for seed in sorted({*options.seeds}):
            search = Search(method, space, seed, data, options, storage, trackers)
            if needs_teacher((method, space)):
                search.teacher = next(
                    s for s in searches if s.method.name == VANILLA and s.seed == seed
                )
            searches.append(search)
    try:
        work(searches, pause=min(5, options.heartbeat / 2))
    except (StorageInternalError, sqlalchemy.exc.SQLAlchemyError) as error:
        raise InputError(f"--storage {address} cannot be used any more: {error}") from None
    done = [search for search in searches if not search.failed]
    for search in searches:
        if search.failed:
            print(f"{search.name}: no network, its trainings or those of its teacher diverged")
    if not done:
        return 1
    whole = len(done) == len(searches)
    if options.distil:
        whole &= distil(done, options)
    write_tables(done, options, started)
    return 0 if whole else 1


def work(searches: list[Search], pause: float) -> None:
    """Does what there is to do until all searches are settled, by this worker or by others."""
    waits, left = False, unsettled(searches)
    if len(left) < len(searches):
        print_progress(searches)
    while left:
        if any(search.advance() for search in left):
            waits = False
            print_progress(searches)
        else:
            if not waits:
                print("waiting: what is left is in the hands of other workers", flush=True)
            waits = True
            time.sleep(pause)
        left = unsettled(searches)


def unsettled(searches: list[Search]) -> list[Search]:
    for search in searches:  # a teacher comes before what it teaches
        search.check()
    return [search for search in searches if not search.settled]


def print_progress(searches: list[Search]) -> None:
    """Of the whole study, whoever did it, with the time left if all goes on as it went."""
    planned = sum(len(search.planned) for search in searches)
    states, seconds, left = Counter(), [], 0
    for search in searches:
        counted, durations = search.count()
        states += counted
        seconds += durations
        if not search.failed:  # what has failed is not gone on with
            left += len(search.planned) - counted["done"]
    said = [f"study: {states['done']} of {planned} trainings done"]
    said += [f"{states[key]} {key}" for key in ("pruned", "diverged", "running") if states[key]]
    if seconds and left:
        workers = min(left, states["running"] + 1)  # this one is between two trainings
        minutes = left * statistics.mean(seconds) / workers / 60
        said.append(f"about {minutes:.0f} min left" if minutes >= 1 else "less than a minute left")
    finished = sum(search.settled and not search.failed for search in searches)
    said.append(f"{finished} of {len(searches)} selected and tested")
    print(", ".join(said), flush=True)


def distil(searches: list[Search], options: argparse.Namespace) -> bool:
    """Distils what was selected, each network by one worker, by way of Network-distillation.py.

    Returns whether all students were trained, and none diverged.
    """
    student, left, statuses = student_flags(options.distil), searches, set()
    while left:
        waiting = []
        for search in left:
            with exclusive(search.folder / ".distil.lock", wait=False) as got:
                if not got or is_distilled_now(search, options):
                    waiting.append(search)
                    continue
                print(f"\n{search.name} is distilled", flush=True)
                status = run_script(
                    "Network-distillation.py", options, "--teacher", search.folder / "best.pt",
                    *student, "--output_dir", options.output_dir, may_diverge=True,
                )  # fmt: skip
                statuses.add(status)
        if len(waiting) == len(left):
            time.sleep(5)
        left = waiting
    return not any(statuses)


def is_distilled_now(search: Search, options: argparse.Namespace) -> bool:
    """Whether a script still does it whose worker was killed."""
    for lock in find_students([search], options, ".lock"):
        with exclusive(lock, wait=False) as free:
            if not free:
                return True
    return False


def write_tables(searches: list[Search], options: argparse.Namespace, started: float) -> None:
    """What Models-evaluation.py says of the networks, and which values were selected.

    By one worker. started: this one's start, in seconds of time.time; tables that are younger than
    that, and than all runs, are another's.
    """
    folder = Path(options.output_dir, "evaluation", options.dataset, options.model)
    networks = [search.folder / "best.pt" for search in searches]
    if options.distil:
        finished = find_students(searches, options, "metrics.json")
        networks += [path.with_name("best.pt") for path in finished]
    with exclusive(Path(options.output_dir, ".tables.lock")):
        youngest = max(path.with_name("metrics.json").stat().st_mtime for path in networks)
        summary = folder / "summary.csv"
        if summary.exists() and summary.stat().st_mtime > max(youngest, started):
            print(f"another worker has written the tables, to {folder}")
            return
        table, text = selected_values(searches), ""
        if len(table):
            cells = table.map(
                lambda value: f"{value:g}" if isinstance(value, float) else str(value)
            )
            text = tables.write(folder, "selected", table, cells, SELECTED_CAPTION)
        run_script("Models-evaluation.py", options, *networks, "--output_dir", folder)
        print(text)
        for tracker in searches[0].trackers:
            tracker.tables(folder)


def find_students(searches: list[Search], options: argparse.Namespace, file: str) -> list[Path]:
    """That file of each student that was distilled from what was selected."""
    place, model = Path(options.output_dir, options.dataset), options.model
    names = [
        f"{student_method(model, search.method.name, scaled)}/seed{search.seed}"
        for search in searches
        for scaled in (False, True)
    ]
    return [path for name in names for path in place.glob(f"**/{name}/{file}")]


def run_script(
    name: str, options: argparse.Namespace, *arguments, may_diverge: bool = False
) -> int:
    """Returns the exit status, 0 or, if the training may diverge, 3. Raises InputError for others.

    A signal that this process alone has received is the script's, too.
    """
    given = {key: getattr(options, key) for key in SHARED}
    flags = [word for key in SHARED if given[key] is not None for word in (f"--{key}", given[key])]
    command = [sys.executable, ROOT / name, *arguments, *flags]
    torch.cuda.empty_cache()  # what this process has used and keeps, the script may need
    script = subprocess.Popen([*map(str, command)])
    try:
        status = script.wait()
    except Stopped as stopped:
        script.send_signal(stopped.number)
        script.wait()
        raise
    if status not in ((0, 3) if may_diverge else (0,)):
        raise InputError(f"{name} ended with status {status}; its last line says why")
    return status


SELECTED_CAPTION = (
    "Selected on the validation split. Position: the rank among the values tried, or the share of "
    "the way through a range. At an edge, lowest or highest, a wider choice may hold something "
    "better. Trained: combinations that were not pruned and did not diverge."
)


def selected_values(searches: list[Search]) -> pd.DataFrame:
    """A row for each hyper-parameter that had a choice: what was selected, and where that lies.

    position: of a grid the rank among its values, of a range the share of the way from its low to
    its high end. edge: lowest or highest, where a wider choice may hold something better; of a
    range the outer 5 %.
    """
    rows = []
    for search in searches:
        choices = {
            name: values
            for name, values in search.space.items()
            if isinstance(values, Range) or len(values) > 1
        }
        if not choices:  # a run that its own script has finished has no search.csv then
            continue
        found = pd.read_csv(search.folder / "search.csv")
        chosen = found[found["selected"]].iloc[0]
        for name, values in choices.items():
            value = chosen[name]
            place, edge = position(value, values)
            rows.append(
                {
                    "method": search.method.name,
                    "seed": search.seed,
                    "hyper_parameter": name,
                    "selected": value,
                    "position": place,
                    "edge": edge,
                    "trained": len(found),
                }
            )
    return pd.DataFrame(rows)


def position(value, values: list | Range) -> tuple[str, str]:
    """Where a value lies in what it was chosen from, and the edge if it is there."""
    if isinstance(values, Range):
        scale = math.log if values.log else float
        low, high = scale(values.low), scale(values.high)
        share = (scale(value) - low) / (high - low)
        edge = "lowest" if share < 0.05 else "highest" if share > 0.95 else ""
        return f"{100 * share:.0f} %", edge
    if isinstance(value, str):
        return "", ""
    rank = sorted(values).index(value) + 1
    edge = {1: "lowest", len(values): "highest"}.get(rank, "")
    return f"{rank} of {len(values)}", edge


# --------------------------------------------------------------------------------------- beforehand


def print_plan(methods: list[tuple[Method, Space]], options: argparse.Namespace) -> None:
    seeds = len({*options.seeds})
    print(f"{'method':28}{'trainings':>10}  of each of {seeds} seeds")
    for method, space in methods:
        values = [
            f"{name} {values}"
            if isinstance(values, Range)
            else f"{name} {' '.join(map(str, values))}"
            for name, values in space.items()
        ]
        print(f"{method.name:28}{len(plan(space, options)):10}  {', '.join(values)}")


def print_estimate(
    methods: list[tuple[Method, Space]], data: ImageData, options: argparse.Namespace
) -> None:
    """Epochs, time and disk space, by a few steps of the vanilla network's training."""
    seeds = len({*options.seeds})
    first = methods[0][0]
    trial = new_trial(first.args, data, options.model, options.seeds[0])
    loss = make_cross_entropy(trial)
    step, validation, steps, weights, state = training.measure(trial, loss)
    trainings = seeds * sum(len(plan(space, options)) for _, space in methods)
    again = seeds * len(methods) if options.protocol == "lr" else 0
    epochs = (trainings + again) * options.epochs
    seconds = epochs * (steps * step + validation)
    kept = seeds * len(methods)
    stays = trainings * (weights + state) if options.keep_candidates else 0
    ends = weights * (2 if options.protocol == "lr" else 1) + state  # of what is selected, a seed
    students = "\nwithout the students of --distil" if options.distil else ""
    print(
        f"\n{trainings} trainings"
        + f", {again} trained again" * bool(again)
        + f", at most {epochs} epochs (early stopping and --pruner make them fewer)\n"
        f"{steps} steps of {1000 * step:.1f} ms an epoch, "
        f"{1000 * validation:.0f} ms validation, measured here on {options.device} with "
        "cross-entropy\n"
        f"time: {_hours(seconds)} for one worker, "
        f"{_hours(seconds / 4)} for four of this speed\n"
        f"disk: at most {trainings * (weights + state) / 1e6:.0f} MB on the way, "
        f"{(stays + kept * ends) / 1e6:.0f} MB in the end"
        f"{students}"
    )


def _hours(seconds: float) -> str:
    return f"{seconds / 3600:.1f} h" if seconds >= 5400 else f"{seconds / 60:.1f} min"
