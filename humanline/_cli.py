"""The command ``humanline``."""

import argparse
import sys
from pathlib import Path

from humanline._garbage import spare_imports
from humanline._home import HOME
from humanline.errors import ConfigError, DataError


def main() -> None:
    """Runs ``humanline plan``."""
    parser = argparse.ArgumentParser(prog="humanline")
    commands = parser.add_subparsers(required=True)
    plan = commands.add_parser(
        "plan",
        help="estimates the memory and time that a config needs on each GPU; needs no GPU itself",
        description="Runs two steps of the recipe on fake tensors, as one of N ranks, and prints what they need.",
    )
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
    arguments = parser.parse_args()
    try:
        print(_plan(arguments))
    except (ConfigError, DataError) as error:
        sys.exit(f"humanline plan: {error}")


def _plan(arguments: argparse.Namespace) -> str:
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
    return head + report(
        cfg,
        arguments.nproc,
        arguments.device_memory,
        arguments.tflops,
        tell=lambda what: print(f"humanline plan: {what} ...", file=sys.stderr, flush=True),
    )


if __name__ == "__main__":
    main()
