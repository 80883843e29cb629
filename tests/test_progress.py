"""Progress of long stages where the output is no terminal: a line now and then, in place of a bar."""

import io
import re
from contextlib import suppress
from pathlib import Path

import pytest

from humanline import progress
from humanline.progress import Progress


@pytest.fixture
def clock(monkeypatch):
    """The seconds that have passed, for the bar and its lines."""
    now = [0.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    monkeypatch.setattr("tqdm.std.time", lambda: now[0])
    return now


@pytest.mark.parametrize("desc", [None, "log-probs"])
def test_a_line_has_the_time_left_and_comes_at_most_every_ten_seconds(desc, clock, capsys):
    with Progress(total=100, desc=desc, unit="step") as bar:
        for _ in range(25):
            clock[0] += 1
            bar.set_postfix({"loss": "0.69"}, refresh=False)
            bar.update()
    lines = capsys.readouterr().err.splitlines()
    if desc:
        assert all(line.startswith("log-probs: ") for line in lines)
    assert [line.removeprefix("log-probs: ") for line in lines] == [
        "10 of 100, 00:10 elapsed, 01:30 left, 1.00step/s, loss=0.69",
        "20 of 100, 00:20 elapsed, 01:20 left, 1.00step/s, loss=0.69",
        "25 of 100, 00:25 elapsed, 01:15 left, 1.00step/s, loss=0.69",
    ]


def test_the_first_line_waits_for_a_percent_or_a_minute(clock, capsys):
    with Progress(total=960, unit="response", smoothing=0) as bar:
        clock[0] = 40  # a batch of equally long responses
        for _ in range(96):
            bar.update()
        clock[0] = 41
        bar.update()
    assert capsys.readouterr().err.splitlines()[0] == "97 of 960, 00:41 elapsed, 06:04 left, 2.37response/s"
    with Progress(total=960, unit="response", leave=False) as bar:
        for now in (50, 99, 102):
            clock[0] = now
            bar.update()
            assert len(capsys.readouterr().err.splitlines()) == (now == 102)


def test_a_short_stage_that_leaves_nothing_writes_nothing(clock, capsys):
    with Progress(total=3, desc="sampling", leave=False) as bar:
        bar.update(3)
    with Progress(total=3, desc="sampling", disable=True) as bar:
        clock[0] += 100
        bar.update(3)
    assert capsys.readouterr().err == ""


def test_of_an_unknown_number_it_says_how_many(clock, capsys):
    for _ in Progress(range(30).__iter__(), desc="reading pairs", unit=" rows", leave=False):
        clock[0] += 1
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 3 and all(re.match(r"reading pairs: \d+ rows \[00:\d\d,", line) for line in lines)


def test_on_a_terminal_it_is_a_bar(clock, capsys, monkeypatch):
    monkeypatch.setattr(progress.sys.stderr, "isatty", lambda: True, raising=False)
    with Progress(total=2) as bar:
        bar.update(2)
    assert re.search(r"100%\|.*\| 2/2 \[", capsys.readouterr().err)


def test_what_is_shown_again_is_not_written_again(clock, capsys):
    with Progress(total=2) as bar:
        clock[0] += 20
        bar.update(2)
        clock[0] += 20
        bar.refresh()
    assert len(capsys.readouterr().err.splitlines()) == 1


@pytest.mark.parametrize("stream", [None, "closed", "full"])
def test_an_output_that_takes_nothing_ends_no_run(stream, clock, monkeypatch):
    full = Path("/dev/full").open("w")
    if stream == "closed":
        full.close()
    monkeypatch.setattr(progress.sys, "stderr", full if stream else None)
    with Progress(total=2, file=io.StringIO()) as bar:
        clock[0] += 20
        bar.update(2)
    assert bar.n == 2
    monkeypatch.undo()
    with suppress(OSError):
        full.close()
