"""Points of the plane as a data set, what is measured against their truth, and their study."""

import copy
import json
from functools import partial

import numpy as np
import pandas as pd
import pytest
import torch
from conftest import run
from scipy.stats import multivariate_normal

from models import build_model
from utils import data_loader, gaussians, smoothing_curves, synthetic
from utils.errors import DivergedError
from utils.evaluate import (
    divergence_from_truth,
    expected_calibration_error,
    log_loss,
    pointwise_calibration_error,
    true_calibration_error,
)
from utils.losses import (
    cross_entropy_loss,
    instance_based_smoothing_loss,
    label_smoothing_loss,
)
from utils.replicas import Candidate, Replicas, search, train

RECIPE = {"lr": 0.01, "epochs": 60, "patience": 5}


@pytest.fixture(scope="module")
def data():
    return synthetic.draw(3, first=0)


@pytest.fixture(scope="module")
def many():
    return gaussians.sample(300_000, stream=1000)


# ------------------------------------------------------------------------------------ the truth


def density(points, label):
    """Of a class, written out with scipy."""
    angle = np.deg2rad((90, 210, 330)[label])
    towards = np.array([np.cos(angle), np.sin(angle)])
    wide = multivariate_normal(1.9 * towards, np.eye(2))
    narrow = multivariate_normal(-2 * towards, 0.25 * np.eye(2))
    return 0.8 * wide.pdf(points) + 0.2 * narrow.pdf(points)


def test_the_posterior_is_bayes_rule(many):
    points = np.concatenate([many[0][:500], [[0, 0], [30, -40]]]).astype(np.float64)
    densities = np.stack([density(points[:-1], label) for label in range(3)], axis=1)
    expected = densities / densities.sum(1, keepdims=True)
    posterior = gaussians.posterior(points)
    np.testing.assert_allclose(posterior[:-1], expected, rtol=1e-9)
    assert posterior.dtype == torch.float64
    # Far away every density underflows, and the probabilities must not.
    assert posterior[-1].sum() == pytest.approx(1)


def test_the_samples_come_from_the_densities(many):
    points, labels = many
    assert np.bincount(labels).tolist() == [100_000] * 3
    for label in range(3):
        mine = points[labels == label].astype(np.float64)
        towards = gaussians.CENTRES[label, 0] / 1.9
        mean = (0.8 * 1.9 - 0.2 * 2) * towards
        np.testing.assert_allclose(mine.mean(0), mean, atol=0.03)
        between = 0.8 * 0.2 * 3.9**2 * np.outer(towards, towards)
        expected = (0.8 + 0.2 * 0.25) * np.eye(2) + between
        np.testing.assert_allclose(np.cov(mine.T), expected, atol=0.03)


def test_the_best_possible_accuracy_is_82_percent(many):
    points, labels = many
    posterior = gaussians.posterior(points)
    assert float(posterior.max(1).values.mean()) == pytest.approx(0.82, abs=0.005)
    hits = (posterior.argmax(1).numpy() == labels).mean()
    assert hits == pytest.approx(float(posterior.max(1).values.mean()), abs=0.003)
    assert log_loss(posterior.log(), labels) == pytest.approx(0.446, abs=0.005)


def test_streams_are_fixed_and_differ():
    first, again, other = (gaussians.sample(300, stream)[0] for stream in (0, 0, 1))
    assert np.array_equal(first, again)
    assert not np.isclose(first, other).all(1).any()


# ----------------------------------------------------------------------- against the known truth


def probabilities(seed, count=4000):
    random = torch.Generator().manual_seed(seed)
    return (2 * torch.randn(count, 3, generator=random, dtype=torch.float64)).softmax(1)


def test_errors_against_the_truth_are_those_of_the_definitions():
    p, truth = probabilities(0), probabilities(1)
    confidence, prediction = p.max(1)
    deserved = truth.gather(1, prediction[:, None]).squeeze(1)
    calibration = 0.0
    for low in np.arange(15) / 15:
        inside = (confidence > low) & (confidence <= low + 1 / 15)
        if inside.any():
            calibration += abs(float((deserved - confidence)[inside].sum())) / len(p)
    assert true_calibration_error(p.log(), truth, 15) == pytest.approx(calibration, rel=1e-9)
    pointwise = float((deserved - confidence).abs().mean())
    assert pointwise_calibration_error(p.log(), truth) == pytest.approx(pointwise, rel=1e-12)
    assert pointwise >= calibration
    divergence = float((truth * (truth / p).log()).sum(1).mean())
    assert divergence_from_truth(3 + p.log(), truth) == pytest.approx(divergence, rel=1e-12)


