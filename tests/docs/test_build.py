"""The website is built without a warning."""

import subprocess
import sys

import pytest

from tests.docs.pages import ROOT


@pytest.mark.slow
def test_the_website_is_built_without_a_warning(tmp_path):
    sphinx = [sys.executable, "-m", "sphinx", "--builder", "html", "--fail-on-warning"]
    done = subprocess.run(
        [*sphinx, "--keep-going", "--quiet", "docs", str(tmp_path)],
        cwd=ROOT, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    page = (tmp_path / "api/alphadecay.html").read_text()
    assert "alphadecay.AlphaDecay" in page and "min_ratio" in page
    assert "api/alphadecay.html" in (tmp_path / "api.html").read_text()
    assert "README.md" in (tmp_path / "measurements.html").read_text()
