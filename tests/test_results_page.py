"""docs/results.md shows the runs of docs/replication.json, all of them and nothing else."""

import importlib.util
import json
from pathlib import Path

import pytest

DOCS = Path(__file__).parent.parent / "docs"
spec = importlib.util.spec_from_file_location("make_results", DOCS / "make_results.py")
page = importlib.util.module_from_spec(spec)
spec.loader.exec_module(page)

RESULTS = json.loads((DOCS / "replication.json").read_text())
PLACES = {match[2]: match[3] for match in page.PLACE.finditer((DOCS / "results.md").read_text())}


@pytest.mark.parametrize("name", page.EXPERIMENTS)
def test_an_experiment_s_table_is_made_from_its_runs(name):
    assert PLACES[name] == page.block(name, RESULTS)
    assert f"figures/results_{name}.svg" not in PLACES[name] or (DOCS / "figures" / f"results_{name}.svg").is_file()


def test_every_run_is_in_an_experiment_once():
    keys = [page.key(run) for run in RESULTS]
    assert len(set(keys)) == len(keys)
    names = {arm.name for arms in page.EXPERIMENTS.values() for arm in arms}
    assert {key.rpartition("-")[0] for key in keys} <= names
    assert PLACES.keys() == page.EXPERIMENTS.keys()


def test_a_table_says_what_is_not_measured():
    arms = page.EXPERIMENTS["five"]
    assert "Not measured yet: 6 of 6 rows." in page.table(arms, [])
    (run,) = (each for each in RESULTS if page.key(each) == f"{arms[1].name}-1")
    row = page.table(arms, [run]).splitlines()[2]
    mean, low, high = (f"{run['pass@1'][end]:.1%}" for end in ("mean", "low", "high"))
    assert f"| {mean}&nbsp;[{low},&nbsp;{high}] |" in row
