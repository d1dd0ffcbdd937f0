"""The page of published and measured numbers says what the measured tables say."""

import runpy

from conftest import ROOT


def test_the_tables_of_the_page_are_those_of_the_results():
    parity = runpy.run_path(str(ROOT / "results/parity.py"))
    page = (ROOT / "docs/results.md").read_text()
    assert parity["replaced"](page) == page, "python results/parity.py writes it anew"


def test_a_measured_number_stands_beside_its_published_one_with_z():
    compared = runpy.run_path(str(ROOT / "results/parity.py"))["compare"]()
    measured = compared[compared["n"] > 1]
    assert {"LR paper", "ILS appendix"} <= set(measured["source"])
    expected = (measured["mean"] - measured["published"].astype(float)) / measured["std"]
    assert (measured["z"] - expected).abs().max() < 1e-12
