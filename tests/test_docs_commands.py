"""Every command of the pages: what tests it, or why it is not run.

A `tune run` line is not run as it stands, since it needs weights and hours. Here its recipe, its config and each of its
overrides are checked as the recipe checks them before it reads anything. Other tests run the same recipes on small
models.
"""

import re
import shlex
from pathlib import Path

import pytest
from conftest import ROOT
from omegaconf import OmegaConf
from test_configs import recipe_class

from humanline.config import Settings, check_component, is_given, load_config, with_overrides

PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]

# What each command begins with, and the test that runs such a command, or the reason why none does.
TESTED = {
    "humanline plan": "test_planning.py::test_the_command_takes_a_config_s_path_and_overrides",
    "humanline report outputs/RUN --watch": "test_report.py::test_a_watched_run_s_page_follows_it_until_the_signal",
    "humanline report": "test_report.py::test_the_command_writes_into_the_run_and_prints_the_address",
    "HEAD=": "test_multinode.py::test_two_nodes_with_a_process_each_have_the_losses_of_the_authors_code",
    "sbatch": "test_multinode.py::"
    "test_a_slurm_job_of_two_nodes_with_two_processes_each_shards_within_nodes_and_equals_one_process",
    "tune cp": "test_tune_plugin.py::test_cp_copies_a_recipe_by_name",
    "tune ls": "test_tune_plugin.py::test_ls_lists_torchtunes_recipes_unchanged_and_then_humanlines",
    "tune run my_dpo.py": "test_tune_plugin.py::test_run_a_copied_recipe_by_path",
    "tune run humanline_dpo_single_device": "test_tune_plugin.py::test_run_by_name_works_from_any_folder",
    "make lint": "test_links.py::test_every_link_leads_to_a_file_and_to_a_heading_of_it",
}
NOT_RUN = {
    "python3 -m venv": "every test runs in an environment that make has made so",
    "pip install": "installs packages",
    "python -m pip install": "installs packages",
    ".venv/bin/pre-commit": "changes the clone's hooks",
    "tune download": "needs the Hugging Face hub",
    "hf download": "needs the Hugging Face hub",
    "python -m humanline.tools.fetch_smollm2": "downloads a model; tests/test_smollm2.py runs it",
    "export": "sets a secret",
    "alpaca_eval": "needs a judge's key",
    "lm_eval": "needs the package and its tasks from the hub",
    "lighteval": "needs the package and its tasks from the hub",
    "transformers serve": "a server; tests/test_online.py starts one",
    "make demo": "minutes of two cores",
    "which tune": "prints the user's paths",
}


def commands() -> list[str]:
    """The commands in the shell blocks of all pages, each once, with its continued lines."""
    found = {}
    for page in PAGES:
        for block in re.findall(r"```(?:sh|bash)\n(.*?)```", page.read_text(), re.DOTALL):
            for line in block.replace("\\\n", " ").splitlines():
                words = " ".join(line.split(" #")[0].split())
                if words and not words.startswith("#"):
                    found[words] = None
    return [*found]


def first(table: dict[str, str], command: str) -> str | None:
    return next((what for start, what in table.items() if command.startswith(start)), None)


RUNS = [command for command in commands() if re.match(r"tune run \S+ --config (configs|humanline)/", command)]


@pytest.mark.parametrize("command", [command for command in commands() if command not in RUNS])
def test_a_command_names_the_test_that_runs_it_or_why_none_does(command):
    test = first(TESTED, command)
    assert (test is None) != (first(NOT_RUN, command) is None), f"add {command!r} to TESTED or to NOT_RUN"
    if test is not None:
        file, _, name = test.partition("::")
        assert f"def {name}(" in (ROOT / "tests" / file).read_text()


@pytest.mark.parametrize("table", [TESTED, NOT_RUN], ids=["tested", "not run"])
def test_nothing_is_said_of_commands_that_no_page_has(table):
    unused = [start for start in table if not any(command.startswith(start) for command in commands())]
    assert not unused


@pytest.mark.parametrize("command", RUNS)
def test_a_run_names_a_recipe_a_config_and_keys_that_exist(command, tmp_path):
    _, _, recipe, _, config, *overrides = shlex.split(command)
    name = Path(recipe).name
    cfg = with_overrides(load_config(ROOT / "configs" / Path(config).with_suffix(".yaml").name), overrides)
    cfg.output_dir = str(tmp_path)
    kind = recipe_class(name)
    (Settings.from_config if hasattr(kind, "train") else kind)(cfg)
    for key in cfg:
        if OmegaConf.is_dict(cfg[key]) and "_component_" in cfg[key] and is_given(cfg, str(key)):
            positional = (None,) if key in ("dataset", "dataset_val", "optimizer", "lr_scheduler") else ()
            named = {"num_training_steps": 1} if key == "lr_scheduler" else {}
            check_component(cfg, str(key), *positional, **named)
