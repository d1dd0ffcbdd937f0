"""Studies through the real command line: shared, killed, stopped, diverged; PostgreSQL, MLflow."""

import contextlib
import importlib.util
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from argparse import Namespace
from collections import Counter
from pathlib import Path

import optuna
import pandas as pd
import pytest
import torch
from conftest import ROOT, run_here, same_bits, start
from optuna.trial import TrialState

from utils import arguments, checkpoint, methods, study
from utils.errors import Stopped
from utils.methods import Range
from utils.run_folder import exclusive

SCRIPT = "Hyperparameter-study.py"
SMALL = ("--dataset", "digits", "--model", "simple_dense", "--batch_size", 256, "--heartbeat", 2)
# Every kind of search: without a choice, with a grid, with a teacher.
METHODS = ("label-smoothing --smoothing 0.01 0.1 0.3", "instance-based --smoothing 0.1 0.2")
METHODS = ("--methods", METHODS[0], METHODS[1] + " --temperature 2")
TABLES = "evaluation/digits/simple_dense"

# A loss of a user's own: at scale 1e38 its gradient is infinite.
OWN = """
from utils.arguments import add_hyper_parameter, positive_float, training_parser
from utils.losses import cross_entropy_loss
from utils.training import Method


def make_loss(trial, scale):
    def loss(logits, batch):
        return {"loss": scale * cross_entropy_loss(logits, batch.labels)}

    return loss


def method(*given):
    parser = training_parser("")
    add_hyper_parameter(parser, "--scale", positive_float, 1.0, "of the loss")
    return Method("scaled", parser.parse_args(*given), make_loss)
"""


def missing(what: str) -> None:
    """CI installs what is needed, and must not pass without it."""
    if os.environ.get("CI"):
        pytest.fail(what)
    pytest.skip(what)


def free_port() -> int:
    with socket.socket() as connection:
        connection.bind(("127.0.0.1", 0))
        return connection.getsockname()[1]


@pytest.fixture(scope="module")
def postgresql():
    """A PostgreSQL server of its own on a free port of this machine; gives its address."""
    programs = sorted(Path("/usr/lib/postgresql").glob("*/bin"))
    if not programs:
        missing("no PostgreSQL server: apt-get install postgresql")
    folder, port = Path(tempfile.mkdtemp(prefix="postgresql-")), free_port()
    user = ["runuser", "-u", "postgres", "--"] if os.geteuid() == 0 else []  # refuses to be root
    if user:
        shutil.chown(folder, "postgres")

    def call(program: str, *arguments) -> None:
        command = [*user, programs[-1] / program, "--pgdata", folder / "data", *arguments]
        subprocess.run([*map(str, command)], check=True, stdout=subprocess.DEVNULL, cwd=folder)

    locale = ("--no-locale", "--encoding", "UTF8")  # whatever LANG names may not be there
    call("initdb", "--auth", "trust", "--username", "study", "--no-sync", *locale)
    options = f"-p {port} -k {folder} -c listen_addresses=127.0.0.1"
    call("pg_ctl", "--wait", "--log", folder / "log", "--options", options, "start")
    try:
        yield f"postgresql://study@127.0.0.1:{port}/postgres"
    finally:
        call("pg_ctl", "--wait", "--mode", "immediate", "stop")
        shutil.rmtree(folder)


@pytest.fixture
def here(capfd):
    """Runs the study in this process, as importing torch takes longer than a small study."""

    def call(*arguments, status: int = 0) -> str:
        capfd.readouterr()
        ended = run_here(SCRIPT, *arguments)
        out, err = capfd.readouterr()
        assert (ended or 0) == status, out + err
        return out + err

    return call


@pytest.fixture
def without_tables(monkeypatch):
    """For what is told of trainings: an evaluation takes longer than they do."""
    monkeypatch.setattr(study, "write_tables", lambda *_: None)


def trials(address: str | Path) -> dict[str, list[optuna.trial.FrozenTrial]]:
    """Of each Optuna study in the storage, by its name."""
    if isinstance(address, Path):
        address = f"sqlite:///{address}"
    storage = optuna.storages.RDBStorage(address.replace("postgresql:", "postgresql+psycopg2:"))
    found = optuna.get_all_study_names(storage)
    return {name: optuna.load_study(study_name=name, storage=storage).trials for name in found}


def check_ended_once(address: str, planned: dict[str, int]) -> None:
    for name, found in trials(address).items():
        ended = [trial for trial in found if trial.state == TrialState.COMPLETE]
        method = name.split("/")[3]
        assert sorted(t.user_attrs["point"] for t in ended) == list(range(planned[method])), name
        assert all(t.state in (TrialState.COMPLETE, TrialState.FAIL) for t in found)


def wait_for(condition, seconds: float = 120) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.02)


