"""The command ``humanline``."""

import argparse
import sys
from importlib.util import find_spec
from pathlib import Path

from humanline._garbage import spare_imports
from humanline._home import HOME
from humanline.errors import ConfigError, DataError


def main() -> None:
    """Runs ``humanline plan`` or ``humanline report``."""
    parser = argparse.ArgumentParser(prog="humanline")
    commands = parser.add_subparsers(required=True, dest="command")
    plan = commands.add_parser(
        "plan",
        help="estimates the memory and time that a config needs on each GPU; needs no GPU itself",
        description="Runs two steps of the recipe on fake tensors, as one of N ranks, and prints what they need.",
    )
    plan.set_defaults(run=_plan)
    plan.add_argument(
        "--config", required=True, help="a config file, or a name as tune ls lists it: humanline/llama3_8b_offline"
    )
    plan.add_argument("--nproc", type=int, default=1, help="processes of the run (default: 1)")
    plan.add_argument("--device-memory", type=float, default=80.0, help="memory of a GPU in GB (default: 80)")
    plan.add_argument("--tflops", type=float, default=330.0, help="rate that a GPU reaches, TFLOP/s (default: 330)")
    plan.add_argument(
        "overrides",
        nargs="*",
        metavar="key=value",
        help="config overrides, as for tune run: key=value, or ~key to remove a key",
    )
    report = commands.add_parser(
        "report",
        help="writes one HTML file with the curves, settings and completions of runs",
        description="Reads what runs have written, also while they train, and writes one HTML file.",
    )
    report.set_defaults(run=_report)
    report.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="output_dir of a run; several are compared")
    report.add_argument("--output", type=Path, help="the file (default: RUN/report.html, report.html for several runs)")
    report.add_argument("--png", type=Path, metavar="FOLDER", help="writes each figure as an image too")
    report.add_argument(
        "--watch",
        type=float,
        nargs="?",
        const=30.0,
        metavar="SECONDS",
        help="writes the file again as often, until Ctrl-C (default: 30)",
    )
    arguments = parser.parse_args()
    try:
        arguments.run(arguments)
    except (ConfigError, DataError) as error:
        sys.exit(f"humanline {arguments.command}: {error}")


def _plan(arguments: argparse.Namespace) -> None:
    from humanline.config import load_config, with_overrides
    from humanline.launch import hide_known_warnings
    from humanline.planning import report

    hide_known_warnings()
    spare_imports()
    for name in ("nproc", "device_memory", "tflops"):
        if (value := getattr(arguments, name)) <= 0:
            raise ConfigError(f"--{name.replace('_', '-')}: expected a number above 0, got {value}")
    path = Path(arguments.config)
    if arguments.config.startswith("humanline/") and not path.is_file():
        path = HOME / "configs" / f"{path.name}.yaml"
    cfg = with_overrides(load_config(path), arguments.overrides)
    head = f"{path}, {arguments.nproc} {'rank' if arguments.nproc == 1 else 'ranks'}\n\n"
    found = report(
        cfg,
        arguments.nproc,
        arguments.device_memory,
        arguments.tflops,
        tell=lambda what: print(f"humanline plan: {what} ...", file=sys.stderr, flush=True),
    )
    print(head + found)


def _report(arguments: argparse.Namespace) -> None:
    if find_spec("plotly") is None:
        raise ConfigError("needs the package plotly; install it: pip install plotly")
    from humanline.report import write_report

    output = arguments.output or (arguments.runs[0] if len(arguments.runs) == 1 else Path()) / "report.html"
    write_report(arguments.runs, output, images=arguments.png, every=arguments.watch)


if __name__ == "__main__":
    main()
