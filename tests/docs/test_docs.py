"""Every command and snippet of the documentation runs, small, in the order of its page.

A page's blocks run in a folder that looks like a checkout. bash blocks run in bash, where `python`
and `clipsae` are those of `warm.py`; python blocks run as they are; a block with a title is a file
of that name. Commands of run.py are composed as they are written, and then run with the sizes of
`small.py`. A command that is marked `# needs ...` in the page is treated as NEEDS says.
"""

import os
import re
import shlex
import subprocess
from pathlib import Path

import pytest

from run import ROOT
from tests.docs import small
from tests.docs.blocks import Block, blocks, inline_commands, script
from tests.warm import start

NEEDS = {
    "the weights": "they are fetched: composed as written, run with clip=tiny",
    "the datasets": "real data: composed only; tests/tasks/test_benchmark.py runs it on toy data",
    "a cluster": "SLURM: composed, the launcher resolved; tests/slurm runs it where one answers",
    "several GPUs": "composed only; tests/training/test_ddp.py runs two processes on the CPU",
    "a network": "Hugging Face or W&B are asked: composed only",
}
PAGES = sorted(
    [ROOT / "README.md", *(ROOT / "docs").rglob("*.md")], key=lambda page: page.as_posix()
)
IDS = [str(page.relative_to(ROOT)) for page in PAGES]


@pytest.fixture(scope="session")
def shims(tmp_path_factory) -> Path:
    """The folder of `python` and `clipsae`, which a warm process serves."""
    folder = tmp_path_factory.mktemp("warm")
    process = start(folder, ROOT / "tests/docs/warm.py", "python", "clipsae")
    yield folder
    process.kill()
    process.wait()


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """A folder that looks like a checkout, for a page to work in."""
    for name in ("run.py", "conf", "sweeps", "src", "tests", "pyproject.toml"):
        (tmp_path / name).symlink_to(ROOT / name)
    return tmp_path


@pytest.fixture
def environment(checkout: Path, shims: Path) -> dict[str, str]:
    outside = {k: v for k, v in os.environ.items() if not k.startswith(("CLIPSAE_", "DOCS_"))}
    return {
        **outside,
        "CLIPSAE_ROOT": str(ROOT),
        "CLIPSAE_OUTPUT": str(checkout / "outputs"),
        "CLIPSAE_DATA": str(checkout / "data"),
        "PATH": f"{shims}{os.pathsep}{os.environ['PATH']}",
        "HF_HUB_OFFLINE": "1",
        "WANDB_MODE": "offline",
    }


def execute(block: Block, folder: Path, environment: dict[str, str]) -> None:
    """Run a block, or write the file that it is."""
    if block.title is not None:
        (folder / block.title).parent.mkdir(parents=True, exist_ok=True)
        (folder / block.title).write_text(block.text)
        return
    file = folder / f".line-{block.line}.{'sh' if block.language == 'bash' else 'py'}"
    file.write_text(script(block, NEEDS) if block.language == "bash" else block.text)
    program = "bash" if block.language == "bash" else "python"
    done = subprocess.run(
        [program, file],
        cwd=folder,
        env=environment,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    assert done.returncode == 0, f"line {block.line}:\n{block.text}\n{done.stdout}"


@pytest.mark.slow
@pytest.mark.parametrize("page", PAGES, ids=IDS)
def test_what_a_page_says_works(page, checkout, environment, monkeypatch):
    # subprocess looks programs up in this process's PATH.
    monkeypatch.setenv("PATH", environment["PATH"])
    for block in blocks(page):
        if block.language != "text":
            execute(block, checkout, environment)


@pytest.mark.parametrize("page", PAGES, ids=IDS)
def test_commands_within_sentences_compose(page):
    for command in inline_commands(page):
        words = shlex.split(command)
        arguments = words[1:] if words[0] == "clipsae" else words[2:]
        small.compose(small.parse(arguments), ROOT / "conf")


def test_every_need_is_used():
    texts = [block.text for page in PAGES for block in blocks(page)]
    found = {need for text in texts for need in re.findall(r"# needs (.+)$", text, re.M)}
    assert found == set(NEEDS)


def test_a_block_that_would_not_run_is_refused(tmp_path):
    page = tmp_path / "page.md"
    for text in ("```sh\nls\n```\n", "```yaml\na: 1\n```\n", "- so:\n\n    python run.py\n"):
        page.write_text(text)
        with pytest.raises(ValueError, match=r"page.md:\d"):
            list(blocks(page))
    page.write_text("```bash\nls # needs patience\n```\n")
    with pytest.raises(ValueError, match="patience"):
        script(next(blocks(page)), NEEDS)
