"""Encoded groups in a folder of arrays, which all processes of a node map into memory together.

A folder's name is a digest of everything that its groups depend on, so a run with the same data, tokenizer and settings
finds it. It is written under another name and renamed when it is complete.

    tokens.bin      int32, all prompts and responses in order
    ends.npy        int64, where each sequence ends in it: a group's prompt, then its responses
    firsts.npy      int64, each group's first sequence, and one more entry
    values.npy      float64 [2, sequences], score and label of each response; NaN for none
    places.npy      int64 [2, groups], the file and the number of the row that a group comes from
    facts.json      what the report says
"""

import json
import os
import shutil
import time
from array import array
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any
from uuid import uuid4

import numpy as np
import torch.distributed as dist

from humanline.data._group import Group, LazyGroups
from humanline.distributed import gathered, together
from humanline.errors import ConfigError

__all__ = ["EncodedGroups", "GroupWriter", "open_encoded"]

_NAN = float("nan")
_FILES = ("tokens.bin", "ends.npy", "firsts.npy", "values.npy", "places.npy", "facts.json")
_UNFINISHED = "unfinished_"
FLUSH = 1 << 20
"""Tokens that are written at a time."""


class EncodedGroups(LazyGroups):
    """The groups of a folder, mapped into memory. A group is made when it is asked for.

    Args:
        folder (Path): the folder, complete.
    """

    def __init__(self, folder: Path) -> None:
        self.facts: dict[str, Any] = json.loads((folder / "facts.json").read_text(encoding="utf-8"))
        self._ends, self._firsts, self._values, self._places = (
            np.load(folder / f"{name}.npy", mmap_mode="r") for name in ("ends", "firsts", "values", "places")
        )
        self._tokens = np.memmap(folder / "tokens.bin", np.int32, "r")

    def __len__(self) -> int:
        return len(self._firsts) - 1

    def group(self, index: int) -> Group:
        first, last = self._firsts[index], self._firsts[index + 1]
        ends = self._ends[max(first - 1, 0) : last].tolist()
        start = ends.pop(0) if first else 0
        tokens = array("i", self._tokens[start : ends[-1]].tobytes())
        cuts = [0, *(end - start for end in ends)]
        prompt, *responses = (tokens[a:b] for a, b in zip(cuts, cuts[1:], strict=False))
        scores, labels = self._values[:, first + 1 : last].tolist()
        file, number = self._places[:, index].tolist()
        return Group(
            prompt,
            tuple(responses),
            None if scores[0] != scores[0] else tuple(scores),
            None if labels[0] != labels[0] else tuple(map(bool, labels)),
            f"{self.facts['places'][file]}{number}" if number >= 0 else self.facts["places"][file],
        )


