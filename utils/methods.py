"""Which methods are there, and which values may their hyper-parameters take?

A method is a training script: it is loaded, not copied, and its own parser checks what is given.
"""

import argparse
import importlib.util
import itertools
import re
import shlex
import sys
from collections.abc import Sequence
from difflib import get_close_matches
from pathlib import Path
from types import ModuleType
from typing import NamedTuple

from utils.arguments import PARAMS, settle, training_parser
from utils.checkpoint import ROOT
from utils.errors import InputError
from utils.teacher import VANILLA
from utils.training import Method, requested_values

GRIDS = tuple(PARAMS["grids"])
SAMPLERS = ("grid", "tpe", "random")
PRUNERS = ("none", "median", "hyperband")
# What a study hands on to the scripts that distil and evaluate.
SHARED = ("data_dir", "device", "ece_bins", "stream", "workers")


class Range(NamedTuple):
    """A hyper-parameter that may take any value between two."""

    low: float
    high: float
    log: bool  # whether low to 10·low is as wide as 10·low to 100·low

    def __str__(self) -> str:
        """As --methods takes it."""
        return f"{self.low:g}..{self.high:g}{':log' * self.log}"


Space = dict[str, list | Range]


def read_methods(texts: Sequence[str], study: argparse.Namespace) -> list[tuple[Method, Space]]:
    """The methods that --methods names; those that need another's network for a teacher last.

    study: the arguments of Hyperparameter-study.py. Raises InputError if the methods cannot be
    compared, because what was published of them differs in more than hyper-parameters.
    """
    methods = [read_method(text, study) for text in texts]
    names = [method.name for method, _ in methods]
    if twice := {name for name in names if names.count(name) > 1}:
        raise InputError(
            f"--methods names {twice.pop()} twice, whose runs would share a folder; each once, or "
            "two studies with an --output_dir each, expected"
        )
    if any(map(needs_teacher, methods)) and VANILLA not in names:
        methods.append(read_method(VANILLA, study))
    for (method, _), key in itertools.product(methods, _shared_flags()):
        first = methods[0][0]
        here, there = getattr(method.args, key), getattr(first.args, key)
        if here != there:
            raise InputError(
                f"--params published has --{key} {there} for {first.name} and {here} for "
                f"{method.name}; give it, or each paper's methods a study of their own"
            )
    return sorted(methods, key=needs_teacher)


def _shared_flags() -> set[str]:
    """The names of what is the same in all trainings of a study."""
    parsed = vars(training_parser("", study=True).parse_args([]))
    return parsed.keys() - {"hyper_parameters", "given"}


def needs_teacher(method: tuple[Method, Space]) -> bool:
    return method[0].find_teacher is not None and not getattr(method[0].args, "teacher", None)


def training_scripts() -> dict[str, Path]:
    """The scripts with a function `method`, by their names in lower case without .py."""
    return {
        path.stem.lower(): path
        for path in sorted(ROOT.glob("*.py"))
        if re.search(r"^def method\(", path.read_text(), re.MULTILINE)
    }


def find_script(name: str) -> Path:
    """The training script of that name, or whose name begins with those words, or a path to one."""
    if name.endswith(".py"):
        if not Path(name).is_file():
            raise InputError(f"--methods {name} given, but there is no such file")
        return Path(name)
    scripts = training_scripts()
    found = [script for script in scripts if script.startswith(f"{name}-")]
    if name in scripts:
        found = [name]
    if len(found) != 1:
        near = get_close_matches(name, scripts, n=1, cutoff=0.3)
        hint = f" (did you mean {near[0]}?)" if near else ""
        raise InputError(
            f"--methods {name} given{hint}, one of {', '.join(scripts)}, the first words of one, "
            "or the path of a script expected"
        )
    return scripts[found[0]]


def load_script(path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"script_{path.stem}", path)
    script = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = script  # where `checkpoint.code` finds what is run
    spec.loader.exec_module(script)
    return script


