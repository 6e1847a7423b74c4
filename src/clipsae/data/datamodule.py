"""Streams token features to the SAE.

B images of a batch, T tokens of an image, d width, S image side, N images of a dataset.
"""

from collections.abc import Callable, Iterator
from functools import partial

import torch
from lightning import LightningDataModule
from torch import Tensor

from clipsae.clip import FrozenCLIP
from clipsae.data.cache import Cache, CacheLoader, TokenLayout, TokenLoader
from clipsae.data.dataset import ImageDataset
from clipsae.data.loader import ResumableLoader, image_batches, joined
from clipsae.data.prefetch import prefetched


class FeatureDataModule(LightningDataModule):
    """Images from a dataset, through the frozen prefix on the training device: tokens [B, T, d].
    With a cache the tokens of the training, or its decoded images, are read instead, and image
    files for validation alone. On a GPU the next batch is prepared beside the step.

    The CLIP lives here and not in the LightningModule: it is no part of a checkpoint.

    Args:
        clip: the frozen model; moved to the training device.
        train_dataset: what the SAE is trained on.
        batch_size: B, images a step and device.
        shuffle_buffer_images: images whose tokens are mixed with each other, a multiple of B; 0:
            the tokens of an image stay together, in their order. The mix is a pure function of
            seed, epoch and block, so a run that is resumed within a block reads the block again
            and goes on exactly where it was.
        num_workers: processes that read images.
        seed: decides the order of the images, with the epoch.
        val_dataset: images for validation, in one fixed order; None: no validation.
        cache: the tokens of `train_dataset`, or its decoded images, with which the batches are
            those without a cache.
        block_images, buffer_images: how tokens are read, see `TokenLoader`.
    """

    def __init__(
        self,
        clip: FrozenCLIP,
        train_dataset: ImageDataset,
        *,
        batch_size: int = 32,
        shuffle_buffer_images: int = 0,
        num_workers: int = 0,
        seed: int = 0,
        val_dataset: ImageDataset | None = None,
        cache: Cache | None = None,
        block_images: int = 64,
        buffer_images: int = 1024,
    ) -> None:
        super().__init__()
        self.clip = clip
        self.train_dataset = train_dataset
        self.val_dataset = val_dataset
        self.batch_size = batch_size
        self.shuffle_buffer_images = shuffle_buffer_images
        self.num_workers = num_workers
        self.seed = seed
        self.cache = cache
        self.reading = {"block_images": block_images, "buffer_images": buffer_images}
        self._train_loader: ResumableLoader | None = None
        self._loader()  # refuses invalid sizes

    def setup(self, stage: str) -> None:
        self.clip.to(self.trainer.strategy.root_device)

    def teardown(self, stage: str) -> None:
        if self._train_loader is not None:
            self._train_loader.close()

    def train_dataloader(self) -> ResumableLoader:
        self._train_loader = self._loader(self.trainer.global_rank, self.trainer.world_size)
        return self._train_loader

    def val_dataloader(self) -> "ValidationLoader | list":
        if self.val_dataset is None:
            return []
        return ValidationLoader(self.val_dataset, self.batch_size, self.num_workers, self._tokens)

    def _loader(self, rank: int = 0, world_size: int = 1) -> ResumableLoader:
        on_gpu = self._on_gpu
        options = {
            "seed": self.seed,
            "shuffle_images": self.shuffle_buffer_images,
            "rank": rank,
            "world_size": world_size,
            "pin_memory": on_gpu,
            "transform": self._mixed,
            "prefetch": partial(prefetched, device=self.clip.device) if on_gpu else None,
        }
        if self.cache is None:
            return ResumableLoader(
                self.train_dataset, self.batch_size, num_workers=self.num_workers, **options
            )
        if isinstance(self.cache.layout, TokenLayout):
            return TokenLoader(self.cache, self.batch_size, **self.reading, **options)
        return CacheLoader(self.cache, self.batch_size, **options)

    @property
    def _on_gpu(self) -> bool:
        return self.clip.device.type == "cuda"

    def _mixed(self, images: list[Tensor], seed: int) -> Tensor:
        """The tokens of a block, permuted where there is a shuffle buffer."""
        tokens = self._tokens(images)
        return self._permuted(tokens, seed) if self.shuffle_buffer_images else tokens

    @torch.no_grad()  # not inference_mode: its tensors cannot be saved for a backward pass
    def _tokens(self, images: list[Tensor]) -> Tensor:
        """Tokens [n, T, d], float32, of images or of a cache's tokens."""
        parts = []
        for part in images:
            part = part.to(self.clip.device, non_blocking=True)
            is_image = part.dtype == torch.uint8
            parts.append(self.clip.prefix(self.clip.normalize(part)) if is_image else part.float())
        return joined(parts)

    def _permuted(self, tokens: Tensor, seed: int) -> Tensor:
        """Mix all tokens of a block, [n, T, d] -> [n, T, d]; the same on every device."""
        flat = tokens.flatten(0, 1)
        generator = torch.Generator().manual_seed(seed)
        # Pinned, or the host would wait for the copy and with it for the GPU.
        order = torch.randperm(len(flat), generator=generator, pin_memory=self._on_gpu)
        return flat[order.to(flat.device, non_blocking=True)].view_as(tokens)

    def first_batch(self, images: int) -> Tensor:
        """Tokens [n, T, d] of the first n images of the first epoch (fewer if the dataset has
        fewer), for an initialisation from data; the same on every rank. From a cache of tokens they
        are the first before a buffer permutes them."""
        return joined(list(self.first_batches(images)))

    def first_batches(self, images: int) -> Iterator[Tensor]:
        """The same, `batch_size` images after another."""
        count = min(images, len(self.train_dataset))
        if self.cache is not None:
            positions = self._loader().order(0)[:count]
            parts = self.cache.read_parts(positions.split(self.batch_size))
        else:
            loader = ResumableLoader(self.train_dataset, count, seed=self.seed)
            parts = next(iter(loader)).split(self.batch_size)
        for part in parts:
            yield self._tokens([part])


class ValidationLoader:
    """Batches of tokens in one fixed random order: a class-sorted folder begins with one class.

    Args:
        dataset: N images.
        batch_size: B.
        num_workers: processes that read images.
        transform: images -> tokens.
    """

    def __init__(
        self,
        dataset: ImageDataset,
        batch_size: int,
        num_workers: int,
        transform: Callable[[list[Tensor]], Tensor],
    ) -> None:
        self.dataset = dataset
        self.batch_size = batch_size
        self.num_workers = num_workers
        self.transform = transform

    def __len__(self) -> int:
        return -(-len(self.dataset) // self.batch_size)

    def __iter__(self) -> Iterator[Tensor]:
        order = torch.randperm(len(self.dataset), generator=torch.Generator().manual_seed(0))
        batches = image_batches(self.dataset, self.batch_size, self.num_workers, order.tolist())
        for images, _, _ in batches:
            yield self.transform([images])