def test_the_truth_itself_has_no_error():
    truth = probabilities(2)
    assert true_calibration_error(truth.log(), truth) == pytest.approx(0, abs=1e-12)
    assert pointwise_calibration_error(truth.log(), truth) == pytest.approx(0, abs=1e-12)
    assert divergence_from_truth(truth.log(), truth) == pytest.approx(0, abs=1e-12)
    certain = torch.eye(3, dtype=torch.float64)  # 0 log 0 is 0
    assert divergence_from_truth(100 * certain, certain) == pytest.approx(0, abs=1e-12)


def test_labels_drawn_from_the_truth_lead_to_the_same_numbers():
    p, truth = probabilities(3, 200_000), probabilities(4, 200_000)
    labels = torch.multinomial(truth, 1, generator=torch.Generator().manual_seed(0)).squeeze(1)
    exact, drawn = (
        true_calibration_error(p.log(), truth),
        expected_calibration_error(p.log(), labels),
    )
    assert exact == pytest.approx(drawn, abs=0.005)
    excess = log_loss(p.log(), labels) - log_loss(truth.log(), labels)
    assert divergence_from_truth(p.log(), truth) == pytest.approx(excess, rel=0.02)


@pytest.mark.parametrize("metric", [true_calibration_error, divergence_from_truth])
@pytest.mark.parametrize(
    ("posterior", "reason"),
    [
        ([[0.5, 0.5, 0.1]], "row 0"),
        ([[1.5, -0.5, 0.0]], "row 0"),
        ([[float("nan"), 0.5, 0.5]], "row 0"),
        ([[0.5, 0.5]], "shape of the logits"),
    ],
)
def test_a_posterior_that_is_none_is_refused(metric, posterior, reason):
    with pytest.raises(ValueError, match=reason):
        metric(torch.zeros(1, 3), torch.tensor(posterior))


# -------------------------------------------------------------------------------- the data set


def test_the_data_set_is_the_first_stream():
    loaded = data_loader.load("gaussians")
    points, labels = gaussians.sample(15300, 0)
    assert loaded.images.dtype == torch.float32
    assert torch.equal(loaded.images[:, 0, 0], torch.from_numpy(points))
    assert torch.equal(loaded.labels, torch.from_numpy(labels))
    assert loaded.input_shape == (2, 1, 1)
    assert (loaded.train_size, loaded.classes) == (300, ("A", "B", "C"))
    studied = synthetic.draw(1, 0)
    images = torch.cat([part.images for part in studied], 1)[0]
    assert torch.equal(images.flatten(1), loaded.images.flatten(1))
    for part, count in zip(studied, (50, 50, 5000), strict=True):
        assert part.labels[0].bincount().tolist() == [count] * 3


def test_a_network_gets_normalised_points():
    loaded = data_loader.load("gaussians")
    indices = data_loader.split(loaded, 0.5, seed=0).train
    mean, std = data_loader.pixel_statistics(loaded, indices)
    model = build_model("feed_forward", loaded.input_shape, 3, mean, std)
    model.network = torch.nn.Flatten()
    (batch,) = data_loader.ordered_batches(loaded, indices, len(indices))
    normalised = model(batch.images)
    points = loaded.images[indices].flatten(1)
    expected = (points - points.mean(0)) / points.std(0, correction=0)
    torch.testing.assert_close(normalised, expected, rtol=1e-5, atol=1e-6)


def test_the_network_is_that_of_the_appendix():
    layers = build_model("feed_forward", (2, 1, 1), 3).network[1:]
    assert [layer.out_features for layer in layers[::2]] == [64] * 5 + [3]
    assert all(isinstance(layer, torch.nn.ReLU) for layer in layers[1::2])
    assert len(layers) == 11


@pytest.mark.parametrize("name", ["resnet18", "densenet", "vgg16", "lenet", "shallownet"])
def test_networks_of_images_take_points(name):
    model = build_model(name, (2, 1, 1), 3).eval()
    assert model(torch.randn(4, 2, 1, 1)).shape == (4, 3)


