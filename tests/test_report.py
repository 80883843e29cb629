"""`humanline report`: what it reads of a run, what it says, and that a browser shows it."""

import json
import math
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from time import monotonic

import pytest
from omegaconf import OmegaConf
from selenium import webdriver
from selenium.webdriver.common.by import By
from selenium.webdriver.support.ui import Select

from humanline.errors import ConfigError, DataError
from humanline.report import page, read_runs
from humanline.report._figures import figures

HOSTILE = "</script><script>document.title='broken'</script><b>&amp;"


def write_run(folder: Path, *, steps=range(1, 13), sync_every=4, lines=(), bounds=(-1.5, 1.5), **config) -> Path:
    """A run as its logger and its completions leave it."""
    (folder / "logs").mkdir(parents=True)
    settings = {
        "output_dir": str(folder),
        "loss": {"log_eps_P": bounds[0], "log_eps_R": bounds[1]},
        "reference": {"sync_every": sync_every},
        **config,
    }
    OmegaConf.save(OmegaConf.create(settings), folder / "torchtune_config.yaml")
    text = "Step 0 | val/loss:0.7 \n"
    for step in steps:
        since = step % sync_every if sync_every else step
        text += (
            f"Step {step} | loss:{1 / step} kl:{step / 100} steps_since_sync:{since} skipped_steps:0 entropy:0.5 "
            f"log_ratio/p01:-{step} log_ratio/p50:0.0 log_ratio/p99:1.0 tokens_per_second:{100 + step} \n"
        )
    (folder / "logs" / "log_1.txt").write_text(text + "".join(lines))
    return folder


def write_completions(folder: Path, name: str, rewards) -> None:
    (folder / "completions").mkdir(exist_ok=True)
    rows = [
        {
            "prompt": f"{name} question {i}",
            "completion": HOSTILE if i == 0 else f"answer {i}",
            "reward": reward,
            "tokens": 3,
            "finish": "stop",
            "mean_log_ratio": -0.25,
        }
        for i, reward in enumerate(rewards)
    ]
    (folder / "completions" / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def read(folder: Path):
    (run,) = read_runs([folder])
    return run


# ------------------------------------------------------------------------------------------------------------- reading


def test_a_log_is_read_by_metric_and_step(tmp_path):
    run = read(write_run(tmp_path / "run"))
    assert run.metrics["loss"] == {step: 1 / step for step in range(1, 13)}
    assert run.metrics["val/loss"] == {0: 0.7}
    assert run.config["loss.log_eps_P"] == -1.5 and run.bounds == (-1.5, 1.5)
    assert (run.syncs, run.restarts, run.last_step, run.unread) == ((4, 8, 12), (), 12, 0)


def test_steps_after_a_restart_replace_those_that_were_lost(tmp_path):
    folder = write_run(tmp_path / "run", steps=range(1, 8))
    (folder / "logs" / "log_2.txt").write_text("".join(f"Step {step} | loss:9.0 \n" for step in range(5, 9)))
    os.utime(folder / "logs" / "log_1.txt", (1, 1))
    run = read(folder)
    assert run.restarts == (4,)
    assert run.metrics["loss"] == {step: 9.0 if step >= 5 else 1 / step for step in range(1, 9)}


def test_a_line_that_is_being_written_is_left_for_the_next_report(tmp_path):
    run = read(write_run(tmp_path / "run", lines=["Step 13 | loss:0.12"]))  # of 0.125
    assert max(run.metrics["loss"]) == 12 and run.unread == 0


def test_what_cannot_be_read_is_counted_and_said(tmp_path):
    run = read(write_run(tmp_path / "run", lines=["Step 13 | loss:nan kl:tensor(1.) \n"]))
    assert math.isnan(run.metrics["loss"][13]) and 13 not in run.metrics["kl"] and run.unread == 1
    assert "<td>lines of the log that could not be read</td><td>1</td>" in page([run])
    assert "could not be read" not in page([read(write_run(tmp_path / "other"))])


def test_a_long_run_s_completions_are_sampled_over_all_of_it_and_the_rest_is_counted(tmp_path):
    folder = write_run(tmp_path / "run")
    for round in range(100):
        write_completions(folder, f"round_{round}", [0.0] * 20)
    run = read(folder)
    stages = list(dict.fromkeys(row["stage"] for row in run.completions))
    assert (stages[0], stages[-1], len(stages)) == ("round 0", "round 99", 40)
    assert len(run.completions) == 640 and run.left_out == 100 * 20 - 640
    assert "1,360 more completions are in the runs' folders." in page([run])


@pytest.mark.parametrize("missing", ["folder", "log"])
def test_a_folder_that_is_no_run_is_refused_by_name(missing, tmp_path):
    folder = tmp_path / "run"
    if missing == "log":
        write_run(folder, metric_logger={"_component_": "torchtune.training.metric_logging.WandBLogger"})
        shutil.rmtree(folder / "logs")
    words = {"folder": "is not a folder; name the output_dir", "log": "this run's metric_logger is .*WandBLogger"}
    with pytest.raises(ConfigError, match=f"{folder}: .*{words[missing]}"):
        read(folder)


def test_bounds_that_the_config_takes_from_elsewhere_are_not_drawn(tmp_path):
    run = read(write_run(tmp_path / "run", bounds=("${clip}", 1.5)))
    assert run.bounds == (None, 1.5) and page([run])


def test_a_broken_line_of_completions_is_refused_by_number(tmp_path):
    folder = write_run(tmp_path / "run")
    write_completions(folder, "round_0", [1.0])
    with open(folder / "completions" / "round_0.jsonl", "a") as file:
        file.write("{\n")
    with pytest.raises(DataError, match="round_0.jsonl:2: is not JSON"):
        read(folder)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["dpo_8_k4", "kto_8_k4", "grpo_8_k4"])
