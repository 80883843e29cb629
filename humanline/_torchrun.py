"""Runs torchrun, and prints one line for each failed process instead of torchrun's own traceback.

``python -m humanline._torchrun`` accepts torchrun's command line.
"""

import signal
import sys
from types import TracebackType


def say_in_a_line(kind: type[BaseException], error: BaseException, traceback: TracebackType | None) -> None:
    """An excepthook that prints one line for each process that ended without printing its own error.

    A process with exit code 1 has printed its error. Processes that torchrun ended after another failure are left out.
    """
    if kind.__name__ == "SignalException":
        print(f"torchrun: stopped by {error.sigval.name}", file=sys.stderr)  # type: ignore[attr-defined]
    elif kind.__name__ == "ChildFailedError":
        failures = error.failures  # type: ignore[attr-defined]
        own = {rank: failure for rank, failure in failures.items() if failure.exitcode != -signal.SIGTERM}
        for rank, failure in (own or failures).items():
            code = failure.exitcode
            if code != 1:
                how = f"was ended by {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"
                print(f"torchrun: rank {rank} (process {failure.pid}) {how}", file=sys.stderr)
    else:
        sys.__excepthook__(kind, error, traceback)


if __name__ == "__main__":
    from torch.distributed.run import main

    sys.excepthook = say_in_a_line
    main()
