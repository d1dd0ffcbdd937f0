"""How fast training and evaluation are, beside the most that the same network allows.

    CPU:  python benchmarks/throughput.py --output throughput.csv     (under 5 minutes on two cores)
    GPU:  python benchmarks/throughput.py --device cuda --output throughput.csv

Images a second of

    ceiling      forward, loss, backward and optimizer step on one batch that stays where it is
    ours         `fit`, the training scripts' loop: vanilla, flipped as Fashion-MNIST is by default
    ours_crop    the same, cropped and flipped as CIFAR is
    ils_stored   instance-based smoothing of flipped images: the teacher's answers are stored
    ils_live     instance-based smoothing of cropped and flipped ones: the teacher sees each batch
    plain        a DataLoader over torchvision's data set with per-image transforms, float32
    evaluation   `collect_logits`, and evaluation_ceiling: forward only, a batch that stays

and, in one process run, their ratios. Each round measures all of them one after the other, the next
round in the opposite order, and the best round of each counts: whatever else a machine does only
slows it down, so that is the measurement which was disturbed least (as in Python's timeit). All but
`plain` train the same network with the same optimizer: two that are alike, at different places in
memory, can differ by 10 %.

    epoch_rest     seconds of an epoch of `ours` besides its steps: drawing the order, validating
                   (here 8 images), and the flushed files at its end. Not part of `ours`: it is due
                   once an epoch, of which the benchmark's are much shorter than real ones
    matmul_share   of the rate of a large matrix product in the same precision: floating-point
                   operations of a training step (forward and backward) at the speed of `ours`

At the end resident memory after 20 and after all of --memory_epochs short epochs on the digits.

The images are random, as many as Fashion-MNIST has, 28x28 and grey: no time here depends on what is
in them.
"""

import contextlib
import io
import os
import runpy
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from unittest import mock

import pandas as pd
import torch
import torchvision
from torch.nn import functional as F
from torch.utils.data import DataLoader
from torch.utils.flop_counter import FlopCounterMode
from torchvision import transforms

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from models import MODELS, build_model, canonical_name, model_names  # noqa: E402
from utils import arguments, checkpoint, data_loader, training  # noqa: E402
from utils.data_loader import ImageData, ordered_batches  # noqa: E402
from utils.errors import run  # noqa: E402
from utils.inference import collect_logits, exact_convolutions  # noqa: E402
from utils.teacher import make_cross_entropy  # noqa: E402

SMALL = ("shallownet", "simple_dense", "lenet")
NETWORKS = ("resnet18", "densenet", "inceptionv4", "shallownet", "simple_dense")
IMAGES, VALIDATION = 60_000, 8
NEW_MODEL = training.new_model
FEWEST_STEPS = 2  # of a round, however slow the network

Measures = Iterator[dict[str, float]]  # a dictionary a round


