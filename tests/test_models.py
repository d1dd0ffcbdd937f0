"""Is every network what its paper says, and does it take the images the data sets have?"""

import numpy as np
import pytest
import torch
from torch import nn

from models import ALIASES, MODELS, build_model, canonical_name, model_names
from utils.inference import evaluation_batch

SHAPES = [(1, 8, 8), (1, 28, 28), (3, 32, 32), (3, 20, 28)]

# Without the large networks that are small ones with more of the same blocks.
SMALL_MODELS = [name for name in MODELS if name not in {"resnet34", "resnet101", "resnet152"}]


# Those of torchvision's that keep its way, and those without convolutions, aside.
DRAWN_AS_HE_HAS_IT = set(SMALL_MODELS) - {"densenet100bc", "lenet", "simple_dense", "feed_forward"}


def random_images(shape, count=2, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (count, *shape), dtype=torch.uint8, generator=generator)


def build(name, input_shape=(3, 32, 32), num_classes=10, seed=0, **normalisation):
    torch.manual_seed(seed)
    return build_model(name, input_shape, num_classes, **normalisation).eval()


def count_parameters(name, input_shape=(3, 32, 32), num_classes=10):
    with torch.device("meta"):  # shapes without values: nothing is drawn or stored
        model = build_model(name, input_shape, num_classes)
    return sum(parameter.numel() for parameter in model.parameters())


def count_convolution_outputs(name, input_shape):
    """How many biases the network's convolutions would have, if they had any."""
    with torch.device("meta"):
        model = build_model(name, input_shape)
    return sum(m.out_channels for m in model.modules() if isinstance(m, nn.Conv2d))


def seen_by(module, model, images):
    """The one tensor that `module` gets when `model` looks at `images`."""
    seen = []
    handle = module.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    with torch.no_grad():
        model(images)
    handle.remove()
    (tensor,) = seen
    return tensor


def assert_same_logits(actual, expected):
    """Equal up to float32 rounding, measured against the largest logit.

    The logits of an untrained network in eval mode can be large: its running statistics are not
    yet those of its activations.
    """
    tolerance = 1e-4 * expected.abs().max().item()
    assert tolerance > 0
    torch.testing.assert_close(actual, expected, rtol=0, atol=tolerance)


# Every network on every kind of image


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("name", MODELS)
def test_gives_finite_logits(name, shape):
    with torch.no_grad():
        logits = build(name, shape, num_classes=7)(random_images(shape))
    assert logits.shape == (2, 7)
    assert logits.dtype == torch.float32
    assert logits.isfinite().all()
    assert not torch.equal(logits[0], logits[1])


@pytest.mark.parametrize(
    ("name", "side"),
    [(name, 64) for name in SMALL_MODELS]
    + [("resnet18", 96), ("densenet", 96), ("vgg16", 96), ("lenet", 96)],
)
def test_takes_larger_images(name, side):
    shape = (3, side, side)
    with torch.no_grad():
        logits = build(name, shape)(random_images(shape))
    assert logits.shape == (2, 10)
    assert logits.isfinite().all()


@pytest.mark.parametrize("name", MODELS)
def test_backward_reaches_every_parameter(name):
    shape = (1, 8, 8)
    model = build(name, shape).train()
    labels = torch.tensor([0, 1, 2, 3])
    nn.functional.cross_entropy(model(random_images(shape, count=4)), labels).backward()
    for parameter_name, parameter in model.named_parameters():
        assert parameter.grad is not None, parameter_name
        assert parameter.grad.isfinite().all(), parameter_name
        assert parameter.grad.any(), parameter_name


@pytest.mark.parametrize("name", SMALL_MODELS)
def test_in_eval_mode_an_image_does_not_depend_on_its_neighbours(name):
    model = build(name, (3, 20, 28))
    images = random_images((3, 20, 28), count=3)
    with torch.no_grad():
        together = model(images)
        assert torch.equal(model(images), together)  # nor on chance
        assert_same_logits(model(images[1:2]), together[1:2])


@pytest.mark.parametrize("name", SMALL_MODELS)
def test_channels_last_changes_nothing_but_the_memory_format(name):
    model = build(name, (3, 20, 28))
    images = random_images((3, 20, 28))
    with torch.no_grad():
        contiguous = model(images)
        model.to(memory_format=torch.channels_last)
        images = images.contiguous(memory_format=torch.channels_last)
        assert_same_logits(model(images), contiguous)
    entering = seen_by(model.network, model, images)
    assert entering.is_contiguous(memory_format=torch.channels_last)
    assert not entering.is_contiguous()