def test_four_workers_on_postgresql_of_which_one_is_killed_do_what_one_does(
    postgresql, here, tmp_path
):
    flags = (*SMALL, *METHODS, "--epochs", 2, "--protocol", "lr")
    here(*flags, "--output_dir", tmp_path / "one")

    storage = ("--storage", postgresql, "--output_dir", tmp_path / "four")
    unbuffered = {**os.environ, "PYTHONUNBUFFERED": "1", "OMP_NUM_THREADS": "1"}
    logs = [tmp_path / f"worker{number}" for number in range(4)]
    workers = [
        subprocess.Popen(
            [sys.executable, SCRIPT, *map(str, (*flags, *storage))],
            cwd=ROOT,
            stdout=log.open("w"),
            stderr=subprocess.STDOUT,
            env=unbuffered,
        )
        for log in logs
    ]

    # The first that is in the middle of a search's training is killed.
    def in_the_middle(log: Path) -> bool:
        return log.read_text().rpartition(" trial ")[2].count("\nepoch") == 1

    victims = []

    def killed_one() -> bool:
        for number, log in enumerate(logs):
            if not victims and in_the_middle(log):
                workers[number].send_signal(signal.SIGSTOP)
                if in_the_middle(log):  # still: it has not gone on while it was found
                    workers[number].kill()
                    victims.append(number)
                workers[number].send_signal(signal.SIGCONT)
        return bool(victims)

    wait_for(killed_one)
    [victim] = victims
    statuses = [worker.wait(timeout=300) for worker in workers]
    said = [log.read_text() for log in logs]
    assert statuses == [-signal.SIGKILL if n == victim else 0 for n in range(4)], "\n".join(said)

    check_ended_once(postgresql, {"vanilla": 1, "label-smoothing": 3, "instance-based-ils2": 2})
    everything = [trial for found in trials(postgresql).values() for trial in found]
    [left] = [trial for trial in everything if trial.state == TrialState.FAIL]
    assert left.user_attrs["worker"].endswith(f":{workers[victim].pid}")
    others = "".join(text for number, text in enumerate(said) if number != victim)
    assert re.search("continued after epoch 1, step", others)
    for name in ("summary.csv", "selected.csv"):
        one, four = (tmp_path / place / TABLES / name for place in ("one", "four"))
        assert one.read_bytes() == four.read_bytes()
    networks = sorted((tmp_path / "one/digits").rglob("best.pt"))
    assert len(networks) == 3 * 2  # what was selected, and what was trained again
    for network in networks:
        assert same_bits(network, tmp_path / "four" / network.relative_to(tmp_path / "one"))


def test_two_workers_share_a_sqlite_file_and_stop_and_start_at_will(here, without_tables, tmp_path):
    flags = (*SMALL, "--methods", "label-smoothing --smoothing 0.1 0.2 0.3", "--epochs", 4)
    unbuffered = {**os.environ, "PYTHONUNBUFFERED": "1", "OMP_NUM_THREADS": "1"}
    command = (SCRIPT, *flags, "--output_dir", tmp_path / "two")
    pair = [start(*command, env=unbuffered)]
    for line in pair[0].stdout:
        if line.startswith("epoch   1"):  # it has one of the three, whoever starts sooner
            pair.append(start(*command, env=unbuffered))
        if line.startswith("epoch   2"):
            pair[0].send_signal(signal.SIGTERM)
            break
    _, err = pair[0].communicate(timeout=60)
    assert pair[0].returncode == 143
    assert f"to continue: python {SCRIPT}" in err
    pair[1].communicate(timeout=300)
    assert pair[1].returncode == 0
    check_ended_once(tmp_path / "two/study.db", {"label-smoothing": 3})
    here(*flags, "--output_dir", tmp_path / "one")
    one, two = (tmp_path / place / "digits/simple_dense" for place in ("one", "two"))
    name = "label-smoothing/seed0/search.csv"
    assert (one / name).read_bytes() == (two / name).read_bytes()
    assert same_bits(*((run / name).with_name("best.pt") for run in (one, two)))
    again = here(*flags, "--output_dir", tmp_path / "two")
    assert "study: 3 of 3 trainings done, 1 of 1 selected and tested" in again
    assert " trial " not in again


