"""The files of a tokenizer in a Hugging Face folder, read and written as ``transformers`` reads them."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Tokenizer

from humanline.data._chat_template import squeeze
from humanline.errors import ConfigError

__all__ = [
    "STANDARD_TOKENS",
    "add_tokens",
    "find_templates",
    "named_tokens",
    "read_generation_stops",
    "read_tokenizer",
    "read_tokenizer_config",
    "write_tokenizer",
]

STANDARD_TOKENS = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
FURTHER_TOKENS = ("extra_special_tokens", "additional_special_tokens")  # keys of lists, or of a dict with names
TOKEN_FLAGS = ("single_word", "lstrip", "rstrip", "normalized", "special")
CONFIG, GENERATION = "tokenizer_config.json", "generation_config.json"
TEMPLATE, TEMPLATES = "chat_template.jinja", "additional_chat_templates"
VOCABULARIES = ("tokenizer.model", "vocab.json", "merges.txt", "vocab.txt", "spiece.model")
FILES = (
    *("tokenizer.json", CONFIG, "special_tokens_map.json", "added_tokens.json", TEMPLATE, "chat_template.json"),
    *VOCABULARIES,
)
"""What belongs to a tokenizer, beside the folder of templates. The vocabularies are older forms of tokenizer.json."""


def read_tokenizer(folder: Path) -> Tokenizer:
    """Reads tokenizer.json.

    Raises:
        ConfigError: if the file is missing or unreadable.
    """
    file = folder / "tokenizer.json"
    if not file.is_file():
        raise ConfigError(f"tokenizer.path: {file} is missing; {_remedy(folder)}")
    try:
        tokenizer = Tokenizer.from_file(str(file))
    except Exception as error:  # the library raises nothing more specific
        raise ConfigError(f"tokenizer.path: {file} cannot be read ({squeeze(error)}); download it again") from error
    tokenizer.no_truncation()  # a file may enable either
    tokenizer.no_padding()
    return tokenizer


def add_tokens(tokenizer: Tokenizer, folder: Path, config: Mapping[str, Any]) -> bool:
    """Adds the tokens of tokenizer_config.json, whose flags count where tokenizer.json has others.

    Named tokens become special tokens, unless the tokenizer has no id for them.

    Returns:
        bool: whether the tokenizer has changed.

    Raises:
        ConfigError: if the two files give a token different ids.
    """
    before = repr(tokenizer.get_added_tokens_decoder())
    listed = _added_tokens(folder, config)
    tokenizer.add_tokens(list(listed.values()))
    for id, token in listed.items():
        if (other := tokenizer.token_to_id(token.content)) != id:
            raise ConfigError(
                f"tokenizer.path: {folder / 'tokenizer_config.json'} gives {token.content!r} the id {id}, "
                f"tokenizer.json gives it {other}; use the files that the model was published with"
            )
    lists = (config[key] for key in FURTHER_TOKENS if isinstance(config.get(key), list))
    further = [token_text(token) for tokens in lists for token in tokens]
    added = {token.content: token for token in tokenizer.get_added_tokens_decoder().values()}
    named = [content for content in named_tokens(config).values() if tokenizer.token_to_id(content) is not None]
    for content in named:
        added.setdefault(content, AddedToken(content, special=True)).special = True
    tokenizer.add_tokens([added[content] for content in named])
    tokenizer.add_tokens([AddedToken(content, special=True) for content in further if content not in added])
    return repr(tokenizer.get_added_tokens_decoder()) != before


def read_tokenizer_config(folder: Path) -> dict[str, Any]:
    """Reads tokenizer_config.json; in older checkpoints special_tokens_map.json overrides the named tokens."""
    config = read_json(folder / CONFIG)
    file = folder / "special_tokens_map.json"
    return config | read_json(file) if file.is_file() and "added_tokens_decoder" not in config else config


def named_tokens(config: Mapping[str, Any]) -> dict[str, str]:
    """Returns the tokens that have a name, such as ``bos_token`` or ``image_token``; templates may read them."""
    named = {name: config[name] for name in STANDARD_TOKENS if config.get(name)}
    named |= {name: token for name, token in config.items() if name.endswith("_token") and isinstance(token, str)}
    for key in FURTHER_TOKENS:
        if isinstance(config.get(key), Mapping):
            named |= config[key]
    return {name: token_text(token) for name, token in named.items() if token}


def read_generation_stops(folder: Path) -> list[int]:
    """Returns the ids at which generation stops according to generation_config.json, if there is such a file."""
    file = folder / GENERATION
    stops = read_json(file).get("eos_token_id") if file.is_file() else None
    return [stops] if isinstance(stops, int) else stops or []


def find_templates(folder: Path, config: Mapping[str, Any], override: str | None) -> dict[str, tuple[Path, str]]:
    """Returns chat templates by name, each with its file: the override, else those that ``transformers`` finds.

    One of them is ``default``. Another, ``tool_use``, is for chats with tools.

    Raises:
        ConfigError: if there is no default.
    """
    if override is not None:
        if not Path(override).is_file():
            raise ConfigError(
                f"tokenizer.chat_template: {override} is not a file; null uses the template in tokenizer.path"
            )
        return {"default": _with_text(Path(override))}
    files = {"default": folder / TEMPLATE}
    files |= {file.stem: file for file in sorted((folder / TEMPLATES).glob("*.jinja"))}
    found = {name: _with_text(file) for name, file in files.items() if file.is_file()}
    if not found:
        template = config.get("chat_template") or {}
        if isinstance(template, list):
            template = {named["name"]: named["template"] for named in template}
        named = template if isinstance(template, Mapping) else {"default": template}
        found = {name: (folder / CONFIG, source) for name, source in named.items()}
    if "default" not in found:
        has = f"the chat templates {', '.join(found)}, and none named default" if found else "no chat template"
        raise ConfigError(f"tokenizer.chat_template: {folder} has {has}; set this key to a Jinja file")
    return found


def write_tokenizer(
    folder: Path, tokenizer: Path, template: str | None, stops: Sequence[int], checkpoint: Path
) -> list[str]:
    """Gives a copy of a checkpoint, or an adapter to it, the tokenizer of another folder or another chat template.

    generation_config.json gets those stop tokens that it lacks.

    Args:
        folder (Path): the copy, or the adapter's folder.
        tokenizer (Path): the tokenizer's folder.
        template (str | None): the chat template; None is that of the tokenizer's folder.
        stops (Sequence[int]): ids that end a response.
        checkpoint (Path): the checkpoint.

    Returns:
        list[str]: the files that are not the checkpoint's; nothing is written if there are none.

    Raises:
        FileNotFoundError: if the tokenizer's files are gone.
    """
    theirs, files = _contents(checkpoint), _contents(tokenizer)
    if gone := {"tokenizer.json", CONFIG} - files.keys():
        raise FileNotFoundError(f"{tokenizer / min(gone)} is missing")
    if template is not None:
        config = json.loads(files[CONFIG])
        files = {name: content for name, content in files.items() if "template" not in name}
        files[TEMPLATE] = template.encode()
        if config.pop("chat_template", None) is not None:
            files[CONFIG] = _json(config)
    if files == theirs:
        return []
    generation, known = checkpoint / GENERATION, read_generation_stops(checkpoint)
    if missing := [id for id in stops if id not in known]:
        theirs[GENERATION] = generation.read_bytes() if generation.is_file() else b"{}"
        files[GENERATION] = _json(json.loads(theirs[GENERATION]) | {"eos_token_id": [*known, *missing]})
    if "tokenizer.json" not in theirs:  # then its vocabulary is the older form of what the run used
        files = {name: theirs[name] for name in VOCABULARIES if name in theirs} | files
    for name in theirs.keys() - files.keys():
        (folder / name).unlink(missing_ok=True)
    for name, content in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        new = folder / f"{name}.new"  # a copied file keeps its original's mode, which may be read-only
        new.write_bytes(content)
        new.replace(folder / name)
    return sorted(name for name in theirs.keys() | files.keys() if theirs.get(name) != files.get(name))


def _contents(folder: Path) -> dict[str, bytes]:
    """Returns the contents of a tokenizer's files, by their names in the folder."""
    files = [*(folder / name for name in FILES), *(folder / TEMPLATES).glob("*.jinja")]
    return {str(file.relative_to(folder)): file.read_bytes() for file in files if file.is_file()}


