"""Streams token features to the SAEs.

B images of a batch, T tokens of an image, d width, e embedding size, S image side, N images of a
dataset.
"""

from collections.abc import Callable, Collection, Iterable, Iterator
from functools import partial

import torch
from lightning import LightningDataModule
from torch import Tensor, nn

from clipsae.clip import FrozenCLIP
from clipsae.data.cache import Cache, CacheLoader, Caches, TokenLayout, TokenLoader
from clipsae.data.captions import Texts, captions_differ, texts_of, with_texts
from clipsae.data.dataset import ImageDataset
from clipsae.data.loader import Batch, ResumableLoader, image_batches, joined, split
from clipsae.data.prefetch import prefetched
from clipsae.errors import ConfigError


class FeatureDataModule(LightningDataModule):
    """Images from a dataset, through the frozen prefix on the training device: tokens [B, T, d].
    With a cache the tokens of the training, or its decoded images, are read instead, and image
    files for validation alone. On a GPU the next batch is prepared beside the step.

    Where SAEs need more, a batch is a dict: "tokens", with it "target" [B, T, d] or "embeddings"
    [B, e]. With several layers it is a dict of the batches of each. A CLIP with `has_captions`
    gives the embeddings of images and of their captions, [B, 2, e] (`FrozenCLIP.pairs`).

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
        cache: the tokens of `train_dataset`, of several layers in `Caches`; or its decoded images,
            with which the batches are those without a cache.
        block_images, buffer_images: how tokens are read, see `TokenLoader`.
        tokens: which of an image's, see `FrozenCLIP.token_slice`.
        layers: after which blocks, counted from the end; of several each stream is what it is
            alone, and the prefix is computed once. None: `clip.layer` alone.
        target_layer: the block after which "target" is read, as `clip.layer`; None: there is none.
        needs: what the SAEs need beside tokens, see `SAE.needs`. "embeddings" are CLIP's own of the
            images, of unit length: the tail of their tokens.

    Raises:
        ValueError: an invalid size; embeddings of images whose tokens are mixed with others'.
        ConfigError: tokens or layers that the CLIP does not have; no captions where it reads them,
            or all the same.
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
        cache: Cache | Caches | None = None,
        block_images: int = 64,
        buffer_images: int = 1024,
        tokens: str = "all",
        layers: Collection[int] | None = None,
        target_layer: int | None = None,
        needs: Collection[str] = (),
    ) -> None:
        super().__init__()
        if "embeddings" in needs and shuffle_buffer_images:
            raise ValueError(
                f"shuffle_buffer_images={shuffle_buffer_images}: a loss term of this SAE needs the "
                "tokens of an image together: set it to 0"
            )
        self.clip = clip
        self.train_dataset = train_dataset
        self.val_dataset = val_dataset
        self.batch_size = batch_size
        self.shuffle_buffer_images = shuffle_buffer_images
        self.num_workers = num_workers
        self.seed = seed
        self.cache = cache
        self.reading = {"block_images": block_images, "buffer_images": buffer_images}
        self.token_slice = clip.token_slice(tokens)
        self.layers = [clip.layer] if layers is None else sorted(layers)
        self.target_layer = None if target_layer is None else clip.at(target_layer).layer
        self.embeds = "embeddings" in needs
        others = [] if self.target_layer is None else [self.target_layer]
        self.read_layers = sorted({*self.layers, *others})
        self.texts = texts_of(clip, train_dataset)
        if self.texts is not None and not captions_differ(train_dataset):
            raise ConfigError(
                "clip.hook=towers: all images of the training have the same caption: train on "
                "several classes, or give those of dataset=image_folder captions of their own by "
                "dataset.captions"
            )
        self._cut = {layer: clip.at(layer) for layer in self.read_layers}
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
        return ValidationLoader(
            self.val_dataset,
            self.batch_size,
            self.num_workers,
            self._batch,
            texts_of(self.clip, self.val_dataset),
        )

    def _loader(self, rank: int = 0, world_size: int = 1) -> ResumableLoader:
        on_gpu = self._on_gpu
        options = {
            "seed": self.seed,
            "shuffle_images": self.shuffle_buffer_images,
            "rank": rank,
            "world_size": world_size,
            "pin_memory": on_gpu,
            "transform": partial(self._batch, embeds=self.embeds),
            "prefetch": partial(prefetched, device=self.clip.device) if on_gpu else None,
        }
        if self.cache is not None and isinstance(self.cache.layout, TokenLayout):
            return TokenLoader(self.cache, self.batch_size, **self.reading, **options)
        options["texts"] = self.texts
        if self.cache is not None:
            return CacheLoader(self.cache, self.batch_size, **options)
        return ResumableLoader(
            self.train_dataset, self.batch_size, num_workers=self.num_workers, **options
        )

    @property
    def _on_gpu(self) -> bool:
        return self.clip.device.type == "cuda"

    @torch.no_grad()  # not inference_mode: its tensors cannot be saved for a backward pass
    def _batch(
        self, images: list[Batch], seed: int | None = None, *, embeds: bool = False
    ) -> Batch:
        """What SAEs are given of images or of a cache's tokens.

        Args:
            seed: of the tokens' permutation, where there is a shuffle buffer; None: as they are.
            embeds: whether it has embeddings.
        """
        parts = [self._streams(part) for part in images]
        streams = {layer: joined([part[layer][0] for part in parts]) for layer in self.read_layers}
        found: dict[int, Batch] = {}
        for layer in self.layers:
            batch = {"tokens": self._chosen(streams[layer], seed)}
            if self.target_layer is not None:
                batch["target"] = self._chosen(streams[self.target_layer], seed)
            if embeds:
                beside = [
                    context for _, context in (part[layer] for part in parts) if context is not None
                ]
                images_alone = streams[layer][:, : self.clip.tokens]
                tail = self._cut[layer].tail(images_alone, joined(beside) if beside else None)
                batch["embeddings"] = nn.functional.normalize(tail, dim=-1)
            found[layer] = batch if len(batch) > 1 else batch["tokens"]
        return found if len(found) > 1 else found[self.layers[0]]

    def _streams(self, part: Batch) -> dict[int, tuple[Tensor, Tensor | None]]:
        """Tokens [B, T, d], float32, of each layer that is read, of images or of a cache's; and
        what CLIP's tail needs beside them, which a cache does not have."""
        if not isinstance(part, Tensor):
            if "texts" in part:
                pixels = self.clip.normalize(self._moved(part["images"]))
                pairs = self.clip.pairs(pixels, self._moved(part["texts"]))
                return {self.read_layers[0]: (pairs, None)}
            return {layer: (self._moved(tokens).float(), None) for layer, tokens in part.items()}
        part = self._moved(part)
        if part.dtype != torch.uint8:
            return {self.read_layers[0]: (part.float(), None)}
        pixels = self.clip.normalize(part)
        if len(self.read_layers) > 1:
            return self.clip.prefixes(pixels, self.read_layers, with_context=True)
        (layer,) = self.read_layers
        return {layer: self._cut[layer].prefix(pixels, with_context=True)}

    def _moved(self, part: Tensor) -> Tensor:
        return part.to(self.clip.device, non_blocking=True)

    def _chosen(self, stream: Tensor, seed: int | None) -> Tensor:
        """The tokens that are trained on, those of a block permuted where there is a buffer."""
        tokens = stream[:, self.token_slice]
        mixed = self.shuffle_buffer_images and seed is not None
        return self._permuted(tokens, seed) if mixed else tokens

    def _permuted(self, tokens: Tensor, seed: int) -> Tensor:
        """Mix all tokens of a block, [n, T, d] -> [n, T, d]; the same on every device."""
        flat = tokens.flatten(0, 1)
        generator = torch.Generator().manual_seed(seed)
        # Pinned, or the host would wait for the copy and with it for the GPU.
        order = torch.randperm(len(flat), generator=generator, pin_memory=self._on_gpu)
        return flat[order.to(flat.device, non_blocking=True)].view_as(tokens)

    def first_batch(self, images: int) -> Batch:
        """A batch, without embeddings, of the first n images of the first epoch (fewer if the
        dataset has fewer), for an initialisation from data; the same on every rank. From a cache of
        tokens they are the first before a buffer permutes them."""
        return self._batch(list(self._first(images)))

    def first_batches(self, images: int) -> Iterator[Batch]:
        """The same, `batch_size` images after another."""
        for part in self._first(images):
            yield self._batch([part])

    def _first(self, images: int) -> Iterable[Batch]:
        """What is read of the first n images, `batch_size` after another."""
        count = min(images, len(self.train_dataset))
        if self.cache is not None:
            loader = self._loader()
            assert isinstance(loader, CacheLoader)
            return loader.read_parts(loader.order(0)[:count].split(self.batch_size))
        loader = ResumableLoader(self.train_dataset, count, seed=self.seed, texts=self.texts)
        return split(next(iter(loader)), self.batch_size)


class ValidationLoader:
    """Batches in one fixed random order: a class-sorted folder begins with one class.

    Args:
        dataset: N images.
        batch_size: B.
        num_workers: processes that read images.
        transform: images -> what SAEs are given of them.
        texts: of the images; None: without captions.
    """

    def __init__(
        self,
        dataset: ImageDataset,
        batch_size: int,
        num_workers: int,
        transform: Callable[[list[Batch]], Batch],
        texts: Texts | None = None,
    ) -> None:
        self.dataset = dataset
        self.batch_size = batch_size
        self.num_workers = num_workers
        self.transform = transform
        self.texts = texts

    def __len__(self) -> int:
        return -(-len(self.dataset) // self.batch_size)

    def __iter__(self) -> Iterator[Batch]:
        order = torch.randperm(len(self.dataset), generator=torch.Generator().manual_seed(0))
        batches = image_batches(self.dataset, self.batch_size, self.num_workers, order.tolist())
        for images, _, indices in batches:
            yield self.transform([with_texts(images, indices, self.texts)])