@pytest.mark.parametrize("name", SMALL_MODELS)
def test_runs_under_bfloat16_autocast(name):
    shape = (3, 8, 8)
    model = build(name, shape).train()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        logits = model(random_images(shape, count=4))
        entering = seen_by(model.network, model, random_images(shape))
    assert logits.dtype == torch.bfloat16
    assert logits.isfinite().all()
    assert entering.dtype == torch.float32  # pixels are normalised in full precision


@pytest.mark.parametrize("name", SMALL_MODELS)
def test_a_state_dict_is_all_a_network_needs(name):
    shape = (1, 8, 8)
    saved = build(name, shape, seed=1, mean=[0.3], std=[0.2])
    loaded = build(name, shape, seed=2)
    images = random_images(shape)
    with torch.no_grad():
        assert not torch.equal(loaded(images), saved(images))
        loaded.load_state_dict(saved.state_dict(), strict=True)
        assert torch.equal(loaded(images), saved(images))
    assert torch.equal(loaded.mean, saved.mean)
    assert torch.equal(loaded.std, saved.std)


# Are they the published networks?


@pytest.mark.parametrize(
    ("name", "input_shape", "num_classes", "published"),
    [
        # torchvision's documented counts: with 64x64 images the stem is torchvision's too.
        ("resnet18", (3, 64, 64), 1000, 11_689_512),
        ("resnet34", (3, 64, 64), 1000, 21_797_672),
        ("resnet50", (3, 64, 64), 1000, 25_557_032),
        ("resnet101", (3, 64, 64), 1000, 44_549_160),
        ("resnet152", (3, 64, 64), 1000, 60_192_808),
        # The small-image stem: github.com/kuangliu/pytorch-cifar and many others.
        ("resnet18", (3, 32, 32), 10, 11_173_962),
        ("resnet34", (3, 32, 32), 10, 21_282_122),
        ("resnet50", (3, 32, 32), 10, 23_520_842),
        ("resnet101", (3, 32, 32), 10, 42_512_970),
        ("resnet152", (3, 32, 32), 10, 58_156_618),
        # Huang et al. 2017, table 2, has 0.8 M.
        ("densenet100bc", (3, 32, 32), 10, 769_162),
        # Inception-v4 of github.com/Cadene/pretrained-models.pytorch and of timm.
        ("inceptionv4", (3, 32, 32), 1000, 42_679_816),
        # "Trainable params" of the Keras summary of github.com/geifmany/cifar-vgg, whose layers
        # the LR paper's are.
        ("vgg16", (3, 32, 32), 10, 14_991_946),
        # LeNet-5 on the digits, and in PyTorch's CIFAR-10 tutorial.
        ("lenet", (1, 28, 28), 10, 61_706),
        ("lenet", (3, 32, 32), 10, 62_006),
        # 784 * 1024 + 1024 + 1024 * 1024 + 1024 + 1024 * 10 + 10
        ("simple_dense", (1, 28, 28), 10, 1_863_690),
        # Convolutions, batch norms, 2048 * 128 hidden, and 128 * 10 + 10 for the classes.
        ("shallownet", (3, 32, 32), 10, 27 * 32 + 288 * 64 + 576 * 128 + 2 * 352 + 262_144 + 1_290),
    ],
)
def test_parameter_count(name, input_shape, num_classes, published):
    assert count_parameters(name, input_shape, num_classes) == published


@pytest.mark.parametrize(
    ("name", "input_shape", "published"),
    [
        # Trainable parameters of ResNet56v2 in Keras' cifar10_resnet.py (1.67 M in all).
        ("resnet56", (3, 32, 32), 1_663_338),
        # Dive into Deep Learning's DenseNet on Fashion-MNIST at 96x96.
        ("densenet", (1, 96, 96), 758_226),
    ],
)
def test_parameter_count_of_networks_published_with_convolution_biases(
    name, input_shape, published
):
    biases = count_convolution_outputs(name, input_shape)
    assert count_parameters(name, input_shape) + biases == published


@pytest.mark.parametrize(
    ("name", "weighted_layers"),
    [("resnet56", 56 + 3), ("densenet100bc", 100), ("vgg16", 15), ("densenet", 21)],
)
def test_depth(name, weighted_layers):
    """The number in the name, but ResNet-56 has three projections more, VGG a hidden layer less."""
    with torch.device("meta"):
        model = build_model(name)
    layers = [m for m in model.modules() if isinstance(m, nn.Conv2d | nn.Linear)]
    assert len(layers) == weighted_layers


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("vgg16", [0.3] + [0.4] * 7 + [0.5] * 2),
        ("inceptionv4", [0.2]),
        ("shallownet", [0.5]),
        ("resnet18", []),
        ("densenet100bc", []),
    ],
)
def test_dropout(name, expected):
    with torch.device("meta"):
        model = build_model(name)
    assert [m.p for m in model.modules() if isinstance(m, nn.Dropout)] == expected