def test_every_metric_of_a_real_run_has_its_figure(name, trajectory):
    run = trajectory(name)
    run.train_on(1)
    found = read(Path(run.config["output_dir"]))
    assert set(figures([found])) == {"Training", "Perception", "Speed and memory"}  # no others
    assert found.last_step == len(run.golden["losses"]) and found.syncs and not found.unread
    assert [*found.metrics["loss"].values()] == pytest.approx(run.golden["losses"], abs=1e-5)


# ------------------------------------------------------------------------------------------------------------ the page


def test_runs_are_compared_by_the_settings_that_differ(tmp_path):
    folders = [write_run(tmp_path / "a" / "out"), write_run(tmp_path / "b" / "out", sync_every=6, epochs=2)]
    runs = read_runs(folders)
    assert [run.name for run in runs] == ["a/out", "b/out"]
    text = page(runs)
    differences = text[text.index("What differs") : text.index("<h2>Summary")]
    assert "<td>reference.sync_every</td><td>4</td><td>6</td>" in differences
    assert "<td>epochs</td><td>—</td><td>2</td>" in differences
    assert differences.count("<tr>") == 3
    same = read_runs([folders[0], folders[0]])
    assert "The configs are the same." in page(same) and "What differs" not in page(runs[:1])


def test_the_arguments_of_a_removed_component_are_not_shown(tmp_path):
    removed = {"_component_": None, "source": "demo/held_out_groups.jsonl"}
    config = read(write_run(tmp_path / "run", dataset_val=removed)).config
    assert {key: value for key, value in config.items() if key.startswith("dataset_val")} == {
        "dataset_val._component_": None
    }


def test_the_summary_has_first_and_last_values(tmp_path):
    text = page([read(write_run(tmp_path / "run", steps=range(1, 5)))])
    for row in (
        "last step</td><td>4",
        "loss</td><td>1 → 0.25",
        "syncs</td><td>1, last at 4",
        "tokens/s, median</td><td>102",
    ):
        assert row in text


def test_bounds_and_syncs_are_in_the_figure_of_log_ratios(tmp_path):
    run = read(write_run(tmp_path / "run", bounds=(-0.1, 0.5)))
    (figure,) = (each for each in figures([run])["Perception"] if "log-ratios" in each.layout.title.text)
    traces = {trace.name: trace for trace in figure.data}
    assert traces["log_eps_P -0.1"].y == (-0.1, -0.1) and traces["log_eps_R 0.5"].y == (0.5, 0.5)
    assert traces["syncs"].x == (4, 8, 12)
    assert traces["1st percentile"].y == tuple(-step for step in range(1, 13))


