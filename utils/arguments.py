"""Which flags the scripts share, and how a flag is checked before anything is read or written."""

import argparse
import functools
import json
import re
import shlex
import sys
from collections.abc import Callable
from difflib import get_close_matches
from fnmatch import fnmatchcase
from pathlib import Path

import torch

from models import MODELS, canonical_name, from_timm, model_names
from utils.checkpoint import MAX_SIDE
from utils.data_loader import AUGMENTATIONS, PROTOCOLS, READERS
from utils.errors import InputError
from utils.evaluate import HIGHEST_TEMPERATURE, LOWEST_TEMPERATURE
from utils.image_files import AUTO, Streaming

PARAMS = json.loads(Path(__file__).with_name("params.json").read_text())
OPTIMIZERS = ("sgd", "adam")
SCHEDULES = ("steps", "cosine", "constant")
PARAMETERS = ("default", "published")
PRECISIONS = ("auto", "float32", "bfloat16")
SELECTIONS = ("log_loss", "accuracy", "ece")
STREAMING = ("auto", "yes", "no")


class Parser(argparse.ArgumentParser):
    """argparse with one-line errors, no abbreviated flags, and the script's docstring as help.

    What it parses has the set of names `given`: those that the command line gives a value.
    """

    def __init__(self, description: str) -> None:
        super().__init__(
            description=description,
            formatter_class=argparse.RawDescriptionHelpFormatter,
            allow_abbrev=False,
        )

    def parse_args(self, args=None, namespace=None) -> argparse.Namespace:
        parsed, unset = super().parse_args(args, namespace), object()
        # argparse leaves alone what a namespace has: what is still unset then was not given.
        again = argparse.Namespace(**dict.fromkeys(vars(parsed), unset))
        super().parse_args(args, again)
        parsed.given = {name for name, value in vars(again).items() if value is not unset}
        return parsed

    def error(self, message: str):
        message = " ".join(message.split())
        unknown = re.match("unrecognized arguments: (--[^ =]+)", message)
        if near := unknown and get_close_matches(unknown[1], self._option_string_actions, 1):
            message += f"; did you mean {near[0]}?"
        self.exit(2, f"{self.prog}: error: {message} (--help lists every flag)\n")


# ------------------------------------------------------------------------------ checking one value


def number(kind: type, low: float, high: float, *, open_low=False, open_high=False) -> Callable:
    """A type for argparse: an int or float between two bounds, open where said."""
    span = f"{'(' if open_low else '['}{low:g}, {high:g}{')' if open_high else ']'}"
    span = span.replace("inf]", "inf)")

    def convert(text: str):
        try:
            value = kind(text)
        except ValueError:
            value = float("nan")
        above = value > low if open_low else value >= low
        below = value < high if open_high else value <= high
        if not (above and below) or value in (float("inf"), float("-inf")):
            name = "a whole number" if kind is int else "a number"
            raise argparse.ArgumentTypeError(f"{text!r} given, {name} in {span} expected")
        return value

    return convert


positive_int = number(int, 1, 10**9)  # more would not fit into the machine, or into a C long
non_negative_int = number(int, 0, 10**9)
positive_float = number(float, 0, float("inf"), open_low=True)
non_negative_float = number(float, 0, float("inf"))
temperatures = number(float, LOWEST_TEMPERATURE, HIGHEST_TEMPERATURE)  # logits / T is finite
bins = number(int, 1, 10**6)
resamples = number(int, 0, 10**6)


def path_name(text: str) -> str:
    """A type for argparse: a file or folder. "" would be the working directory, and is most often a
    shell variable that is not set."""
    if not text:
        raise argparse.ArgumentTypeError(f"{text!r} given, a path expected")
    return text


def one_of(names: list[str] | tuple[str, ...]) -> Callable:
    """A type for argparse: one of the names; the error suggests the nearest."""

    def convert(text: str) -> str:
        if text not in names:
            near = get_close_matches(text, names, n=1, cutoff=0.5)
            hint = f" (did you mean {near[0]}?)" if near else ""
            raise argparse.ArgumentTypeError(
                f"{text!r} given{hint}, one of {', '.join(names)} expected"
            )
        return text

    return convert