def read_method(text: str, study: argparse.Namespace) -> tuple[Method, Space]:
    """What the text says: a script and, behind it, flags of its own.

    A hyper-parameter takes the values given there, or a range "low..high" or "low..high:log"; else
    those of --grids, an entry of params.json, or of the first that has the method; else the
    script's default.
    """
    try:
        name, *words = shlex.split(text)
    except ValueError:
        raise InputError(f"--methods {text!r} given, a method and its flags expected") from None
    path = find_script(name)
    script = load_script(path)
    if not hasattr(script, "method"):
        raise InputError(f"--methods {path} given, but it has no function method(*given)")
    words, logarithmic = _take_ranges(words)
    flags = _shared_flags()
    shared = argparse.Namespace(**{key: getattr(study, key) for key in flags})
    method = script.method(words, shared)
    given = method.args.given
    if general := given & {*flags, "seed", "trials", "overwrite"}:
        raise InputError(
            f"--methods {text!r} given, but --{min(general)} is one for the whole study; "
            "hyper-parameters of the method expected within the quotes"
        )
    method.args.given = given | (study.given & flags)
    args = settle(method.args, method.name, study.dataset, study.model)
    if study.grids or args.params != "published":  # settle has taken the published grid
        grids = PARAMS["grids"]
        order = (grids[study.grids or args.protocol], *grids.values())
        grid = next((grid[method.name] for grid in order if method.name in grid), {})
        for parameter in {*args.hyper_parameters} - given:
            setattr(args, parameter, grid.get(parameter, getattr(args, parameter)))
    space: Space = dict(requested_values(args))
    for parameter, log in logarithmic.items():
        space[parameter] = _range(parameter, space.get(parameter, []), log)
        if study.sampler == "grid":
            raise InputError(
                f"--{parameter} of {method.name} was given a range, of which --sampler grid cannot "
                "try all; single values, or --sampler tpe or random, expected"
            )
    return method._replace(args=args), space


def student_flags(distil: str) -> list[str]:
    """The flags of Network-distillation.py that --distil stands for: a student, and more.

    Raises InputError, or ends as the script would, with what is wrong with them.
    """
    try:
        student, *flags = shlex.split(distil)
    except ValueError:
        raise InputError(f"--distil {distil!r} given, a network and flags expected") from None
    parser = load_script(ROOT / "Network-distillation.py").make_parser()
    parsed = parser.parse_args(["--teacher", "best.pt", "--student", student, *flags])
    ours = parsed.given & {*SHARED, "seed", "output_dir", "overwrite"}
    if parsed.teacher != ["best.pt"]:
        ours.add("teacher")
    if ours:
        raise InputError(
            f"--distil {distil!r} given, but --{min(ours)} is the study's to give; other flags of "
            "Network-distillation.py expected"
        )
    return ["--student", student, *flags]


def _take_ranges(words: list[str]) -> tuple[list[str], dict[str, bool]]:
    """Puts the two ends in the place of a range, for the script to check as it checks values."""
    plain, logarithmic, flag = [], {}, ""
    for word in words:
        if word.startswith("--"):
            flag = word.removeprefix("--")
        if match := re.fullmatch(r"([0-9.][^/]*?)\.\.([^/]+?)(:log)?", word):
            logarithmic[flag] = match[3] is not None
            plain += match[1], match[2]
        else:
            plain.append(word)
    return plain, logarithmic


def _range(parameter: str, ends: list, log: bool) -> Range:
    if len(ends) != 2 or isinstance(ends[0], str) or not ends[0] < ends[1]:
        raise InputError(
            f"--{parameter} was given a range and {ends}; one range low..high of two increasing "
            "numbers expected, and nothing beside it"
        )
    if log and ends[0] <= 0:
        raise InputError(f"--{parameter} {ends[0]}..{ends[1]}:log given, a low end > 0 expected")
    return Range(*ends, log)