def test_scripts_train_distil_and_evaluate(tmp_path):
    runs = tmp_path / "runs"
    flags = ("--dataset", "gaussians", "--tr_size", 0.5, "--output_dir", runs, "--epochs", 3)
    adam = ("--optimizer", "adam", "--lr", 0.01, "--schedule", "constant")
    run("Instance-based-smoothing.py", "--model", "feed_forward", *flags, *adam)
    vanilla = runs / "gaussians/feed_forward/vanilla/seed0"
    run("Network-distillation.py", "--teacher", vanilla, *flags[4:], "--scale_teacher", "no")
    out = tmp_path / "evaluation"
    run("Models-evaluation.py", runs, "--output_dir", out, "--inspect", 0)
    results = pd.read_csv(out / "results.csv")
    assert set(results["dataset"]) == {"gaussians"}
    assert set(results["model"]) == {"feed_forward", "shallownet"}
    assert (out / "inspect-gaussians-feed-forward-0.png").exists()
    written = json.loads((vanilla / "metrics.json").read_text())
    assert written["test"]["unscaled"]["accuracy"] > 1 / 3


def test_what_means_nothing_for_points_is_refused(refused, tmp_path):
    flags = ("--dataset", "gaussians", "--model", "feed_forward", "--output_dir", tmp_path)
    for wrong in (("--augment", "flip"), ("--augment", "crop"), ("--image_size", 8)):
        error = refused("Vanilla-cross-entropy.py", *flags, *wrong, written=tmp_path)
        assert wrong[0] in error
        assert str(wrong[1]) in error


# -------------------------------------------------------------------------- many networks at once


def alone(data, number, loss, teacher_logits=None):
    """The same training as a plain loop over one network: logits, best loss and epoch."""
    images = data.training.images[number]
    torch.manual_seed(number)
    mean, std = (images / 255).mean(0).flatten(), (images / 255).std(0, correction=0).flatten()
    model = build_model("feed_forward", (2, 1, 1), 3, mean.tolist(), std.tolist())
    optimizer = torch.optim.Adam(model.parameters(), lr=RECIPE["lr"])
    best_loss, best_epoch, best = float("inf"), 0, None
    for epoch in range(1, RECIPE["epochs"] + 1):
        views = [] if teacher_logits is None else [teacher_logits[number]]
        optimizer.zero_grad()
        loss(model(images), data.training.labels[number], *views).mean().backward()
        optimizer.step()
        with torch.no_grad():
            logits = model(data.validation.images[number])
            validation = float(cross_entropy_loss(logits, data.validation.labels[number]))
        if validation < best_loss:
            best_loss, best_epoch, best = validation, epoch, copy.deepcopy(model)
        if epoch - best_epoch >= RECIPE["patience"]:
            break
    with torch.no_grad():
        return best(data.test.images[number]), best_loss, best_epoch


@pytest.mark.parametrize("with_teacher", [False, True])
def test_replicas_are_what_they_would_be_alone(data, with_teacher):
    if with_teacher:
        teacher_logits = torch.randn(3, 150, 3, generator=torch.Generator().manual_seed(0))
        loss = partial(instance_based_smoothing_loss, variant="ils", reduction="none")
    else:
        teacher_logits, loss = None, partial(label_smoothing_loss, reduction="none")
    start = synthetic.new_networks(data.training, 0)
    before = {name: p.detach().clone() for name, p in start.parameters.items()}
    candidate = Candidate({}, loss, teacher_logits)
    trained = train(start, data.training, data.validation, candidate, **RECIPE)
    logits = trained.networks.predict(data.test.images)
    singles = [alone(data, number, loss, teacher_logits) for number in range(3)]
    assert trained.epoch.tolist() == [epoch for _, _, epoch in singles]
    # They end at different times, before the last epoch: dropping the others changes nothing.
    assert len(set(trained.epoch.tolist())) > 1
    assert max(trained.epoch) + RECIPE["patience"] < RECIPE["epochs"]
    for number, (expected, validation, _) in enumerate(singles):
        torch.testing.assert_close(logits[number], expected, rtol=0, atol=1e-5)
        assert float(trained.loss[number]) == pytest.approx(validation, abs=1e-5)
    assert all(torch.equal(before[name], p) for name, p in start.parameters.items())


def test_each_replica_keeps_its_own_best_candidate(data):
    start = synthetic.new_networks(data.training, 0)
    candidates = [
        Candidate(
            {"smoothing": smoothing},
            partial(label_smoothing_loss, smoothing=smoothing, reduction="none"),
        )
        for smoothing in (0.0, 0.1, 0.3, 0.6)
    ]
    every = [train(start, data.training, data.validation, each, **RECIPE) for each in candidates]
    losses = torch.stack([found.loss for found in every])
    best = search(start, data.training, data.validation, candidates, **RECIPE)
    assert torch.equal(best.loss, losses.min(0).values)
    for number, chosen in enumerate(losses.argmin(0).tolist()):
        assert best.hyper_parameters[number] == candidates[chosen].hyper_parameters
        assert best.epoch[number] == every[chosen].epoch[number]
        for name, parameter in best.networks.parameters.items():
            assert torch.equal(parameter[number], every[chosen].networks.parameters[name][number])


