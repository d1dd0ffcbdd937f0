"""Train an image classifier with instance-based label smoothing (Maher and Kull, ICMLA 2021).

A vanilla teacher of the same network says how the smoothing is to differ between images: how much
the true class gives away (ε_i), and to which wrong classes it goes (shares r_j that sum to 1).

    loss = -Σ_j t_j log p_j,  t_y = 1 - ε_i,  t_j = ε_i·r_j for j ≠ y

    --variant  ε_i                              r_j
    ils2       ε                                teacher's softmax at T over the wrong classes
    ils1       --factor of the teacher's q_y    1/(K - 1)
    ils        --factor of the teacher's q_y    teacher's softmax at T over the wrong classes
    scores     ε·s_y                            s_j/(1 - s_y), s shares of the shifted logits
    class      ε                                teacher's softmax at T, averaged over the class y

q_y is the teacher's probability of the true class. ils1 and ils use the teacher after temperature
scaling; scores is what the paper's code computed when its README's table was made.

Without --teacher the vanilla checkpoint of the same data set, model and seed below --output_dir is
used, and trained first when there is none.

GPU:     python Instance-based-smoothing.py --dataset cifar10 --model resnet18 --num_classes 10
CPU:     python Instance-based-smoothing.py --dataset fashionmnist --model shallownet --epochs 5
search:  python Instance-based-smoothing.py --smoothing 0.01 0.05 0.1 --temperature 1 2 4
"""

from utils.arguments import (
    add_hyper_parameter,
    non_negative_float,
    number,
    one_of,
    path_name,
    temperatures,
    training_parser,
)
from utils.errors import InputError, run
from utils.inference import collect_logits
from utils.losses import (
    BY_TRUE_CLASS,
    FACTORS,
    VARIANTS,
    class_average_logits,
    instance_based_smoothing_loss,
)
from utils.teacher import find_or_train_teacher
from utils.training import Method, train_method


def make_loss(trial, variant, **hyper_parameters):
    if variant == "class":
        logits, labels = collect_logits(trial.teacher.model, trial.data, trial.splits.train)
        averages = class_average_logits(logits, labels, hyper_parameters["temperature"])
        averages = averages.to(trial.device)
    scaling = trial.teacher.temperature if variant in BY_TRUE_CLASS else 1.0

    def loss(logits, batch):
        if variant == "class":
            teacher_logits = averages[batch.labels]
        else:
            teacher_logits = trial.teacher_logits(batch) / scaling
        return {
            "loss": instance_based_smoothing_loss(
                logits, batch.labels, teacher_logits, variant=variant, **hyper_parameters
            )
        }

    return loss


def find_teacher(trial, args):
    if args.variant == ["class"]:  # refused before --overwrite removes anything
        labels = trial.data.labels[trial.splits.train.to(trial.data.labels.device)]
        counts = labels.bincount(minlength=len(trial.data.classes)).tolist()
        if 0 in counts:
            raise InputError(
                "--variant class averages over each class of the training split, which has no "
                f"image of {trial.data.classes[counts.index(0)]}; a larger --tr_size, or another "
                "--seed, may do"
            )
    return find_or_train_teacher(trial, args)


def hyper_parameters_of(variant: str, factor: str) -> tuple[str, ...]:
    """The flags that a variant reads. The others would do nothing."""
    if variant in BY_TRUE_CLASS:
        amount = ("shift", "slope", "cap") if factor == "quadratic" else ("smoothing",)
        return ("variant", "factor", *amount, *(("temperature",) if variant == "ils" else ()))
    return ("variant", "smoothing", *(("temperature",) if variant != "scores" else ()))


def method(*given) -> Method:
    parser = training_parser(__doc__)
    add = parser.add_argument
    add(
        "--teacher",
        type=path_name,
        nargs="+",
        metavar="CHECKPOINT",
        help="best.pt of the teacher of all seeds; or several, or folders that are searched for "
        "them: each seed takes that in a folder seed<N> (default: the vanilla run below "
        "--output_dir)",
    )
    add(
        "--variant",
        type=one_of(VARIANTS),
        default="ils2",
        metavar="NAME",
        help=f"{', '.join(VARIANTS)}, see above (default: %(default)s)",
    )
    add(
        "--factor",
        type=one_of(FACTORS),
        default="quadratic",
        metavar="NAME",
        help="ε_i of ils1 and ils: quadratic min(P2·(q_y - P1)², cap), proportional ε·q_y, "
        "complementary ε·(1 - q_y) (default: %(default)s)",
    )
    share = number(float, 0, 1, open_high=True)
    add_hyper_parameter(
        parser,
        "--smoothing",
        share,
        0.1,
        "smoothing factor ε in [0, 1), the share of the target for wrong classes; 0 is off",
    )
    add_hyper_parameter(
        parser,
        "--temperature",
        temperatures,
        1.0,
        "T > 0 that softens the teacher's shares over the wrong classes; 1 is off",
    )
    add_hyper_parameter(parser, "--shift", number(float, 0, 1), 0.8, "P1, a probability")
    add_hyper_parameter(parser, "--slope", non_negative_float, 2.0, "P2 >= 0; 0 is off")
    add_hyper_parameter(parser, "--cap", share, 0.2, "largest ε_i of the quadratic, in [0, 1)")
    args = parser.parse_args(*given)

    used = hyper_parameters_of(args.variant, args.factor)
    if idle := args.given & {"factor", *args.hyper_parameters} - {*used}:
        parser.error(
            f"--{min(idle)} does nothing with --variant {args.variant} --factor {args.factor}, "
            f"which reads {', '.join('--' + other for other in used)}"
        )
    name = f"instance-based-{args.variant}"
    args.hyper_parameters, args.variant, args.factor = used, [args.variant], [args.factor]
    return Method(name, args, make_loss, find_teacher)


if __name__ == "__main__":
    run(lambda: train_method(method()))
