"""One pickled file `{"cfg", "state_dict"}`: PatchSAE's, the Sparsemax SAE's, and what early SAELens
and ViT-Prisma save, from which these two grew.

`cfg` is a dictionary or an object of the training code's own config class, of which only the
attributes are read. Sources: https://github.com/dynamical-inference/patchsae,
https://github.com/qyj-bkjx/Sparsemax-SAE, https://github.com/decoderesearch/SAELens,
https://github.com/Prisma-Multimodal/ViT-Prisma. But for the Sparsemax SAE they are one form,
z = rule((x - b_dec) W_enc + b_enc), x_hat = z W_dec + b_dec, and PatchSAE has no option of it.
(PatchSAE's evaluation adds a constant of 0.105 to every element of x_hat, which is no part of the
SAE.)
"""

from dataclasses import replace
from pathlib import Path
from typing import Any

from clipsae.interop import saelens, sparsemax_release
from clipsae.interop.known import PATCHSAE, SAELENS, refuse_others
from clipsae.interop.plain import Imported
from clipsae.interop.safely import Inert, Tensors, read_pickle

SUFFIXES = (".pt", ".pth", ".ckpt")

# What trainings save beside the SAE, to go on from.
_OF_TRAINING = (
    *("optimizer", "optimizer_state_dict", "scheduler", "scheduler_state_dict", "lr_scheduler"),
    *("epoch", "step", "global_step", "n_training_steps", "n_training_tokens", "wandb_id"),
)

_CLASSES = (
    *(
        f"{module}.{name}"
        for module in ("src.sae_training.config", "sae_training.config")
        for name in ("ViTSAERunnerConfig", "Config", "LanguageModelSAERunnerConfig")
    ),
    "sae_lens.training.config.LanguageModelSAERunnerConfig",
    "vit_prisma.sae.config.VisionModelSAERunnerConfig",
    "vit_prisma.configs.HookedViTConfig.HookedViTConfig",
)


def read(path: Path) -> Imported:
    """Read one file: the paper's Sparsemax SAE if it holds `concept`.

    Raises:
        FileNotFoundError, ValueError: none there, or none of these, or a hostile one; an option
            that is not understood.
    """
    held = read_pickle(path, _CLASSES)
    if not isinstance(held, dict) or "state_dict" not in held:
        raise ValueError(f"{path} holds no 'state_dict': expected a PatchSAE or Sparsemax release")
    refuse_others(held, ("state_dict", "cfg", "config", *_OF_TRAINING), {}, path)
    cfg = _options(held.get("cfg", held.get("config")), path)
    tensors = Tensors(path, held["state_dict"])
    if "concept" in tensors:
        return sparsemax_release.convert(cfg, tensors)
    found = saelens.convert(cfg, tensors, path, SAELENS | PATCHSAE)
    if not cfg:
        unsaid = f"{path} has no config: its weights are read as those of a ReLU SAE."
        found = replace(found, lost=(*found.lost, unsaid))
    of_patchsae = set(cfg) <= PATCHSAE | {"d_in", "d_sae", "gated_sae"}
    return replace(found, format="PatchSAE") if of_patchsae else found


def _options(cfg: Any, path: Path) -> dict[str, Any]:
    """The config's values by name; those that are no plain ones, too, so that none is dropped."""
    if cfg is None:
        return {}
    cfg = vars(cfg) if isinstance(cfg, Inert) else cfg
    if not isinstance(cfg, dict):
        raise ValueError(f"{path}: cfg is a {type(cfg).__name__}: expected names and values")
    return {
        str(name): vars(value) if isinstance(value, Inert) else value for name, value in cfg.items()
    }