def network(text: str) -> str:
    """A type for argparse: the canonical name of one of our networks, or of timm's."""
    if not from_timm.is_timm(text):
        return canonical_name(one_of([*model_names(), "timm/NAME"])(text))
    try:
        return canonical_name(text)
    except (ValueError, ModuleNotFoundError) as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def device(text: str) -> torch.device:
    """auto, cpu, cuda or cuda:N; a device that is not there is an error."""
    available = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if text == "auto":
        return torch.device("cuda" if available and _has_kernels() else "cpu")
    if not re.fullmatch(r"cpu|cuda(:[0-9]{1,3})?", text):
        raise argparse.ArgumentTypeError(f"{text!r} given, auto, cpu, cuda or cuda:N expected")
    chosen = torch.device(text)
    if chosen.type == "cuda" and (chosen.index or 0) >= available:
        raise argparse.ArgumentTypeError(
            f"{text!r} given, but {available} CUDA devices are available here; cpu would do"
        )
    return chosen


@functools.cache  # said once
def _has_kernels() -> bool:
    """Whether this PyTorch was compiled for the first GPU; for old ones it is not."""
    compiled_for = re.findall(r"(sm|compute)_(\d+)(\d)", " ".join(torch.cuda.get_arch_list()))
    if not compiled_for:  # ROCm, which names its GPUs otherwise, or not known
        return True
    capability = torch.cuda.get_device_capability()
    for kind, *made_for in compiled_for:
        made_for = tuple(map(int, made_for))
        # sm is machine code, for GPUs of one major number; compute any later one can compile.
        if made_for <= capability and (kind == "compute" or made_for[0] == capability[0]):
            return True
    print(
        f"--device cpu is taken: this PyTorch has nothing for {torch.cuda.get_device_name()}, of "
        f"compute capability {capability[0]}.{capability[1]}; one made for it would",
        file=sys.stderr,
    )
    return False


# ------------------------------------------------------------------------------------ shared flags


def training_parser(description: str, defaults: str = "training", study: bool = False) -> Parser:
    """The flags of everything that trains. defaults: an entry of params.json.

    study: without --seed, --trials and --overwrite, which a study of many runs has no use for.
    """
    parser = Parser(description)
    if defaults == "training":
        add_data_flags(parser)
    _add_recipe_flags(parser, PARAMS[defaults])
    _add_run_flags(parser, defaults, study)
    add_evaluation_flags(parser)
    parser.set_defaults(hyper_parameters=(), defaults=defaults)
    return parser


def _add_recipe_flags(parser: Parser, recipe: dict) -> None:
    add = parser.add_argument_group("training").add_argument
    add(
        "--params",
        type=one_of(PARAMETERS),
        default="default",
        metavar="NAME",
        help="default, or published: what utils/params.json has from the papers for this method, "
        "data set and network, hyper-parameters to choose from included; flags that are given win "
        "(default: %(default)s)",
    )
    add(
        "--lr",
        type=positive_float,
        default=recipe["lr"],
        help="starting learning rate (default: %(default)s)",
    )
    add(
        "--optimizer",
        type=one_of(OPTIMIZERS),
        default=recipe["optimizer"],
        metavar="NAME",
        help="sgd (Nesterov momentum 0.9) or adam (default: %(default)s)",
    )
    add(
        "--weight_decay",
        type=non_negative_float,
        default=recipe["weight_decay"],
        metavar="W",
        help="L2 penalty on all parameters; 0 turns it off (default: %(default)s)",
    )
    add(
        "--schedule",
        type=one_of(SCHEDULES),
        default=recipe["schedule"],
        metavar="NAME",
        help="of the learning rate: steps multiplies it by --fall at each of --milestones, cosine "
        "lowers it to 0, constant is off (default: %(default)s)",
    )
    add(
        "--milestones",
        type=positive_int,
        nargs="+",
        metavar="EPOCH",
        help="epochs after which the learning rate falls (default: 30 %%, 60 %% and 90 %% of "
        "--epochs)",
    )
    add(
        "--fall",
        type=number(float, 0, 1, open_low=True, open_high=True),
        default=0.1,
        metavar="FACTOR",
        help="what the learning rate is multiplied by at a milestone (default: %(default)s)",
    )
    add(
        "--batch_size",
        type=positive_int,
        default=recipe["batch_size"],
        metavar="N",
        help="images a step (default: %(default)s)",
    )
    add(
        "--epochs",
        type=positive_int,
        default=recipe["epochs"],
        metavar="N",
        help="most epochs (default: %(default)s)",
    )
    add(
        "--estop",
        type=non_negative_int,
        metavar="N",
        help="epochs without a better validation log loss before training stops; 0 turns it off "
        f"(default: {recipe['estop']}; 0 with --protocol lr, which keeps the last epoch)",
    )
    add(
        "--augment",
        type=one_of(["auto", *AUGMENTATIONS]),
        default="auto",
        metavar="NAME",
        help="of training images: none (off), flip (left-right), crop (4 pixels padding), "
        "crop-flip, shift-flip (3 pixels padding); auto is crop-flip for CIFAR, flip for "
        "fashionmnist and imagefolder, none for the others (default: %(default)s)",
    )
    add(
        "--pretrained",
        action="store_true",
        help="start from timm's weights, on images normalised and enlarged as those they were "
        "trained on (default: off)",
    )
    add(
        "--precision",
        type=one_of(PRECISIONS),
        default="auto",
        metavar="NAME",
        help="of the network's arithmetic: float32, bfloat16 (mixed), or auto: bfloat16 on a GPU "
        "or CPU that has instructions for it, else float32; losses are float32 always "
        "(default: %(default)s)",
    )
    add(
        "--compile",
        action="store_true",
        help="compile the networks with torch.compile, which takes a minute or so at the start; "
        "whether steps are faster then, benchmarks/throughput.py --compile says (default: off)",
    )
    add(
        "--deterministic",
        action="store_true",
        help="the same bits each time on CUDA too, at a cost in speed; on the CPU that is so "
        "without it (default: off)",
    )


