"""docs/troubleshooting.md quotes messages, metrics and keys that the package has.

A quoted message follows `**Message:**`, as inline code in which `…` stands for a value. It has to be a whole string of
the source, so a changed message fails the test. Nothing of the package is imported: the source is parsed.
"""

import ast
import re
from collections.abc import Iterator
from difflib import get_close_matches
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parent.parent
PAGE = (ROOT / "docs" / "troubleshooting.md").read_text(encoding="utf-8")
CONFIGURATION = (ROOT / "docs" / "configuration.md").read_text(encoding="utf-8")
PROGRAMS = {path.stem for path in (ROOT / "recipes").glob("humanline_*.py")}
TREES = [
    ast.parse(path.read_text(encoding="utf-8"))
    for folder in ("humanline", "recipes")
    for path in sorted((ROOT / folder).rglob("*.py"))
]

VALUE = "…"
MESSAGES = [found[2].strip() for found in re.finditer(r"\*\*Message:\*\*\s+(`+)(.+?)\1(?!`)", PAGE)]
FENCED = re.compile(r"^ *```(\w*)\n(.*?)^ *```$", re.MULTILINE | re.DOTALL)
BLOCKS = FENCED.findall(PAGE)
WITHOUT_MESSAGES = re.sub(r"\*\*Message:\*\*\s+(`+).+?\1(?!`)", "", FENCED.sub("", PAGE))
SPANS = [span for _, span in re.findall(r"(`+)(.+?)\1(?!`)", WITHOUT_MESSAGES)]

PATHS = ("output_dir/", "configs/", "recipes/", "outputs/", "epoch_N/", "humanline/")  # with a slash, but no metrics


def text_of(node: ast.AST) -> str | None:
    """A string expression with `…` for each placeholder; None for any other expression."""
    if isinstance(node, ast.Constant):
        return node.value if isinstance(node.value, str) else None
    if isinstance(node, ast.JoinedStr):
        return "".join(str(part.value) if isinstance(part, ast.Constant) else VALUE for part in node.values)
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add):
        left, right = text_of(node.left), text_of(node.right)
        return None if left is None or right is None else left + right
    return None


def strings_of(tree: ast.AST) -> Iterator[str]:
    """The string expressions of a module, without docstrings."""
    texts = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}
    for node in ast.walk(tree):
        if id(node) not in texts and (text := text_of(node)):
            yield re.sub(f"{VALUE}+", VALUE, text)


def metrics_of(tree: ast.AST) -> Iterator[str]:
    """The keys of a module's dicts: the log's metrics are among them."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Dict):
            yield from (key.value for key in node.keys if isinstance(key, ast.Constant) and isinstance(key.value, str))


def public_names_of(tree: ast.Module) -> set[str]:
    """The functions and classes that a module defines."""
    return {node.name for node in tree.body if isinstance(node, ast.ClassDef | ast.FunctionDef)}


def keys_of_the_configuration() -> dict[str, set[str]]:
    """The keys of each component, and under "" those of the top level, from the tables of docs/configuration.md."""
    keys: dict[str, set[str]] = {"": set()}
    for section in re.split(r"^(?=#{2,3} )", CONFIGURATION, flags=re.MULTILINE):
        title, _, text = section.partition("\n")
        rows = set(re.findall(r"^\| `(\w+)` \|", text, re.MULTILINE))
        components = re.findall(r"`(\w+)`", title) if title.startswith("### `") else []
        for name in [name for name in components if name not in PROGRAMS] or [""]:
            keys.setdefault(name, set()).update(rows)
    return keys


STRINGS = {text for tree in TREES for text in strings_of(tree)}
METRICS = {name for tree in TREES for name in metrics_of(tree)}
PUBLIC = {name for tree in TREES for name in public_names_of(tree)}
KEYS = keys_of_the_configuration()
ALL_KEYS = set().union(*KEYS.values(), KEYS)
# Arguments of other packages' components, which the table of `optimizer` and the like cannot have.
ELSEWHERE = {"optimizer.fused"}


def settings_of_the_page() -> Iterator[str]:
    """The keys that the page names or sets in code style: `loss.beta`, `compile=True`, `'~optimizer.fused'`."""
    for span in SPANS:
        found = re.fullmatch(r"'?~?(?P<key>[a-z_]+(?:\.[A-Za-z_]+)*)(?P<value>(=|: ).+)?'?", span)
        if found and (found["value"] or "_" in span or "." in span) and not span.startswith(("humanline.", "torch")):
            yield found["key"]
    for language, block in BLOCKS:
        if language == "yaml":
            for name, value in yaml.safe_load(block).items():
                yield name
                yield from (f"{name}.{key}" for key in value) if isinstance(value, dict) else ()
        else:
            yield from re.findall(r"(?:^|\s)'?~?([a-z_]+(?:\.[A-Za-z_]+)*)=", block)


def is_known(name: str) -> bool:
    """Whether a key, a metric or a program has this name."""
    component, _, key = name.partition(".")
    if not key:
        return name in ALL_KEYS | METRICS | PROGRAMS or name in ("_component_", "humanline_")
    if re.fullmatch(r"\w+\.(py|jsonl?|ya?ml|txt|safetensors)", name) or name in ELSEWHERE:
        return True
    return component in KEYS and (key == "_component_" or key in KEYS[component])


def metrics_of_the_page() -> Iterator[str]:
    for span in SPANS:
        if re.fullmatch(r"[a-z_]+(?:/[a-z_0-9]+)+", span) and not span.startswith(PATHS):
            yield span


def test_the_page_quotes_messages():
    assert len(MESSAGES) >= 30
    assert PAGE.count("**Message:**") == len(MESSAGES) + 1, "a quoted message is not inline code on the same line"


@pytest.mark.parametrize("message", MESSAGES, ids=lambda message: message[:50])
def test_a_quoted_message_is_the_package_s(message):
    if message not in STRINGS:
        near = get_close_matches(message, STRINGS, n=1, cutoff=0.0)[0]
        pytest.fail(f"docs/troubleshooting.md quotes\n  {message}\nthe nearest text of the source is\n  {near}")


def test_a_changed_message_would_be_noticed():
    assert not {message.replace(" ", "  ", 1) for message in MESSAGES} & STRINGS
    assert not {f"{message}." for message in MESSAGES} & STRINGS


def test_every_metric_of_the_page_is_logged():
    named = set(metrics_of_the_page())
    assert len(named) >= 15
    assert sorted(name for name in named if name.removeprefix("val/") not in METRICS and name not in METRICS) == []


def test_every_key_of_the_page_exists():
    named = set(settings_of_the_page())
    assert len(named) >= 40
    assert sorted(name for name in named if not is_known(name)) == []


def test_every_component_of_the_page_exists():
    named = {span.rpartition(".")[2] for span in re.findall(r"\bhumanline(?:\.\w+)+", PAGE)}
    named = {name for name in named if name[0].isupper() or name.endswith("_groups")}
    assert len(named) >= 7
    assert sorted(named - PUBLIC) == []
