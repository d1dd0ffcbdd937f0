"""Joins tables of one kind whose seeds were evaluated on different machines.

    python results/join.py results/fashionmnist-densenet-8-epochs

reads the results.csv of each folder below the one given, and writes there the tables of
`Models-evaluation.py --compare` of all their networks together: trainings of one name are one, and
what their recipes differ in is said. Intervals of the bootstrap, which need each image, and figures
stay in the folders below.
"""

import argparse
import json
import sys
from pathlib import Path

import pandas as pd

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

from utils import comparison, tables  # noqa: E402


def join(folder: Path, left_out: list[str]) -> None:
    parts = [pd.read_csv(path) for path in sorted(folder.glob("*/results.csv"))]
    results = pd.concat(parts).filter(regex="^(?!.*_(low|high)$)")
    results = results[~results["training"].isin(left_out)].sort_values("seed", kind="stable")
    comparison.check_test_images(results)
    # Parts that were evaluated by an earlier version lack it; it is the same for all seeds.
    share = "test_per_training_image"
    if share in results:
        results[share] = results.groupby("dataset")[share].transform("max")
    for warning in tables.counted_as_one(results):
        print(f"warning: {warning}", file=sys.stderr)
    for (*block, training), same in results.groupby([*comparison.BLOCK, "training"]):
        if keys := comparison.differing([*map(json.loads, same["recipe"])]):
            print(
                f"warning: {', '.join(block)}: what is joined as {training} differs in "
                f"{', '.join(keys)}",
                file=sys.stderr,
            )
    results.to_csv(folder / "results.csv", index=False)
    rows = tables.with_students(results)
    single = rows.drop_duplicates(["weights", "training", "scaling"])
    compared = comparison.compare(single, "vanilla", {})
    unequal = comparison.unequal_recipes(single, compared)
    tables.write_all(folder, tables.summarise(rows), compared, unequal, results["ece_bins"].iloc[0])


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--without", nargs="+", default=[], help="trainings to leave out")
    args = parser.parse_args()
    join(args.folder, args.without)
