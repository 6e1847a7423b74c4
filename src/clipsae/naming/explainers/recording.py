"""Answers that were given before, kept in a file."""

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from clipsae.errors import ConfigError
from clipsae.naming.explainers.base import EXPLAINERS, Evidence, Example, Explainer


class Answers:
    """A file of answers, a JSON object a line, with the key of what was asked. A line is on the
    disk before the next question is asked, so a killed run asks nothing twice; a line that is cut
    off counts as not there.

    Args:
        file: made when the first answer is added.
    """

    def __init__(self, file: Path) -> None:
        self.file = file
        self.known: dict[str, str] = {}
        if file.is_file():
            for line in file.read_text(encoding="utf-8", errors="replace").split("\n"):
                try:
                    entry = json.loads(line)
                    self.known[entry["key"]] = entry["answer"]
                except (ValueError, KeyError, TypeError):
                    continue

    def get(self, key: str) -> str | None:
        """The answer to what has this key; None: it was not asked."""
        return self.known.get(key)

    def add(self, key: str, answer: str, **about: Any) -> None:
        """Append an answer.

        Args:
            about: of what was asked, for those who read the file.
        """
        self.known[key] = answer
        self.file.parent.mkdir(parents=True, exist_ok=True)
        line = json.dumps({"key": key, **about, "answer": answer}, ensure_ascii=False)
        with self.file.open("ab") as file:
            # (A line break first: the line before may be cut off.)
            torn = file.tell() > 0 and not self._ends_in_newline()
            file.write(("\n" * torn + line + "\n").encode())

    def _ends_in_newline(self) -> bool:
        with self.file.open("rb") as file:
            file.seek(-1, 2)
            return file.read() == b"\n"


def key_of(content: Any) -> str:
    """SHA-256 of what is asked, any JSON value."""
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


@EXPLAINERS.register("recording")
class Recording(Explainer):
    """Replays names and judgements from a file, for tests, and for names that people gave.

    Args:
        recording: a JSON file {"names": {"12": "wheel"}, "true": {"wheel": [0, 5, 9]}}: names by
            latent, and for each name the indices of the images that it is true of.

    Raises:
        ConfigError: no such file, or another content.
    """

    def __init__(self, *, recording: str) -> None:
        self.source = f"recording:{Path(recording).name}"
        try:
            content = json.loads(Path(recording).expanduser().read_text(encoding="utf-8"))
            self.names = {int(latent): str(name) for latent, name in content["names"].items()}
            self.true = {str(k): {int(i) for i in v} for k, v in content["true"].items()}
        except (OSError, ValueError, KeyError, AttributeError, TypeError) as error:
            reason = error.strerror if isinstance(error, OSError) else "another content"
            raise ConfigError(
                f'naming.recording={recording}: {reason}; expected a JSON file {{"names": {{"12": '
                '"wheel"}, "true": {"wheel": [0, 5, 9]}}'
            ) from error

    def describe(self, evidence: Evidence) -> str:
        return self.names.get(evidence.latent, "")

    def detect(self, name: str, examples: Sequence[Example]) -> list[bool]:
        true = self.true.get(name, set())
        return [example.index in true for example in examples]