def test_two_studies_select_from_the_same_trainings(here, without_tables, tmp_path):
    flags = (*SMALL, "--methods", "label-smoothing --smoothing 0.1 0.9", "--epochs", 2)
    flags = (*flags, "--protocol", "lr", "--select_by")
    kept = ("--keep_candidates", tmp_path / "kept")
    place = "digits/simple_dense/label-smoothing/seed0"
    trained, found = {}, {}
    for by in ("accuracy", "ece"):
        out = here(*flags, by, *kept, "--output_dir", tmp_path / by)
        trained[by] = out.count("validation log loss")  # once an epoch of what is selected from
        found[by] = pd.read_csv(tmp_path / by / place / "search.csv").set_index("smoothing")
    assert trained == {"accuracy": 4, "ece": 0}
    assert "continued after" not in out  # all of it is finished
    chosen = {by: table.pop("selected").idxmax() for by, table in found.items()}
    assert found["accuracy"].equals(found["ece"])
    assert chosen["accuracy"] == found["ece"]["validation_accuracy"].idxmax()
    assert chosen["ece"] == found["ece"]["validation_ece"].idxmin()
    candidates = tmp_path / "kept" / place / "kept-candidates"
    assert len([*candidates.iterdir()]) == 2
    here(*flags, "ece", "--output_dir", tmp_path / "alone")
    assert same_bits(*(tmp_path / study / place / "best.pt" for study in ("ece", "alone")))
    # What is kept stays, also where a study, or a run, ends in the same folder.
    here(*flags, "ece", *kept, "--output_dir", tmp_path / "kept")
    assert same_bits(*(tmp_path / study / place / "best.pt" for study in ("ece", "kept")))
    assert len([*candidates.iterdir()]) == 2


def test_what_diverges_has_failed_and_is_neither_selected_nor_tried_again(
    here, without_tables, tmp_path
):
    own = tmp_path / "My-loss.py"
    own.write_text(OWN)
    flags = (*SMALL, "--epochs", 1, "--methods")
    several = (*flags, f"{own} --scale 1e38 1 0.5", "--output_dir", tmp_path / "runs")
    out = here(*several)
    assert "diverged: " in out
    assert "3 of 3 trainings done, 1 diverged" in out
    [found] = trials(tmp_path / "runs/study.db").values()
    assert [t.state for t in found] == [TrialState.FAIL, TrialState.COMPLETE, TrialState.COMPLETE]
    search = pd.read_csv(tmp_path / "runs/digits/simple_dense/scaled/seed0/search.csv")
    assert list(search["scale"]) == [1, 0.5]
    assert " trial " not in here(*several)
    # Nothing is left when all of them do.
    out = here(*flags, f"{own} --scale 1e38", "--output_dir", tmp_path / "none", status=1)
    assert "scaled/seed0: no network, its trainings or those of its teacher diverged" in out
    assert not list((tmp_path / "none").rglob("metrics.json"))


def test_a_training_that_diverges_on_more_images_ends_its_search_alone(
    here, without_tables, tmp_path
):
    own = tmp_path / "My-loss.py"
    own.write_text(OWN.replace("scale *", "of(trial, scale) *"))
    with own.open("a") as file:
        file.write("\n\ndef of(trial, scale):\n    return 1e38 if trial.selected else scale\n")
    flags = (*SMALL, "--epochs", 1, "--protocol", "lr", "--methods", str(own), "vanilla")
    out = here(*flags, "--output_dir", tmp_path / "runs", status=1)
    assert "scaled/seed0: no network" in out
    assert (tmp_path / "runs/digits/simple_dense/vanilla/seed0/metrics.json").exists()


def test_what_was_selected_is_distilled(here, tmp_path):
    student = "lenet --epochs 1 --batch_size 256 --scale_teacher no"
    flags = (*SMALL, "--epochs", 1, "--methods", "vanilla", "--distil", student)
    here(*flags, "--ece_bins", 7, "--output_dir", tmp_path)
    students = pd.read_csv(tmp_path / TABLES / "students.csv")
    assert len(students) == 1
    assert students["student"].item().startswith("lenet, alpha 0.9, temperature 20")
    # The scripts that a study starts have its flags.
    assert set(pd.read_csv(tmp_path / TABLES / "results.csv")["ece_bins"]) == {7}
    [metrics] = tmp_path.glob("digits/lenet/*/seed0/metrics.json")
    assert json.loads(metrics.read_text())["ece_bins"] == 7


def test_a_study_goes_on_without_a_student_that_diverges(here, tmp_path):
    student = "simple_dense --epochs 1 --lr 1e30 --scale_teacher no"
    flags = (*SMALL, "--epochs", 1, "--methods", "vanilla", "--distil", student)
    out = here(*flags, "--output_dir", tmp_path, status=1)
    assert "Network-distillation.py: diverged" in out
    assert (tmp_path / TABLES / "summary.csv").exists()
    assert not (tmp_path / TABLES / "students.csv").exists()


def test_a_worker_that_is_stopped_has_its_student_saved(tmp_path):
    student = "lenet --epochs 10000 --estop 0 --scale_teacher no"
    flags = (*SMALL, "--epochs", 1, "--methods", "vanilla", "--distil", student)
    log = tmp_path / "log"
    command = [sys.executable, SCRIPT, *map(str, (*flags, "--output_dir", tmp_path / "runs"))]
    with log.open("w") as file:
        worker = subprocess.Popen(command, cwd=ROOT, stdout=file, stderr=subprocess.STDOUT)
        try:
            wait_for(lambda: " 2/10000" in log.read_text())
        finally:
            worker.terminate()
            status = worker.wait(timeout=60)
    assert status == 128 + signal.SIGTERM, log.read_text()
    said = log.read_text()
    assert "Network-distillation.py: stopped by SIGTERM; training state saved" in said
    assert "Hyperparameter-study.py: stopped by SIGTERM; to continue" in said