def test_batch_norm_of_vgg16_stands_behind_relu():
    with torch.device("meta"):
        kinds = [type(module) for module in build_model("vgg16").network]
    behind = [tuple(kinds[i + 1 : i + 3]) for i, kind in enumerate(kinds) if kind is nn.Conv2d]
    assert behind == [(nn.ReLU, nn.BatchNorm2d)] * 13


@pytest.mark.parametrize("name", sorted(DRAWN_AS_HE_HAS_IT))
def test_convolutions_begin_as_he_has_it(name):
    """Normal, of the variance 2 / (kernel area · output channels), and biases of 0."""
    convolutions = [m for m in build(name).modules() if isinstance(m, nn.Conv2d)]
    assert convolutions
    for convolution in convolutions:
        weight = convolution.weight.detach().double()
        expected = (2 / (weight[0, 0].numel() * len(weight))) ** 0.5
        n = weight.numel()
        assert weight.std() == pytest.approx(expected, rel=6 / (2 * n) ** 0.5)
        assert abs(weight.mean()) < 6 * expected / n**0.5
        assert convolution.bias is None or not convolution.bias.any()


def test_feed_forward_begins_as_glorot_has_it():
    """Uniform within ±sqrt(6 / (inputs + outputs)), and biases of 0."""
    for layer in build("feed_forward", (1, 1, 2), 3).modules():
        if isinstance(layer, nn.Linear):
            bound = (6 / (layer.in_features + layer.out_features)) ** 0.5
            assert 0.9 * bound < layer.weight.abs().max() <= bound
            assert not layer.bias.any()


@pytest.mark.parametrize(
    ("name", "side", "find", "expected"),
    [
        ("resnet18", 32, lambda network: network.layer1, 32),
        ("resnet18", 64, lambda network: network.layer1, 16),
        ("resnet18", 63, lambda network: network.layer1, 63),
        ("resnet56", 32, lambda network: network[-5], 8),
        ("densenet", 32, lambda network: network[-5], 4),
        ("densenet", 96, lambda network: network[-5], 3),
        ("densenet100bc", 32, lambda network: network.features.norm5, 8),
        ("inceptionv4", 32, lambda network: network[1], 8),  # the first Inception-A block
        ("inceptionv4", 64, lambda network: network[1], 8),
    ],
)
def test_resolution_inside(name, side, find, expected):
    model = build(name, (3, side, side))
    inside = seen_by(find(model.network), model, random_images((3, side, side), count=1))
    assert inside.shape[2:] == (expected, expected)


# From the data set's pixels to what the network sees


@pytest.mark.parametrize("fraction", [None, 0.37], ids=["uint8", "float"])
def test_normalisation_is_the_textbook_formula(fraction):
    mean, std = [0.4914, 0.4822, 0.4465], [0.2470, 0.2435, 0.2616]
    model = build("simple_dense", (3, 20, 28), mean=mean, std=std)
    assert model.mean.shape == model.std.shape == (3, 1, 1)
    images = random_images((3, 20, 28))
    if fraction is not None:  # as after an augmentation that interpolates
        images = images * fraction
    column = (3, 1, 1)
    expected = images.numpy().astype(np.float64) / 255 - np.reshape(mean, column)
    expected /= np.reshape(std, column)
    entering = seen_by(model.network, model, images)
    assert entering.dtype == torch.float32
    np.testing.assert_allclose(entering.numpy(), expected, rtol=0, atol=1e-6)


def test_without_statistics_pixels_are_scaled_to_the_unit_interval():
    model = build("simple_dense", (1, 1, 3))
    entering = seen_by(model.network, model, torch.tensor([[[[0, 51, 255]]]], dtype=torch.uint8))
    torch.testing.assert_close(entering.flatten(), torch.tensor([0.0, 0.2, 1.0]))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_uint8_and_float_images_give_identical_logits(dtype):
    model = build("shallownet", mean=[0.5, 0.4, 0.3], std=[0.2, 0.3, 0.4])
    images = random_images((3, 32, 32))  # bfloat16 holds the integers up to 256 exactly
    with torch.no_grad():
        assert torch.equal(model(images), model(images.to(dtype)))


