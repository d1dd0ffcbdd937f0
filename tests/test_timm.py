"""timm's networks: trained, evaluated and distilled like ours, with timm's weights if asked.

They are the smallest of each kind, on a few digits, through the real scripts.
"""

import copy
import json
import sys

import pandas as pd
import pytest
import torch
from conftest import run, run_here, weights, write_image
from sklearn.datasets import load_digits

from models import build_model, canonical_name, from_timm
from utils import checkpoint
from utils.errors import InputError

timm = pytest.importorskip("timm")
save_file = pytest.importorskip("safetensors.torch").save_file

NETWORKS = ("resnet10t", "mobilenetv3_small_050", "vit_tiny_patch16_224", "efficientnet_lite0")


@pytest.fixture(scope="module")
def few_digits(tmp_path_factory):
    """Flags for 80 digits to train on and 30 to test, as image files."""
    folder, digits = tmp_path_factory.mktemp("digits"), load_digits()
    for index, (pixels, label) in enumerate(zip(digits.images[:110], digits.target, strict=False)):
        path = folder / ("train" if index < 80 else "test") / str(label) / f"{index}.png"
        write_image(path, (pixels * 255 / 16).astype("uint8"))
    return ("--data_dir", folder, "--epochs", 1)


@pytest.fixture(scope="module")
def runs(few_digits, tmp_path_factory):
    """A vanilla run of each network, the students of one of them, and all of them evaluated."""
    folder = tmp_path_factory.mktemp("timm")
    flags = (*few_digits, "--output_dir", folder / "runs")
    for name in NETWORKS:
        assert not run_here(
            "Vanilla-cross-entropy.py", "--dataset", "imagefolder", "--model", f"timm/{name}",
            "--batch_size", 32, "--lr", 0.01, *flags,
        )  # fmt: skip
    assert not run_here(
        "Network-distillation.py", "--teacher", folder / "runs", "--student", "timm/test_vit",
        "--scale_teacher", "no", *flags,
    )  # fmt: skip
    assert not run_here(
        "Models-evaluation.py", folder / "runs", *few_digits[:2],
        "--output_dir", folder / "evaluation",
    )  # fmt: skip
    return folder


def best(runs, name: str, method: str = "vanilla"):
    return runs / f"runs/imagefolder/timm-{name}/{method}/seed0/best.pt"


@pytest.mark.parametrize("name", NETWORKS)
def test_a_checkpoint_of_each_gives_what_the_training_saw(runs, name):
    state = torch.get_rng_state()
    trained = checkpoint.load(best(runs, name))
    assert torch.equal(torch.get_rng_state(), state)
    assert trained.model.name == f"timm-{name}"
    assert trained.model.network_size == (32, 32)
    images = torch.randint(256, (2, 3, 8, 8), dtype=torch.uint8)
    with torch.no_grad():
        logits = trained.model(images)
        # The same weights in a network that timm itself makes.
        sized = {"img_size": 32} if name.startswith("vit") else {}
        network = timm.create_model(name, num_classes=10, **sized).eval()
        prefix = "network."
        own = {k[len(prefix) :]: v for k, v in trained.model.state_dict().items() if prefix in k}
        network.load_state_dict(own)
        pixels = (images / 255 - trained.model.mean) / trained.model.std
        enlarged = torch.nn.functional.interpolate(pixels, (32, 32), mode="bilinear")
        torch.testing.assert_close(logits, network(enlarged), rtol=1e-3, atol=1e-3)


def test_they_are_evaluated_and_distilled(runs):
    table = pd.read_csv(runs / "evaluation/results.csv")
    assert set(table["model"]) == {f"timm-{name}" for name in (*NETWORKS, "test_vit")}
    for name in NETWORKS:
        student = torch.load(
            best(runs, "test_vit", f"distilled-timm-{name}-vanilla"), weights_only=True
        )
        teacher = checkpoint.load(best(runs, name))
        assert student["teacher"]["weights"] == teacher.weights_hash
        assert student["teacher"]["model"] == f"timm-{name}"
    summary = pd.read_csv(runs / "evaluation/summary.csv")
    assert summary["student_accuracy_mean"].notna().sum() >= len(NETWORKS)


def test_the_run_says_what_it_was_made_with(runs):
    config = json.loads(best(runs, "resnet10t").with_name("config.json").read_text())
    assert config["settings"]["model"] == "timm-resnet10t"
    assert config["settings"]["recipe"]["pretrained"] is False
    assert config["environment"]["timm"] == timm.__version__


# ------------------------------------------------------------------------------------ image sizes