def test_a_student_whose_worker_was_killed_is_waited_for(tmp_path):
    args = Namespace(output_dir=tmp_path, dataset="digits", model="simple_dense")
    search = Namespace(method=Namespace(name="vanilla"), seed=0)
    place = tmp_path / "digits/lenet/distilled-simple_dense-vanilla/seed0"
    assert not study.is_distilled_now(search, args)
    with exclusive(place / ".lock"):
        assert study.is_distilled_now(search, args)
    assert not study.is_distilled_now(search, args)


def test_every_training_is_as_deterministic_as_asked(here, without_tables, tmp_path):
    own = tmp_path / "My-loss.py"
    checked = "    assert torch.are_deterministic_algorithms_enabled()\n\n    def loss("
    own.write_text("import torch\n" + OWN.replace("    def loss(", checked))
    assert checked in own.read_text()
    flags = (*SMALL, "--epochs", 1, "--methods", f"{own} --scale 1 2", "--deterministic")
    try:
        here(*flags, "--output_dir", tmp_path / "runs")
    finally:
        torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("sampler", ["tpe", "random"])
def test_a_range_is_sampled_as_often_as_asked_for(sampler, here, without_tables, tmp_path):
    flags = (*SMALL, "--methods", "label-smoothing --smoothing 0.001..0.9:log", "--epochs", 1)
    flags = (*flags, "--sampler", sampler, "--n_trials", 3, "--select_by", "accuracy")
    here(*flags, "--output_dir", tmp_path)
    [found] = trials(tmp_path / "study.db").values()
    assert [trial.user_attrs["point"] for trial in found] == [0, 1, 2]
    values = [trial.params["smoothing"] for trial in found]
    assert len({*values}) == 3
    assert all(0.001 <= value <= 0.9 for value in values)
    best = max(found, key=lambda trial: trial.user_attrs["validation_accuracy"])
    assert best.value == pytest.approx(1 - best.user_attrs["validation_accuracy"])
    table = pd.read_csv(tmp_path / "digits/simple_dense/label-smoothing/seed0/search.csv")
    assert len(table) == 3
    kept = checkpoint.load(tmp_path / "digits/simple_dense/label-smoothing/seed0/best.pt")
    assert kept.training["requested"] == {"smoothing": ["0.001..0.9:log"]}
    assert kept.training["select_by"] == "accuracy"
    chosen = table[table["selected"]].iloc[0]
    assert chosen["validation_accuracy"] == best.user_attrs["validation_accuracy"]


def test_a_path_is_no_range():
    words = ["--teacher", "../runs/../best.pt", "a..b", "--gamma", "0.1..2:log", ".5..1"]
    plain, logarithmic = methods._take_ranges(words)
    assert plain == [*words[:4], "0.1", "2", ".5", "1"]
    assert logarithmic == {"gamma": False}


def test_a_training_that_falls_behind_is_pruned_and_not_selected(here, without_tables, tmp_path):
    flags = (*SMALL, "--methods", "label-smoothing --smoothing 0.01 0.02 0.03 0.9", "--epochs", 3)
    out = here(*flags, "--pruner", "median", "--output_dir", tmp_path)
    assert "4 of 4 trainings done, 1 pruned" in out
    [found] = trials(tmp_path / "study.db").values()
    assert [trial.state for trial in found] == [TrialState.COMPLETE] * 3 + [TrialState.PRUNED]
    assert found[0].intermediate_values.keys() == {1, 2, 3}
    assert found[3].intermediate_values.keys() == {1}
    table = pd.read_csv(tmp_path / "digits/simple_dense/label-smoothing/seed0/search.csv")
    assert list(table["smoothing"]) == [0.01, 0.02, 0.03]


def test_hyperband_is_of_as_many_epochs_as_a_training(here, without_tables, tmp_path):
    flags = (*SMALL, "--methods", "label-smoothing --smoothing 0.01 0.02 0.03 0.9", "--epochs", 3)
    out = here(*flags, "--pruner", "hyperband", "--output_dir", tmp_path)
    assert "4 of 4 trainings done" in out
    pruner = study._pruner("hyperband", 3)
    assert isinstance(pruner, optuna.pruners.HyperbandPruner)
    assert pruner._max_resource == 3


