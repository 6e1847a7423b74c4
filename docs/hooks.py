"""What mkdocs does beyond Markdown: formulas become MathML, which browsers show without a script,
and the page of the config groups is made from the files in `conf/` and `sweeps/`."""

import re
from html import unescape
from itertools import takewhile
from pathlib import Path

from latex2mathml.converter import convert
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files

_INLINE = re.compile(r'<span class="arithmatex">\\\((.*?)\\\)</span>', re.S)
_BLOCK = re.compile(r'<div class="arithmatex">\s*\\\[(.*?)\\\]\s*</div>', re.S)

GROUPS = {
    "task": "What a run does.",
    "model": "The SAE.",
    "optimizer": "Adam and its schedule.",
    "recipe": "Selected automatically: sizes and learning rates for a pair of CLIP and model.",
    "clip": "The frozen model whose tokens the SAE reads.",
    "dataset": "What the SAE is evaluated on.",
    "train_dataset": "What it is trained on.",
    "features": "Source of the training tokens.",
    "trainer": "Lightning's Trainer: steps, devices.",
    "callbacks": "Checkpoints and the progress bar.",
    "evaluation": "Top-n classification.",
    "measurement": "Sparsity, fidelity, monosemanticity.",
    "naming": "What latents are called.",
    "logger": "Where metrics are logged.",
    "paths": "Folders of outputs and data.",
    "hydra/launcher": "How the jobs of a sweep run.",
}
PAGE = "reference/configs.md"


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the page of the config groups, and let mkdocs refuse links to what is not there."""
    root = Path(config.config_file_path).parent
    files.append(File.generated(config, PAGE, content=_configs(root)))
    return files


def on_page_content(html: str, **_: object) -> str:
    """Formulas as MathML."""
    html = _INLINE.sub(lambda m: convert(unescape(m[1])), html)
    return _BLOCK.sub(
        lambda m: f'<div class="arithmatex">{convert(unescape(m[1]), display="block")}</div>', html
    )


def _configs(root: Path) -> str:
    conf = root / "conf"
    found = {p.parent.relative_to(conf).as_posix() for p in conf.rglob("*.yaml")} - {"."}
    parts = [
        "# Config groups\n",
        "One run is one choice of each group, `group=choice`, with any value changed by "
        "`group.key=value`. These are the files: what is not in them cannot be set. Open one to "
        "read it.\n",
        "## The run itself\n",
        _file(conf / "config.yaml", "conf/config.yaml"),
    ]
    for group in [*GROUPS, *sorted(found - set(GROUPS))]:
        parts.append(f"## {group}\n\n{GROUPS.get(group, '')}\n")
        parts += [
            _file(file, f"{group}{'/' if file.stem[0] == '_' else '='}{file.stem}")
            for file in sorted((conf / group).glob("*.yaml"))
        ]
    parts.append("## sweeps\n\nWhat many runs are.\n")
    parts += [_file(f, f"sweeps={f.stem}") for f in sorted((root / "sweeps").glob("*.yaml"))]
    return "\n".join(parts)


def _file(path: Path, title: str) -> str:
    text = path.read_text().strip() or "# (empty)"
    body = "\n".join(f"    {line}".rstrip() for line in f"```yaml\n{text}\n```".splitlines())
    return f'??? note "`{title}` {_first_sentence(text)}"\n\n{body}\n'


def _first_sentence(text: str) -> str:
    """Of the comment that a file begins with, without what would end the title's quotes."""
    lines = text.removeprefix("# @package _global_\n").splitlines()
    comment = " ".join(line.removeprefix("#").strip() for line in takewhile(_is_comment, lines))
    return re.split(r"(?<=[.:]) ", comment)[0].rstrip(".:").replace('"', "")


def _is_comment(line: str) -> bool:
    return line.startswith("#")
