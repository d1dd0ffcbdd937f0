"""Published settings: whole, taken where there are some, and overridden by the command line."""

import contextlib
import json
import math
import sys
from fnmatch import fnmatchcase

import pandas as pd
import pytest
import torch
from conftest import run_here

from models import MODELS
from utils.arguments import (
    PARAMS,
    add_hyper_parameter,
    print_next,
    recipe,
    settle,
    training_parser,
)
from utils.data_loader import READERS
from utils.training import new_optimizer, new_schedule

HYPER_PARAMETERS = {
    "vanilla": (),
    "label-smoothing": ("smoothing",),
    "label-relaxation": ("alpha",),
    "focal": ("gamma",),
    "confidence-penalty": ("beta",),
    "instance-based-ils1": ("smoothing", "shift", "slope"),
    "instance-based-ils2": ("smoothing", "temperature"),
    "instance-based-ils": ("smoothing", "shift", "slope", "temperature"),
    "instance-based-scores": ("smoothing",),
    "instance-based-class": ("smoothing", "temperature"),
    "distillation": ("alpha", "temperature"),
}
COMBINATIONS = [
    (protocol, method, dataset, model)
    for protocol, content in PARAMS["published"].items()
    for pattern in content["methods"]
    for method in HYPER_PARAMETERS
    if fnmatchcase(method, pattern)
    for dataset, networks in content["networks"].items()
    for model in networks
]


def parse(method: str, *words):
    parser = training_parser("", "distillation" if method == "distillation" else "training")
    for name in HYPER_PARAMETERS[method]:
        add_hyper_parameter(parser, f"--{name}", float, 0.5, "of the method")
    return parser.parse_args(["--params", "published", *map(str, words)])


def as_flags(settings: dict) -> list:
    return [
        word
        for name, value in settings.items()
        for word in (f"--{name}", *(value if isinstance(value, list) else [value]))
    ]


@pytest.mark.parametrize("native", [True, False])
def test_bfloat16_is_the_default_on_gpus_that_have_it(native, monkeypatch):
    def supported(including_emulation=True):
        return native or including_emulation

    monkeypatch.setattr(torch.cuda, "is_bf16_supported", supported)
    monkeypatch.setattr(torch.cuda, "device", lambda _: contextlib.nullcontext())
    args = training_parser("", "training").parse_args(["--precision", "auto"])
    args.device = torch.device("cuda")
    args = settle(args, "vanilla", "digits", "resnet18")
    assert recipe(args, "digits")["precision"] == ("float32", "bfloat16")[native]