@pytest.mark.parametrize(
    ("value", "values", "expected"),
    [
        (0.1, [0.1, 0.5, 0.2], ("1 of 3", "lowest")),
        (0.2, [0.1, 0.5, 0.2], ("2 of 3", "")),
        (0.5, [0.1, 0.5, 0.2], ("3 of 3", "highest")),
        (0.01, Range(0.001, 0.1, log=True), ("50 %", "")),
        (0.01, Range(0.001, 0.1, log=False), ("9 %", "")),
        (0.002, Range(0.001, 0.1, log=False), ("1 %", "lowest")),
        (0.099, Range(0.001, 0.1, log=True), ("100 %", "highest")),
    ],
)
def test_how_near_the_edge_a_value_lies(value, values, expected):
    assert study.position(value, values) == expected


def test_a_worker_that_died_while_it_took_a_trial_leaves_it_to_others(
    here, without_tables, tmp_path, monkeypatch
):
    """Between asking for a trial and its first heartbeat, when no heartbeat can be missed."""

    class Killed(BaseException):
        pass

    def die(*_):
        raise Killed

    flags = (*SMALL, "--methods", "vanilla", "--epochs", 1, "--output_dir", tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(study.optuna.storages.RDBStorage, "record_heartbeat", die)
        with pytest.raises(Killed):
            here(*flags)
    [[left]] = trials(tmp_path / "study.db").values()
    assert left.state == TrialState.RUNNING
    here(*flags)
    [found] = trials(tmp_path / "study.db").values()
    assert [trial.state for trial in found] == [TrialState.FAIL, TrialState.COMPLETE]


def test_a_training_whose_worker_was_taken_for_dead_is_done_again(
    here, without_tables, tmp_path, monkeypatch
):
    follow, taken = study.Search._follow, []

    def slow(self, trial, values):
        if not taken:  # another worker tells that no heartbeat has come
            taken.append(trial.number)
            self.study.tell(trial.number, state=TrialState.FAIL)
        return follow(self, trial, values)

    monkeypatch.setattr(study.Search, "_follow", slow)
    flags = (*SMALL, "--methods", "vanilla", "--epochs", 1, "--output_dir", tmp_path)
    assert "taken for dead, and given to another worker" in here(*flags)
    [found] = trials(tmp_path / "study.db").values()
    assert [trial.state for trial in found] == [TrialState.FAIL, TrialState.COMPLETE]
    assert (tmp_path / "digits/simple_dense/vanilla/seed0/metrics.json").exists()


def test_tables_that_another_worker_has_just_written_are_left(here, tmp_path):
    flags = (*SMALL, "--methods", "vanilla", "--epochs", 1, "--output_dir", tmp_path)
    assert "another worker" not in here(*flags)
    summary = tmp_path / TABLES / "summary.csv"
    for seconds, left in (-1000, False), (1000, True):
        summary.write_text("of another\n")
        os.utime(summary, (time.time() + seconds,) * 2)
        assert ("another worker has written the tables" in here(*flags)) == left
        assert (summary.read_text() == "of another\n") == left


def test_a_worker_that_is_stopped_before_a_training_begins_gives_it_back(
    here, without_tables, tmp_path, monkeypatch
):
    pytest.importorskip("tensorboard")

    def stop(*_):
        raise Stopped(signal.SIGINT, saved=False)

    flags = (*SMALL, "--methods", "vanilla", "--epochs", 1, "--output_dir", tmp_path / "runs")
    flags = (*flags, "--tensorboard", tmp_path / "board")
    with monkeypatch.context() as patch:
        patch.setattr(study.tracking.TensorBoard, "start", stop)
        here(*flags, status=128 + signal.SIGINT)
    [[left]] = trials(tmp_path / "runs/study.db").values()
    assert left.state == TrialState.FAIL
    assert "waiting" not in here(*flags)


def test_what_a_study_trained_with_other_code_is_pointed_out(here, without_tables, tmp_path):
    flags = (*SMALL, "--methods", "label-smoothing --smoothing 0.1", "--epochs", 1)
    flags = (*flags, "--output_dir", tmp_path)
    assert "warning" not in here(*flags)
    config = tmp_path / "digits/simple_dense/label-smoothing/seed0/config.json"
    content = json.loads(config.read_text())
    code = content["environment"]["code"]
    assert {"Hyperparameter-study.py", "Label-smoothing.py"} <= code.keys()
    code["Label-smoothing.py"] = "0" * 64
    config.write_text(json.dumps(content))
    said = here(*flags)
    assert f"warning: since {config.parent} was trained, or begun, Label-smoothing.py" in said
    assert "1 of 1 selected and tested" in said


class Client:
    """Of MLflow: it writes down what it is told, and knows of two epochs."""

    def __init__(self) -> None:
        self.told = []

    def get_metric_history(self, run: str, name: str) -> list[Namespace]:
        return [Namespace(step=1), Namespace(step=2)]

    def __getattr__(self, name: str):
        return lambda *given, **named: self.told.append((name, *given, *named.values()))


class Away:
    def __getattr__(self, name: str):
        raise ConnectionError("no route\nto host")


def mlflow_with(client) -> study.tracking.MLflow:
    tracker = object.__new__(study.tracking.MLflow)
    tracker.client, tracker.experiment, tracker.parent = client, "0", "parent"
    return tracker


TAKEN_UP = Namespace(user_attrs={"mlflow_run": "earlier"})  # a trial whose worker has died


def test_a_training_that_another_worker_began_is_told_from_where_it_was():
    tracker = mlflow_with(client := Client())
    tracker.start(None, TAKEN_UP, {})
    for epoch in (1, 2, 3):
        tracker.epoch({"epoch": epoch, "validation_log_loss": 0.5})
    assert client.told == [
        ("update_run", "earlier", "RUNNING"),
        ("log_metric", "earlier", "validation_log_loss", 0.5, 3),
    ]


@pytest.mark.parametrize(
    ("state", "status"), [("pruned", "KILLED"), ("diverged", "FAILED"), ("stopped", None)]
)
def test_how_a_training_ended_is_told(state, status, tmp_path):
    tracker = mlflow_with(client := Client())
    tracker.start(None, TAKEN_UP, {})
    client.told.clear()
    tracker.end(state, tmp_path)
    told = [("set_tag", "earlier", "state", state), ("set_terminated", "earlier", status)]
    assert client.told == (told if status else [])


def test_a_server_that_is_away_costs_no_training(capsys, tmp_path):
    tracker = mlflow_with(Away())
    tracker.start(None, TAKEN_UP, {})
    tracker.epoch({"epoch": 1, "validation_log_loss": 0.5})
    tracker.end("finished", tmp_path)
    tracker.tables(tmp_path)
    said = capsys.readouterr().err
    assert said == "warning: MLflow was not told: no route to host\n" * 4


def test_mlflow_and_tensorboard_are_told_of_every_training(here, tmp_path):
    if not importlib.util.find_spec("mlflow"):
        missing("no MLflow: pip install mlflow")
    from mlflow import MlflowClient
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    port = free_port()
    server = subprocess.Popen(
        [
            *(sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1", "--port", str(port)),
            *("--workers", "1", "--backend-store-uri", f"sqlite:///{tmp_path}/mlflow.db"),
            *("--artifacts-destination", str(tmp_path / "artifacts")),
        ],
        stdout=(tmp_path / "server").open("w"),
        stderr=subprocess.STDOUT,
        start_new_session=True,
        env={**os.environ, "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"},  # starts sooner
    )
    address = f"http://127.0.0.1:{port}"

    def answers() -> bool:
        assert server.poll() is None, (tmp_path / "server").read_text()
        with contextlib.suppress(OSError):
            return urllib.request.urlopen(f"{address}/health").status == 200
        return False

    try:
        wait_for(answers)
        out = here(
            *(*SMALL, "--methods", "label-smoothing --smoothing 0.1 0.3", "--epochs", 2),
            *("--mlflow", address, "--tensorboard", tmp_path / "board"),
            *("--output_dir", tmp_path / "runs"),
        )
        assert "warning" not in out
        client = MlflowClient(address)
        experiment = client.get_experiment_by_name("study").experiment_id
        runs = client.search_runs([experiment])
        [parent] = [run for run in runs if "mlflow.parentRunId" not in run.data.tags]
        assert parent.info.run_name == "digits/simple_dense"
        children = [run for run in runs if run is not parent]
        assert sorted(run.data.params["smoothing"] for run in children) == ["0.1", "0.3"]
        for child in children:
            assert child.data.tags["mlflow.parentRunId"] == parent.info.run_id
            assert child.info.status == "FINISHED"
            losses = client.get_metric_history(child.info.run_id, "validation_log_loss")
            assert [metric.step for metric in losses] == [1, 2]
            files = {file.path for file in client.list_artifacts(child.info.run_id)}
            assert files == {"best.pt", "history.csv", "training-curve.png"}
        tables = client.list_artifacts(parent.info.run_id, "simple_dense")
        assert "simple_dense/selected.csv" in {file.path for file in tables}
    finally:
        os.killpg(server.pid, signal.SIGTERM)
        server.wait(timeout=60)
    board = tmp_path / "board/digits/simple_dense/label-smoothing/seed0"
    for point in "01":
        events = EventAccumulator(str(board / point)).Reload()
        assert [event.step for event in events.Scalars("validation_log_loss")] == [1, 2]


def test_the_time_left_is_that_of_all_workers(capsys):
    """This one is between two trainings, so of two workers one is seen running."""
    search = Namespace(planned=range(16), failed=False, settled=False)
    for running, minutes in (0, 8), (1, 4), (9, 1):
        search.count = lambda running=running: (Counter(done=8, running=running), [60.0] * 8)
        study.print_progress([search])
        assert "8 of 16 trainings done" in (said := capsys.readouterr().out)
        assert f"about {minutes} min left" in said


def test_a_dry_run_counts_and_measures_and_writes_nothing(here, tmp_path):
    flags = ("--dataset", "digits", "--model", "lenet", "--epochs", 3, "--seeds", 0, 1)
    out = here(*flags, "--dry_run", "--output_dir", tmp_path / "runs", "--protocol", "lr")
    # Vanilla 1, label smoothing, relaxation, focal and penalty 7 each, ILS2 3 x 5; and two seeds.
    assert "88 trainings, 12 trained again, at most 300 epochs" in out
    assert re.search(r"time: \d+\.\d (min|h) for one worker", out)
    assert not list(tmp_path.iterdir())


def test_published_values_are_those_of_the_script_whatever_the_protocol(
    here, fashion_mnist, tmp_path
):
    flags = ("--dataset", "fashionmnist", "--model", "simple_dense", "--params", "published")
    flags = (*flags, "--data_dir", tmp_path)
    flags = (*flags, "--protocol", "ils", "--methods", "label-smoothing", "--dry_run")
    published = "smoothing 0.01 0.025 0.05 0.1 0.2 0.3 0.4"
    assert here(*flags).count(published) == 2  # announced and planned
    assert here(*flags, "--grids", "ils").count(published) == 1


def test_a_dry_run_whose_steps_diverge_says_so(here):
    out = here(*SMALL, "--methods", "vanilla", "--lr", 1e20, "--dry_run", status=3)
    assert "a validation logit became NaN or infinite in epoch 1 at learning rate 1e+20" in out


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (("--methods", "label-smooting"), "did you mean label-smoothing?"),
        (("--methods", "label"), "label-relaxation, label-smoothing"),
        (("--methods", "nothing.py"), "there is no such file"),
        (("--methods", "focal --gamma -1"), "a number in [0, inf) expected"),
        (("--methods", "focal --gama 1"), "unrecognized arguments: --gama 1"),
        (("--methods", "focal --lr 0.2"), "--lr is one for the whole study"),
        (("--methods", "focal --seed 0"), "--seed is one for the whole study"),
        (("--methods", "focal 'x"), "a method and its flags expected"),
        (("--methods", "focal", "focal --gamma 2"), "names focal twice"),
        (("--methods", "focal --gamma 1..2"), "--sampler grid cannot try all"),
        (("--methods", "focal --gamma 2..1", "--sampler", "tpe"), "two increasing numbers"),
        (("--methods", "focal --gamma 0..1:log", "--sampler", "tpe"), "a low end > 0 expected"),
        (("--methods", "focal --gamma -1..1", "--sampler", "tpe"), "expected"),
        (("--storage", "redis://here"), "postgresql://user@host/database"),
        (("--sampler", "gird"), "did you mean grid?"),
        (("--heartbeat", "0"), "a whole number in [1, 1e+09] expected"),
        (("--seeds", "-1"), "a whole number in [0, 1e+09] expected"),
        (("--num_classes", "3"), "digits has 10 classes"),
        (("--n_trials", "3"), "does nothing with --sampler grid"),
        (("--distil", "shalownet"), "did you mean shallownet?"),
        (("--distil", "shallownet --epohs 3"), "unrecognized arguments: --epohs 3"),
        (("--distil", ""), "a network and flags expected"),
        (("--distil", "lenet --seed 5"), "--seed is the study's to give"),
        (("--distil", "lenet --teacher runs"), "--teacher is the study's to give"),
        (("--model", "shallownet", "--batch_size", "1", "--dry_run"), "batches of 1"),
        (("--keep_candidates", ""), "--keep_candidates: '' given, a path expected"),
        (("--storage", ""), "--storage: '' given, a path expected"),
        (("--mlflow", ""), "--mlflow: '' given, a path expected"),
        (("--tensorboard", ""), "--tensorboard: '' given, a path expected"),
    ],
)
def test_what_cannot_be_studied_is_said_in_one_line(flags, words, refused, tmp_path):
    output = ("--output_dir", tmp_path / "runs")
    assert words in refused(SCRIPT, "--model", "simple_dense", *flags, *output, written=tmp_path)


