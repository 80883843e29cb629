"""What mkdocs needs beyond Markdown: pages for notebooks and other files, and docstrings without Sphinx's roles.

A page may link to a notebook, or to a file outside of docs/, such as a recipe. On GitHub that link opens the file; on
the site it opens a page with the file's text, which is made here.
"""

import base64
import json
import posixpath
import re
from pathlib import Path
from typing import Any

from griffe import Extension, Object
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).parent.parent
_LINK = re.compile(r"(\]\()((?:\.\./)+[^)#\s]+)(#[^)\s]*)?(\))")
_NOTEBOOK = re.compile(r"(\]\((?!\w+:)[^)\s#]+)\.ipynb(#[^)\s]*)?\)")
_ROLE = re.compile(r":(?:class|func|meth|attr|mod|data|exc|math):`~?([^`]+)`")
_LANGUAGES = {".py": "python", ".yaml": "yaml", ".sh": "bash"}


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Adds the pages of notebooks, of files that others link to, of the changelog and the guide for contributors."""
    for notebook in [file for file in files if file.src_uri.endswith(".ipynb")]:
        files.remove(notebook)
        for name, content in _pages(notebook).items():
            files.append(File.generated(config, name, content=content))
    wanted = {"CHANGELOG.md", "CONTRIBUTING.md"}
    for file in [*files]:
        if file.src_uri.endswith(".md"):
            links = _LINK.finditer(file.content_string)
            wanted |= {_target(match[2], file.src_uri) for match in links}
    for path in sorted(wanted):
        source = ROOT / path
        if source.is_file():
            files.append(File.generated(config, _uri(path), content=_content(path, source.read_text())))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Turns links to notebooks and to files outside of docs/ into links to their pages."""

    def to_page(match: re.Match[str]) -> str:
        uri = _uri(_target(match[2], page.file.src_uri))
        if files.get_file_from_path(uri) is None:
            return match[0]
        to = posixpath.relpath(uri, posixpath.dirname(page.file.src_uri) or ".")
        return f"{match[1]}{to}{match[3] or ''}{match[4]}"

    return _LINK.sub(to_page, _NOTEBOOK.sub(r"\1.md\2)", markdown))


def _pages(notebook: File) -> dict[str, str | bytes]:
    """Returns a notebook's page and its images, by their paths in docs/."""
    name = notebook.src_uri.removesuffix(".ipynb")
    parts: list[str] = []
    images: dict[str, str | bytes] = {}
    for cell in json.loads(notebook.content_string)["cells"]:
        source = "".join(cell["source"])
        parts.append(source if cell["cell_type"] == "markdown" else f"```python\n{source}\n```")
        for output in cell.get("outputs", ()):
            data = output.get("data", {})
            if "image/png" in data:
                image = f"{name}_{len(images)}.png"
                images[image] = base64.b64decode("".join(data["image/png"]))
                parts.append(f"![{''.join(data['text/plain'])}]({posixpath.basename(image)})")
            elif text := "".join(output.get("text", data.get("text/plain", ()))):
                parts.append(f"```text\n{text.rstrip()}\n```")
    return {f"{name}.md": "\n\n".join(parts) + "\n", **images}


def _target(link: str, page: str) -> str:
    """Returns the path in the repository that a page of docs/ links to."""
    return posixpath.normpath(posixpath.join("docs", posixpath.dirname(page), link))


def _uri(path: str) -> str:
    return f"files/{path.removesuffix('.md')}.md"


def _content(path: str, text: str) -> str:
    if path.endswith(".md"):
        # Its links start at the repository's root, where docs/ is a folder.
        return re.sub(r"(\]\()docs/", r"\1../", text)
    fence = "```" if "```" not in text else "````"
    return f"# {path}\n\n{fence}{_LANGUAGES.get(Path(path).suffix, 'text')}\n{text}\n{fence}\n"


class PlainRoles(Extension):
    """Shows ``:class:`~package.Name``` as ``Name`` in code, in every docstring."""

    def on_instance(self, *, obj: Object, **_: Any) -> None:
        if obj.docstring is not None:
            obj.docstring.value = _ROLE.sub(lambda match: f"`{match[1].rpartition('.')[2]}`", obj.docstring.value)
