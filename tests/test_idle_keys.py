"""Every key of every script is in one table: what it has no effect without, and that this is said or refused then."""

import logging
from pathlib import Path

import pytest

from tests.train.test_every_script import SETTINGS
from tools.config_reference import scripts, settings_of
from warpcore.config import Config, ConfigError, Settings, make_config
from warpcore.idle_keys import about_idle, needs_of


def names(text: str) -> set[str]:
    return set(text.split())


PICTURE, VIDEO = [Path("a.png")], [Path("a.mp4")]
CLASSES = {"num_classes": 7, "model_version": "mini", "num_frames": 1}
SAID = {
    "autoencoder_frames": (2, {"model_version": "mini"}, {"model_version": "XL/2"}),
    "betas": ([0.8, 0.9], {"optimizer": "adafactor"}, {"optimizer": "lion"}),
    "block_out_channels": ([32, 64], {"autoencoder_checkpoint_path": "a"}, {}),
    "bucketeer_random_ratio": (0.5, {}, {"multi_aspect_ratio": [1, 2]}),
    "cache_path": ("cache", {}, {"webdataset_path": "s3://bucket/a.tar"}),
    "cache_size_gb": (1, {}, {"cache_path": "cache"}),
    "cache_text_gb": (1, {}, {"cache_text": True, "train_tokens": None, "text_encoder_filters": [],
                              "text_encoder_lr": None}),
    "cache_text": (True, CLASSES, {}),
    "caption_dropout": (0.5, CLASSES, {}),
    "caption_templates": (["a {caption}"], CLASSES, {}),
    "captions_getter": (("json", "lambda j: j['a']"), CLASSES, {}),
    "class_dropout": (0.5, {}, CLASSES),
    "class_getter": (("json", "lambda j: j['a']"), {}, CLASSES),
    "sample_classes": ([1], {}, CLASSES),
    "sample_prompts": (["a"], CLASSES, {}),
    "shuffle_tags": (True, CLASSES, {}),
    "tag_dropout": (0.5, CLASSES, {}),
    "text_encoder_checkpoint_path": ("a", CLASSES, {}),
    "change_target": (True, {"generator_checkpoint_path": "a"},
                      {"generator_checkpoint_path": "a", "diffusion_target": "rectified_flows"}),
    "clip_image_checkpoint_path": ("a", {"clip_image_dropout": 1.0}, {"clip_image_dropout": 0.5, "image": "a"}),
    "clip_image_model_name": ("a", {"clip_image_dropout": 1.0}, {"clip_image_dropout": 0.5, "image": "a"}),
    "decompose_both": (True, {"adapter": "lora"}, {"adapter": "lokr", "dora": False}),
    "discriminator_channels": (8, {"discriminator_weight": 0.0}, {}),
    "discriminator_start": (5, {"discriminator_weight": 0.0}, {}),
    "ema_at_end": (True, {}, {"ema_start_iters": 0}),
    "ema_beta": (0.9, {}, {"ema_start_iters": 0}),
    "ema_device": ("cpu", {}, {"post_hoc_ema": {"every": 5}}),
    "ema_iters": (5, {}, {"ema_start_iters": 0}),
    "eps": (1e-6, {"optimizer": "came"}, {"optimizer": "muon"}),
    "frame_rate": (8.0, {"num_frames": 1, "frame_stride": 1}, {"num_frames": 5, "frame_stride": 1}),
    "frame_stride": (2, {"num_frames": 1, "pictures": PICTURE}, {"num_frames": 5, "pictures": VIDEO}),
    "huber_c": (0.3, {}, {"loss_type": "huber"}),
    "huber_schedule": ("constant", {}, {"loss_type": "smooth_l1"}),
    "kl_weight": (0.5, {"decoder_only": True, "autoencoder_checkpoint_path": "a"}, {}),
    "latent_channels": (8, {"autoencoder_checkpoint_path": "a"}, {}),
    "layers_per_block": (3, {"autoencoder_checkpoint_path": "a"}, {}),
    "logit_mean": (0.5, {"timestep_sampling": "uniform"}, {"timestep_sampling": "logit_normal"}),
    "logit_std": (0.5, {"timestep_sampling": "uniform"}, {"timestep_sampling": "logit_normal"}),
    "learn_first_frame": (False, {"num_frames": 1}, {"num_frames": 5}),
    "lora_init": ("published", {"lora_checkpoint_path": "a", "alpha": 2.0, "adapter": "lora"},
                  {"lora_checkpoint_path": "a", "adapter": "lora"}),
    "mid_block_attention": (False, {"autoencoder_checkpoint_path": "a"}, {}),
    "min_lr_ratio": (0.1, {}, {"lr_schedule": "cosine"}),
    "min_sigma": (0.1, {"diffusion_target": "v"}, {"diffusion_target": "rectified_flows"}),
    "motion_column": ("flow", {"model_version": "mini"}, {"model_version": "mini-video"}),
    "multires_noise_discount": (0.5, {"offset_noise": 0.0}, {"multires_noise_iterations": 6, "offset_noise": 0.0}),
    "multires_noise_iterations": (1, {"offset_noise": 0.0}, None),
    "muon_convolutions": (True, {"optimizer": "lion"}, {"optimizer": "muon"}),
    "norm_num_groups": (4, {"autoencoder_checkpoint_path": "a"}, {"block_out_channels": [4, 8]}),
    "num_frames": (5, {"pictures": PICTURE}, {"pictures": VIDEO}),  # of a script that rebuilds
    "perceptual_weight": (0.5, {}, {"perceptual_checkpoint_path": "a"}),
    "prior_weight": (0.5, {}, {"prior_path": "b.tar"}),
    "sample_flow": (2.0, {}, {"motion_column": "flow"}),
    "factor": (8, {"adapter": "lora"}, {"adapter": "lokr", "dora": False}),
    "full_matrix": (True, {"adapter": "lora"}, {"adapter": "lokr", "dora": False}),
    "split_qkv": (True, {"adapter": "loha", "dora": False}, {"adapter": "lora"}),
    "first_frames": (["a.png"], {"num_frames": 1}, {"num_frames": 5}),
    "flow_shift": (2.0, {"diffusion_target": "epsilon"}, {"diffusion_target": "rectified_flows"}),
    "guidance_renorm": (0.5, {"guidance": 1.0}, {"guidance": 4.0}),
    "guidance_trunc": (500.0, {"guidance": 1.0}, {"guidance": 4.0}),
    "image_guidance": (1.5, {"guidance": 1.0}, {"guidance": 4.0}),
    "min_guidance": (2.0, {"guidance": 1.0}, {"guidance": 4.0}),
    "scratch_path": ("scratch", {}, {"checkpoint_path": "s3://bucket/runs"}),
    "shift": (2.0, {"diffusion_target": "epsilon"}, {"diffusion_target": "rectified_flows"}),
    "space_scale": (1.0, {"model_version": "mini"}, {"model_version": "STDiT-XL/2"}),
    "start_from_ema": (True, {"generator_checkpoint_path": None}, {"generator_checkpoint_path": "a"}),
    "tag_separator": (";", {}, {"shuffle_tags": True}),
    "time_scale": (0.5, {"model_version": "mini"}, {"model_version": "STDiT-XL/2"}),
    "timestep_sampling": ("uniform", {"model_version": "mini-1.1"}, {"model_version": "mini"}),
    "token_lr_scale": (2.0, {"train_tokens": None}, {"train_tokens": [["[a]", "^a"]]}),
    "use_timestep_transform": (False, {"model_version": "mini-1.1"}, {"model_version": "mini"}),
    "validation_levels": (4, {"validation_samples": 0, "validation_path": None}, {"validation_samples": 2}),
    "zero_terminal_snr": (True, {"diffusion_target": "rectified_flows"}, {"diffusion_target": "v"}),
    "wandb_entity": ("team", {}, {"wandb_project": "project"}),
    # drawing
    "aspect_ratio": (2.0, {"size": (64, 64)}, {"size": None, "resolution": "480p"}),
    "caption": ("a", {"stage_a_only": True}, {"stage_a_only": False}),
    "clip_text_checkpoint_path": ("a", {"stage_a_only": True}, {"stage_a_only": False}),
    "clip_text_model_name": ("a", {"stage_a_only": True}, {"stage_a_only": False}),
    "compression": (8.0, {"stage_a_only": True}, {"stage_a_only": False}),
    "condition_frame_edit": (0.5, {"loop": 1}, {"loop": 2}),
    "condition_frame_length": (5, {"loop": 1}, {"loop": 2}),
    "effnet_checkpoint_path": ("a", {"stage_a_only": True}, {"stage_a_only": False}),
    "fps": (5.0, {"num_frames": 1}, {"num_frames": 16}),
    "guidance_channels": (3, {"guidance": 1.0}, {"guidance": 4.0}),
    "guidance_rescale": (0.1, {"guidance": 1.0, "stage_a_only": True}, {"guidance": 4.0, "stage_a_only": False}),
    "image_size": (256, {"size": (64, 64)}, {"size": None}),
    "keep_unmasked": (False, {}, {"control_margins": 0.25}),
    "negative_prompt": ("a", {"guidance": 1.0}, {"guidance": 4.0}),
    "save_fps": (5.0, {"num_frames": 1}, {"num_frames": 16}),
    "seed": (3, {"stage_a_only": True}, {"stage_a_only": False}),
    "skip_existing": (True, {"output_path": None}, {"output_path": "a"}),
} | {
    key: (value, {"preview": True, "stage_a_only": True}, {"preview": False, "stage_a_only": False})
    for key, value in {
        "stage_b_checkpoint_path": "a", "stage_b_guidance": 2.0, "stage_b_sampler": "ddim", "stage_b_shift": 2.0,
        "stage_b_steps": 5, "stage_b_target": "v", "stage_b_version": "mini",
    }.items()
}  # fmt: skip
"""A value, other keys beside which it has no effect, and others beside which it has one (None: of another value)."""
REFUSED = {
    "autoencoder_version": {"autoencoder_version": "sdxl"},
    "clip_skip": {"clip_skip": 2, "text_model": "t5"},
    "cycle_lengths": {"cycle_lengths": [500]},
    "decay_updates": {"decay_updates": 5},
    "decoder_only": {"decoder_only": True},
    "ema_iteration_shift": {"ema_iteration_shift": 5, "ema_start_iters": 0},
    "ema_profile": {"ema_profile": "power"},
    "ema_rate": {"ema_rate": 0.2, "ema_start_iters": 0},
    "f_max": {"f_max": [0.5]},
    "f_min": {"f_min": [0.5]},
    "f_start": {"f_start": [0.5]},
    "fsdp_cpu_offload": {"fsdp_cpu_offload": True},
    "fsdp_shards": {"fsdp_shards": 2},
    "grad_mean_per_block": {"grad_mean_per_block": True},
    "gradient_topk_pattern": {"gradient_topk_pattern": "a"},
    "keep_tags": {"keep_tags": 1},
    "lr_power": {"lr_power": 2.0},
    "min_rank": {"min_rank": 8, "rank": 8, "adapter": "lora", "dora": False},
    "micro_batches_per_update": {"micro_batches_per_update": 2},
    "num_cycles": {"num_cycles": 2},
    "offload": {"offload": ["activations"]},
    "size_condition": {"size_condition": "bucket"},
    "swap_blocks": {"swap_blocks": 3, "activation_checkpointing": 2},
    "text_chunks": {"text_chunks": 2, "text_model": "t5"},
    "text_encoder_lr": {"text_encoder_lr": 0.1, "text_encoder_filters": [], "train_text_encoder": False},
    "text_projection_checkpoint_path": {"text_projection_checkpoint_path": "a"},
    "text_tokens": {"text_tokens": 8},
    "validation_samples": {"validation_samples": 2, "validation_path": "b.tar"},
    "warm_up_steps": {"warm_up_steps": [5]},
}
"""Keys of training that are an error where they have no effect, with such settings."""
REFUSED_IN_DRAWING = names(
    """
    control_end control_guided control_image control_margins control_mask control_ready control_start
    control_strength controlnet_blocks controlnet_filter controlnet_filter_params crop distill_steps
    negative_prompts noise_level original_size resolution strength karras timestep_spacing guidance steps sampler
    """
)
"""The same of drawing, where weights are read first: see tests/inference and tests/families."""
ALWAYS = names(
    """
    activation_checkpointing adapter aes camera_motion clean_prompts fit flow loop mask_strategy reference_mb
    reference_path reference_seconds sample_name adaptive_loss_weight allow_tf32 alpha autoencoder_checkpoint_path
    autoencoder_frames
    autoencoder_precision autoencoder_version background backup_every discriminator_weight ema_start_iters
    base_dim batch_size bucket_config cache_text caches
    caption_dropout caption_templates captions_getter checkpoint_path class_dropout class_file class_getter
    class_names classes clean_captions clip_grad_norm clip_image_dropout clip_skip clip_text_checkpoint_path
    clip_text_model_name coarse_weight codebook_decay columns commitment_weight compile clip_tensor_norm controlnet
    controlnet_blocks
    controlnet_bottleneck_mode controlnet_checkpoint_path controlnet_filter controlnet_filter_params crop_mode
    dataset_filters dead_code_use device diffusion_target dim_mult dora dtype edge_weight effnet_checkpoint_path
    effnet_dropout effnet_scale experiment_id export_dtype export_every export_file_gb fp8 frozen_weights
    fused_backward
    generator_checkpoint_path grad_accum_steps grad_mean_groups grad_norm_groups gradient_topk guidance_rescale
    image image_layers image_size image_tower_patch image_tower_size init_image input_perturbation keep_last
    kl_weight lanes latent latent_noise learn_sigma load log_every lora lora_checkpoint_path lora_dropout loss_reduce
    loss_repeat loss_scale loss_type loss_weight lr lr_schedule mask_ratios masked_loss max_bad_samples
    max_nonfinite_updates max_picture_pixels means_weight micro_batch_size min_snr_gamma model_version
    module_filters most_pictures motion groups rotary_pos_embed sample_groups video_mixer_rank
    multi_aspect_ratio num_classes num_frames num_res_blocks num_threads num_workers official_stem offset_noise
    on_data_change optimizer output_path overwrite parameter_groups patch_size perceptual_checkpoint_path pictures
    post_hoc_ema
    preview previewer_checkpoint_path prior_path process_timeout_seconds processes profile prompt_file prompts
    quantised rank rank_stabilised repa run sample_classes sample_count sample_guidance sample_guides_control
    sample_prompts sample_sampler sample_steps save_every seed seeds sequence_shards shard_group_rows
    shift shuffle_tags size squared_weight stage_a_checkpoint_path stage_a_only start_from_scratch
    tag_dropout tensorboard
    text_chunks text_encoder text_encoder_checkpoint_path text_encoder_filters text_encoder_precision text_layers
    text_length text_model text_projection_checkpoint_path text_tokens text_width tiled_decoding tiling
    timestep_sampling tower_heads tower_width train_encoder train_text_encoder train_tokens tread updates use_ema
    use_fsdp use_timestep_transform
    validation_caches validation_path wandb_project warmup_updates webdataset_path weight_decay weight_norm
    weights_dtype words z_dim zero_terminal_snr
    """
)
"""Keys that have an effect beside all others. What patterns and filters do not find stops a run, and missing masks,
columns and captions are told or stop it, once the data and the networks are there. What counts updates has its effect
where the run is made longer."""