def test_methods_whose_papers_differ_are_refused(refused, monkeypatch, tmp_path):
    """None do today: no network on a data set is in both."""
    networks = arguments.PARAMS["published"]["lr"]["networks"]
    densenet = networks["fashionmnist"]["simple_dense"]
    monkeypatch.setitem(networks["fashionmnist"], "densenet", densenet)
    flags = ("--dataset", "fashionmnist", "--model", "densenet", "--params", "published")
    flags = (*flags, "--methods", "label-relaxation", "instance-based", "--output_dir", tmp_path)
    said = refused(SCRIPT, *flags, written=tmp_path)
    assert re.search("published has --[a-z_]+ .* for label-relaxation and .* for instance-b", said)


def test_a_database_that_does_not_answer_is_named_without_its_password(here, tmp_path):
    address = f"postgresql://me:secret@127.0.0.1:{free_port()}/none"
    flags = ("--methods", "vanilla", "--storage", address, "--output_dir", tmp_path)
    out = here(*SMALL, *flags, status=2)
    assert "Connection refused" in out
    assert "secret" not in out


def test_another_study_is_not_mixed_in(here, without_tables, tmp_path):
    flags = (*SMALL, "--methods", "focal --gamma 1", "--output_dir", tmp_path)
    here(*flags, "--epochs", 1)
    shutil.rmtree(tmp_path / "digits")
    error = here(*flags, "--epochs", 2, status=2).strip().splitlines()[-1]
    assert "other settings: epochs is 1 there and 2 here" in error


