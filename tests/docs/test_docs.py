"""Every command and snippet of the documentation runs, small, in the order of its page.

All pages share a folder that looks like a checkout, and its outputs: work that another page's
commands have done is used again, and a command that has run is not run again. A block with a title
is a file of that name. Commands of run.py are composed as they are written, and then run with the
sizes of `commands.py`. A command that is marked `# needs ...` in the page is treated as NEEDS says.
"""

import os
import re
import shlex
import subprocess
from pathlib import Path

import pytest

from run import ROOT
from tests.docs import commands
from tests.docs.blocks import Block, blocks, inline_commands
from tests.warm import fork

NEEDS = {
    "the weights": "they are fetched: composed as written, run with clip=tiny",
    "the datasets": "real data: composed only; tests/tasks/test_benchmark.py runs it on toy data",
    "a cluster": "SLURM: composed, the launcher resolved; tests/slurm runs it where one answers",
    "several GPUs": "composed only; tests/training/test_ddp.py runs two processes on the CPU",
    "hours": "a sweep of some hours: composed only; tests/report/test_questions.py makes its page",
    "a network": "Hugging Face or W&B are asked: composed only",
}
PAGES = sorted(
    [ROOT / "README.md", *(ROOT / "docs").rglob("*.md")], key=lambda page: page.as_posix()
)
IDS = [str(page.relative_to(ROOT)) for page in PAGES]


class Shell:
    """Runs the blocks of pages in one folder, each command once."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.ran: set[str] = set()
        outside = {k: v for k, v in os.environ.items() if not k.startswith("CLIPSAE_")}
        self.environment = {
            **outside,
            "CLIPSAE_ROOT": str(ROOT),
            "CLIPSAE_OUTPUT": str(folder / "outputs"),
            "CLIPSAE_DATA": str(folder / "data"),
            "HF_HUB_OFFLINE": "1",
            "WANDB_MODE": "offline",
        }

    def execute(self, block: Block) -> None:
        """Run a block, or write the file that it is."""
        if block.title is not None:
            file = self.folder / block.title
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(block.text)
        elif block.language == "python":
            file = self.folder / "block.py"
            file.write_text(block.text)
            self.python({}, file.name)
        else:
            for line in block.text.splitlines():
                self.line(line)

    def line(self, line: str) -> None:
        """Run a line of a bash block.

        Raises:
            ValueError: a need that has no reason in the tests.
        """
        need = re.search(r"# needs (.+)$", line)
        if need and need[1] not in NEEDS:
            raise ValueError(f"'# needs {need[1]}' is not in NEEDS")
        if line in self.ran:
            return
        self.ran.add(line)
        for variables, (program, *words) in commands.simple_commands(line):
            if program == "clipsae":
                program, words = "python", ["run.py", *words]
            if program != "python":
                subprocess.run([program, *words], cwd=self.folder, check=True)
                continue
            if words[0] == "run.py":
                cfg = commands.compose(words[1:], self.folder)
                if need and need[1] != "the weights":
                    continue
                clip = "tiny" if need else None
                words[1:] = commands.shrunken(words[1:], cfg, clip)
            self.python(variables, *words)

    def python(self, variables: dict[str, str], *words: str) -> None:
        environment = self.environment | variables
        done = fork(commands.python, *words, cwd=self.folder, env=environment)
        assert done.returncode == 0, f"{shlex.join(words)}\n{done.stdout}\n{done.stderr}"


@pytest.fixture(scope="module")
def shell(tmp_path_factory: pytest.TempPathFactory) -> Shell:
    folder = tmp_path_factory.mktemp("checkout")
    for name in ("run.py", "conf", "sweeps", "src", "tests", "pyproject.toml"):
        (folder / name).symlink_to(ROOT / name)
    return Shell(folder)


@pytest.mark.slow
@pytest.mark.parametrize("page", PAGES, ids=IDS)
def test_what_a_page_says_works(page, shell):
    for block in blocks(page):
        if block.language != "text":
            shell.execute(block)


@pytest.mark.parametrize("page", PAGES, ids=IDS)
def test_commands_within_sentences_compose(page):
    for command in inline_commands(page):
        words = shlex.split(command)
        commands.compose(words[1:] if words[0] == "clipsae" else words[2:], ROOT)


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
    with pytest.raises(ValueError, match="patience"):
        Shell(tmp_path).line("ls # needs patience")