@pytest.mark.parametrize(
    ("name", "image", "pretrained", "size"),
    [
        ("resnet18d", (1, 8, 8), False, (32, 32)),
        ("resnet18d", (3, 40, 60), False, (40, 60)),
        ("resnet18d", (3, 20, 60), False, (32, 60)),
        ("vit_tiny_patch16_224", (1, 28, 28), False, (32, 32)),
        ("vit_tiny_patch16_224", (3, 40, 40), False, (64, 64)),  # whole patches
        ("eva02_tiny_patch14_224", (3, 32, 32), False, (42, 42)),
        ("inception_v3", (3, 32, 32), False, (96, 96)),  # too deep for 32 and 64
        ("efficientformer_l1", (3, 32, 32), False, (224, 224)),  # no other size
        ("resnet18d", (3, 32, 32), True, (224, 224)),  # of its weights' images
        ("resnet18d", (3, 300, 300), True, (300, 300)),
        ("vit_tiny_patch16_224", (3, 32, 32), True, (224, 224)),
    ],
)
def test_images_enter_at_the_next_size_that_the_network_takes(name, image, pretrained, size):
    assert from_timm.image_size(f"timm-{name}", image, pretrained) == size
    assert from_timm.takes(f"timm-{name}", image[0], size)


def test_an_image_size_that_the_network_cannot_take(refused, tmp_path):
    error = refused(
        "Vanilla-cross-entropy.py", "--model", "timm/efficientformer_l1", "--image_size", 232,
        "--output_dir", tmp_path, written=tmp_path,
    )  # fmt: skip
    assert "timm/efficientformer_l1 takes no images of 1 channels and 232x232" in error
    assert "--image_size 224" in error


# ------------------------------------------------------------------------------------------ names


@pytest.mark.parametrize(
    ("flag", "given", "meant"),
    [
        ("--model", "timm/resnet18dd", "timm/resnet18d"),
        ("--model", "timm/resnet18.a1_in1", "timm/resnet18.a1_in1k"),
        ("--model", "timm/", "timm.list_models()"),
        ("--model", "timm/hf-hub:timm/resnet18.a1_in1k", "timm.list_models()"),
        ("--model", "timm/local-dir:.", "timm.list_models()"),
        ("--student", "timm/vit_tinny_patch16_224", "timm/vit_tiny_patch16_224"),
    ],
)
def test_an_unknown_name_gets_the_nearest(flag, given, meant, refused, tmp_path):
    script, *needed = {
        "--model": ("Vanilla-cross-entropy.py",),
        "--student": ("Network-distillation.py", "--teacher", "best.pt"),
    }[flag]
    error = refused(script, *needed, flag, given, "--output_dir", tmp_path, written=tmp_path)
    assert f"argument {flag}: {given!r} given" in error
    assert meant in error


def test_a_timm_that_is_missing(runs, refused, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "timm", None)
    output = ("--output_dir", tmp_path / "runs")
    error = refused(
        "Focal-loss.py", "--model", "timm/resnet10t", *output, written=tmp_path
    )  # fmt: skip
    assert "pip install timm" in error
    path = best(runs, "resnet10t")
    error = refused("Models-evaluation.py", path, *output, written=tmp_path)
    assert str(path) in error
    assert "pip install timm" in error
    error = refused("Network-distillation.py", "--teacher", path, *output, written=tmp_path)
    assert "pip install timm" in error


def test_one_name_in_files_whatever_was_typed():
    assert canonical_name("timm/resnet10t") == canonical_name("timm-resnet10t") == "timm-resnet10t"
    assert build_model("timm/test_resnet", (3, 32, 32), 4).name == "timm-test_resnet"


# ---------------------------------------------------------------------------- files from strangers


@pytest.fixture(scope="module")
def sound(runs):
    return torch.load(best(runs, "test_vit", "distilled-timm-resnet10t-vanilla"), weights_only=True)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("name", "timm/test_vit"),
        ("name", "timm-hf-hub:timm/test_vit"),
        ("name", "timm-local-dir:."),
        ("name", "timm-../test_vit"),
        ("name", "timm-"),
        ("name", "timm-test_resnet"),
        ("name", "shallownet"),
        ("network_size", [32]),
        ("network_size", [0, 32]),
        ("network_size", [64, 64]),
        ("network_size", [10**6, 10**6]),
        ("network_size", "32"),
    ],
)
def test_a_file_can_do_no_more_than_name_a_network(sound, field, value, tmp_path, monkeypatch):
    content = copy.deepcopy(sound)
    content["model"][field] = value
    torch.save(content, tmp_path / "best.pt")
    made = []
    create = timm.create_model
    monkeypatch.setattr(timm, "create_model", lambda *a, **k: made.append(a) or create(*a, **k))
    with pytest.raises(InputError, match="is damaged"):
        checkpoint.load(tmp_path / "best.pt")
    assert {arguments[0] for arguments in made} <= {"test_vit", "test_resnet"}


