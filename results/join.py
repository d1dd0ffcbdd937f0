"""Joins tables of one kind whose seeds were evaluated on different machines.

    python results/join.py results/fashionmnist-densenet-8-epochs

reads the results.csv of each folder below the one given, and writes there what
`Models-evaluation.py --compare` would of all their networks together. Intervals of the bootstrap,
which need each image, and figures stay in the folders below.
"""

import argparse
import sys
from pathlib import Path

import pandas as pd

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

from utils import comparison, tables  # noqa: E402
from utils.methods import load_script  # noqa: E402


def join(folder: Path, left_out: list[str]) -> None:
    parts = [pd.read_csv(path) for path in sorted(folder.glob("*/results.csv"))]
    results = pd.concat(parts).filter(regex="^(?!.*_(low|high)$)")
    results = results[~results["training"].isin(left_out)].sort_values("seed", kind="stable")
    results.to_csv(folder / "results.csv", index=False)
    rows = tables.with_students(results)
    compared = comparison.compare(rows.drop_duplicates(["weights", "scaling"]), "vanilla", {})
    about = argparse.Namespace(bootstrap=0, ece_bins=results["ece_bins"].iloc[0])
    evaluation = load_script(ROOT / "Models-evaluation.py")
    evaluation.write_tables(folder, tables.summarise(rows), compared, [], about)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--without", nargs="+", default=[], help="trainings to leave out")
    args = parser.parse_args()
    join(args.folder, args.without)
