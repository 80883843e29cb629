"""A program called `tune` that runs the command `tune`, as often as asked, without the seconds of importing torch.

Each line of its input is a command in JSON. A fork runs it to its end, with what Python does at exit, and its exit code
is the answer. What torchtune imports is imported here; torchtune itself is left to the forks, so that the plug-in's
import hooks act there.
"""

import gc
import json
import os
import runpy
import sys

import datasets  # noqa: F401
import omegaconf  # noqa: F401
import torchao.quantization  # noqa: F401


def become(argv: list[str], cwd: str, stdout: str, stderr: str, first_on_path: str | None) -> None:
    """Makes this process one that was started with these arguments, in this folder."""
    for stream, path, flags in (
        (0, os.devnull, os.O_RDONLY),
        (1, stdout, os.O_WRONLY | os.O_CREAT | os.O_TRUNC),
        (2, stderr, os.O_WRONLY | os.O_CREAT | os.O_TRUNC),
    ):
        os.dup2(os.open(path, flags), stream)
    os.chdir(cwd)
    sys.argv = argv
    sys.path[0] = os.path.dirname(argv[0])
    if first_on_path:
        sys.path.insert(1, first_on_path)
        os.environ["PYTHONPATH"] = first_on_path


gc.freeze()  # or each fork would, at its end, collect what the imports left
for line in sys.stdin:
    if child := os.fork():
        print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
    else:
        become(**json.loads(line))
        runpy.run_path(sys.argv[0], run_name="__main__")
        break
