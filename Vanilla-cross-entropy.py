"""Train an image classifier with plain cross-entropy: the baseline, and the teacher of the others.

    loss = -log p_y

GPU:  python Vanilla-cross-entropy.py --dataset cifar10 --model resnet18 --trials 3
CPU:  python Vanilla-cross-entropy.py --dataset fashionmnist --model shallownet --epochs 5
"""

from utils.arguments import training_parser
from utils.errors import run
from utils.teacher import VANILLA, make_cross_entropy
from utils.training import Method, train_method


def method(*given) -> Method:
    parser = training_parser(__doc__)
    return Method(VANILLA, parser.parse_args(*given), make_cross_entropy)


if __name__ == "__main__":
    run(lambda: train_method(method()))
