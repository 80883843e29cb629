"""Fresh virtual environments that see the libraries of the running one, but not the humanline installed there.

Installing torch anew takes minutes, so its files are linked, like those of every other library. humanline itself is
installed by pip, from a copy of this repository that the tests may edit. An environment may also link torch alone, so
that pip has to find everything else.
"""

import json
import os
import re
import select
import shutil
import subprocess
import sysconfig
import venv
from pathlib import Path

REPOSITORY = Path(__file__).parent.parent


def copy_repository(folder: Path) -> Path:
    """Copies what an installation reads, and returns the copy's root."""
    ignore = shutil.ignore_patterns("__pycache__")
    for name in ("humanline", "recipes", "configs"):
        shutil.copytree(REPOSITORY / name, folder / name, ignore=ignore)
    for name in ("pyproject.toml", "constraints.txt", "README.md", "LICENSE", "Makefile"):
        shutil.copy(REPOSITORY / name, folder / name)
    return folder


# By the first word of their names in site-packages: torch with what a CUDA build of it installs, and pip.
TORCH_AND_PIP = {"torch", "torchgen", "functorch", "triton", "nvidia", "cuda", "pip"}


class VirtualEnvironment:
    """A virtual environment in `folder`, with the command `tune` as pip would install it.

    With `torch_alone` it sees none of the running one's libraries but torch and pip.
    """

    def __init__(self, folder: Path, *, torch_alone: bool = False) -> None:
        venv.create(folder, symlinks=True)
        self.python = folder / "bin" / "python"
        self.tune_script = folder / "bin" / "tune"
        self.tune_script.write_text("import sys\nfrom torchtune._cli.tune import main\nsys.exit(main())\n")
        (self.site_packages,) = (folder / "lib").glob("python*/site-packages")

        self.libraries = folder / "libraries"
        self.libraries.mkdir()
        for library in {Path(sysconfig.get_path("purelib")), Path(sysconfig.get_path("platlib"))}:
            for entry in library.iterdir():
                is_seen = re.split("[-_.]", entry.name)[0] in TORCH_AND_PIP or not torch_alone
                if is_seen and "humanline" not in entry.name:
                    (self.libraries / entry.name).symlink_to(entry)
        (self.site_packages / "libraries.pth").write_text(f"{self.libraries}\n")
        self._tune_server: subprocess.Popen[str] | None = None

    def run(
        self, *arguments: str | Path, cwd: Path, first_on_path: Path | None = None, seconds: float = 300
    ) -> subprocess.CompletedProcess[str]:
        """Runs this environment's Python in `cwd`, with only the folder `first_on_path` before its own libraries."""
        environment = _environment()
        if first_on_path is not None:
            environment["PYTHONPATH"] = str(first_on_path)
        command = [str(argument) for argument in (self.python, *arguments)]
        return subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, timeout=seconds)

    def pip(self, *arguments: str | Path) -> None:
        """Runs pip, which must succeed, and may have to download."""
        command = ("-m", "pip", "--disable-pip-version-check", *arguments)
        result = self.run(*command, cwd=self.site_packages, seconds=1200)
        assert result.returncode == 0, result.stderr

    def install(self, *source: str | Path) -> None:
        """Installs from a wheel, or `-e` and a clone, asking no index for anything."""
        self.pip("install", "--no-index", "--no-deps", "--no-build-isolation", *source)

    def tune(self, *arguments: str | Path, cwd: Path, first_on_path: Path | None = None) -> str:
        """Runs `tune`, which must succeed, and returns what it printed."""
        result = self.run_tune(*arguments, cwd=cwd, first_on_path=first_on_path)
        assert result.returncode == 0, result.stderr
        return result.stdout

    def run_tune(
        self, *arguments: str | Path, cwd: Path, first_on_path: Path | None = None, script: Path | None = None
    ) -> subprocess.CompletedProcess[str]:
        """Runs `tune`, or another script of this name, in a fork of a process that has imported torch."""
        server = self._tune_server or self._start_tune_server()
        assert server.stdin and server.stdout
        argv = [str(argument) for argument in (script or self.tune_script, *arguments)]
        output = {stream: str(self._server_folder / stream) for stream in ("stdout", "stderr")}
        first = str(first_on_path) if first_on_path else None
        server.stdin.write(json.dumps({"argv": argv, "cwd": str(cwd), "first_on_path": first, **output}) + "\n")
        server.stdin.flush()
        answered, _, _ = select.select([server.stdout], [], [], 300)
        assert answered, f"tune {arguments} is still running"
        code = int(server.stdout.readline())
        return subprocess.CompletedProcess(argv, code, *(Path(output[name]).read_text() for name in output))

    @property
    def _server_folder(self) -> Path:
        return self.python.parents[1] / "server"

    def _start_tune_server(self) -> subprocess.Popen[str]:
        """Starts what `tune` forks from. It ends when this process does: then nobody can ask anything of it."""
        program = self._server_folder / "tune"  # the name by which the plug-in knows `tune`
        program.parent.mkdir()
        shutil.copy(Path(__file__).with_name("tune_server.py"), program)
        self._tune_server = subprocess.Popen(
            [self.python, program], env=_environment(), stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        return self._tune_server


def _environment() -> dict[str, str]:
    """This process's environment without what would lead Python to other libraries."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
    return {**kept, "OMP_NUM_THREADS": "1"}


def build_wheel(clone: Path, folder: Path) -> Path:
    """Builds the wheel of `clone` into the empty `folder`."""
    VirtualEnvironment(folder / "builder").pip(
        "wheel", "--no-index", "--no-deps", "--no-build-isolation", "--wheel-dir", folder, clone
    )
    (wheel,) = folder.glob("*.whl")
    return wheel