def test_a_run_of_other_settings_is_refused_before_its_search_begins(here, tmp_path):
    """An unfinished one; and a finished one whose teacher is still to be trained."""
    script = (*SMALL[:-2], "--output_dir", tmp_path)
    flags = (*SMALL, "--epochs", 1, "--output_dir", tmp_path, "--methods", "vanilla")
    place = tmp_path / "digits/simple_dense/vanilla/seed0"
    smoothed = ("--smoothing", 0.1, 0.2)
    assert not run_here("Instance-based-smoothing.py", *script, "--epochs", 1, *smoothed)
    said = here(*flags, "instance-based --smoothing 0.1 0.2 0.3 --temperature 1", status=2)
    assert "instance-based-ils2/seed0 holds another configuration: hyper_parameters" in said
    assert " trial " not in said
    shutil.rmtree(place)
    said = here(*flags, "instance-based --smoothing 0.1 0.2 0.3 --temperature 1", status=2)
    assert "instance-based-ils2/seed0 holds another configuration: hyper_parameters" in said
    assert re.findall(r"\n(.*) trial ", said) == ["vanilla/seed0"]
    shutil.rmtree(place)
    assert not run_here("Vanilla-cross-entropy.py", *script, "--epochs", 2)
    (place / "metrics.json").unlink()
    said = here(*flags, "--study_name", "new", status=2)
    assert "vanilla/seed0 holds another configuration: recipe.epochs is 2 there" in said
    assert " trial " not in said