def kinds() -> dict[str, type[Settings]]:
    found = {f"{script} {kind.__name__}": kind for script in scripts() for kind in settings_of(script)}
    return {name.removeprefix("train/").removeprefix("inference/"): kind for name, kind in found.items()}


KINDS = kinds()
KEYS = [(name, key) for name, kind in KINDS.items() for key in sorted(kind.model_fields.keys() - kind.unused)]


def settings(name: str, **changes: object) -> dict:
    """Those of a script of training, with what it requires."""
    kind = KINDS[name]
    every = {
        "experiment_id": "run", "checkpoint_path": "runs", "updates": 100, "batch_size": 4, "webdataset_path": "a.tar",
        "model_version": "mini", "generator_checkpoint_path": "a",
    } | SETTINGS[name.split(".py")[0]] | changes  # fmt: skip
    return {key: value for key, value in every.items() if key in kind.model_fields.keys() - kind.unused}


def lines(name: str, caplog, **changes: object) -> list[str]:
    """What is said of a config about keys without an effect."""
    kind = KINDS[name]
    if not issubclass(kind, Config):
        return about_idle(kind.model_construct(**changes), changes)  # without weights, which are read for more keys
    caplog.clear()
    with caplog.at_level(logging.WARNING):
        make_config(kind, settings(name, **changes))
    return caplog.messages