def _add_run_flags(parser: Parser, defaults: str, study: bool) -> None:
    add = parser.add_argument_group("runs and files").add_argument
    if not study:
        add(
            "--seed",
            type=non_negative_int,
            default=0 if defaults == "training" else None,
            metavar="N",
            help="of the split, the initial weights, the order of the images and the "
            "augmentation; the same for all methods, so that their runs are paired (default: "
            + ("%(default)s)" if defaults == "training" else "the teacher's)"),
        )
    if defaults == "training" and not study:
        add(
            "--trials",
            type=positive_int,
            default=1,
            metavar="N",
            help="seeds in a row, from --seed on (default: %(default)s)",
        )
    add(
        "--select_by",
        type=one_of(SELECTIONS),
        default="log_loss",
        metavar="NAME",
        help=f"which validation metric selects among several values of hyper-parameters: "
        f"{', '.join(SELECTIONS)} (default: %(default)s)",
    )
    add(
        "--output_dir",
        type=path_name,
        default="runs",
        metavar="DIR",
        help="a run is left in DIR/<dataset>/<model>/<method>/seed<N> (default: %(default)s)",
    )
    if not study:
        add(
            "--overwrite",
            action="store_true",
            help="start anew where DIR holds this run already: its files are removed, but not a "
            "teacher's; off: an unfinished run is continued, a finished one reported",
        )
    add(
        "--save_every",
        type=non_negative_float,
        default=10,
        metavar="MINUTES",
        help="save the training state within long epochs; 0 saves at the end of each epoch only, "
        "as several processes do (default: %(default)s)",
    )


def add_data_flags(parser: Parser) -> None:
    add = parser.add_argument_group("data and network").add_argument
    add(
        "--dataset",
        type=one_of(list(READERS)),
        default="digits",
        metavar="NAME",
        help=f"{', '.join(READERS)} (default: %(default)s, which needs no download)",
    )
    add(
        "--num_classes",
        type=positive_int,
        metavar="K",
        help="number of classes, checked against the data set (default: the data set's)",
    )
    add(
        "--protocol",
        type=one_of(PROTOCOLS),
        default="ils",
        metavar="NAME",
        help="ils: official test split, best epoch kept; lr: all images are split anew for each "
        "seed, the last epoch is kept, and the network that is tested is trained on training and "
        "validation split (default: %(default)s)",
    )
    add(
        "--tr_size",
        metavar="SHARE",
        type=number(float, 0, 1, open_low=True, open_high=True),
        help="share of the training images that is trained on, the rest is the validation split "
        "(default: 0.8; 5/6 with --protocol lr)",
    )
    add(
        "--image_size",
        type=number(int, 1, MAX_SIDE),
        metavar="PIXELS",
        help="bring all images to this height and width (default: off, as they are)",
    )
    add(
        "--model",
        type=network,
        default="resnet18",
        metavar="NAME",
        help=f"{', '.join(MODELS)}, or timm/NAME: any network of timm, if it is installed "
        "(default: %(default)s)",
    )


