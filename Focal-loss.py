"""Train an image classifier with the focal loss (Lin et al. 2017), a baseline of the LR paper.

    loss = -(1 - p_y)^γ log p_y

GPU:     python Focal-loss.py --dataset cifar10 --model resnet56 --trials 5
CPU:     python Focal-loss.py --dataset fashionmnist --model shallownet --epochs 5
search:  python Focal-loss.py --gamma 0.1 0.2 0.5 1 2 3.5 5
"""

from utils.arguments import add_hyper_parameter, non_negative_float, training_parser
from utils.errors import run
from utils.losses import focal_loss
from utils.training import Method, train_method


def make_loss(trial, gamma):
    def loss(logits, batch):
        return {"loss": focal_loss(logits, batch.labels, gamma)}

    return loss


def method(*given) -> Method:
    parser = training_parser(__doc__)
    add_hyper_parameter(
        parser,
        "--gamma",
        non_negative_float,
        1.0,
        "focusing exponent γ >= 0, how much less the easy images count; 0 is off",
    )
    return Method("focal", parser.parse_args(*given), make_loss)


if __name__ == "__main__":
    run(lambda: train_method(method()))
