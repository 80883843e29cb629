"""Opens what ``datasets`` can load: folders, what ``save_to_disk`` wrote, web addresses, and datasets of the hub."""

import logging
from collections import deque
from collections.abc import Iterator, Mapping
from difflib import get_close_matches
from functools import partial
from itertools import chain
from os.path import expanduser
from pathlib import Path
from typing import Any

from torchtune.utils import get_logger, log_rank_zero

from humanline.data._files import READERS, first_line, kind_of
from humanline.data._record import BadRow
from humanline.errors import ConfigError, DataError

log = get_logger("INFO")

__all__ = ["batches", "file_like", "load", "parts_of"]


def load(key: str, source: Any, split: str, name: str | None, data_files: Any, revision: str | None) -> Any:
    """Loads a split of a dataset; the data of a hub dataset is downloaded, and kept in the cache of ``datasets``.

    Raises:
        ConfigError: if the source or the split does not exist, a setting does not apply, or files would be left out.
        DataError: if a local file cannot be read.
    """
    import datasets

    folder = Path(expanduser(str(source)))
    if (folder / "state.json").is_file() or (folder / "dataset_dict.json").is_file():
        for setting, value in (("name", name), ("data_files", data_files), ("revision", revision)):
            if value is not None:
                raise ConfigError(f"{setting}: expected null for '{folder}', which save_to_disk wrote, got {value!r}")
        return _part(_saved(key, folder), split, str(source))
    if "://" in str(source) and data_files is None:
        source, data_files = _builder_of(key, source), source
    elif folder.is_dir():
        if revision is not None:
            raise ConfigError(f"revision: expected null for the folder '{folder}', got {revision!r}")
        source = str(folder)
    try:
        if folder.is_dir():
            _check_files(key, folder, name, data_files)
        load_splits = partial(datasets.load_dataset, source, name, data_files=data_files, revision=revision)
        try:
            return load_splits(split=split)
        except ValueError:  # if not for another reason, there is no such split, or nothing in it
            return _part(load_splits(), split, source)
    except (ConfigError, DataError):
        raise
    except Exception as error:  # it passes on errors of many libraries; each means that there is no data
        raise _not_loaded(key, source, split, name, data_files, revision, error) from error


def _saved(key: str, folder: Path) -> dict[str, Any]:
    import datasets

    try:
        saved = datasets.load_from_disk(str(folder))
    except Exception as error:
        raise ConfigError(f"{key}: '{folder}' cannot be loaded ({first_line(error)}); save it again") from error
    return saved if isinstance(saved, datasets.DatasetDict) else {str(saved.split or "train"): saved}


def _part(splits: Mapping[str, Any], split: str, source: str) -> Any:
    import datasets

    chosen = parts_of(split, {name: len(part) for name, part in splits.items()}, f"'{source}'")
    rows = [(splits[it.splitname], range(it.from_, it.to)) for it in chosen]
    return datasets.concatenate_datasets([part.select(wanted or []) for part, wanted in rows])


def parts_of(split: str, sizes: Mapping[str, int], of: str) -> list[Any]:
    """Returns the parts of a split in the notation of ``datasets``, each with the name of its split and its ends."""
    from datasets import ReadInstruction

    try:
        return ReadInstruction.from_spec(split).to_absolute(dict(sizes))
    except ValueError as error:
        first = next(iter(sizes))
        raise ConfigError(
            f"split: '{split}' does not work for {of} ({error}); use {' or '.join(sizes)}, or a slice such as "
            f"{first}[:95%]"
        ) from error


def batches(title: str, dataset: Any) -> Iterator[dict[str, list[Any]]]:
    """Yields the columns of the rows, many rows at a time.

    Raises:
        DataError: if a column cannot be read.
    """

    try:
        yield from dataset.iter(batch_size=512)
    except (ValueError, OverflowError) as error:  # no UTF-8, or a time that Python has no value for
        for column in dataset.column_names:
            try:
                deque(dataset.select_columns(column).iter(batch_size=512), maxlen=0)
            except (ValueError, OverflowError):
                problem = f"column '{column}' cannot be read ({first_line(error)})"
                raise DataError(f"{title}: {problem}; correct it, or write the data without it") from error
        raise


# ---- What cannot be loaded


def _check_files(key: str, folder: Path, name: str | None, data_files: Any) -> None:
    """
    Raises:
        ConfigError: if ``datasets`` would leave out files of a folder, which are in no split of any config.
        DataError: if a file has columns of one name, of which ``datasets`` would keep the first.
    """
    files = _files_of(str(folder), name, data_files)
    left_out = [] if data_files is not None else _left_out(folder, files)
    columns = _columns(files[0]) if left_out and files else set()
    if alike := [file for file in left_out if _columns(str(folder / file)) in (columns, set())]:
        raise ConfigError(
            f"{key}: of the folder '{folder}', datasets would leave out {', '.join(alike)}, in no split or config; "
            f"set data_files to the files that are meant, or {key} to a list or a glob of them"
        )
    if left_out:
        log_rank_zero(log, f"{key}: of '{folder}', {', '.join(left_out)} is not read: other columns", logging.WARNING)
    for file in files:
        if kind_of(file).startswith((".csv", ".tsv")):
            next(READERS[kind_of(file)](file), None)


