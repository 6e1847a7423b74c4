"""How CLIP's predictions from the SAE's reconstructions develop during training.

B images, T tokens of an image, d width, C classes.
"""

import torch
from lightning import Trainer
from lightning.pytorch.callbacks import Callback
from torch import Tensor

from clipsae.clip import FrozenCLIP
from clipsae.training.module import SAEGroup, SAEModule

_AT_ONCE = 16  # images; their dense codes are held


class Predictions(Callback):
    """Logs at every validation how CLIP's predictions change on a few held-out images.

    `val/accuracy` in % beside CLIP's own, `val/accuracy_no_sae`; `val/agreement`, the share of
    images in % whose predicted class stays; `val/logit_loss`, what the logit of the class that
    CLIP predicts loses, relative to the mean over all classes.

    The images' tokens are computed once and kept, [B, T, d] (64 images of ViT-B/16: 39 MB). Each
    time costs a forward pass of the SAE over them and CLIP's tail: as much as two validation
    batches of 32 images. In a training on several devices the first one does it.

    Args:
        images: uint8 [B, 3, S, S].
        labels: LongTensor [B].
        classifier: text embeddings of the classes [C, e].
    """

    def __init__(
        self, clip: FrozenCLIP, images: Tensor, labels: Tensor, classifier: Tensor
    ) -> None:
        self.clip = clip
        self.images = images
        self.labels = labels
        self.classifier = classifier
        # By the layer that they are read at, with CLIP's context.
        self.streams: dict[int, list[tuple[Tensor, Tensor | None]]] = {}
        self.own: Tensor | None = None  # CLIP's logits [B, C]

    @torch.no_grad()
    def on_validation_epoch_end(self, trainer: Trainer, pl_module: SAEGroup) -> None:
        if any(member.run is not None for member in pl_module.current):
            self._prepare(pl_module.device)
            pl_module.each(self._log)

    def _log(self, member: SAEModule) -> None:
        if member.run is None:
            return
        clip = self.clip if member.layer is None else self.clip.at(member.layer)
        config = member.sae.config
        target = clip if config["target_layer"] is None else clip.at(config["target_layer"])
        read, written = (self._streams(one) for one in (clip, target))
        if self.own is None:
            own = [target.logits(part, self.classifier, context) for part, context in written]
            self.own = torch.cat(own)
        through = []
        for (part, _), (around, context) in zip(read, written, strict=True):
            chosen = clip.token_slice(config["tokens"])
            more = {} if target is clip else {"target": around[:, chosen]}
            found = member.sae(part[:, chosen], **more).reconstruction
            stream = clip.with_tokens(around, found, config["tokens"])
            through.append(target.logits(stream, self.classifier, context))
        compared = compare(self.own, torch.cat(through), self.labels)
        # Not by `record`: what the training keeps of itself must not depend on these images.
        values = {f"val/{name}": float(value) for name, value in compared.items()}
        member.run.log_metrics(values, step=member.step)

    def _streams(self, clip: FrozenCLIP) -> list[tuple[Tensor, Tensor | None]]:
        """The images' tokens [b, T, d] at the layer of a CLIP, in parts, each with its context."""
        if clip.layer not in self.streams:
            self.streams[clip.layer] = [
                clip.prefix(clip.normalize(part), with_context=True)
                for part in self.images.split(_AT_ONCE)
            ]
        return self.streams[clip.layer]

    def _prepare(self, device: torch.device) -> None:
        self.clip.to(device)
        self.classifier, self.labels = self.classifier.to(device), self.labels.to(device)


def compare(own: Tensor, through: Tensor, labels: Tensor) -> dict[str, Tensor]:
    """How predictions change when the stream is replaced.

    Args:
        own, through: logits [B, C] before and after.
        labels: LongTensor [B].

    Returns:
        accuracy_no_sae, accuracy, agreement in percent; logit_loss: of the class predicted
        before, relative to the mean over all classes.
    """
    before, after = own.argmax(dim=-1), through.argmax(dim=-1)
    lost = own - through
    lost = lost - lost.mean(dim=-1, keepdim=True)
    return {
        "accuracy_no_sae": 100 * (before == labels).float().mean(),
        "accuracy": 100 * (after == labels).float().mean(),
        "agreement": 100 * (before == after).float().mean(),
        "logit_loss": lost.gather(-1, before[:, None]).mean(),
    }