def test_a_replica_without_any_finite_loss_is_an_error(data):
    def broken(logits, labels):
        return cross_entropy_loss(logits * torch.nan, labels, reduction="none")

    start = synthetic.new_networks(data.training, 0)
    with pytest.raises(DivergedError, match="replica 0"):
        search(start, data.training, data.validation, [Candidate({}, broken)], **RECIPE)


def test_predictions_do_not_depend_on_how_many_are_made_at_once(data, monkeypatch):
    networks = synthetic.new_networks(data.training, 0)
    assert isinstance(networks, Replicas)
    whole = networks.logits(data.test.images)
    monkeypatch.setattr("utils.replicas.POINTS_AT_ONCE", 15000)
    torch.testing.assert_close(networks.predict(data.test.images), whole, rtol=0, atol=1e-6)


# ----------------------------------------------------------------------------------- the curves


def test_one_bin_alone_is_smoothed():
    logits = torch.randn(6, 3, generator=torch.Generator().manual_seed(0))
    labels = torch.tensor([0, 1, 2, 0, 1, 2])
    q = torch.tensor([0.05, 0.31, 0.39, 0.41, 0.999, 1.0])
    teacher = ((1 - q) / 2)[:, None].repeat(1, 3).scatter(1, labels[:, None], q[:, None]).log()
    plain = cross_entropy_loss(logits, labels, reduction="none")
    # t_y = 1 - ε and t_j = ε / 2 are label smoothing with 1.5 ε.
    smoothed = label_smoothing_loss(logits, labels, 0.3, reduction="none")
    for number, inside in ((0, [0]), (3, [1, 2]), (4, [3]), (9, [4, 5])):
        given = smoothing_curves.smooth_bin(logits, labels, teacher, 0.2, number, bins=10)
        expected = plain.clone()
        expected[inside] = smoothed[inside]
        torch.testing.assert_close(given, expected)


def test_the_ideal_factor_is_the_mean_of_what_the_truth_leaves(data):
    truth, labels = synthetic.truth(data.test), data.test.labels
    p_true = truth.gather(2, labels[..., None]).squeeze(2)
    curve = smoothing_curves.ideal_factor(p_true.float(), truth, labels, bins=20)
    # For a teacher that knows the truth it is the line 1 - q_y.
    np.testing.assert_allclose(curve["factor"], 1 - curve["teacher_probability"], atol=1e-6)
    assert curve["points"].sum() == pytest.approx(15000)
    shares = np.average(curve["factor"], weights=curve["points"])
    assert shares == pytest.approx(float(1 - p_true.mean()))


def test_the_ideal_factor_is_the_one_nearest_to_the_truth(data):
    truth, labels = synthetic.truth(data.training)[0], data.training.labels[0]
    even = torch.full((150, 3), 1 / 3)
    chosen = smoothing_curves.ideal_factor(even[None, :, 0], truth[None], labels[None], bins=1)
    own = torch.nn.functional.one_hot(labels, 3)

    def divergence(factor):
        target = own * (1 - factor) + (1 - own) * factor / 2
        return float((truth * (truth / target).log()).sum(1).mean())

    best = float(chosen["factor"].iloc[0])
    assert all(divergence(best) < divergence(best + step) for step in (-0.02, 0.02))


def test_a_parabola_is_found_again():
    q = np.linspace(0.05, 0.95, 10)
    curve = pd.DataFrame({"teacher_probability": q, "factor": 2 * (q - 0.8) ** 2 + 0.01})
    found = smoothing_curves.fit(curve.assign(points=np.arange(1.0, 11)))
    assert found["P1"] == pytest.approx(0.8)
    assert found["P2"] == pytest.approx(2)
    assert found["least"] == pytest.approx(0.01)
    assert found["parabola_r2"] == pytest.approx(1)
    assert found["line_r2"] < 0.9


# ----------------------------------------------------------------------------------- the script


@pytest.fixture(scope="module")
def study(tmp_path_factory):
    folder = tmp_path_factory.mktemp("study")
    grids = "--smoothing .05 .1 --temperature 1 4 --shift .8 --slope 2 --alpha .1 --gamma 1"
    limits = "--beta .3 --epochs 4 --curve_bins 3 --curve_smoothing .1 .4 --replicas 3"
    finished = run("Synthetic-study.py", *grids.split(), *limits.split(), "--output_dir", folder)
    return folder, finished