def add_evaluation_flags(parser: Parser) -> None:
    """What training, distillation and evaluation share."""
    add = parser.add_argument_group("machine and evaluation").add_argument
    add(
        "--data_dir",
        type=path_name,
        default="data",
        metavar="DIR",
        help="where the data set is, or is downloaded to; for imagefolder the folder that holds "
        "train/<class>/ and test/<class>/ (default: %(default)s)",
    )
    add(
        "--device",
        type=device,
        default="auto",
        metavar="NAME",
        help="cpu, cuda, cuda:N, or auto: the first GPU if there is one (default: auto)",
    )
    add(
        "--ece_bins",
        type=bins,
        default=10,
        metavar="N",
        help="equal-width bins of the expected calibration error (default: %(default)s)",
    )
    add(
        "--stream",
        type=one_of(STREAMING),
        default="auto",
        metavar="NAME",
        help="of imagefolder: yes leaves the images on disk and decodes each batch when it is "
        "needed, no decodes all into memory, auto is yes if they would take more than half of "
        "the memory available; the result is the same (default: %(default)s)",
    )
    add(
        "--workers",
        type=number(int, 0, 1024),
        metavar="N",
        help="processes that decode the images of imagefolder; 0: the script does it itself "
        "(default: one for each core that it may use)",
    )


def add_hyper_parameter(
    parser: Parser, flag: str, kind: Callable, default: float, description: str
) -> None:
    """A flag of the method that takes one value, or several to choose from.

    Each combination of several values is trained; the one that is best on the validation split by
    --select_by is kept.
    """
    parser.add_argument(
        flag,
        type=kind,
        nargs="+",
        default=[default],
        metavar="X",
        help=f"{description} (default: {default:g}); several values: each is trained, the best on "
        "the validation split is kept",
    )
    parser.set_defaults(
        hyper_parameters=(*parser.get_default("hyper_parameters"), flag.removeprefix("--"))
    )


def settle(args: argparse.Namespace, method: str, dataset: str, model: str) -> argparse.Namespace:
    """The arguments that hold for one training, published settings among them if asked for.

    Raises InputError if nobody published any, or if some clash.
    """
    if args.params == "published":
        args = _with_published(args, method, dataset, model)
    milestones, idle = args.milestones or [], {"milestones", "fall"} & args.given
    if idle and args.schedule != "steps":
        raise InputError(f"--{min(idle)} does nothing with --schedule {args.schedule}; steps would")
    if milestones != sorted(set(milestones)):
        given = " ".join(map(str, milestones))
        raise InputError(f"--milestones {given} given, epochs one after the other expected")
    if "milestones" in args.given and milestones[-1] >= args.epochs:
        raise InputError(
            f"--milestones {milestones[-1]} does nothing with --epochs {args.epochs}; less expected"
        )
    if args.pretrained and not from_timm.is_timm(model):
        raise InputError(f"--pretrained loads timm's weights, of which {model} has none")
    tag = model.partition(".")[2]
    if tag and not args.pretrained:
        raise InputError(
            f"{model!r} given, and {tag!r} names weights that nothing loads without --pretrained; "
            "give that flag, or the name alone"
        )
    return args


def _with_published(args, method: str, dataset: str, model: str) -> argparse.Namespace:
    """A copy with the settings of the paper, but for what the command line gives; says which."""
    settings = {}
    for name, protocol in PARAMS["published"].items():
        networks, methods = protocol["networks"].get(dataset, {}), protocol["methods"]
        if model in networks and any(fnmatchcase(method, pattern) for pattern in methods):
            grid = PARAMS["grids"].get(name, {}).get(method, {})
            hyper_parameters = {key: grid[key] for key in args.hyper_parameters if key in grid}
            settings = {**protocol["settings"], **networks[model], **hyper_parameters}
            source = protocol["source"]
    if not settings:
        raise InputError(
            f"--params published has nothing for {method} on {dataset} with {model}; the nearest "
            f"that it has: {'; '.join(_nearest_published(method, dataset, model))}"
        )
    kept = {k for k in args.given & settings.keys() if getattr(args, k) != settings[k]}
    # Milestones belong to the schedule they were published with, early stopping to the protocol.
    unfit = {"milestones", "fall"} if "schedule" in kept else set()
    unfit |= {"estop"} if "protocol" in kept and args.protocol == "lr" else set()
    taken = {k: value for k, value in settings.items() if k not in kept | unfit}
    left = [
        f"{name} {_in_words(getattr(args, name))}, not {_in_words(value)}"
        for name, value in settings.items()
        if name in kept
    ]
    listed = (f"{name} {_in_words(value)}" for name, value in taken.items())
    print(f"published settings ({source}): {', '.join(listed)}")
    if left:
        print(f"the command line gives: {'; '.join(left)}")
    return argparse.Namespace(**{**vars(args), **taken})