def test_a_file_cannot_ask_for_tables_larger_than_memory(sound, tmp_path):
    """A network whose tables of relative positions grow with the fourth power of the side."""
    with torch.device("meta"):
        model = build_model("timm/test_vit_relpos", (3, 8, 8), 10, network_size=(4096, 4096))
    content = copy.deepcopy(sound)
    content["model"] = checkpoint.contents(model, {}, {}, None, 1.0, {})["model"]
    content["weights"] = {
        name: torch.ones(tensor.shape, dtype=tensor.dtype)
        for name, tensor in model.state_dict().items()
    }
    torch.save(content, tmp_path / "best.pt")
    with pytest.raises(InputError, match="beside its weights"):
        checkpoint.load(tmp_path / "best.pt")


# -------------------------------------------------------------------------------- timm's weights


@pytest.fixture
def offline(monkeypatch, tmp_path):
    """No server for the processes that a test starts, and an empty cache, which is returned."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def test_pretrained_weights_are_trained_on(offline, few_digits, tmp_path):
    """A file in the cache of the hub's client, as a download leaves it."""
    torch.manual_seed(3)
    there = timm.create_model("test_resnet").state_dict()
    repository = offline / "models--timm--test_resnet.r160_in1k"
    for path in (repository / "refs", repository / "snapshots/1"):
        path.mkdir(parents=True)
    (repository / "refs/main").write_text("1")
    save_file(there, repository / "snapshots/1/model.safetensors")

    command = (
        "Vanilla-cross-entropy.py", "--dataset", "imagefolder", "--model", "timm/test_resnet",
        "--lr", 1e-9, *few_digits, "--output_dir", tmp_path / "runs",
    )  # fmt: skip
    said = run(*command, "--pretrained").out
    assert "enlarged to 160x160" in said
    path = tmp_path / "runs/imagefolder/timm-test_resnet/vanilla/seed0/best.pt"
    here = weights(path)
    assert torch.equal(here["mean"], torch.full((3, 1, 1), 0.5))
    for name in ("conv1.0.weight", "layer1.0.conv1.weight", "layer4.0.conv2.weight"):
        torch.testing.assert_close(here[f"network.{name}"], there[name], atol=1e-6, rtol=0)
    assert here["network.fc.weight"].shape[0] == 10
    # It is another configuration than a training from scratch ...
    error = run(*command, status=2).err
    assert "recipe.pretrained is True there and False here" in error
    # ... and who uses it needs the weights no more.
    repository.rename(tmp_path / "elsewhere")
    trained = checkpoint.load(path)
    assert trained.model.network_size == (160, 160)
    assert trained.data["normalisation"] == {"mean": [0.5] * 3, "std": [0.5] * 3}


@pytest.mark.parametrize("channels", [1, 3, 4])
def test_the_normalisation_of_the_weights(channels):
    """resnet18's are those of ImageNet; grey images get the average over the colours."""
    given = from_timm.normalisation("timm-resnet18", channels)
    expected = {"mean": [0.485, 0.456, 0.406], "std": [0.229, 0.224, 0.225]}
    for statistic, values in expected.items():
        values = values if channels == 3 else [sum(values) / 3] * channels
        assert given[statistic] == pytest.approx(values)


def test_pretrained_weights_that_cannot_be_had(offline, tmp_path):
    error = run(
        "Vanilla-cross-entropy.py", "--model", "timm/test_resnet", "--pretrained",
        "--output_dir", tmp_path / "runs", status=2,
    ).err  # fmt: skip
    assert len(error.strip().splitlines()) == 1
    assert "no usable weights for timm/test_resnet" in error
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize(
    ("flags", "reason"),
    [
        (("--model", "resnet18", "--pretrained"), "resnet18 has none"),
        (("--model", "timm/cs3darknet_s", "--pretrained"), "weights for timm/cs3darknet_s"),
        (("--model", "timm/resnet18.a1_in1k"), "'a1_in1k' names weights"),
    ],
)
def test_pretrained_where_it_cannot_be(flags, reason, refused, tmp_path):
    error = refused(
        "Vanilla-cross-entropy.py", *flags, "--output_dir", tmp_path, written=tmp_path
    )  # fmt: skip
    assert reason in error
