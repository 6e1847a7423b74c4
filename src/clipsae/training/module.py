"""The LightningModules around SAEs: one SAE in training, and several on the same tokens."""

import logging
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from lightning import LightningModule
from lightning.fabric.utilities import move_data_to_device
from lightning.pytorch.loggers import Logger
from torch import Tensor, nn

from clipsae.data.loader import Batch
from clipsae.sae import SAE, SAEOutput
from clipsae.sae.checks import boolean, fraction, positive, whole
from clipsae.sae.normalization import Moments
from clipsae.store import whole_checkpoint
from clipsae.training.logging import log_histogram
from clipsae.training.ranks import average_statistics
from clipsae.training.schedule import Decay, penalty_warmup, warmup_then
from clipsae.training.window import TokenSums

log = logging.getLogger(__name__)


class SAEModule(LightningModule):
    """An SAE in training: its loss, optimizer, schedule and numbers. `SAEGroup` trains it.

    It never asks which variant it has: losses are named tensors, and what a variant does around
    a step (unit decoder rows, projected gradients) is behind the SAE's own hooks.

    Args:
        sae: the autoencoder; the module's only parameters.
        learning_rate, betas: Adam's. Fused where the device has it: a step on one M x d matrix
            costs a tenth of the unfused one.
        reference_latents: the number of latents that the learning rate is meant for. With M latents
            it is learning_rate * sqrt(reference_latents / M): Gao et al. (arXiv 2406.04093) find
            that the best rate of TopK SAEs goes as 1 / sqrt(M). None: whatever M is.
        warmup_steps, decay, decay_fraction: see `warmup_then`.
        sparsity_warmup_steps: steps in which the penalties that make codes sparse
            (`Activation.penalties`) grow from 0; see `penalty_warmup`. Fewer than `max_steps`.
        initial_images: images whose tokens the SAE is initialised from (geometric median of
            b_dec), once, before the first step.
        statistics_images: images whose tokens the mean, deviation and whitening of its
            `normalize` are of.
        compile: run the SAE's forward through torch.compile.
        name: for log lines.
        max_steps: optimizer steps of the training; 0: it stays as initialised; -1: unknown.
        accumulate_grad_batches, gradient_clip_val, gradient_clip_algorithm: as Lightning's Trainer
            takes them.
        run: where its numbers are logged; None: nowhere.
        checkpoint: the file that the training continues from, if it is there.
        progress: called with (step, max_steps, numbers to show) after each batch; what it raises
            ends the training.
        layer: of a stream that has several, the one that this SAE reads; None: it has one.

    Attributes:
        step: optimizer steps taken.
        batches: batches of the stream that it has been trained on.
        numbers: what was logged last under each name, before an interruption, too.
        error: why the training failed; None: it did not.
    """

    def __init__(
        self,
        sae: SAE,
        *,
        learning_rate: float,
        betas: tuple[float, float] = (0.9, 0.999),
        warmup_steps: int = 500,
        decay: Decay = "constant",
        decay_fraction: float = 1.0,
        sparsity_warmup_steps: int = 0,
        reference_latents: int | None = None,
        initial_images: int = 32,
        statistics_images: int = 2000,
        compile: bool = False,
        name: str = "SAE",
        max_steps: int = -1,
        accumulate_grad_batches: int = 1,
        gradient_clip_val: float | None = None,
        gradient_clip_algorithm: str | None = None,
        run: Logger | None = None,
        checkpoint: Path | None = None,
        progress: Callable[[int, int, str | None], None] | None = None,
        layer: int | None = None,
    ) -> None:
        super().__init__()
        positive("learning_rate", learning_rate)
        if not isinstance(betas, list | tuple) or len(betas) != 2:
            raise ValueError(f"betas={betas!r}: expected two numbers, such as [0.9, 0.999]")
        for beta in betas:
            fraction("betas", beta, "two numbers with 0 <= beta < 1", zero=True, one=False)
        warmup_then(decay, warmup_steps, max(max_steps, 0), decay_fraction)
        whole("sparsity_warmup_steps", sparsity_warmup_steps, least=0)
        if sparsity_warmup_steps and not sae.activation.penalties:
            raise ValueError(
                f"sparsity_warmup_steps={sparsity_warmup_steps} does nothing with "
                f"activation={sae.config['activation']}, which has no sparsity penalty: set it to 0"
            )
        if 0 < max_steps <= sparsity_warmup_steps:
            raise ValueError(
                f"sparsity_warmup_steps={sparsity_warmup_steps}: in a training of max_steps="
                f"{max_steps} the sparsity penalty would never reach its strength: set it to fewer "
                "steps, or to 0 for no warm-up"
            )
        if reference_latents is not None:
            whole("reference_latents", reference_latents)
        whole("initial_images", initial_images)
        whole("statistics_images", statistics_images)
        boolean("compile", compile)
        self.sae = sae
        self.learning_rate = float(learning_rate)
        if reference_latents is not None:
            self.learning_rate *= math.sqrt(reference_latents / sae.latents)
        self.betas = (float(betas[0]), float(betas[1]))
        self.warmup_steps = warmup_steps
        self.decay = decay
        self.decay_fraction = decay_fraction
        self.sparsity_warmup_steps = sparsity_warmup_steps
        self.initial_images = initial_images
        self.statistics_images = statistics_images
        self.forward_sae = torch.compile(sae) if compile else sae
        self.name = name
        self.max_steps = max_steps
        self.accumulate_grad_batches = accumulate_grad_batches
        self.gradient_clip_val = gradient_clip_val
        self.gradient_clip_algorithm = gradient_clip_algorithm
        self.run = run
        self.checkpoint = checkpoint
        self.progress = progress
        self.layer = layer
        self.step = 0
        self.batches = 0
        self.accumulating = False
        self.numbers: dict[str, float] = {}
        self.error: Exception | None = None
        self._unlogged: dict[str, float] = {}
        self._accumulated: dict[str, Tensor] = {}  # gradients that the training continues from
        self.train_window = TokenSums(sae.d)
        self.val_window = TokenSums(sae.d, sae.latents)

    def __setattr__(self, name: str, value: Any) -> None:
        # The compiled wrapper is a Module too: kept out of `_modules`, or every weight would be
        # saved twice and the names in a checkpoint would depend on `compile`.
        if name == "forward_sae":
            object.__setattr__(self, name, value)
        else:
            super().__setattr__(name, value)

    @property
    def done(self) -> bool:
        """Whether it has taken all its steps, or has failed."""
        return self.step == self.max_steps or self.error is not None

    def configure_optimizers(self) -> dict[str, Any]:
        parameters = [p for p in self.sae.parameters() if p.requires_grad]
        optimizer = torch.optim.Adam(
            parameters, lr=self.learning_rate, betas=self.betas, fused=True
        )
        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, self.rate_factor())
        self.optimizer, self.scheduler = optimizer, scheduler
        return {
            "optimizer": optimizer,
            "lr_scheduler": {"scheduler": scheduler, "interval": "step"},
        }

    def rate_factor(self) -> Callable[[int], float]:
        """step -> what the learning rate is multiplied by."""
        return warmup_then(self.decay, self.warmup_steps, self.max_steps, self.decay_fraction)

    def on_fit_start(self) -> None:
        # The first step whose loss was NaN or infinite, -1: none. It is read now and then only: a
        # GPU that is asked after every step waits. (No buffer: DDP would overwrite it.)
        self.bad_step = torch.tensor(-1, device=self.device)
        self.sae.world_size = self.trainer.world_size
        if self.sparsity_warmup_steps:
            # A tensor that is set in place: compiled code would be compiled again for each number.
            self.penalty_scale = torch.ones((), device=self.device)

    def on_train_start(self) -> None:
        for name, gradient in self._accumulated.items():  # before, Lightning sets them to zero
            self.sae.get_parameter(name).grad = gradient

    def of(self, batch: Batch) -> dict[str, Tensor]:
        """What is this SAE's of a batch of the stream, by the keywords of `SAE.forward`."""
        own = batch if self.layer is None else batch[self.layer]
        return {"tokens": own} if isinstance(own, Tensor) else own

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        inputs = self.of(batch)
        if self.sparsity_warmup_steps:
            if self.step <= self.sparsity_warmup_steps:
                self.penalty_scale.fill_(penalty_warmup(self.sparsity_warmup_steps, self.step))
            self.sae.activation.penalty_scale = self.penalty_scale
        self.sae.before_step(self.step, self.max_steps)
        try:
            out: SAEOutput = self.forward_sae(**inputs)
        finally:  # outside of a step penalties are whole, however the training ends
            self.sae.activation.penalty_scale = 1.0
        if self.trainer.world_size > 1:
            average_statistics(self.sae)
        self.train_window.update(inputs.get("target", inputs["tokens"]), out)
        loss = out.loss
        first = ~loss.detach().isfinite() & (self.bad_step < 0)
        self.bad_step.masked_fill_(first, self.step + 1)
        return loss

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        if (self.step + 1) % self.trainer.log_every_n_steps == 0:
            self.check_finite()
            self.sae.read_silence()
            self.record(self._compute("train", self.train_window))
            self.record({"train/learning_rate": self.optimizer.param_groups[0]["lr"]})
        self.sae.after_backward()

    def on_after_optimizer_step(self) -> None:
        """The optimizer has taken a step."""
        self.step += 1
        self.sae.after_step()
        self.scheduler.step()

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        inputs = self.of(batch)
        self.val_window.update(inputs.get("target", inputs["tokens"]), self.sae(**inputs))

    def on_validation_epoch_end(self) -> None:
        frequency = self.val_window.fired / self.val_window.tokens
        log_histogram(
            self.run,
            "val/log10_frequency",
            frequency[frequency > 0].log10().cpu().numpy(),
            step=self.step,
        )
        self.record(self._compute("val", self.val_window))
        self.log_recorded(self.step)

    def _compute(self, prefix: str, window: TokenSums) -> dict[str, Tensor]:
        values = window.compute()
        window.reset()
        values["dead_fraction"] = self.sae.dead.float().mean()
        return {f"{prefix}/{name}": value for name, value in values.items()}

    def record(self, values: Mapping[str, Tensor | float]) -> None:
        """Keep numbers, for `log_recorded` and `numbers`."""
        numbers = {name: float(value) for name, value in values.items()}
        self._unlogged |= numbers
        self.numbers |= numbers

    def log_recorded(self, step: int) -> None:
        """Log what was recorded since the last time."""
        if self._unlogged and self.run is not None:
            epoch = self.trainer.train_dataloader.epoch
            self.run.log_metrics({**self._unlogged, "epoch": epoch}, step)
            self.run.save()
        self._unlogged = {}

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
            step = self.step
        if step >= 0:
            rate = self.learning_rate * self.rate_factor()(max(0, step - 1))
            raise FloatingPointError(
                f"the loss became NaN or infinite at step {step:,} of {self.max_steps:,}, "
                f"at a learning rate of {rate:.3g}"
            )

    def training_state(self) -> dict[str, Any]:
        """What the training continues from; to be called on every rank.

        Raises:
            FloatingPointError: the loss was NaN or infinite.
        """
        self.check_finite()
        accumulated = self.sae.named_parameters() if self.accumulating else ()
        return {
            "step": self.step,
            "batches": self.batches,
            "accumulated": {name: p.grad for name, p in accumulated},
            "sae": self.sae.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "scheduler": self.scheduler.state_dict(),
            "numbers": self.numbers,
            "train_window": self.train_window.sums(),
        }

    def load_training_state(self, state: Mapping[str, Any]) -> None:
        """Continue from what `training_state` returned."""
        self.step, self.batches = state["step"], state["batches"]
        self.sae.load_state_dict(state["sae"])
        self._accumulated = state["accumulated"]
        self.optimizer.load_state_dict(state["optimizer"])
        self.scheduler.load_state_dict(state["scheduler"])
        self.numbers = state["numbers"]
        if self.trainer.is_global_zero:  # the sums are of all ranks
            self.train_window.restore(state["train_window"])