def _nearest_published(*wanted: str) -> list[str]:
    """The four that have most in common with the method, data set and network wanted."""

    def in_common(found: tuple[str, ...]) -> tuple[int, list[bool]]:
        same = list(map(fnmatchcase, wanted, found))
        return sum(same), same  # of equally many the method counts most

    there = [
        (method, dataset, model)
        for protocol in PARAMS["published"].values()
        for method in protocol["methods"]
        for dataset, networks in protocol["networks"].items()
        for model in networks
    ]
    there.sort(key=in_common, reverse=True)
    return ["{} on {} with {}".format(*found) for found in there[:4]]


def _in_words(value) -> str:
    return " ".join(map(str, value)) if isinstance(value, list) else str(value).lower()


def recipe(args: argparse.Namespace, dataset: str) -> dict:
    """How a network is trained, whatever the method: plain values, kept in config.json."""
    augment = args.augment
    if augment == "auto":
        augment = PARAMS["augmentation"].get(dataset, "none")
    if dataset == "gaussians" and augment != "none":
        raise InputError(f"--augment {augment} given, but gaussians are points; none expected")
    keeps_last = args.protocol == "lr"
    if keeps_last and args.estop and "estop" in args.given:
        raise InputError(
            f"--estop {args.estop} given, but --protocol lr keeps the last of all epochs; "
            "0 expected"
        )
    estop = PARAMS[args.defaults]["estop"] if args.estop is None else args.estop
    return {
        "optimizer": args.optimizer,
        "lr": args.lr,
        "weight_decay": args.weight_decay,
        "schedule": args.schedule,
        "milestones": args.milestones,
        "fall": args.fall,
        "batch_size": args.batch_size,
        "epochs": args.epochs,
        "estop": 0 if keeps_last else estop,
        "augment": augment,
        "pretrained": args.pretrained,
        "precision": _precision(args.device) if args.precision == "auto" else args.precision,
        "compile": args.compile,
        "deterministic": args.deterministic,
        "protocol": args.protocol,
        "tr_size": args.tr_size or (5 / 6 if keeps_last else 0.8),
    }


def _precision(device: torch.device) -> str:
    """bfloat16 where the processor has instructions for it: see docs/performance.md."""
    if device.type == "cuda":
        # Cards before Ampere emulate it, slowly, and cuDNN has no convolutions of it for them.
        with torch.cuda.device(device):
            native = torch.cuda.is_bf16_supported(including_emulation=False)
    else:
        here = torch.cpu.get_capabilities()
        native = here.get("avx512_bf16") or here.get("amx_bf16") or here.get("bf16")
    return "bfloat16" if native else "float32"


def streaming(args: argparse.Namespace) -> Streaming:
    return Streaming(args.stream, args.workers)


def check_streaming(args: argparse.Namespace, datasets: set[str]) -> None:
    """Raises InputError if a flag of image folders is given and none of the data sets is one."""
    if streaming(args) != AUTO and "imagefolder" not in datasets:
        raise InputError(
            "--stream and --workers are of imagefolder and do nothing with "
            f"{', '.join(sorted(datasets))}; leave them out"
        )


def print_next(args: argparse.Namespace, *commands: str) -> None:
    """Says which commands come next, with the flags of this one that they need."""
    parser = Parser("")
    add_evaluation_flags(parser)
    needed = "".join(
        f" --{name} {shlex.quote(str(getattr(args, name)))}"
        for name in ("data_dir", "stream", "workers", "ece_bins")
        if getattr(args, name) != parser.get_default(name)
    )
    beside = Path(sys.argv[0]).parent  # the scripts, wherever this one was called from
    place = "" if beside == Path() else shlex.quote(f"{beside}/")
    for command in commands:
        print(f"  python {place}{command}{needed}")