@pytest.mark.parametrize(
    ("metric", "values", "range_", "scale", "title"),
    [
        ("lr", [2e-5] * 40, (0, 2.5e-5), None, "Learning rate"),
        ("rewards/mean", [-2.0] * 40, (-2.5, 0), None, "Reward"),
        ("loss", [*range(20), *range(20), 5000], (-17, 37), None, "Loss (1 of 42 values lie outside)"),
        ("loss", [*range(20), *range(20), 50], None, None, "Loss"),
        ("grad_norm", [*range(1, 40), 1e6], None, "log", "Gradient norm"),
        ("rewards/accuracies", [*[1.0] * 39, 0.5], None, None, "Accuracy"),
        ("loss", [float("nan"), 1.0], None, None, "Loss"),
        ("lr", [*[2e-5] * 40, 2.0000001e-5, 1e-6], None, None, "Learning rate"),
    ],
)
def test_no_outlier_or_constant_flattens_a_curve(tmp_path, metric, values, range_, scale, title):
    lines = [f"Step {step} | {metric}:{value} \n" for step, value in enumerate(values, 1)]
    run = read(write_run(tmp_path / "run", steps=range(0), lines=lines))
    drawn = {figure.data[0].name: figure for figure in figures([run])["Training"]}
    figure = drawn[metric]
    assert figure.layout.title.text == title
    assert figure.layout.yaxis.range == (range_ and pytest.approx(range_))
    assert figure.layout.yaxis.type == scale


def test_a_curve_of_few_values_is_never_left_out(tmp_path):
    lines = [f"Step {step} | kl:{0.002 + step % 7 / 10000} \n" for step in range(1, 300)]
    lines += [f"Step {step} | val/kl:{step / 1000} \n" for step in range(0, 300, 50)]
    run = read(write_run(tmp_path / "run", steps=range(0), lines=lines))
    (figure,) = (each for each in figures([run])["Perception"] if each.data[0].name == "kl")
    assert figure.layout.title.text == "KL to the reference" and figure.layout.yaxis.range is None


def test_a_metric_that_nobody_knows_is_drawn_too(tmp_path):
    run = read(write_run(tmp_path / "run", lines=["Step 12 | my/metric:3.0 \n"]))
    assert [figure.layout.title.text for figure in figures([run])["Other metrics"]] == ["my/metric"]


# ---------------------------------------------------------------------------------------------------------- the command


def command(*arguments, **settings):
    return subprocess.Popen(
        [sys.executable, "-m", "humanline._cli", "report", *map(str, arguments)],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **settings,
    )  # fmt: skip


@pytest.mark.slow
def test_the_command_writes_into_the_run_and_prints_the_address(tmp_path):
    folder = write_run(tmp_path / "run")
    output, errors = command(folder).communicate(timeout=120)
    assert (output.strip(), errors) == ((folder / "report.html").as_uri(), "")
    assert "<h2>Summary" in (folder / "report.html").read_text()
    process = command(folder, tmp_path / "none")
    assert process.communicate(timeout=120)[1] == (
        f"humanline report: {tmp_path / 'none'}: is not a folder; name the output_dir of a run\n"
    )
    assert process.returncode == 1


@pytest.mark.slow
def test_a_watched_run_s_page_follows_it_until_the_signal(tmp_path):
    folder = write_run(tmp_path / "run", steps=range(1, 4))
    file = folder / "report.html"
    process = command(folder, "--watch", 1)
    try:
        assert process.stdout.readline().strip() == file.as_uri()
        assert '<meta http-equiv="refresh" content="1">' in file.read_text()
        with open(folder / "logs" / "log_1.txt", "a") as log:
            log.write("Step 77 | loss:0.5 \n")
        deadline = monotonic() + 60
        while "<td>77</td>" not in file.read_text():
            assert process.stdout.readline() and monotonic() < deadline
        process.send_signal(signal.SIGINT)
        assert process.wait(60) == 0
        assert "http-equiv" not in file.read_text() and "<td>77</td>" in file.read_text()
    finally:
        process.kill()
        process.communicate()


# ---------------------------------------------------------------------------------------------------------- the browser

needs_chromium = pytest.mark.skipif(
    not (shutil.which("chromedriver") and shutil.which("chromium")), reason="needs chromium and chromium-driver"
)


