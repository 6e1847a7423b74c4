"""The documentation as a site: it builds without a warning, and asks nothing of a network."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

import clipsae.clip
import clipsae.evaluation
import clipsae.sae
from run import ROOT

# What a page loads by itself; links that a reader follows are no part of it.
LOADED = re.compile(
    r"""<(?:script|img|iframe|source)[^>]*\ssrc=["']?(https?:)?//"""
    r"""|<link[^>]*\srel=["']?(?:stylesheet|preconnect|preload|icon)[^>]*\shref=["']?(https?:)?//"""
    r"""|@import\s+["']?(?:url\()?["']?https?:|url\(["']?https?:""",
)


@pytest.fixture(scope="module")
def site(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", folder]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return folder


def test_every_page_is_there_and_in_the_navigation(site):
    pages = {p.relative_to(ROOT / "docs").with_suffix("") for p in (ROOT / "docs").rglob("*.md")}
    pages.add(Path("reference/configs"))
    built = {p.relative_to(site).with_suffix("") for p in site.rglob("*.html")}
    assert built == pages | {Path("404")}
    links = set(re.findall(r'href="([\w/-]+)\.html"', (site / "index.html").read_text()))
    assert {str(page) for page in pages} <= links


def test_nothing_is_loaded_from_elsewhere(site):
    files = [file for kind in ("html", "css") for file in site.rglob(f"*.{kind}")]
    assert len(files) > 20
    for file in files:
        assert not LOADED.search(file.read_text()), file


def test_formulas_are_mathml_and_none_is_left_as_tex(site):
    html = (site / "explanation" / "saes.html").read_text()
    assert html.count("<math") > 40
    for file in site.rglob("*.html"):
        text = file.read_text()
        assert "\\(" not in text, file
        assert "\\[" not in text, file


def test_the_page_of_the_config_groups_has_every_file(site):
    html = (site / "reference" / "configs.html").read_text()
    for file in (ROOT / "conf").rglob("*.yaml"):
        group = file.parent.relative_to(ROOT / "conf").as_posix()
        chosen = f"{group}{'/' if file.stem[0] == '_' else '='}{file.stem}"  # _: others' base
        assert (chosen if group != "." else "conf/config.yaml") in html


def test_the_reference_knows_the_public_names(site):
    inventory = {
        anchor
        for page in (site / "reference").glob("*.html")
        for anchor in re.findall(r'id="(clipsae\.[\w.]+)"', page.read_text())
    }
    known = {anchor.rpartition(".")[2] for anchor in inventory}
    for module in (clipsae, clipsae.sae, clipsae.clip, clipsae.evaluation):
        names = {name for name in module.__all__ if callable(getattr(module, name))}
        assert names <= known
