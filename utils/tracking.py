"""Who else is told how a study goes? MLflow and TensorBoard, each imported only when asked for."""

import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from utils import plots
from utils.errors import InputError, one_line

if TYPE_CHECKING:
    import optuna

    from utils.study import Search


class Tracker(Protocol):
    """What a study tells, in this order, of each training; and `tables` at its end."""

    def start(self, search: "Search", trial: "optuna.Trial", values: dict) -> None: ...

    def epoch(self, row: dict) -> None:
        """row: one of history.csv. After a restart the earlier ones come again."""

    def end(self, state: str, folder: Path) -> None:
        """state: finished, pruned, diverged or stopped. folder: the candidate's."""

    def tables(self, folder: Path) -> None: ...


def _goes_on(method: Callable) -> Callable:
    """A server that is away costs what it was to be told, not the study."""

    def call(self, *arguments) -> None:
        try:
            method(self, *arguments)
        except Exception as error:  # of MLflow, of requests, of its database
            print(f"warning: MLflow was not told: {one_line(str(error))[:300]}", file=sys.stderr)

    return call


class MLflow:
    """One parent run for the study, in it one child for each training."""

    def __init__(self, address: str, study: str, block: str) -> None:
        """address: of a server, or a folder. study: the experiment. block: data set and network,
        the name of the parent run."""
        try:
            from mlflow import MlflowClient
        except ImportError:
            raise InputError("--mlflow needs MLflow: pip install mlflow") from None
        # Its own defaults, 7 attempts and 2 minutes each, would hold up the training.
        os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "2")
        os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "20")
        os.environ.setdefault("MLFLOW_ALLOW_FILE_STORE", "true")
        try:
            self.client = MlflowClient(_address(address))
            found = self.client.get_experiment_by_name(study)
            self.experiment = found.experiment_id if found else self.client.create_experiment(study)
            filters = f"tags.`study.parent` = '{block}'"
            parents = self.client.search_runs([self.experiment], filters)
            if parents:
                self.parent = parents[0].info.run_id
            else:
                run = self.client.create_run(
                    self.experiment, tags={"study.parent": block}, run_name=block
                )
                self.parent = run.info.run_id
        except Exception as error:  # MlflowException, and what its stores raise
            raise InputError(f"--mlflow {address} cannot be used: {one_line(str(error))}") from None

    @_goes_on
    def start(self, search, trial, values) -> None:
        self.run = trial.user_attrs.get("mlflow_run")  # of the worker before, if that has died
        self.known = 0
        if self.run:
            earlier = self.client.get_metric_history(self.run, "validation_log_loss")
            self.known = max((metric.step for metric in earlier), default=0)
            self.client.update_run(self.run, "RUNNING")
            return
        about = {"dataset": search.data.name, "model": search.options.model}
        about |= {"method": search.method.name, "seed": search.seed}
        run = self.client.create_run(
            self.experiment,
            tags={"mlflow.parentRunId": self.parent, "trial": str(trial.number)},
            run_name=f"{search.name}/{trial.number}",
        )
        self.run = run.info.run_id
        trial.set_user_attr("mlflow_run", self.run)
        for name, value in {**about, **values}.items():
            self.client.log_param(self.run, name, value)

    @_goes_on
    def epoch(self, row) -> None:
        if row["epoch"] <= self.known:
            return
        for name, value in row.items():
            if name != "epoch":
                self.client.log_metric(self.run, name, value, step=row["epoch"])

    @_goes_on
    def end(self, state, folder) -> None:
        if state == "stopped":
            return
        for file in (folder / "best.pt", folder / "history.csv"):
            if file.exists():
                self.client.log_artifact(self.run, str(file))
        if (folder / "history.csv").exists():
            figure = plots.training_curve(folder / "history.csv")
            self.client.log_figure(self.run, figure, "training-curve.png")
        status = {"finished": "FINISHED", "pruned": "KILLED", "diverged": "FAILED"}[state]
        self.client.set_tag(self.run, "state", state)
        self.client.set_terminated(self.run, status)

    @_goes_on
    def tables(self, folder) -> None:
        self.client.log_artifacts(self.parent, str(folder), folder.name)
        self.client.set_terminated(self.parent)


def _address(text: str) -> str:
    return text if "://" in text else Path(text).resolve().as_uri()


class TensorBoard:
    """A folder for each training, below one for each method and seed."""

    def __init__(self, folder: Path) -> None:
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError:
            raise InputError("--tensorboard needs TensorBoard: pip install tensorboard") from None
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise InputError(f"--tensorboard {folder} cannot be used: {error}") from None
        self.folder, self.new_writer = folder, SummaryWriter

    def start(self, search, trial, values) -> None:
        place = self.folder / search.name / str(trial.user_attrs["point"])
        self.writer = self.new_writer(str(place), purge_step=1)  # what a dead worker told is void
        self.writer.add_text("hyper_parameters", repr(values))

    def epoch(self, row) -> None:
        for name, value in row.items():
            if name != "epoch":
                self.writer.add_scalar(name, value, row["epoch"])

    def end(self, state, folder) -> None:
        self.writer.close()

    def tables(self, folder) -> None:
        text = (folder / "summary.md").read_text()
        with self.new_writer(str(self.folder / "tables")) as writer:
            writer.add_text("summary", text)
