"""docs/data.md lists the schemas that the code has."""

import re
from pathlib import Path

from humanline.data._schemas import SCHEMAS


def test_the_page_names_every_schema_and_its_columns():
    page = (Path(__file__).parent.parent / "docs" / "data.md").read_text(encoding="utf-8")
    rows = dict(re.findall(r"^\| `(\w+)` \| `([\w ]+)` \|", page, re.MULTILINE))
    assert rows == {schema.name: schema.columns for schema in SCHEMAS}