class GroupWriter:
    """Writes groups into a folder for :class:`EncodedGroups`.

    Args:
        folder (Path): an empty folder.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._tokens = (folder / "tokens.bin").open("wb")
        self._ends, self._firsts = array("q"), array("q", [0])
        self._values = array("d"), array("d")
        self._places = array("q"), array("q")
        self._files: dict[str, int] = {}
        self._end, self._buffer = 0, array("i")

    def __len__(self) -> int:
        return len(self._firsts) - 1

    def add(self, group: Group) -> None:
        """Appends a group."""
        for tokens in (group.prompt, *group.responses):
            self._buffer.extend(tokens)
            self._end += len(tokens)
            self._ends.append(self._end)
        if len(self._buffer) > FLUSH:
            self._flush()
        self._firsts.append(len(self._ends))
        for values, given in zip(self._values, (group.scores, group.labels), strict=True):
            values.append(_NAN)  # the prompt's
            values.extend(given if given is not None else [_NAN] * len(group.responses))
        file, number = _split(group.id)
        self._places[0].append(self._files.setdefault(file, len(self._files)))
        self._places[1].append(number)

    def _flush(self) -> None:
        self._buffer.tofile(self._tokens)
        self._tokens.flush()  # so that a writer that is given up writes nothing later into the file of its successor
        del self._buffer[:]

    def close(self, facts: dict[str, Any]) -> None:
        """Completes the folder, with ``facts`` about the groups."""
        self._flush()
        self._tokens.close()
        arrays = {
            "ends": np.array(self._ends),
            "firsts": np.array(self._firsts),
            "values": np.array(self._values),
            "places": np.array(self._places),
        }
        for name, each in arrays.items():
            np.save(self._folder / f"{name}.npy", each)
        text = json.dumps(facts | {"places": list(self._files)})
        (self._folder / "facts.json").write_text(text, encoding="utf-8")


def open_encoded(key: Callable[[], str | None], encode: Callable[[Path], None]) -> EncodedGroups:
    """Opens the groups of ``key``; encodes them first if there are none. Collective if there are ranks.

    Rank 0 encodes. A node that does not see its folder, because the cache is on a local disk, encodes its own.

    Args:
        key (Callable[[], str | None]): returns a digest of what the groups depend on; None keeps nothing for later.
        encode (Callable[[Path], None]): writes the groups into a folder.

    Raises:
        ConfigError: if the cache cannot be written.
    """

    def ensure() -> tuple[Path, bool]:
        digest = key()
        folder = None if digest is None else cache() / digest
        if folder is not None and _is_complete(folder):
            with suppress(OSError):  # another user's
                os.utime(folder)  # tells old folders from those in use
            return folder, True
        return _written(folder, encode), folder is not None

    if not dist.is_initialized() or dist.get_backend() == "fake" or dist.get_world_size() == 1:
        folder, kept = ensure()
        groups = EncodedGroups(folder)
        mine = True
    else:
        task, mine = "encoding the dataset", dist.get_rank() == 0
        folder, kept = together(ensure, task=task, on_rank_0=True)[0]
        missing = gathered(not _is_complete(folder))
        if any(missing):  # the cache is local; ranks are numbered node by node
            rank = dist.get_rank()
            mine = mine or (missing[rank] and os.environ.get("LOCAL_RANK", "0") == "0")
            made = together(lambda: ensure() if mine and missing[rank] else None, task=task)
            if missing[rank]:
                folder, kept = next((each for each in made[rank::-1] if each is not None), (folder, kept))
        opened: list[EncodedGroups] = []
        together(lambda: opened.append(EncodedGroups(folder)), task=task)  # before it may be removed
        groups = opened[0]
    if mine and not kept:
        shutil.rmtree(folder)  # its files live on until they are unmapped
    return groups


def cache() -> Path:
    """Returns the folder of encoded datasets: $HUMANLINE_CACHE, else humanline/ in the user's cache folder."""
    if own := os.environ.get("HUMANLINE_CACHE"):
        return Path(own).expanduser() / "datasets"
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "humanline" / "datasets"


def _written(folder: Path | None, encode: Callable[[Path], None]) -> Path:
    try:
        cache().mkdir(parents=True, exist_ok=True)
        for left in cache().glob(f"{_UNFINISHED}*"):  # by a run that was killed
            with suppress(OSError):  # another run has completed or removed it
                if time.time() - left.stat().st_mtime > 86_400:
                    shutil.rmtree(left, ignore_errors=True)
        unfinished = cache() / f"{_UNFINISHED}{uuid4().hex}"
        unfinished.mkdir()  # not by mkdtemp, whose folder no other user of the cache can read
    except OSError as error:
        raise ConfigError(
            f"dataset: encoded groups cannot be written to {cache()} ({error}); set the environment variable "
            "HUMANLINE_CACHE to a folder with space"
        ) from error
    try:
        encode(unfinished)
        if folder is None:
            return unfinished
        try:
            unfinished.rename(folder)
        except OSError:
            if _is_complete(folder):  # another run was faster
                shutil.rmtree(unfinished)
            else:  # what removes old files has left some
                shutil.rmtree(folder)
                unfinished.rename(folder)
        return folder
    except OSError as error:
        shutil.rmtree(unfinished, ignore_errors=True)
        raise ConfigError(
            f"dataset: encoded groups cannot be written to {cache()} ({error}); set the environment variable "
            "HUMANLINE_CACHE to a folder with space"
        ) from error
    except BaseException:
        shutil.rmtree(unfinished, ignore_errors=True)
        raise


def _is_complete(folder: Path) -> bool:
    return all((folder / name).is_file() for name in _FILES)


def _split(place: str) -> tuple[str, int]:
    """Splits a place at its number: many rows share what stands before it."""
    head, space, number = place.rpartition(" ")
    return (head + space, int(number)) if number.isdecimal() else (place, -1)