def _columns(file: str) -> set[Any]:
    """Returns the columns of a file's first row; empty if there is none that can be read."""
    try:
        first = next((row for _, row in READERS[kind_of(file)](file) if not isinstance(row, BadRow)), None)
    except (DataError, KeyError):
        return set()
    return set(first or ())


def _left_out(folder: Path, files: list[str]) -> list[str]:
    """Returns the files of a folder that are neither ``files`` nor those of a config."""
    import datasets
    from datasets.data_files import FILES_TO_IGNORE

    inside = [file.relative_to(folder) for file in sorted(folder.rglob("*"))]
    rest = {
        (folder / file).resolve(): str(file)
        for file in inside
        if kind_of(file.name) in READERS and (folder / file).is_file()
        if file.name not in FILES_TO_IGNORE and not any(part.startswith((".", "__")) for part in file.parts)
    }
    for file in map(Path, files):
        rest.pop(file.resolve(), None)
    for config in datasets.get_dataset_config_names(str(folder)) if rest else ():
        for file in map(Path, _files_of(str(folder), config, None)):
            rest.pop(file.resolve(), None)
    return [*rest.values()]


def _files_of(source: Any, name: str | None, data_files: Any) -> list[str]:
    """Returns the local files of a config, of all its splits."""
    import datasets

    found = datasets.load_dataset_builder(source, name, data_files=data_files).config.data_files or {}
    return [file for file in chain.from_iterable(found.values()) if Path(file).is_file()]


def _builder_of(key: str, address: str) -> str:
    kind = kind_of(address.split("?")[0])
    builders = {".json": "json", ".jsonl": "json", ".csv": "csv", ".tsv": "csv", ".parquet": "parquet"}
    if kind.removesuffix(".gz") not in builders:
        raise ConfigError(f"{key}: '{address}' has an unsupported type; download it, and use the file")
    return builders[kind.removesuffix(".gz")]


def _not_loaded(
    key: str, source: Any, split: str, name: str | None, data_files: Any, revision: str | None, error: Exception
) -> ConfigError | DataError:
    """Returns the error about a source that ``datasets`` does not load."""
    from datasets import get_dataset_config_names
    from datasets.exceptions import DatasetGenerationError

    try:
        configs = get_dataset_config_names(source, revision=revision, data_files=data_files)
    except Exception:  # then the first error says it
        configs = []
    if name is None and len(configs) > 1:
        return ConfigError(
            f"name: missing; '{source}' has the configs {', '.join(configs)}; set name to one of them, beside {key}"
        )
    if name is not None and configs and name not in configs:
        return ConfigError(f"name: expected one of {', '.join(configs)}, got '{name}' for '{source}'")
    if configs and (fault := _fault(source, name, data_files)):
        remedy = f"; correct it, or set {key} to a list or a glob of files: bad rows are then left out"
        return DataError(f"{fault}{remedy if isinstance(fault, BadRow) else ''}")
    if isinstance(error, DatasetGenerationError) and isinstance(error.__cause__, Exception):
        error = error.__cause__
    said = first_line(error)
    if near := file_like(str(source)):
        return ConfigError(f"{key}: '{source}' cannot be loaded ({said}); did you mean the file '{near}'?")
    if Path(expanduser(str(source))).is_dir():
        return ConfigError(
            f"{key}: folder '{source}' cannot be loaded ({said}); correct its files, or list those that are meant"
        )
    return ConfigError(
        f"{key}: '{source}' (split '{split}') cannot be loaded ({said}); correct the name, log in "
        "with `hf auth login` if access is restricted, or use local files"
    )


def file_like(path: str) -> str | None:
    """Returns the file of a similar name in a path's folder, if it has one that can be read."""
    wanted = Path(expanduser(path))
    if wanted.exists() or not wanted.parent.is_dir():
        return None
    names = [file.name for file in wanted.parent.iterdir() if kind_of(file.name) in READERS]
    near = get_close_matches(wanted.name, names, n=1, cutoff=0.8)
    return str(Path(path).with_name(near[0])) if near else None


def _fault(source: Any, name: str | None, data_files: Any) -> BadRow | DataError | None:
    """Returns the first fault in the local files of a config, which has the file and the line."""
    try:
        for file in _files_of(source, name, data_files):
            rows = READERS[kind_of(file)](file) if kind_of(file) in READERS else iter(())
            if (bad := next((row for _, row in rows if isinstance(row, BadRow)), None)) is not None:
                return bad
    except DataError as error:
        return error
    except Exception:  # then the first error says it
        pass
    return None
