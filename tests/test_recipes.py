"""The training recipes are six files to copy and to change, and one text."""

import ast
import math

import pytest
from conftest import ROOT, TUNE, run

OBJECTIVES = ("dpo", "kto", "grpo")
FILES = {
    (objective, kind): ROOT / "recipes" / f"humanline_{objective}_{kind}.py"
    for objective in OBJECTIVES
    for kind in ("distributed", "single_device")
}


def recipe_class(objective: str, kind: str) -> ast.ClassDef:
    """A recipe's class, without its name and its docstrings."""
    tree = ast.parse(FILES[objective, kind].read_text())
    (found,) = (node for node in tree.body if isinstance(node, ast.ClassDef))
    for node in ast.walk(found):
        if isinstance(node, ast.ClassDef | ast.FunctionDef) and ast.get_docstring(node):
            node.body = node.body[1:]
    found.name = "Recipe"
    return found


def is_sharded(node: ast.stmt) -> bool:
    return isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "sharded"


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_the_parallelism_of_a_recipe_is_one_line(objective):
    both = [recipe_class(objective, kind) for kind in ("distributed", "single_device")]
    lines = [[ast.unparse(node) for node in each.body if is_sharded(node)] for each in both]
    assert lines == [["sharded = True"], ["sharded = False"]]
    rest = [[ast.unparse(node) for node in each.body if not is_sharded(node)] for each in both]
    assert rest[0] == rest[1]


def test_the_objective_of_a_recipe_is_how_it_calls_its_loss():
    texts = {}
    for objective in OBJECTIVES:
        body = recipe_class(objective, "distributed").body
        its_own = ("loss_and_metrics", "kl_baseline")
        shared = [node for node in body if not (isinstance(node, ast.FunctionDef) and node.name in its_own)]
        assert len(body) - len(shared) == (2 if objective == "kto" else 1)
        texts[objective] = "\n".join(map(ast.unparse, shared)).replace(f"= {objective.upper()}(", "= OBJECTIVE(")
    assert texts["dpo"] == texts["grpo"]
    # KTO's baseline: from the KL sequences of the microbatch, and of the held-out groups.
    lines = (
        texts["kto"].replace("draws, kl)", "draws)").replace("loss_and_metrics, self.kl_baseline)", "loss_and_metrics)")
    )
    own = [line for line in lines.splitlines() if line not in texts["dpo"].splitlines()]
    assert [line.split(" = ")[0].strip() for line in own] == ["passes", "kl"]
    assert [line for line in lines.splitlines() if line not in own] == texts["dpo"].splitlines()


@pytest.mark.parametrize("file", FILES.values(), ids=lambda file: file.stem)
def test_a_recipe_is_read_in_one_go(file):
    assert len(file.read_text().splitlines()) <= 200


def test_a_copy_with_another_loss_and_another_rule_of_syncing_does_what_it_says(trajectory, tmp_path):
    copy = tmp_path / "my_dpo.py"
    run([str(TUNE), "cp", "humanline_dpo_distributed", str(copy)], cwd=tmp_path)
    text = copy.read_text()
    for before, after in {
        "return losses.sum(), {": "return 2 * losses.sum(), {",
        "self.reference.before_optimizer_step(step)": "self.reference.sync(step) if step in (2, 5) else None",
    }.items():
        assert text.count(before) == 1
        text = text.replace(before, after)
    copy.write_text(text)
    mine = trajectory("dpo_8_k4")
    mine.recipe = copy
    assert mine.train() is None
    losses = mine.log()
    # Policy and reference are one before the first step, and at no later one, since the weights move after a sync.
    assert losses[1] == pytest.approx(2 * math.log(2), abs=1e-6) and abs(losses[6] - losses[1]) > 1e-6
    since = mine.log("steps_since_sync")
    assert list(since.values()) == [1, 0, 1, 2, 0, 1, 2, 3, 4, 5, 6, 7]