def test_the_study_reports_every_method_and_the_truth(study):
    folder, finished = study
    rows = pd.read_csv(folder / "results.csv")
    methods = [synthetic.BAYES, "vanilla", "label-smoothing", "label-relaxation", "focal"]
    methods += ["confidence-penalty"]
    methods += [f"instance-based-{name}" for name in ("ils1", "ils2", "ils", "scores", "class")]
    assert set(rows["method"]) == set(methods)
    assert len(rows) == 3 + 3 * 2 * 10
    assert rows[[*synthetic.SHOWN]].notna().all(axis=None)
    bayes = rows[rows["method"] == synthetic.BAYES]
    assert bayes["divergence"].max() < 1e-12
    assert bayes["accuracy"].between(0.80, 0.84).all()
    trained = rows[rows["method"] != synthetic.BAYES]
    assert (trained["divergence"] > 0.01).all()
    unscaled = trained[trained["scaling"] == "no"]
    assert (unscaled["temperature"] == 1).all()
    # The log loss is the divergence from the truth above the truth's own, but for the labels.
    own = bayes.set_index("replica")["log_loss"]
    excess = unscaled["log_loss"].to_numpy() - own[unscaled["replica"]].to_numpy()
    np.testing.assert_allclose(excess, unscaled["divergence"], atol=0.02)
    for method in methods:
        assert f"| {method} " in finished.out


def test_the_study_chooses_on_validation(study):
    folder, _ = study
    rows = pd.read_csv(folder / "results.csv")
    smoothed = rows[(rows["method"] == "label-smoothing") & (rows["scaling"] == "no")]
    data = synthetic.draw(3, 0)
    start = synthetic.new_networks(data.training, 0)
    losses = []
    for smoothing in (0.05, 0.1):
        loss = partial(label_smoothing_loss, smoothing=smoothing, reduction="none")
        found = train(
            start, data.training, data.validation, Candidate({}, loss),
            lr=0.01, epochs=4, patience=10,
        )  # fmt: skip
        losses.append(found.loss)
    best = torch.stack(losses).min(0)
    np.testing.assert_allclose(smoothed["validation_log_loss"], best.values, atol=1e-5)
    chosen = [json.loads(text)["smoothing"] for text in smoothed["hyper_parameters"]]
    assert chosen == [(0.05, 0.1)[index] for index in best.indices]


def test_the_study_writes_tables_and_figures(study):
    folder, _ = study
    for name in ("summary", "comparison"):
        for kind in ("csv", "md", "tex"):
            assert (folder / f"{name}.{kind}").stat().st_size > 100
    for name in ("data", "curves"):
        for kind in ("png", "pdf"):
            assert (folder / f"{name}.{kind}").stat().st_size > 1000
    summary = pd.read_csv(folder / "summary.csv").set_index(["method", "scaling"])
    rows = pd.read_csv(folder / "results.csv")
    losses = rows.query("method == 'focal' and scaling == 'yes'")["log_loss"]
    assert summary.loc[("focal", "yes"), "log_loss_mean"] == pytest.approx(losses.mean())
    assert summary.loc[("focal", "yes"), "log_loss_std"] == pytest.approx(losses.std())
    assert summary.loc[("vanilla", "no"), "published"] == synthetic.PUBLISHED["vanilla"]
    compared = pd.read_csv(folder / "comparison.csv")
    row = compared.query("reference == 'vanilla' and method == 'focal' and scaling == 'yes'")
    plain = rows.query("method == 'vanilla' and scaling == 'yes'")["log_loss"]
    assert row["log_loss"].item() == pytest.approx(losses.mean() - plain.mean())
    assert row["log_loss_low"].item() < row["log_loss"].item() < row["log_loss_high"].item()
    curves = pd.read_csv(folder / "curves.csv")
    assert set(curves["curve"]) == {"test points", "training points", *smoothing_curves.JUDGES}
    trained = curves[curves["curve"].isin(smoothing_curves.JUDGES)]
    assert set(trained["factor"]) <= {0, 0.1, 0.4}
    assert (trained["low"] <= trained["factor"]).all()
    assert (trained["factor"] <= trained["high"]).all()


def test_the_study_refuses_what_it_cannot_use(refused, tmp_path):
    for flag, value in (
        ("--replicas", 1),
        ("--smoothing", 1),
        ("--alpha", 0),
        ("--lr", 0),
        ("--curve_bins", -1),
    ):
        error = refused(
            "Synthetic-study.py", flag, value, "--output_dir", tmp_path, written=tmp_path
        )
        assert flag in error
    (tmp_path / "file").write_text("")
    error = refused("Synthetic-study.py", "--replicas", 2, "--output_dir", tmp_path / "file")
    assert "cannot write" in error
