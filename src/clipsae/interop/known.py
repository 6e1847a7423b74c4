"""Options of other libraries' configs that decide nothing of what a trained SAE computes.

Each importer reads some options, knows these, and refuses any other by its name: an option that is
dropped may be the one that makes the codes.
"""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

# Where an option of this value does nothing, it need not be read. (None does nothing anywhere.)
Harmless = Mapping[str, tuple[Any, ...]]


def names(text: str) -> frozenset[str]:
    """Words as a set."""
    return frozenset(text.split())


# SAELens's trainings, versions 0 to 6, and ViT-Prisma's, which grew out of it.
SAELENS = names(
    """
    act_store_device activations_mixing_fraction adam_beta1 adam_beta2 autocast autocast_lm
    aux_loss_coefficient b_dec_init_method cached_activations_path checkpoint_path
    cls_token_only compile_llm compile_sae context_size dataset_name dataset_path
    dataset_train_path dataset_trust_remote_code dataset_val_path dead_feature_threshold
    dead_feature_window decoder_heuristic_init decoder_init_norm decoder_orthogonal_init device
    dtype eval_batch_size_prompts eval_every_n_wandb_logs exclude_special_tokens
    expansion_factor feature_sampling_window finetuning_tokens from_pretrained_path hook_eval
    hook_layer hook_name hook_point hook_point_eval hook_point_layer image_size
    init_encoder_as_decoder_transpose initialization_method is_dataset_tokenized
    jumprelu_bandwidth jumprelu_init_threshold jumprelu_sparsity_loss_mode jumprelu_tanh_scale
    l0_coefficient l0_warm_up_steps l1_coefficient l1_warm_up_steps layer_out_subtype
    layer_subtype llm_compilation_mode log_activations_store_to_wandb
    log_optimizer_state_to_wandb log_to_wandb logger lp_norm lr lr_decay_steps lr_end
    lr_scheduler_name lr_warm_up_steps max_grad_norm metadata min_explained_variance min_l0
    model_class_name model_from_pretrained_kwargs model_kwargs model_name model_path
    mse_loss_normalization n_batches_in_buffer n_checkpoints n_eval_batches n_restart_cycles
    n_validation_runs neuronpedia_id normalize_sae_decoder num_epochs num_workers
    out_hook_point_layer pre_act_loss_coefficient prepend_bos resume run_name
    sae_compilation_mode sae_lens_training_version sae_lens_version
    scale_sparsity_penalty_by_decoder_norm seed seqpos_slice
    sparsity_penalty_decoder_norm_lp_norm store_batch_size store_batch_size_prompts streaming
    tokens_per_buffer total_training_images total_training_steps total_training_tokens
    train_batch_size train_batch_size_tokens training_tokens use_cached_activations
    use_ghost_grads use_patches_only use_sparse_activations verbose vit_model_cfg wandb_entity
    wandb_id wandb_log_frequency wandb_project
    """
)

# PatchSAE's training, and the Sparsemax SAE's.
PATCHSAE = names(
    """
    b_dec_init_method batch_size block_layer cached_activations_path checkpoint_path class_token
    create_dataloader custom_clip_ckpt_path dataset_path dead_feature_estimation_method
    dead_feature_threshold dead_feature_window debug_numerics device dtype expansion_factor
    feature_reinit_scale feature_sampling_method feature_sampling_window from_pretrained_path
    ghost_grad_exp_clamp_max image_height image_key image_width l1_coefficient label_key
    log_to_wandb lr lr_scheduler_name lr_warm_up_steps max_batch_size_for_vit_forward_pass
    model_name module_name mse_cls_coefficient n_batches_in_store n_checkpoints norm_eps
    resample_batches run_name seed store_size total_training_tokens use_cached_activations
    use_ghost_grads wandb_entity wandb_log_frequency wandb_project
    """
)

# dictionary_learning's trainers.
DICTIONARY_LEARNING = names(
    """
    anneal_end anneal_start auxk_alpha bandwidth compile_model decay_start device
    initial_sparsity_penalty k_anneal_steps l1_penalty l1_warmup_steps layer lm_name lp_norm lr
    n_sparsity_updates norm_factor p_end p_start resample_steps seed sparsity_function
    sparsity_penalty sparsity_queue_length sparsity_warmup_steps steps submodule_name target_l0
    threshold_beta threshold_start_step top_k_aux trainer_class wandb_name warmup_steps
    """
)

# visaebench's and overcomplete's.
VISAEBENCH = names(
    """
    backbone batch_size dataset device dtype epochs expansion_factor layer learning_rate lr
    model model_name name num_epochs seed steps
    """
)

# sparsify's; the loss alone knows of multi_topk.
SPARSIFY = names("expansion_factor gram_table_hash lookup_max_order multi_topk normalize_decoder")


def refuse_others(
    config: Mapping[str, Any], known: Iterable[str], harmless: Harmless, where: Path | str
) -> None:
    """Nothing of a config is dropped unread.

    Args:
        known: options that are read, and those that decide nothing.
        harmless: options that are not read, by the values at which they do nothing.
        where: the file, for messages.

    Raises:
        ValueError: another option, or one of `harmless` at another value.
    """
    known = set(known)
    for name, value in config.items():
        if value is None or name in known:
            continue
        if name not in harmless:
            raise ValueError(
                f"{where}: {name}={_shown(value)} is an option that is not known here and may "
                "decide the codes: remove it from the file if it does not"
            )
        plain = isinstance(value, str | bool | int | float | list | tuple | dict)
        if not plain or value not in harmless[name]:
            expected = " or ".join(str(allowed) for allowed in harmless[name]) or "null"
            raise ValueError(
                f"{where}: {name}={_shown(value)} has no counterpart here: expected {expected}"
            )


def _shown(value: Any) -> str:
    text = " ".join(repr(value).split())
    return text if len(text) <= 80 else f"{text[:77]}..."
