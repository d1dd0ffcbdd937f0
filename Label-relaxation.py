"""Train an image classifier with label relaxation (Lienen and Hüllermeier, AAAI 2021).

    loss = 0                                                    if p_y >= 1 - α (credal set)
    loss = (1 - α) log((1 - α) / p_y) + α log(α / (1 - p_y))    otherwise, eq. (5)

GPU:     python Label-relaxation.py --dataset cifar10 --model resnet56 --trials 5
CPU:     python Label-relaxation.py --dataset fashionmnist --model shallownet --epochs 5
search:  python Label-relaxation.py --alpha 0.01 0.025 0.05 0.1 0.2 0.3 0.4
"""

from utils.arguments import add_hyper_parameter, number, training_parser
from utils.errors import run
from utils.losses import label_relaxation_loss
from utils.training import Method, train_method


def make_loss(trial, alpha):
    def loss(logits, batch):
        return {"loss": label_relaxation_loss(logits, batch.labels, alpha)}

    return loss


def method(*given) -> Method:
    parser = training_parser(__doc__)
    add_hyper_parameter(
        parser,
        "--alpha",
        number(float, 0, 1, open_low=True, open_high=True),
        0.1,
        "imprecisiation degree α in (0, 1), the probability that may go to wrong classes at no "
        "loss; towards 0 it is cross-entropy (off)",
    )
    return Method("label-relaxation", parser.parse_args(*given), make_loss)


if __name__ == "__main__":
    run(lambda: train_method(method()))