@pytest.fixture(scope="module")
def browser():
    options = webdriver.ChromeOptions()
    options.binary_location = shutil.which("chromium")
    for argument in ("--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage"):
        options.add_argument(argument)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    driver = webdriver.Chrome(options, webdriver.ChromeService(shutil.which("chromedriver")))
    yield driver
    driver.quit()


def opened(browser, runs, tmp_path, width=1600):
    file = tmp_path / "report.html"
    file.write_text(page(runs), encoding="utf-8")
    browser.set_window_size(width, 1000)
    browser.get(file.as_uri())
    assert [entry["message"] for entry in browser.get_log("browser")] == []  # no error, and nothing asked for
    return browser.find_elements(By.CLASS_NAME, "plot")


@needs_chromium
@pytest.mark.slow
@pytest.mark.parametrize("width", [400, 1600])
@pytest.mark.parametrize("count", [1, 3])
def test_a_browser_shows_every_figure_at_any_width(width, count, browser, tmp_path):
    runs = read_runs([write_run(tmp_path / f"run_{i}", sync_every=4 + i) for i in range(count)])
    plots = opened(browser, runs, tmp_path, width)
    expected = [figure for each in figures(runs).values() for figure in each]
    assert len(plots) == len(expected) > 4
    for plot, figure in zip(plots, expected, strict=True):
        drawn = browser.execute_script("return arguments[0].querySelectorAll('.trace.scatter').length", plot)
        assert drawn == len(figure.data)
        assert plot.size["width"] <= browser.execute_script("return document.documentElement.clientWidth")
    assert browser.execute_script("return document.documentElement.scrollWidth <= innerWidth")


@needs_chromium
@pytest.mark.slow
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_text_stands_out_from_the_page_in_light_and_dark(scheme, browser, tmp_path):
    features = [{"name": "prefers-color-scheme", "value": scheme}]
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": features})
    (plot, *_) = opened(browser, [read(write_run(tmp_path / "run"))], tmp_path)

    def brightness(element, style):
        color = browser.execute_script("return getComputedStyle(arguments[0])[arguments[1]]", element, style)
        return sum(map(float, color.partition("(")[2].rstrip(")").split(",")[:3])) / 3

    back = brightness(browser.find_element(By.TAG_NAME, "body"), "backgroundColor")
    assert (back > 200) == (scheme == "light")
    texts = [(browser.find_element(By.TAG_NAME, "td"), "color"), (plot.find_element(By.CLASS_NAME, "gtitle"), "fill")]
    assert all(abs(brightness(*text) - back) > 150 for text in texts)


@needs_chromium
@pytest.mark.slow
def test_the_completions_are_filtered_and_no_text_of_a_model_is_markup(browser, tmp_path):
    folder = write_run(tmp_path / "run")
    write_completions(folder, "round_0", [0.0, 1.0, 0.5])
    write_completions(folder, "step_8", [None, None])
    lines = (folder / "completions" / "step_8.jsonl").read_text()
    lines = lines.replace('"answer 1"', '"a\u2028b"').replace('"mean_log_ratio": -0.25', '"mean_log_ratio": NaN')
    (folder / "completions" / "step_8.jsonl").write_text(lines + '{"half')
    opened(browser, [read(folder)], tmp_path)

    def rows():
        lines = browser.find_elements(By.CSS_SELECTOR, "#completions tbody tr")
        return [[cell.text for cell in line.find_elements(By.TAG_NAME, "td")] for line in lines]

    assert len(rows()) == 5 and browser.title != "broken"
    assert rows()[0][1:] == ["round 0", "round_0 question 0", HOSTILE, "0", "3", "stop", "-0.25"]
    form = browser.find_element(By.ID, "filter")
    form.find_element(By.NAME, "least").send_keys("0.5")
    assert [row[3] for row in rows()] == ["answer 1", "answer 2"]
    form.find_element(By.NAME, "words").send_keys("ANSWER 2")
    assert [row[3] for row in rows()] == ["answer 2"]
    assert browser.find_element(By.ID, "count").text == "1 of 5 match."
    for name in ("least", "words"):
        form.find_element(By.NAME, name).clear()
    Select(form.find_element(By.NAME, "stage")).select_by_visible_text("held out, step 8")
    assert [row[2] for row in rows()] == ["step_8 question 0", "step_8 question 1"]
    assert [row[-1] for row in rows()] == ["nan", "nan"] and rows()[1][3].startswith("a")