def test_a_batch_of_larger_images_takes_no_more_memory_in_an_evaluation():
    small, large = (build("shallownet", (3, side, side)) for side in (64, 224))
    assert evaluation_batch(small) == 1024
    assert evaluation_batch(large) == 83  # 1024 * (64 / 224)^2, rounded down


@pytest.mark.parametrize(
    ("name", "shape", "size"),
    [
        ("vgg16", (3, 20, 40), (32, 40)),
        ("vgg16", (3, 32, 32), (32, 32)),
        ("lenet", (1, 8, 8), (28, 28)),
        ("shallownet", (1, 5, 9), (8, 9)),
        ("simple_dense", (1, 5, 9), (5, 9)),
    ],
)
def test_small_images_are_enlarged_to_what_the_network_takes(name, shape, size):
    model = build(name, shape)
    assert model.network_size == size
    assert seen_by(model.network, model, random_images(shape)).shape[2:] == size


def test_enlargement_is_bilinear():
    model = build("vgg16", (1, 8, 20), mean=[0.5], std=[0.25])
    images = random_images((1, 8, 20), count=1)
    expected = (images[0, 0].numpy().astype(np.float64) / 255 - 0.5) / 0.25
    for axis, side in enumerate(expected.shape):
        # Where the centres of the new pixels lie among the centres of the old ones.
        centres = (np.arange(32) + 0.5) * side / 32 - 0.5
        expected = np.apply_along_axis(
            lambda line, at=centres: np.interp(at, np.arange(len(line)), line), axis, expected
        )
    entering = seen_by(model.network, model, images)
    np.testing.assert_allclose(entering[0, 0].numpy(), expected, rtol=0, atol=1e-5)


# Names and mistakes


def test_the_names_of_the_command_line_are_there():
    readme = {"resnet18", "resnet50", "inceptionv4", "densenet", "densetnet"}
    label_relaxation = {"simple_dense", "resnet56", "vgg16", "densenet100bc"}
    assert readme | label_relaxation | {"shallownet", "lenet"} <= set(model_names())
    assert len(model_names()) == len(set(model_names()))


def test_aliases():
    assert canonical_name("densetnet") == "densenet"
    assert build("densetnet").name == "densenet"
    assert set(ALIASES.values()) <= set(MODELS)
    assert [canonical_name(name) for name in MODELS] == list(MODELS)


def test_an_unknown_name_is_told_what_there_is_nearest_first():
    with pytest.raises(ValueError, match="unknown model") as error:
        build_model("densent")
    message = str(error.value)
    assert message.startswith("unknown model 'densent'; accepted: densenet, densetnet, ")
    assert "\n" not in message
    assert sorted(message.partition("accepted: ")[2].split(", ")) == sorted(model_names())


def test_an_unknown_name_like_no_other_is_told_too():
    with pytest.raises(ValueError, match="unknown model '§'; accepted: resnet18, resnet34, "):
        canonical_name("§")


@pytest.mark.parametrize(
    "shape", [(2, 3, 28, 28), (2, 1, 32, 32), (3, 32, 32), (2, 32, 32, 3), (1, 2, 3, 32, 32)]
)
def test_images_of_another_shape_are_refused(shape):
    model = build("simple_dense", (3, 32, 32))
    with pytest.raises(ValueError, match=r"^images have shape \(.*\); accepted: \(N, 3, 32, 32\)$"):
        model(torch.zeros(shape, dtype=torch.uint8))


def test_images_of_another_shape_are_refused_even_where_enlargement_would_fit_them():
    model = build("vgg16", (3, 20, 28))
    with pytest.raises(ValueError, match=r"accepted: \(N, 3, 20, 28\)"):
        model(random_images((3, 32, 32)))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"input_shape": (3, 0, 8)}, r"^input_shape is \(3, 0, 8\); accepted"),
        ({"input_shape": (32, 32)}, r"^input_shape is \(32, 32\); accepted"),
        ({"num_classes": 1}, r"^num_classes is 1; accepted: 2 or more"),
        ({"mean": [0.5]}, r"^mean has 1 values; accepted: 3"),
        ({"std": [0.5] * 4}, r"^std has 4 values; accepted: 3"),
        ({"std": [0.5, 0.0, 0.5]}, r"^std is .*; accepted: positive"),
    ],
)
def test_impossible_arguments_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        build_model("lenet", **arguments)


def test_a_classifier_describes_itself():
    model = build("vgg16", (3, 20, 28), num_classes=100)
    assert (model.name, model.input_shape, model.num_classes) == ("vgg16", (3, 20, 28), 100)
