"""The pages list the schemas that the code has."""

import re
from pathlib import Path

from humanline.data._schemas import SCHEMAS

ROOT = Path(__file__).parent.parent


def test_the_page_names_every_schema_and_its_columns():
    page = (ROOT / "docs" / "data.md").read_text(encoding="utf-8")
    rows = dict(re.findall(r"^\| `(\w+)` \| `([\w ]+)` \|", page, re.MULTILINE))
    assert rows == {schema.name: schema.columns for schema in SCHEMAS}


def test_the_readme_counts_them():
    assert f"{len(SCHEMAS)} formats of public datasets" in (ROOT / "README.md").read_text(encoding="utf-8")
