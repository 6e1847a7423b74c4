"""The LightningModule around any SAE: one step, one optimizer, honest numbers."""

import logging
from collections.abc import Iterator
from typing import Any

import torch
from lightning import LightningModule
from torch import Tensor, nn

from clipsae.sae import SAE, SAEOutput
from clipsae.sae.checks import boolean, fraction, positive, whole
from clipsae.training.logging import log_histogram
from clipsae.training.ranks import average_statistics
from clipsae.training.schedule import Decay, warmup_then
from clipsae.training.window import TokenSums

log = logging.getLogger(__name__)


class SAEModule(LightningModule):
    """Trains an SAE on batches of tokens [B, T, d] that the DataModule makes.

    It never asks which variant it has: losses are named tensors, and what a variant does around
    a step (unit decoder rows, projected gradients) is behind the SAE's own hooks.

    Args:
        sae: the autoencoder; the module's only parameters.
        learning_rate, betas: Adam's. Fused where the device has it: a step on one M x d matrix
            costs a tenth of the unfused one.
        warmup_steps, decay: see `warmup_then`.
        initial_images: images whose tokens the SAE is initialised from (geometric median of
            b_dec), once, before the first step.
        compile: run the SAE's forward through torch.compile.
    """

    def __init__(
        self,
        sae: SAE,
        *,
        learning_rate: float,
        betas: tuple[float, float] = (0.9, 0.999),
        warmup_steps: int = 500,
        decay: Decay = "constant",
        initial_images: int = 32,
        compile: bool = False,
    ) -> None:
        super().__init__()
        positive("learning_rate", learning_rate)
        if not isinstance(betas, list | tuple) or len(betas) != 2:
            raise ValueError(f"betas={betas!r}: expected two numbers, such as [0.9, 0.999]")
        for beta in betas:
            fraction("betas", beta, "two numbers with 0 <= beta < 1", zero=True, one=False)
        whole("warmup_steps", warmup_steps, least=0)
        whole("initial_images", initial_images)
        boolean("compile", compile)
        self.sae = sae
        self.learning_rate = float(learning_rate)
        self.betas = (float(betas[0]), float(betas[1]))
        self.warmup_steps = warmup_steps
        self.decay = decay
        self.initial_images = initial_images
        self.forward_sae = torch.compile(sae) if compile else sae
        self.train_window = TokenSums(sae.d)
        self.val_window = TokenSums(sae.d, sae.latents)
        self.earlier: dict[str, float] = {}  # the latest numbers at the checkpoint gone on from

    def __setattr__(self, name: str, value: Any) -> None:
        # The compiled wrapper is a Module too: kept out of `_modules`, or every weight would be
        # saved twice and the names in a checkpoint would depend on `compile`.
        if name == "forward_sae":
            object.__setattr__(self, name, value)
        else:
            super().__setattr__(name, value)

    def on_fit_start(self) -> None:
        # The first step whose loss was NaN or infinite, -1: none. It is read now and then only: a
        # GPU that is asked after every step waits. (No buffer: DDP would overwrite it.)
        self.bad_step = torch.tensor(-1, device=self.device)
        self.sae.world_size = self.trainer.world_size
        fresh = self.trainer.ckpt_path is None and self.global_step == 0
        if fresh:
            log.info("initialising from the tokens of %d images", self.initial_images)
            tokens = self.trainer.datamodule.first_batch(self.initial_images)
            self.sae.initialize(tokens.to(self.device))

    def training_step(self, tokens: Tensor, batch_idx: int) -> Tensor:
        out: SAEOutput = self.forward_sae(tokens)
        if self.trainer.world_size > 1:
            average_statistics(self.sae)
        self.train_window.update(tokens, out)
        step = self.global_step + 1
        loss = out.loss
        first = ~loss.detach().isfinite() & (self.bad_step < 0)
        self.bad_step.masked_fill_(first, step)
        if step % self.trainer.log_every_n_steps == 0:
            self.check_finite()
            self._log_window("train", self.train_window)
            self.log("train/learning_rate", self.optimizers().param_groups[0]["lr"])
        return loss

    def check_finite(self) -> None:
        """Stop a training that has become useless.

        Raises:
            FloatingPointError: the loss was NaN or infinite; it names the step and its rate.
        """
        bad = self.bad_step
        if self.trainer.world_size > 1:  # or the other ranks would wait for this one for ever
            bad = self.trainer.strategy.reduce(bad.clone(), reduce_op="max")
        step = int(bad)
        if step < 0 and not all(p.isfinite().all() for p in self.sae.parameters()):
            step = self.global_step
        if step >= 0:
            factor = warmup_then(self.decay, self.warmup_steps, self.trainer.max_steps)
            rate = self.learning_rate * factor(max(0, step - 1))
            raise FloatingPointError(
                f"the loss became NaN or infinite at step {step:,} of {self.trainer.max_steps:,}, "
                f"at a learning rate of {rate:.3g}"
            )

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        self.check_finite()  # the last good checkpoint is kept
        # A continued run's numbers are those of one undisturbed, too.
        checkpoint["numbers"] = self.numbers()
        checkpoint["train_window"] = self.train_window.sums()

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        self.earlier = checkpoint["numbers"]
        if self.trainer.is_global_zero:  # they are of all ranks
            self.train_window.restore(checkpoint["train_window"])

    def numbers(self) -> dict[str, float]:
        """What was logged last under each name, before an interruption, too."""
        latest = {name: float(value) for name, value in self.trainer.callback_metrics.items()}
        return {**self.earlier, **latest}

    def on_train_end(self) -> None:
        self.check_finite()

    def validation_step(self, tokens: Tensor, batch_idx: int) -> None:
        self.val_window.update(tokens, self.sae(tokens))

    def on_validation_epoch_end(self) -> None:
        frequency = self.val_window.fired / self.val_window.tokens
        log_histogram(
            self.logger,
            "val/log10_frequency",
            frequency[frequency > 0].log10().cpu().numpy(),
            step=self.global_step,
        )
        self._log_window("val", self.val_window)

    def _log_window(self, prefix: str, window: TokenSums) -> None:
        values = window.compute()
        window.reset()
        values["dead_fraction"] = self.sae.dead.float().mean()
        self.log_dict({f"{prefix}/{name}": value for name, value in values.items()})

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        self.sae.after_backward()

    def optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        super().optimizer_step(*args, **kwargs)
        # Here and not in on_train_batch_end: checkpoints are written by callbacks, whose hooks
        # run before the module's, and would hold rows that are not yet of unit norm.
        self.sae.after_step()

    def configure_optimizers(self) -> dict[str, Any]:
        optimizer = torch.optim.Adam(
            self.trained_parameters(), lr=self.learning_rate, betas=self.betas, fused=True
        )
        factor = warmup_then(self.decay, self.warmup_steps, self.trainer.max_steps)
        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, factor)
        return {
            "optimizer": optimizer,
            "lr_scheduler": {"scheduler": scheduler, "interval": "step"},
        }

    def trained_parameters(self) -> Iterator[nn.Parameter]:
        """The parameters that receive gradients."""
        return (p for p in self.sae.parameters() if p.requires_grad)