@dataclass(frozen=True)
class Case:
    """One row of the table: what is measured, and for how many steps a round."""

    network: str
    batch_size: int
    data: ImageData
    device: torch.device
    precision: str
    compile: bool
    steps: int

    def trial(self, augment: str, teacher: checkpoint.Checkpoint | None = None) -> training.Trial:
        """As a training script makes it, with one epoch's images for a round and a step before."""
        images = (self.steps + 1) * self.batch_size
        data = replace(self.data, train_size=images + VALIDATION)
        flags = {
            "batch_size": self.batch_size,
            "precision": self.precision,
            "augment": augment,
            "lr": 1e-3,
            "schedule": "constant",
            "epochs": 10**6,
            "estop": 0,
            "tr_size": images / data.train_size,
        }
        words = [word for name, value in flags.items() for word in (f"--{name}", str(value))]
        args = arguments.training_parser("").parse_args([*words, *["--compile"] * self.compile])
        args.device = self.device
        trial = training.new_trial(args, data, self.network, 0)
        trial.teacher = teacher
        return trial

    def synchronize(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def rate(self, step: Callable[[], object], steps: int, count: float) -> float:
        """Of what a step does `count`, how many a second."""
        self.synchronize()
        start = time.perf_counter()
        for _ in range(steps):
            step()
        self.synchronize()
        return steps * count / (time.perf_counter() - start)


# ------------------------------------------------------------------------------- what is measured


def ceiling(case: Case) -> Measures:
    step, model = resident_step(case)
    while True:
        model.train()
        step()
        yield {"ceiling": case.rate(step, case.steps, case.batch_size)}


def resident_step(case: Case):
    """A training step on a batch that stays where it is, and the network."""
    trial = case.trial("none")
    model = training.new_model(trial)
    optimizer = training.new_optimizer(model, trial.recipe)
    network = trial.compiled(model)
    batch = next(ordered_batches(trial.data, trial.splits.train, case.batch_size))

    def step() -> None:
        with trial.autocast():
            logits = network(batch.images)
        loss = F.cross_entropy(logits.float(), batch.labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    return step, model


class Terminal(io.StringIO):
    """Where nobody looks, but where progress bars believe that somebody does."""

    def isatty(self) -> bool:
        return True


def through_fit(case: Case, name: str, augment: str, make_loss: Callable, **values) -> Measures:
    """The scripts' own loop. Its loss, which is the caller's, looks at the clock.

    From the first call of the loss in an epoch to the last one all steps are whole: loss, backward,
    optimizer, next batch, augmentation, progress bar, forward.
    """
    trial = case.trial(augment, untrained_teacher(case) if values else None)
    calls: list[float] = []

    def make_watched_loss(trial, **hyper_parameters):
        loss_function = make_loss(trial, **hyper_parameters)

        def loss(logits, batch):
            if len(calls) in (0, case.steps):
                case.synchronize()
            calls.append(time.perf_counter())
            return loss_function(logits, batch)

        return loss

    with tempfile.TemporaryDirectory() as folder:
        epochs = training.fit(trial, "benchmark", values, make_watched_loss, Path(folder))
        with contextlib.closing(epochs):
            next(epochs)
            while True:
                calls.clear()
                with (
                    contextlib.redirect_stdout(io.StringIO()),
                    contextlib.redirect_stderr(Terminal()),
                ):
                    start = time.perf_counter()
                    next(epochs)
                    whole = time.perf_counter() - start
                a_step = (calls[-1] - calls[0]) / case.steps
                rest = whole - (case.steps + 1) * a_step
                yield {name: case.batch_size / a_step, f"{name}_epoch_rest": rest}


def untrained_teacher(case: Case) -> checkpoint.Checkpoint:
    torch.manual_seed(1)
    model = NEW_MODEL(case.trial("none")).eval()
    training = {"method": "none", "trained_on": "train"}
    data = {"seed": 1, "protocol": "ils", "tr_size": 0.8}
    return checkpoint.Checkpoint(Path(), model, training, data, None, 1.0, {})


class FashionMNIST(torchvision.datasets.FashionMNIST):
    """torchvision's class, with images that are in memory instead of its files."""

    def __init__(self, data: ImageData, count: int, transform: Callable) -> None:
        self.data, self.targets = data.images[:count, ..., 0].cpu(), data.labels[:count].cpu()
        self.transform, self.target_transform = transform, None


def plain(case: Case) -> Measures:
    """As in many a tutorial. Of several workers the first batches, made at once, do not count."""
    torch.manual_seed(0)
    model = build_model(case.network, case.data.input_shape, len(case.data.classes)).to(case.device)
    network, device = model.network.train(), case.device
    optimizer = torch.optim.SGD(
        network.parameters(), lr=1e-3, momentum=0.9, nesterov=True, weight_decay=1e-4
    )
    steps = [transforms.RandomHorizontalFlip(), transforms.ToTensor()]
    if model.network_size != model.input_shape[1:]:
        steps.insert(0, transforms.Resize(model.network_size))
    transform = transforms.Compose([*steps, transforms.Normalize([0.5], [0.3])])
    cuda = device.type == "cuda"
    workers = min(8, os.cpu_count() or 1) if cuda else 0  # two cores have enough to do
    first = max(1, workers)
    count = min(IMAGES, (first + case.steps) * case.batch_size)
    loader = DataLoader(
        FashionMNIST(case.data, count, transform),
        case.batch_size,
        shuffle=True,
        num_workers=workers,
        pin_memory=cuda,
        drop_last=True,
    )
    while True:
        batches = iter(loader)

        def step(batches=batches) -> None:
            images, labels = next(batches)
            images = images.to(device, non_blocking=True)
            labels = labels.to(device, non_blocking=True)
            loss = F.cross_entropy(network(images), labels)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()

        for _ in range(first):
            step()
        yield {"plain": case.rate(step, len(loader) - first, case.batch_size)}


@torch.no_grad()
def evaluation(case: Case) -> Measures:
    trial = case.trial("none")
    model = training.new_model(trial)
    indices = trial.splits.train[: case.steps * case.batch_size]
    batch = next(ordered_batches(trial.data, indices, case.batch_size))
    while True:
        model.eval()
        with trial.autocast(), exact_convolutions():
            model(batch.images)
            ceiling = case.rate(lambda: model(batch.images), case.steps, case.batch_size)
            ours = case.rate(
                lambda: collect_logits(model, trial.data, indices, case.batch_size), 1, len(indices)
            )
        yield {"evaluation_ceiling": ceiling, "evaluation": ours}


def matmul(case: Case) -> Measures:
    """Floating-point operations a second of a large matrix product."""
    size = 8192 if case.device.type == "cuda" else 1024
    a = torch.randn(size, size, device=case.device, dtype=getattr(torch, case.precision))
    while True:
        a @ a
        yield {"matmul": case.rate(lambda: a @ a, 10, 2 * size**3)}


@contextlib.contextmanager
def one_network(case: Case) -> Iterator[None]:
    """Within this context all training is of one network with one optimizer."""
    trial = case.trial("none")
    model = NEW_MODEL(trial)
    optimizer = training.new_optimizer(model, trial.recipe)
    with (
        mock.patch.object(training, "new_model", return_value=model),
        mock.patch.object(training, "new_optimizer", return_value=optimizer),
    ):
        yield


def measure(case: Case, rounds: int) -> dict:
    """A row of the table."""
    make_ils = runpy.run_path(str(ROOT / "Instance-based-smoothing.py"))["make_loss"]
    ils = {"variant": "ils2", "smoothing": 0.1, "temperature": 1.0}
    cuda = case.device.type == "cuda"
    if cuda:
        torch.cuda.reset_peak_memory_stats(case.device)
    with contextlib.ExitStack() as stack:
        stack.enter_context(one_network(case))
        variants = []
        for variant in (
            # The first alone has the device for itself in its first round: see the peak below.
            partial(through_fit, name="ours", augment="flip", make_loss=make_cross_entropy),
            ceiling,
            partial(through_fit, name="ils_stored", augment="flip", make_loss=make_ils, **ils),
            partial(
                through_fit, name="ours_crop", augment="crop-flip", make_loss=make_cross_entropy
            ),
            partial(through_fit, name="ils_live", augment="crop-flip", make_loss=make_ils, **ils),
            evaluation,
            matmul,
            plain,
        ):
            variants.append(stack.enter_context(contextlib.closing(variant(case))))
            next(variants[-1])  # the first round is for warming up
            if cuda and len(variants) == 1:
                peak = torch.cuda.max_memory_allocated(case.device)
        rows = []
        for number in range(rounds):
            ordered = variants if number % 2 == 0 else variants[::-1]
            rows.append({k: v for variant in ordered for k, v in next(variant).items()})
    table = pd.DataFrame(rows)
    rest = table.pop("ours_epoch_rest").median()
    best = table.max()
    flop = flop_per_image(case)
    row = {
        "network": case.network,
        "batch_size": case.batch_size,
        "precision": case.precision,
        "compile": case.compile,
        "steps": case.steps,
        "rounds": rounds,
    }
    rates = ("ceiling", "ours", "ours_crop", "ils_stored", "ils_live", "plain", "evaluation")
    row |= best[[*rates, "evaluation_ceiling"]].to_dict()
    row |= {
        "ours/ceiling": best["ours"] / best["ceiling"],
        "ours_crop/ceiling": best["ours_crop"] / best["ceiling"],
        "ours/plain": best["ours"] / best["plain"],
        "time ils_stored/ours": best["ours"] / best["ils_stored"],
        "time ils_live/ours_crop": best["ours_crop"] / best["ils_live"],
        "evaluation/ceiling": best["evaluation"] / best["evaluation_ceiling"],
        "epoch_rest": rest,
    }
    if not (cuda and case.precision == "float32"):  # there convolutions alone round to TF32
        row["matmul_share"] = best["ours"] * flop / best["matmul"]
    if cuda:
        row["peak_memory_mib"] = peak / 2**20
    return row


def flop_per_image(case: Case) -> float:
    step, _ = resident_step(replace(case, compile=False))
    with FlopCounterMode(display=False) as counter:
        step()
    return counter.get_total_flops() / case.batch_size


def memory(device: torch.device, epochs: int) -> str:
    """What resident memory is after short epochs on the digits."""
    digits = data_loader.load("digits").to(device)
    case = Case("shallownet", 48, digits, device, "float32", compile=False, steps=3)
    resident = []
    with contextlib.closing(through_fit(case, "ours", "crop-flip", make_cross_entropy)) as measured:
        for _ in range(epochs):
            next(measured)
            pages = int(Path("/proc/self/statm").read_text().split()[1])
            resident.append(pages * os.sysconf("SC_PAGE_SIZE") / 2**20)
    first = min(20, epochs)
    return (
        f"resident memory: {resident[first - 1]:.1f} MiB after {first} epochs, "
        f"{resident[-1]:.1f} MiB after {epochs}"
    )


# ------------------------------------------------------------------------------------ command line


def main() -> None:
    parser = arguments.Parser(__doc__)
    add = parser.add_argument
    add(
        "--device",
        type=arguments.device,
        default="auto",
        metavar="NAME",
        help="cpu, cuda, cuda:N, or auto: the first GPU if there is one (default: auto)",
    )
    add(
        "--networks",
        type=arguments.one_of(model_names()),
        nargs="+",
        default=NETWORKS,
        metavar="NAME",
        help=f"of {', '.join(MODELS)} (default: {' '.join(NETWORKS)})",
    )
    add(
        "--batch_size",
        type=arguments.number(int, 2, 4096),
        metavar="N",
        help=f"images a step (default: 512; 32 on the CPU but for {', '.join(SMALL)})",
    )
    add(
        "--precision",
        type=arguments.one_of(arguments.PRECISIONS),
        default="auto",
        metavar="NAME",
        help="float32, bfloat16 or auto, as in the training scripts (default: %(default)s)",
    )
    add(
        "--rounds",
        type=arguments.positive_int,
        default=5,
        metavar="N",
        help="of which the best one of each measurement counts (default: %(default)s)",
    )
    add(
        "--seconds",
        type=arguments.positive_float,
        default=0.4,
        metavar="S",
        help="about how long one measurement of a round is to take (default: %(default)s; at "
        f"least {FEWEST_STEPS} steps)",
    )
    add(
        "--memory_epochs",
        type=arguments.non_negative_int,
        default=200,
        metavar="N",
        help="short epochs over which resident memory is watched, on Linux; 0 is off "
        "(default: %(default)s)",
    )
    add("--compile", action="store_true", help="a second row for each network, with torch.compile")
    add(
        "--output",
        type=arguments.path_name,
        metavar="FILE",
        help="a CSV file to write (default: off)",
    )
    args = parser.parse_args()

    versions = machine(args.device)
    print("  ".join(f"{name} {value}" for name, value in versions.items()), flush=True)
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(256, (IMAGES, 28, 28, 1), dtype=torch.uint8, generator=generator)
    labels = torch.randint(10, (IMAGES,), generator=generator)
    data = ImageData("random", images, labels, tuple("0123456789"), IMAGES).to(args.device)
    rows = []
    for name in map(canonical_name, args.networks):
        for compiled in (False, True)[: 1 + args.compile]:
            small = name in SMALL or args.device.type == "cuda"
            batch_size = args.batch_size or (512 if small else 32)
            case = Case(name, batch_size, data, args.device, args.precision, compiled, FEWEST_STEPS)
            case = ready(case, args.seconds)
            rows.append({**measure(case, args.rounds), **versions})
            print(pd.Series(rows[-1]).drop(versions).to_string(float_format="{:.4g}".format))
            print(flush=True)
    if args.memory_epochs:
        print(memory(args.device, args.memory_epochs))
    if args.output:
        checkpoint.write_text(Path(args.output), pd.DataFrame(rows).to_csv(index=False))


def ready(case: Case, seconds: float) -> Case:
    """With the precision and the number of steps chosen."""
    recipe = case.trial("none").recipe
    training.choose_algorithms(recipe, case.device)
    case = replace(case, precision=recipe["precision"])
    with contextlib.closing(ceiling(case)) as rounds:
        next(rounds)
        wanted = seconds * next(rounds)["ceiling"] / case.batch_size
    most = (IMAGES - VALIDATION) // case.batch_size - 1
    return replace(case, steps=min(most, max(FEWEST_STEPS, round(wanted))))


def machine(device: torch.device) -> dict:
    made_by = checkpoint.environment(device)
    return {name: made_by[name] for name in ("device", "threads", "torch", "torchvision", "python")}


if __name__ == "__main__":
    run(main)