@pytest.mark.parametrize(("name", "key"), KEYS, ids=str)
def test_a_key_that_can_have_no_effect_says_so(name, key, caplog):
    kind = KINDS[name]
    if key in needs_of(kind):
        value, without, beside = SAID[key]
        said = lines(name, caplog, **(without | {key: value}))
        assert any(line.startswith(f"{key} has no effect without ") for line in said), said
        if beside is not None:
            said = lines(name, caplog, **(beside | {key: value}))
            assert not any(line.startswith(f"{key} ") for line in said), said
        default = kind.model_fields[key].get_default(call_default_factory=True)
        said = lines(name, caplog, **(without | {key: default}))
        assert not any(line.startswith(f"{key} ") for line in said), said
    elif key in REFUSED and issubclass(kind, Config) and not (key == "autoencoder_version" and "sd" in name):
        with pytest.raises(ConfigError, match=key):
            make_config(kind, settings(name, **REFUSED[key]))
    else:
        assert key in ALWAYS | REFUSED_IN_DRAWING, "write into a table what this key has no effect without"


def test_the_tables_name_keys_that_there_are():
    known = {key for _, key in KEYS}
    assert SAID.keys() | REFUSED.keys() | REFUSED_IN_DRAWING | ALWAYS <= known
    assert {key for kind in KINDS.values() for key in needs_of(kind)} == SAID.keys()
