"""The page says of each name of the published program what takes its place, and names tests that are there."""

import re
from pathlib import Path

ROOT = Path(__file__).parents[3]
PAGE = (ROOT / "docs" / "cosmos.md").read_text(encoding="utf-8")
THEIRS = {
    "training": """
        --config --dryrun experiment predict2_text2image_training_2b_cosmos_nemo_assets
        predict2_text2image_training_14b_cosmos_nemo_assets model predict2_text2image_fsdp_2b
        predict2_text2image_fsdp_14b optimizer fusedadamw scheduler constant lambdalinear ckpt_type standard none
        dataloader_val mock_image callbacks basic job.project job.group job.name model.config.train_architecture base
        lora model.config.lora_rank model.config.lora_alpha model.config.lora_target_modules
        model.config.init_lora_weights model.config.loss_scale model.config.loss_reduce model.config.fsdp_shard_size
        model.config.precision pipe_config.precision model.config.model_manager_config.dit_path
        pipe_config.ema.enabled pipe_config.ema.rate pipe_config.ema.iteration_shift
        pipe_config.guardrail_config.enabled guardrail_config.checkpoint_dir guardrail_config.offload_model_to_cpu
        conditioner.text.dropout_rate timestamps.t_min timestamps.t_max timestamps.order timestamps.nfe
        pipe_config.resolution state_ch sigma_data rectified_flow_t_scaling_factor adjust_video_noise state_t
        resize_online rectified_flow_loss_weight_uniform model_parallel.context_parallel_size
        dataloader_train.batch_size dataset.dataset_dir dataset.image_size trainer.max_iter trainer.logging_iter
        trainer.grad_accum_iter trainer.seed trainer.run_validation trainer.validation_iter trainer.max_val_iter
        trainer.distributed_parallelism fsdp ddp iter_speed.hit_thres grad_clip.clip_norm checkpoint.save_iter
        checkpoint.strict_resume checkpoint.load_path optimizer.lr optimizer.weight_decay optimizer.betas optimizer.eps
        scheduler.warm_up_steps scheduler.cycle_lengths scheduler.f_start scheduler.f_max scheduler.f_min
        low_prec iter_speed device_monitor manual_gc loss_log grad_clip use_text_encoder text_encoder_path
        high_sigma_ratio master_weights capturable IMAGINAIRE_OUTPUT_ROOT
    """,
    "sampling": """
        --model_size --dit_path --load_ema --prompt --negative_prompt --aspect_ratio --seed --save_path
        --batch_input_json --distill_steps --use_fast_tokenizer --use_cuda_graphs --benchmark --disable_guardrail
        --offload_guardrail --use_lora --lora_rank --lora_alpha --lora_target_modules COSMOS_PREDICT2_ARGS
        --checkpoints --text_encoder
    """,
    "data": """
        scripts.get_t5_embeddings --dataset_path --max_length --cache_dir get_t5_embeddings_from_cosmos_nemo_assets
        --prompt --is_image extract_images_from_videos --input_dataset_dir --output_dataset_dir --stride
        metas/NAME.txt images/NAME.jpg t5_xxl/NAME.pickle ImageDataset
    """,
    "files": """
        net. net_ema. checkpoints/model/iter_NUMBER.pt latest_checkpoint.txt config.yaml config.pkl stdout.log optim
        scheduler trainer model.pt model_fast_tokenizer.pt model_distilled.pt model_fast_tokenizer_distilled.pt
        tokenizer/tokenizer.pth tokenizer_fast/tokenizer.pth
    """,
}
"""Names of the published program (training config, command lines, data folders, files), by table."""


def first_columns() -> set[str]:
    """What stands as `code` in the first column of tables headed `theirs`, with the parts of dotted names."""
    found, inside = set(), False
    for line in PAGE.splitlines():
        inside = line.startswith("| theirs") or (inside and line.startswith("|"))
        if inside:
            found.update(re.findall(r"`([^`]+)`", line.split("|")[1]))
    return found | {part for name in found for part in name.split(".")} | {name.split(" ")[0] for name in found}


def test_each_name_of_the_published_program_has_a_row():
    names, known = {name for of in THEIRS.values() for name in of.split()}, first_columns()
    assert [name for name in sorted(names) if not {name, name.split(".")[-1]} & known] == []


def test_the_tests_that_the_page_names_are_there():
    named = re.findall(r"`(tests/[\w/]+\.py)::(\w+)`", PAGE)
    assert len(named) >= 10
    for file, test in named:
        assert f"def {test}(" in (ROOT / file).read_text(encoding="utf-8"), test
