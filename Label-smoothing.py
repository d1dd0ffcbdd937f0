"""Train an image classifier with label smoothing (Szegedy et al. 2016, section 7).

    loss = -Σ_j t_j log p_j,  t = (1 - ε)·onehot(y) + ε/K

GPU:     python Label-smoothing.py --dataset cifar10 --model resnet18 --trials 3
CPU:     python Label-smoothing.py --dataset fashionmnist --model shallownet --epochs 5
search:  python Label-smoothing.py --smoothing 0.01 0.05 0.1
"""

from utils.arguments import add_hyper_parameter, number, training_parser
from utils.errors import run
from utils.losses import label_smoothing_loss
from utils.training import Method, train_method


def make_loss(trial, smoothing):
    def loss(logits, batch):
        return {"loss": label_smoothing_loss(logits, batch.labels, smoothing)}

    return loss


def method(*given) -> Method:
    parser = training_parser(__doc__)
    add_hyper_parameter(
        parser,
        "--smoothing",
        number(float, 0, 1),
        0.1,
        "smoothing factor ε in [0, 1], the share of the target spread over all classes; 0 is off",
    )
    return Method("label-smoothing", parser.parse_args(*given), make_loss)


if __name__ == "__main__":
    run(lambda: train_method(method()))
