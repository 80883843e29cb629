"""`make docs` builds the site: every page has its place, every link its target, and docstrings become pages."""

import re
import subprocess
import sys

import pytest
from conftest import ROOT

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--site-dir", str(folder)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    return folder


def test_every_page_is_built_and_found_by_the_search(site):
    pages = list((ROOT / "docs").rglob("*.md"))
    assert len(pages) > 30
    for page in pages:
        path = page.relative_to(ROOT / "docs").with_suffix("")
        assert (site / ("" if path.name == "index" else path) / "index.html").is_file()
    assert "HumanlineDPOLoss" in (site / "search" / "search_index.json").read_text()


def test_the_api_has_arguments_and_no_role_of_another_format(site):
    page = (site / "api" / "reference" / "index.html").read_text()
    assert 'id="humanline.reference.WindowedReference"' in page and "sync_every" in page
    for api in (site / "api").rglob("index.html"):
        text = re.sub(r"<details.*?</details>", "", api.read_text(), flags=re.DOTALL)  # the source has them
        assert "Parameters" in text and ":class:" not in text and ":func:" not in text


def test_a_recipe_that_a_page_links_to_is_a_page(site):
    assert 'href="../files/recipes/humanline_dpo_distributed.py/"' in (site / "architecture" / "index.html").read_text()
    recipe = (site / "files" / "recipes" / "humanline_dpo_distributed.py" / "index.html").read_text()
    assert "before_optimizer_step" in recipe


def test_a_notebook_is_a_page_with_its_outputs_and_pictures(site):
    page = (site / "humanline" / "index.html").read_text()
    assert "held-out sums" in page and "pass@1" in page
    pictures = re.findall(r'<img [^>]*src="([^"]+\.png)"', page)
    assert len(pictures) == 3 and all((site / "humanline" / picture).is_file() for picture in pictures)
    assert 'href="../humanline/"' in (site / "quickstart" / "index.html").read_text()
