"""Train an image classifier with the confidence penalty (Pereyra et al. 2017), a baseline of the
LR paper.

    loss = -log p_y - β·H(p),  H the entropy in nats

GPU:     python Confidence-penalty.py --dataset cifar10 --model resnet56 --trials 5
CPU:     python Confidence-penalty.py --dataset fashionmnist --model shallownet --epochs 5
search:  python Confidence-penalty.py --beta 0.1 0.3 0.5 1 2 4 8
"""

from utils.arguments import add_hyper_parameter, non_negative_float, training_parser
from utils.errors import run
from utils.losses import confidence_penalty_loss
from utils.training import Method, train_method


def make_loss(trial, beta):
    def loss(logits, batch):
        return {"loss": confidence_penalty_loss(logits, batch.labels, beta)}

    return loss


def method(*given) -> Method:
    parser = training_parser(__doc__)
    add_hyper_parameter(
        parser,
        "--beta",
        non_negative_float,
        0.1,
        "weight β >= 0 of the entropy that is rewarded, per nat; 0 is off",
    )
    return Method("confidence-penalty", parser.parse_args(*given), make_loss)


if __name__ == "__main__":
    run(lambda: train_method(method()))
