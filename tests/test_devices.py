"""Where everything of a step lies, for want of a GPU: with tensors that only claim to be on one.

torch's fake tensors have a shape, a type and a device, and no values. An operation on two devices
is the error that it would be on a GPU, but for indexing, which they let pass. Gradients, and what
needs values, as --variant class does, are for test_cuda.py.
"""

import pytest
import torch
from torch._subclasses import FakeTensor, FakeTensorMode

from models import MODELS, build_model
from utils import data_loader
from utils.checkpoint import Checkpoint
from utils.data_loader import AUGMENTATIONS, ImageData, ordered_batches, shuffled_batches
from utils.inference import StoredLogits, collect_logits
from utils.methods import ROOT, load_script, training_scripts
from utils.training import Trial, all_combinations, requested_values

GPU = torch.device("cuda", 0)
IMAGES, BATCH = 40, 16

METHODS = [(script, ()) for script in training_scripts()] + [
    ("instance-based-smoothing", ("--variant", variant)) for variant in ("ils1", "ils", "scores")
]


@pytest.fixture
def mode():
    with FakeTensorMode() as mode:
        yield mode


def on_gpu(mode: FakeTensorMode, *shape: int, dtype: torch.dtype) -> FakeTensor:
    return FakeTensor(mode, torch.empty(shape, dtype=dtype, device="meta"), GPU)


@pytest.fixture
def data(mode) -> ImageData:
    images = on_gpu(mode, 2 * IMAGES, 8, 8, 1, dtype=torch.uint8)
    labels = on_gpu(mode, 2 * IMAGES, dtype=torch.int64)
    return ImageData("random", images, labels, tuple("0123456789"), train_size=IMAGES)


def network_on_gpu(mode, name: str = "lenet") -> torch.nn.Module:
    with torch.device("meta"):
        model = build_model(name, (1, 8, 8), 10)
    for module in model.modules():
        for name, tensor in module.named_parameters(recurse=False):
            fake = FakeTensor(mode, tensor.detach(), GPU)
            module.register_parameter(name, torch.nn.Parameter(fake))
        for name, tensor in module.named_buffers(recurse=False):
            setattr(module, name, FakeTensor(mode, tensor, GPU))
    return model


@pytest.mark.parametrize("augment", AUGMENTATIONS)
def test_batches(augment, data):
    training = data_loader.split(data, 0.8, seed=0).train
    for batch in (
        *shuffled_batches(data, training, BATCH, AUGMENTATIONS[augment], seed=0, epoch=0),
        *ordered_batches(data, training, BATCH, flip=True),
    ):
        assert {tensor.device for tensor in batch[:-1]} == {GPU}


@pytest.mark.parametrize("name", MODELS)
def test_networks(name, mode, data):
    network = network_on_gpu(mode, name)
    logits, labels = collect_logits(network, data, torch.arange(IMAGES))
    assert logits.device == labels.device == torch.device("cpu")
    assert logits.shape == (IMAGES, 10)


@pytest.mark.parametrize("augment", ["flip", "crop-flip"])  # the teacher is asked once, and live
@pytest.mark.parametrize(("script", "flags"), [*METHODS, ("network-distillation", ())])
def test_losses(script, flags, augment, mode, data, tmp_path):
    path = next(path for path in ROOT.glob("*.py") if path.stem.lower() == script)
    script = load_script(path)
    if hasattr(script, "method"):
        _, args, make_loss, _ = script.method([*flags])
    else:
        args, make_loss = script.make_parser().parse_args(["--teacher", "a"]), script.make_loss
    recipe = {"augment": augment, "batch_size": BATCH, "epochs": 5, "compile": False}
    recipe |= {"precision": "float32", "tr_size": 0.8, "protocol": "ils"}
    trial = Trial(data, None, "lenet", 0, recipe, GPU, tmp_path, ece_bins=10)
    network = network_on_gpu(mode)
    trial.teacher = Checkpoint(tmp_path, network_on_gpu(mode).eval(), {}, {}, None, 2.0, {})
    trial.teacher_use = {"scaled": True}
    (hyper_parameters,) = all_combinations(requested_values(args))
    loss_function = make_loss(trial, **hyper_parameters)
    for batch in shuffled_batches(
        data, trial.training_images, BATCH, AUGMENTATIONS[augment], seed=0, epoch=0
    ):
        for loss in loss_function(network(batch.images), batch).values():
            assert loss.device == GPU
            assert loss.shape == ()


def test_stored_answers(mode, data):
    indices = torch.arange(1, IMAGES, 2)
    with torch.no_grad():
        stored = StoredLogits(network_on_gpu(mode), data, indices, True, BATCH)
    for batch in shuffled_batches(data, indices, BATCH, AUGMENTATIONS["flip"], seed=0, epoch=0):
        assert stored(batch).device == GPU
