"""`task=explain`: what a trained SAE sees in images of one's own, and which latents decide what
CLIP says."""

from pathlib import Path

from omegaconf import DictConfig, ListConfig
from torch import Tensor

from clipsae.clip import FrozenCLIP
from clipsae.data import ImageDataset
from clipsae.data.images import read_image
from clipsae.errors import ConfigError
from clipsae.evaluation.interventions import Interventions
from clipsae.naming import Names
from clipsae.sae import SAE
from clipsae.store import Store, write_json
from clipsae.tasks import build, pictures, precision
from clipsae.tasks.stages import classifier
from clipsae.tasks.stages import names as naming
from clipsae.tasks.table import terminal
from clipsae.visualization import References
from clipsae.visualization.explanation import Explanation
from clipsae.visualization.figures import save
from clipsae.visualization.page.images import image_activations


def run(cfg: DictConfig) -> None:
    """Explain each image, collecting the reference images and the names of latents first where they
    are missing.

    Raises:
        ConfigError: an image that cannot be read, an SAE that is not trained yet, a CLIP without
            texts.
    """
    files, images = image_files(cfg), list[Tensor]()

    def check(cfg: DictConfig, clip: FrozenCLIP, dataset: ImageDataset) -> None:
        naming.check(cfg, clip, dataset)
        images.extend(build.user_error(read_image, file, clip.image_size) for file in files)

    store = Store(cfg.paths.output_dir)
    clip, dataset, (found,) = pictures.prepare([cfg], store, check)
    cfg = found.cfg
    precision.apply(cfg, clip)
    device = build.best_device()
    classes = classifier.embeddings(cfg, store, clip.to(device), dataset).to(device)
    place = naming.make_names(cfg, store, clip, dataset, found.pictures, found.trained)
    names = Names.load(place.path)
    named = names.named.tolist()
    sae, references = SAE.load(found.trained.path).to(device), References.load(found.pictures.path)
    interventions = Interventions(clip, sae, classes)
    folder = Path(cfg.paths.output_dir) / "explained" / found.trained.path.name
    folder.mkdir(parents=True, exist_ok=True)
    console = terminal()
    for file, image in zip(files, images, strict=True):
        seen = image_activations(interventions, image)
        explanation = Explanation.of(
            seen, references, file.name, lambda m: names.text[m] if named[m] else ""
        )
        text = explanation.text()
        console.print(text, soft_wrap=True, highlight=False, markup=False)
        stem = pictures.name_of_file(file)
        (folder / f"{stem}.txt").write_text(text + "\n", encoding="utf-8")
        write_json(folder / f"{stem}.json", explanation.json())
        figure = explanation.draw(
            image, references, lambda index: dataset[index][0], pictures.names(dataset)
        )
        path = save(figure, folder / stem)[0]
        console.print(f"picture     {path}", soft_wrap=True, highlight=False)


def image_files(cfg: DictConfig) -> list[Path]:
    """The files of `image`.

    Raises:
        ConfigError: none, or one that is not there.
    """
    given = cfg.image if isinstance(cfg.image, ListConfig) else [cfg.image]
    if not given or given == [None]:
        raise ConfigError("image is not given: task=explain image=cat.jpg, or image=[a.jpg,b.jpg]")
    files = [Path(str(file)).expanduser() for file in given]
    for file in files:
        if not file.is_file():
            raise ConfigError(f"image={file}: no such file")
    return files
