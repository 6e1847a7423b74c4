"""Names by a vision language model on any server that speaks OpenAI's chat protocol: OpenAI's own,
vLLM, Ollama, LM Studio, and others."""

import base64
import io
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor, nn

from clipsae.errors import ConfigError
from clipsae.naming.explainers.base import EXPLAINERS, Evidence, Example, Explainer
from clipsae.naming.explainers.recording import Answers, key_of

LONGEST = 60  # letters of a name
_SIDE = 256  # pixels of a picture that is sent, at most
_DARK = 0.15  # brightness of the patches where a latent does not act
_NOTHING = "nothing in common"

_DESCRIBE = (
    "One unit of a vision model acts on each of these images. Every picture shows an image on the "
    "left, and on the right the same image, dark where the unit does not act. The first {top} are "
    "those on which it acts most, the other {sample} are drawn at random from all on which it "
    "acts. What do the bright parts have in common? Answer with one word or a short phrase of at "
    "most six words, as for a caption, and nothing else. If there is nothing, answer "
    f'"{_NOTHING}".'
)
_DETECT = (
    'In which of these {n} images is something that "{name}" describes? Answer with the numbers of '
    'those images, separated by commas, or "none", and nothing else.'
)


@EXPLAINERS.register("openai")
class OpenAI(Explainer):
    """Asks a server by the package `openai` (`pip install clipsae[explain]`). Answers are kept in a
    file; what was asked before, of the same model with the same pictures, is not asked again.

    Args:
        model: a name that the server knows.
        address: the server's, up to "/v1".
        answers: the file of answers.
        requests: how many may be sent; answers from the file cost none.
        key_variable: the environment variable that holds the key. Servers that need none get a
            placeholder.
        timeout: seconds that an answer may take.

    Raises:
        ConfigError: the package is missing, or the key is where the server is OpenAI's.
    """

    requests = (1, 1)

    def __init__(
        self,
        *,
        model: str,
        address: str = "https://api.openai.com/v1",
        answers: Path,
        requests: int,
        key_variable: str = "OPENAI_API_KEY",
        timeout: float = 120.0,
    ) -> None:
        try:
            import openai
        except ImportError as error:
            raise ConfigError(
                "naming.explainer=openai needs the package openai: pip install 'clipsae[explain]'"
            ) from error
        key = os.environ.get(key_variable)
        if not key and "api.openai.com" in address:
            raise ConfigError(
                f"naming.address={address}: the environment variable {key_variable} with the key "
                "of that server is not set"
            )
        self.source = f"openai:{model}"
        self.model, self.address = model, address
        self.answers = Answers(answers)
        self.left = requests
        self._errors = openai.OpenAIError
        self._client = openai.OpenAI(
            base_url=address, api_key=key or "none", timeout=timeout, max_retries=4
        )

    def describe(self, evidence: Evidence) -> str:
        shown = [*evidence.top, *evidence.sample]
        question = _DESCRIBE.format(top=len(evidence.top), sample=len(evidence.sample))
        answer = self._ask(question, [marked(example) for example in shown])
        return name_of(answer)

    def detect(self, name: str, examples: Sequence[Example]) -> list[bool]:
        question = _DETECT.format(n=len(examples), name=name)
        answer = self._ask(question, [example.image for example in examples], numbered=True)
        found = {int(number) for number in re.findall(r"\d+", _without_thoughts(answer))}
        return [number + 1 in found for number in range(len(examples))]

    def _ask(self, question: str, pictures: Sequence[Tensor], numbered: bool = False) -> str:
        """The answer to a question about pictures, uint8 [3, h, w] each.

        Raises:
            ConfigError: the server does not answer, or the requests are used up.
        """
        content: list[dict[str, Any]] = [{"type": "text", "text": question}]
        for number, picture in enumerate(pictures):
            if numbered:
                content.append({"type": "text", "text": f"Image {number + 1}:"})
            content.append({"type": "image_url", "image_url": {"url": data_url(picture)}})
        messages: Any = [{"role": "user", "content": content}]
        key = key_of([self.model, messages])
        known = self.answers.get(key)
        if known is not None:
            return known
        if self.left < 1:
            raise ConfigError(
                "naming.requests: as many as it allows have been sent; what was answered is kept "
                f"in {self.answers.file}: raise it and run the same command again"
            )
        self.left -= 1
        try:
            # (No temperature: some models refuse any. What was answered is kept anyway.)
            said = self._client.chat.completions.create(model=self.model, messages=messages)
            if not getattr(said, "choices", None):  # some servers and proxies say errors this way
                raise self._errors(str(said))
            answer = (said.choices[0].message.content or "").strip()
        except self._errors as error:
            detail = " ".join(str(error).split())[:200]
            raise ConfigError(
                f"naming.address={self.address}: no answer of naming.model={self.model} "
                f"({detail}); what was answered is kept: the same command goes on from there"
            ) from error
        self.answers.add(key, answer, model=self.model, question=question)
        return answer


def name_of(answer: str) -> str:
    """A model's answer as a name: its first line, without quotation marks and a full stop; "" where
    it found nothing."""
    lines = _without_thoughts(answer).splitlines() or [""]
    name = lines[0].strip().strip("\"'`*.").strip()
    return "" if name.lower() == _NOTHING else name[:LONGEST]


def _without_thoughts(answer: str) -> str:
    """An answer without what some models think aloud before it."""
    return re.sub(r"<think>.*?</think>", "", answer, flags=re.DOTALL).strip()


def marked(example: Example) -> Tensor:
    """An image beside itself, dark where the latent does not act: uint8 [3, S, 2 S]."""
    bright = nn.functional.interpolate(
        (example.heat > 0).float()[None, None], example.image.shape[-2:], mode="nearest"
    )[0]
    masked = example.image.float() * (_DARK + (1 - _DARK) * bright)
    return torch.cat((example.image, masked.to(torch.uint8)), dim=2)


def data_url(picture: Tensor) -> str:
    """A picture, uint8 [3, h, w], as a URL that contains it, JPEG of quality 85."""
    image = Image.fromarray(picture.permute(1, 2, 0).cpu().numpy())
    shrink = _SIDE / image.height
    if shrink < 1:
        image = image.resize((round(image.width * shrink), _SIDE), Image.Resampling.LANCZOS)
    file = io.BytesIO()
    image.save(file, "JPEG", quality=85)
    return "data:image/jpeg;base64," + base64.b64encode(file.getvalue()).decode()