def test_a_run_that_its_own_script_has_finished_is_taken_as_it_is(here, tmp_path):
    script = (*SMALL[:-2], "--epochs", 1, "--output_dir", tmp_path)
    assert not run_here("Vanilla-cross-entropy.py", *script)
    flags = ("--methods", "vanilla", "label-smoothing --smoothing 0.1 0.2")
    said = here(*SMALL, "--epochs", 1, *flags, "--output_dir", tmp_path)
    assert {*re.findall(r"\n(.*) trial ", said)} == {"label-smoothing/seed0"}
    assert set(pd.read_csv(tmp_path / TABLES / "selected.csv")["method"]) == {"label-smoothing"}
    assert len(pd.read_csv(tmp_path / TABLES / "summary.csv")) == 4


def test_a_folder_that_tensorboard_cannot_use_is_named(here, tmp_path):
    (tmp_path / "file").touch()
    flags = ("--methods", "vanilla", "--tensorboard", tmp_path / "file")
    said = here(*SMALL, *flags, "--output_dir", tmp_path / "runs", status=2)
    assert f"--tensorboard {tmp_path / 'file'}" in said
    assert "cannot be used" in said


@pytest.mark.parametrize(
    ("package", "flags"),
    [
        ("optuna", ()),
        ("mlflow", ("--mlflow", "mlruns")),
        ("torch.utils.tensorboard", ("--tensorboard", "board")),
    ],
)
def test_a_package_that_is_missing_is_named(package, flags, here, tmp_path, monkeypatch):
    for name in [name for name in sys.modules if name.partition(".")[0] == package]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.delitem(sys.modules, "utils.study", raising=False)
    monkeypatch.delattr("utils.study", raising=False)
    monkeypatch.setitem(sys.modules, package, None)
    common = (*SMALL, "--methods", "vanilla", "--output_dir", tmp_path)
    out = here(*common, *flags, status=2)
    assert f"pip install {package.rpartition('.')[2]}" in out.strip().splitlines()[-1]


def test_the_slurm_script_of_the_docs_is_a_shell_script_with_a_command_that_works(here):
    blocks = re.findall("```bash\n(.*?)```", (ROOT / "docs/cluster.md").read_text(), re.DOTALL)
    for block in blocks:
        subprocess.run(["bash", "-n"], input=block, text=True, check=True)
    [script] = [block for block in blocks if "#SBATCH" in block]
    echoed = script.replace("exec python", "printf '%s\\n'").replace("cifar10", "digits", 1)
    command = subprocess.run(["bash"], input=echoed, text=True, check=True, capture_output=True)
    name, *flags = command.stdout.splitlines()
    assert name == SCRIPT
    out = here(*flags, "--model", "simple_dense", "--epochs", 1, "--dry_run")
    assert "time: " in out