@pytest.mark.parametrize(
    ("script", "place"),
    [("Label-smoothing.py", ""), ("/a b/Label-smoothing.py", "'/a b/'"), ("../c/x.py", "../c/")],
)
def test_the_next_command_is_where_the_script_is(script, place, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", [script])
    args = training_parser("", "training").parse_args(["--ece_bins", "15"])
    print_next(args, "Models-evaluation.py runs")
    assert capsys.readouterr().out == (f"  python {place}Models-evaluation.py runs --ece_bins 15\n")


@pytest.mark.parametrize(("protocol", "method", "dataset", "model"), COMBINATIONS)
def test_each_is_what_its_flags_would_say(protocol, method, dataset, model):
    """So a value that no flag takes, and a name of none, cannot be in the file."""
    content = PARAMS["published"][protocol]
    settings = content["settings"] | content["networks"][dataset][model]
    settings |= PARAMS["grids"].get(protocol, {}).get(method, {})
    settings.pop("source", None)
    assert dataset in READERS
    assert model in MODELS
    taken = settle(parse(method), method, dataset, model)
    given = settle(parse(method, *as_flags(settings)), method, dataset, model)
    assert {**vars(taken), "given": None} == {**vars(given), "given": None}
    assert given.given == {"params", *settings}
    assert all(getattr(taken, name) == value for name, value in settings.items())


def test_no_two_sources_for_the_same():
    combinations = [combination[1:] for combination in COMBINATIONS]
    assert len(combinations) == len(set(combinations)) > 50
    for content in (*PARAMS["published"].values(), *PARAMS["grids"].values()):
        assert content["source"]


@pytest.mark.parametrize(
    ("method", "dataset", "model", "expected"),
    [
        ("vanilla", "cifar10", "resnet18", {"lr": 0.1, "batch_size": 512, "epochs": 100}),
        ("instance-based-ils2", "cifar100", "resnet50", {"smoothing": [0.01, 0.05, 0.1]}),
        ("focal", "cifar100", "resnet56", {"milestones": [75, 150, 225], "weight_decay": 2e-4}),
        ("label-relaxation", "cifar10", "vgg16", {"lr": 0.01, "weight_decay": 1e-3, "fall": 0.1}),
        ("vanilla", "mnist", "simple_dense", {"schedule": "constant", "epochs": 25}),
        ("distillation", "cifar10", "shallownet", {"optimizer": "adam", "lr": 0.001}),
    ],
)
def test_what_the_papers_say(method, dataset, model, expected):
    taken = settle(parse(method), method, dataset, model)
    assert expected.items() <= vars(taken).items()


def test_the_falls_of_the_paper_are_square_roots_of_a_tenth():
    taken = settle(parse("vanilla"), "vanilla", "cifar10", "resnet56")
    assert taken.fall == pytest.approx(0.1**0.5)


def test_a_schedule_of_ones_own_comes_without_the_published_milestones():
    args = parse("vanilla", "--schedule", "cosine")
    taken = settle(args, "vanilla", "cifar10", "resnet18")
    assert (taken.schedule, taken.milestones, taken.fall) == ("cosine", None, 0.1)
    assert taken.epochs == 100


def test_a_protocol_of_ones_own_comes_without_the_published_early_stopping():
    taken = settle(parse("vanilla", "--protocol", "lr"), "vanilla", "cifar10", "resnet18")
    assert recipe(taken, "cifar10")["estop"] == 0
    assert taken.epochs == 100


@pytest.mark.parametrize("protocol", ["ils", "lr"])  # of the teacher
def test_published_students_are_trained_to_the_end(protocol):
    args = training_parser("", "distillation").parse_args(["--params", "published"])
    taken = settle(args, "distillation", "cifar10", "shallownet")
    taken.protocol, taken.tr_size = protocol, 0.8
    published = recipe(taken, "cifar10")
    assert (published["estop"], published["milestones"], published["fall"]) == (0, [100], 0.2)


def test_only_what_was_given_is_said_to_be(capsys):
    settle(parse("vanilla", "--schedule", "cosine"), "vanilla", "cifar10", "resnet18")
    assert "the command line gives: schedule cosine, not steps\n" in capsys.readouterr().out
    settle(parse("vanilla", "--protocol", "lr"), "vanilla", "cifar10", "resnet18")
    assert "the command line gives" not in capsys.readouterr().out


def test_a_flag_that_agrees_with_the_paper_leaves_all_its_settings(capsys):
    published = settle(parse("vanilla"), "vanilla", "cifar10", "resnet18")
    listed = capsys.readouterr().out
    taken = settle(parse("vanilla", "--schedule", "steps"), "vanilla", "cifar10", "resnet18")
    assert capsys.readouterr().out == listed
    assert recipe(taken, "cifar10") == recipe(published, "cifar10")


def test_a_flag_that_says_the_default_is_given_all_the_same():
    default = training_parser("").get_default("batch_size")
    taken = settle(parse("vanilla", "--batch_size", default), "vanilla", "mnist", "simple_dense")
    assert taken.batch_size == default


# ----------------------------------------------------------------------------- through the scripts


def test_published_settings_are_applied_and_listed(fashion_mnist, tmp_path, capsys):
    assert not run_here(
        "Label-relaxation.py", "--params", "published", "--dataset", "fashionmnist",
        "--model", "simple_dense", "--alpha", 0.05, "--epochs", 1, "--tr_size", 0.01,
        "--data_dir", tmp_path / "data", "--output_dir", tmp_path,
    )  # fmt: skip
    said = capsys.readouterr().out.splitlines()
    assert said[0].startswith("published settings (LR paper")
    assert "lr 0.05" in said[0]
    assert "milestones 30" in said[0]
    assert "epochs 1, not 50" in said[1]
    assert "alpha 0.05, not 0.01 0.025" in said[1]
    folder = tmp_path / "fashionmnist/simple_dense/label-relaxation/seed0"
    settings = json.loads((folder / "config.json").read_text())["settings"]
    assert settings["hyper_parameters"] == {"alpha": [0.05]}
    published = {
        "optimizer": "sgd", "lr": 0.05, "schedule": "steps", "milestones": [30],
        "fall": 0.31622777, "batch_size": 64, "estop": 0, "augment": "none",
    }  # fmt: skip
    assert published.items() <= settings["recipe"].items()
    assert {"epochs": 1, "tr_size": 0.01}.items() <= settings["recipe"].items()
    assert json.loads((folder / "metrics.json").read_text())["ece_bins"] == 15


@pytest.mark.parametrize(
    ("script", "flags", "wanted", "near"),
    [
        ("Focal-loss.py", (), "focal on digits with resnet18", "focal on"),
        (
            "Instance-based-smoothing.py", ("--dataset", "cifar10", "--model", "vgg16"),
            "instance-based-ils2 on cifar10 with vgg16", "instance-based-* on cifar10",
        ),
        (
            "Vanilla-cross-entropy.py", ("--dataset", "mnist", "--model", "lenet"),
            "vanilla on mnist with lenet", "vanilla on mnist with simple_dense",
        ),
    ],
)  # fmt: skip
def test_what_nobody_published_is_refused_with_the_nearest(
    script, flags, wanted, near, refused, tmp_path
):
    error = refused(
        script, "--params", "published", *flags, "--output_dir", tmp_path, written=tmp_path
    )  # fmt: skip
    before, _, after = error.partition("the nearest that it has: ")
    assert wanted in before
    assert near in after.split("; ")[0]


@pytest.fixture(scope="module")
def stepped(tmp_path_factory):
    folder = tmp_path_factory.mktemp("stepped")
    flags = (
        "--model", "simple_dense", "--epochs", 4, "--batch_size", 256, "--milestones", 1, 3,
        "--fall", 0.5, "--output_dir", folder,
    )  # fmt: skip
    assert not run_here("Vanilla-cross-entropy.py", *flags)
    return folder, flags


def test_the_learning_rate_falls_at_the_milestones(stepped):
    folder, _ = stepped
    history = pd.read_csv(folder / "digits/simple_dense/vanilla/seed0/history.csv")
    assert list(history["learning_rate"]) == pytest.approx([0.1, 0.05, 0.05, 0.025])


def test_a_checkpoint_with_milestones_is_evaluated(stepped, tmp_path):
    folder, _ = stepped
    assert not run_here("Models-evaluation.py", folder, "--output_dir", tmp_path)
    recipe = json.loads(pd.read_csv(tmp_path / "results.csv")["recipe"][0])
    assert recipe["milestones"] == [1, 3]


def test_other_milestones_are_another_configuration(stepped, refused):
    folder, flags = stepped
    error = refused("Vanilla-cross-entropy.py", *flags, "--milestones", 2, written=folder)
    assert "recipe.milestones is [1, 3] there and [2] here" in error


@pytest.mark.parametrize(
    ("flags", "reason"),
    [
        (("--schedule", "cosine", "--milestones", 3), "--milestones does nothing with"),
        (("--schedule", "constant", "--fall", 0.1), "--fall does nothing with"),
        (("--milestones", 30, 20), "--milestones 30 20 given"),
        (("--milestones", 20, 20), "--milestones 20 20 given"),
        (("--epochs", 5, "--milestones", 3, 5), "--milestones 5 does nothing with --epochs 5"),
    ],
)
def test_milestones_that_cannot_be(flags, reason, refused, tmp_path):
    error = refused(
        "Vanilla-cross-entropy.py", *flags, "--output_dir", tmp_path, written=tmp_path
    )  # fmt: skip
    assert reason in error


# ------------------------------------------------------------------------------- what settings mean

SGD = {"optimizer": "sgd", "lr": 0.1, "weight_decay": 0.01, "epochs": 10, "fall": 0.1}


@pytest.mark.parametrize(
    ("name", "kind", "more"),
    [
        ("sgd", torch.optim.SGD, {"momentum": 0.9, "nesterov": True, "dampening": 0}),
        ("adam", torch.optim.Adam, {"betas": (0.9, 0.999), "eps": 1e-8, "amsgrad": False}),
    ],
)
def test_the_optimizers_are_those_of_the_papers(name, kind, more):
    optimizer = new_optimizer(torch.nn.Linear(3, 2), {**SGD, "optimizer": name})
    assert type(optimizer) is kind
    assert {"lr": 0.1, "weight_decay": 0.01, **more}.items() <= optimizer.defaults.items()


@pytest.mark.parametrize("dataset", READERS)
def test_the_augmentation_of_a_data_set(dataset):
    expected = {"cifar10": "crop-flip", "cifar100": "crop-flip", "fashionmnist": "flip"}
    expected["imagefolder"] = "flip"
    args = training_parser("").parse_args(["--dataset", dataset])
    assert recipe(args, dataset)["augment"] == expected.get(dataset, "none")


@pytest.mark.parametrize(
    ("schedule", "milestones", "rates"),
    [
        ("steps", None, [0.1] * 3 + [0.01] * 3 + [0.001] * 3 + [0.0001]),  # at 30, 60 and 90 %
        ("steps", [2, 9], [0.1] * 2 + [0.01] * 7 + [0.001]),
        ("cosine", None, [0.05 * (1 + math.cos(math.pi * k / 10)) for k in range(10)]),
        ("constant", None, [0.1] * 10),
    ],
)
def test_the_learning_rate_of_each_epoch(schedule, milestones, rates):
    recipe = {**SGD, "schedule": schedule, "milestones": milestones}
    optimizer = new_optimizer(torch.nn.Linear(3, 2), recipe)
    falling, found = new_schedule(optimizer, recipe), []
    for _ in rates:
        found += falling.get_last_lr()
        optimizer.step()
        falling.step()
    assert found == pytest.approx(rates)