class SAEGroup(LightningModule):
    """Trains one SAE, or several on the same batches of a `FeatureDataModule`, each as if alone.

    An SAE whose checkpoint is ahead of the others' waits until the stream has come there. One that
    fails ends by itself and the others go on; alone, its error ends the fit.

    Lightning counts the steps of all of them together: with `max_steps` the sum of theirs, the fit
    ends when all are done.

    Attributes:
        members: the SAEs.
        current: those that the latest batch was for.
    """

    def __init__(self, members: Sequence[SAEModule]) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.members = nn.ModuleList(members)
        self.current: list[SAEModule] = []
        self._stepping = members[0]

    def setup(self, stage: str) -> None:
        for member in self.members:
            member.trainer = self.trainer

    def configure_optimizers(self) -> list[dict[str, Any]]:
        return [member.configure_optimizers() for member in self.members]

    def on_fit_start(self) -> None:
        fresh: dict[int, Batch] = {}
        moments: dict[tuple[int, int | None], Moments] = {}  # of so many images, at a layer
        starts: list[tuple[int, dict[str, Any]]] = []  # batches done, and where the stream was
        self._seed = torch.initial_seed()
        for member in self.members:
            member.on_fit_start()
            state = self._checkpoint(member)
            if state is not None:
                member.load_training_state(state)
                log.info("continuing the training of %s from step %s", member.name, member.step)
                if not member.done:
                    starts.append((member.batches, state["stream"]))
                continue
            images = member.initial_images
            log.info("training %s, initialised from the tokens of %d images", member.name, images)
            if images not in fresh:
                first = self.trainer.datamodule.first_batch(images)
                fresh[images] = move_data_to_device(first, self.device)
            if member.sae.normalization.learned:
                of = member.statistics_images, member.layer
                if of not in moments:
                    moments |= self._moments(of[0])
                member.sae.normalization.fit(moments[of])
            inputs = member.of(fresh[images])
            member.sae.initialize(**inputs)
            if member.done:  # with max_steps=0
                member.sae.estimate_statistics(inputs["tokens"])
                continue
            starts.append((0, {}))
        self._start = min(starts, key=lambda start: start[0], default=(0, {}))
        steps = self.trainer.fit_loop.epoch_loop.manual_optimization.optim_step_progress.total
        steps.ready = steps.completed = sum(member.step for member in self.members)

    def _moments(self, images: int) -> dict[tuple[int, int | None], Moments]:
        """Of the tokens of so many images, at each layer of a member that asks for them; one pass
        over the images."""
        log.info("normalising by the statistics of the tokens of %d images", images)
        asking = [m for m in self.members if m.sae.normalization.learned]
        readers = {m.layer: m for m in asking if m.statistics_images == images}
        found = {(images, layer): Moments() for layer in readers}
        for batch in self.trainer.datamodule.first_batches(images):
            for layer, member in readers.items():
                found[images, layer].add(member.of(batch)["tokens"])
        return found

    def _checkpoint(self, member: SAEModule) -> dict[str, Any] | None:
        """What a member's training continues from, if there is a checkpoint."""
        file = member.checkpoint and whole_checkpoint(member.checkpoint)
        if not file:
            return None
        state = torch.load(file, map_location=self.device, weights_only=True)
        if "stream" in state:
            return state
        log.warning("%s: the checkpoint of an earlier version is ignored", member.name)
        return None

    def on_train_start(self) -> None:
        # (Lightning's own resumption skips an epoch after a SIGTERM in the last step of another.)
        batches, stream = self._start
        if stream:
            self.trainer.train_dataloader.load_state_dict(stream)
        self.trainer.fit_loop.epoch_loop.batch_progress.total.ready = batches
        for member in self.members:
            member.on_train_start()

    def training_step(self, batch: Batch, batch_idx: int) -> None:
        batches = self.trainer.fit_loop.total_batch_idx
        self.current = [m for m in self.members if not m.done and m.batches == batches]
        optimizers = self.optimizers()
        if not isinstance(optimizers, list):
            optimizers = [optimizers]
        by_member = dict(zip(self.members, optimizers, strict=True))
        self.each(lambda member: self._train(member, by_member[member], batch))

    def _train(self, member: SAEModule, optimizer: Any, batch: Batch) -> None:
        every = member.accumulate_grad_batches
        batch_idx = member.batches % self.trainer.num_training_batches  # in the epoch
        is_last = batch_idx + 1 == self.trainer.num_training_batches
        # What a plugin draws depends neither on other members nor on an interruption.
        torch.manual_seed(self._seed + member.batches)
        loss = member.training_step(batch, batch_idx)
        # Lightning runs this whole method under autocast, which is meant for the forward pass.
        with torch.autocast(self.device.type, enabled=False):
            self.manual_backward(loss / every)
            member.accumulating = (batch_idx + 1) % every != 0 and not is_last
            if not member.accumulating:
                self._stepping = member
                optimizer.step()
                optimizer.zero_grad()
                member.on_after_optimizer_step()
        member.batches += 1

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        member = self._stepping
        member.on_before_optimizer_step(optimizer)
        value, algorithm = member.gradient_clip_val, member.gradient_clip_algorithm
        if value:  # not by Lightning, which refuses bf16-mixed with fused Adam, too
            clip = nn.utils.clip_grad_value_ if algorithm == "value" else nn.utils.clip_grad_norm_
            clip(member.sae.parameters(), value)

    def each(self, work: Callable[[SAEModule], Any]) -> None:
        """Do something for each SAE of `current`. An error ends that SAE's training alone."""
        for member in list(self.current):
            try:
                work(member)
            except Exception as error:
                if len(self.members) == 1:
                    raise
                log.error("%s: %s; the others go on", member.name, error)
                member.error = error
                self.current.remove(member)
                self.trainer.fit_loop.epoch_loop.max_steps -= member.max_steps - member.step

    def on_train_batch_end(self, *args: Any) -> None:
        self.each(lambda member: member.log_recorded(max(0, member.step - 1)))

    def on_train_end(self) -> None:
        self.each(lambda member: member.check_finite())

    def on_validation_model_zero_grad(self) -> None:
        """Nothing: some may be accumulating gradients."""

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        self.each(lambda member: member.validation_step(batch, batch_idx))

    def on_validation_epoch_end(self) -> None:
        self.each(lambda member: member.on_validation_epoch_end())