def _json(content: Mapping[str, Any]) -> bytes:
    return (json.dumps(content, indent=2, ensure_ascii=False) + "\n").encode()


def token_text(token: str | Mapping[str, Any]) -> str:
    return token if isinstance(token, str) else token["content"]


def read_json(file: Path) -> dict[str, Any]:
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ConfigError(f"tokenizer.path: {file} is missing; {_remedy(file.parent)}") from None
    except ValueError as error:
        raise ConfigError(f"tokenizer.path: {file} is not valid JSON ({squeeze(error)}); download it again") from error


def _added_tokens(folder: Path, config: Mapping[str, Any]) -> dict[int, AddedToken]:
    """Returns the tokens of ``added_tokens_decoder`` in tokenizer_config.json, by id and in its order."""
    try:
        tokens = {
            int(id): AddedToken(token["content"], **{flag: token[flag] for flag in TOKEN_FLAGS if flag in token})
            for id, token in config.get("added_tokens_decoder", {}).items()
        }
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise ConfigError(
            f"tokenizer.path: added_tokens_decoder of {folder / 'tokenizer_config.json'} cannot be read "
            f"({squeeze(error)}); download the file again"
        ) from error
    return dict(sorted(tokens.items()))


def _with_text(file: Path) -> tuple[Path, str]:
    return file, file.read_text(encoding="utf-8")


def _remedy(folder: Path) -> str:
    if folder.is_dir():
        return "use a complete Hugging Face checkpoint"
    where = f"there is no folder {folder} (working directory {Path.cwd()})"
    return f"{where}; download the model to it, or correct the path, also in checkpointer.checkpoint_dir"
