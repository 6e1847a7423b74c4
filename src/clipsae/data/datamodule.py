"""Streams token features to the SAE.

B images of a batch, T tokens of an image, d width, S image side, N images of a dataset.
"""

from collections.abc import Iterator
from typing import Any

import torch
from lightning import LightningDataModule
from torch import Tensor

from clipsae.clip import FrozenCLIP
from clipsae.data.dataset import ImageDataset
from clipsae.data.loader import Block, ResumableLoader, image_batches


class FeatureDataModule(LightningDataModule):
    """Images from a dataset, through the frozen prefix on the training device: tokens [B, T, d].

    The CLIP lives here and not in the LightningModule: it is no part of a checkpoint.

    Args:
        clip: the frozen model; moved to the training device.
        train_dataset: what the SAE is trained on.
        batch_size: B, images a step and device.
        shuffle_tokens: images whose tokens are mixed with each other, a multiple of B; 0: the
            tokens of an image stay together, in their order. The mix is a pure function of seed,
            epoch and block, so a run that is resumed within a block reads the block again and
            goes on exactly where it was.
        num_workers: processes that read images.
        seed: decides the order of the images, with the epoch.
        val_dataset: images for validation, in one fixed order; None: no validation.
    """

    def __init__(
        self,
        clip: FrozenCLIP,
        train_dataset: ImageDataset,
        *,
        batch_size: int = 32,
        shuffle_tokens: int = 0,
        num_workers: int = 0,
        seed: int = 0,
        val_dataset: ImageDataset | None = None,
    ) -> None:
        super().__init__()
        self.clip = clip
        self.train_dataset = train_dataset
        self.val_dataset = val_dataset
        self.batch_size = batch_size
        self.shuffle_tokens = shuffle_tokens
        self.num_workers = num_workers
        self.seed = seed
        self._mixed: Tensor | None = None  # the tokens of the current block, already permuted
        self._loader()  # refuses sizes that cannot be

    def train_dataloader(self) -> ResumableLoader:
        return self._loader(self.trainer.global_rank, self.trainer.world_size)

    def val_dataloader(self) -> "ValidationLoader | list":
        if self.val_dataset is None:
            return []
        return ValidationLoader(self.val_dataset, self.batch_size, self.num_workers)

    def _loader(self, rank: int = 0, world_size: int = 1) -> ResumableLoader:
        return ResumableLoader(
            self.train_dataset,
            self.batch_size,
            seed=self.seed,
            shuffle_images=self.shuffle_tokens,
            rank=rank,
            world_size=world_size,
            num_workers=self.num_workers,
            pin_memory=torch.cuda.is_available(),
        )

    def transfer_batch_to_device(
        self, batch: tuple[Tensor | None, Block], device: torch.device, dataloader_idx: int
    ) -> tuple[Tensor | None, Block]:
        self.clip.to(device)
        images, block = batch
        return (None if images is None else images.to(device, non_blocking=True)), block

    def on_after_batch_transfer(
        self, batch: tuple[Tensor | None, Block], dataloader_idx: int
    ) -> Tensor:
        """Tokens [B, T, d], float32, without a gradient."""
        images, block = batch
        if block.parts == 1:
            tokens = self._tokens(images)
            return self._permuted(tokens, block) if self.shuffle_tokens else tokens
        if images is not None:
            self._mixed = self._permuted(self._tokens(images), block)
        size = len(self._mixed) // block.parts
        return self._mixed[block.part * size : (block.part + 1) * size]

    @torch.no_grad()  # not inference_mode: its tensors cannot be saved for a backward pass
    def _tokens(self, images: Tensor) -> Tensor:
        parts = [self.clip.prefix(self.clip.normalize(i)) for i in images.split(self.batch_size)]
        return torch.cat(parts) if len(parts) > 1 else parts[0]

    def _permuted(self, tokens: Tensor, block: Block) -> Tensor:
        """Mix all tokens of a block, [n, T, d] -> [n, T, d]; the same on every device."""
        flat = tokens.flatten(0, 1)
        generator = torch.Generator().manual_seed(block.seed)
        order = torch.randperm(len(flat), generator=generator).to(flat.device)
        return flat[order].view_as(tokens)

    def first_batch(self, images: int) -> Tensor:
        """Tokens [n, T, d] of the first n images of the first epoch, for an initialisation that
        looks at data; fewer where the dataset has fewer."""
        wanted = self._loader().order(0)[:images].tolist()
        parts = [
            self._tokens(batch.to(self.clip.device))
            for batch, _, _ in image_batches(self.train_dataset, self.batch_size, 0, wanted)
        ]
        return torch.cat(parts)


class ValidationLoader:
    """Batches of images in one fixed random order: a class-sorted folder begins with one class.

    Args:
        dataset: N images.
        batch_size: B.
        num_workers: processes that read images.
    """

    def __init__(self, dataset: ImageDataset, batch_size: int, num_workers: int) -> None:
        self.dataset = dataset
        self.batch_size = batch_size
        self.num_workers = num_workers

    def __len__(self) -> int:
        return -(-len(self.dataset) // self.batch_size)

    def __iter__(self) -> Iterator[Any]:
        order = torch.randperm(len(self.dataset), generator=torch.Generator().manual_seed(0))
        batches = image_batches(self.dataset, self.batch_size, self.num_workers, order.tolist())
        for images, _, _ in batches:
            yield images, Block(seed=0, part=0, parts=1)
