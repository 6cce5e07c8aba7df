"""Keys: how other tools spell our settings, and what of theirs can be said here.

Three vocabularies are read beside our own: FinLoRA's documentation (`use_rsLoRA`, `lora_rank`),
FinLoRA's `finetune_configs.json` (`lora_r`, `dataset_path`) and Axolotl's YAML. A key of theirs
sets one of our fields (`SPELLINGS`), or is read only at values that change nothing (`INERT`).
"""

from typing import NamedTuple


class Spelling(NamedTuple):
    """The names of one field; several are separated by a space."""

    field: str
    finlora: str = ""
    json: str = ""
    axolotl: str = ""
    others: str = ""

    @property
    def names(self) -> list[str]:
        """All of them but our own."""
        return " ".join(self[1:]).split()


SPELLINGS = (
    # ours, FinLoRA's documentation, FinLoRA's JSON, Axolotl, PEFT and TRL
    Spelling("model", "model_name", "base_model", "base_model", "model_name_or_path"),
    Spelling("dataset", "dataset", "dataset_path", "datasets"),
    Spelling("eval_dataset", "", "", "test_datasets"),
    Spelling("eval_fraction", "", "", "val_set_size"),
    Spelling("output", "", "", "output_dir"),
    Spelling("rank", "lora_rank", "lora_r", "lora_r", "r"),
    Spelling("alpha", "lora_alpha", "lora_alpha", "lora_alpha"),
    Spelling("use_rslora", "use_rsLoRA", "peft_use_rslora", "peft_use_rslora"),
    Spelling("targets", "", "", "lora_target_modules lora_target_linear", "target_modules"),
    Spelling("rank_pattern", "", "", "lora_rank_pattern"),
    Spelling("alpha_pattern", "", "", "lora_alpha_pattern"),
    Spelling("quant_bits", "quant_bits", "quant_bits", "adapter load_in_8bit load_in_4bit"),
    Spelling("quant_format", "", "", "bnb_4bit_quant_type"),
    Spelling("lora_plus_ratio", "", "", "loraplus_lr_ratio"),
    Spelling("epochs", "", "num_epochs", "num_epochs", "num_train_epochs"),
    Spelling("steps", "", "", "max_steps"),
    Spelling(
        "batch_per_device", "", "batch_size", "micro_batch_size", "per_device_train_batch_size"
    ),
    Spelling("accumulation", "", "gradient_accumulation_steps", "gradient_accumulation_steps"),
    Spelling("learning_rate", "", "learning_rate", "learning_rate"),
    Spelling("warmup", "", "", "warmup_ratio"),
    Spelling("warmup_steps", "", "", "warmup_steps"),
    Spelling("weight_decay", "", "", "weight_decay"),
    Spelling("clip", "", "", "max_grad_norm"),
    Spelling("length", "", "", "sequence_len", "max_length"),
    Spelling("packing", "", "", "sample_packing"),
    Spelling("bfloat16", "", "", "bf16 bfloat16 bnb_4bit_compute_dtype"),
    Spelling("remat", "", "", "gradient_checkpointing"),
    Spelling("seed", "", "", "seed"),
    Spelling("eval_every", "", "", "eval_steps"),
    Spelling("evals_per_epoch", "", "", "evals_per_epoch eval_strategy"),
    Spelling("save_every", "", "", "save_steps"),
    Spelling("saves_per_epoch", "", "", "saves_per_epoch save_strategy"),
    Spelling("keep_last", "", "", "save_total_limit"),
    Spelling("tensorboard", "", "", "use_tensorboard"),
    Spelling("merge", "", "", "merge_lora"),
    Spelling("data", "", "", "dp_replicate_size"),
    Spelling("fsdp", "", "", "dp_shard_size"),
    Spelling("tensor", "", "", "tensor_parallel_size"),
)
FIELDS = {name: spelling.field for spelling in SPELLINGS for name in spelling.names}
LORA = {name for s in SPELLINGS if s.field in ("rank", "alpha") for name in s.names}


class Inert(NamedTuple):
    """Keys that are read at values that change nothing.

    Attributes:
      names: the keys, separated by spaces.
      accepted: these values, separated by spaces; none or an empty list always; `*` is any.
      why: what is done here instead.
    """

    names: str
    accepted: str
    why: str


INERT = (
    # The adapters.
    Inert("lora_dropout", "0", "adapters have no dropout here"),
    Inert("peft_use_dora use_dora", "false", "DoRA is not among the methods"),
    Inert("bias", "none", "biases are not trained"),
    Inert("lora_bias", "false", "adapters have no bias here"),
    Inert("peft_init_lora_weights init_lora_weights", "true", "adapters start as LoRA's do"),
    Inert("lora_modules_to_save modules_to_save", "", "only adapters are trained"),
    Inert("lora_model_dir", "", "a run goes on from its own output folder"),
    Inert("lora_exclude_modules", "", "name what is wanted in lora_target_modules"),
    Inert("lora_target_parameters", "", "name modules in lora_target_modules"),
    Inert(
        "peft_layers_to_transform peft_layers_pattern", "", "all layers share their adapters' rank"
    ),
    Inert("peft_layer_replication", "", "each layer is used once"),
    Inert("peft_trainable_token_indices", "", "only adapters are trained"),
    Inert("peft_ensure_weight_tying", "false", "a tied head shares its adapter anyway"),
    Inert("peft_autocast_adapter_dtype", "true", "adapters are float32"),
    Inert("peft", "", "write quant_bits and quant_format instead"),
    Inert("relora relora_steps relora_cpu_offload", "false", "ReLoRA is not among the methods"),
    Inert("loraplus_lr_embedding", "1e-6", "embeddings have no learning rate of their own"),
    Inert("bnb_4bit_use_double_quant", "false", "scales of blocks are not quantized"),
    Inert("bnb_config_kwargs gptq", "false", "write quant_bits and quant_format instead"),
    Inert(
        "unfrozen_parameters lr_groups embedding_lr embedding_lr_scale", "", "only adapters train"
    ),
    # The optimizer.
    Inert(
        "optimizer",
        "adamw adamw_torch adamw_torch_fused adamw_hf adamw_8bit adamw_bnb_8bit adamw_torch_8bit "
        "paged_adamw_32bit paged_adamw_8bit",
        "the optimizer is AdamW with float32 moments",
    ),
    Inert("optim_args", "", "AdamW has its usual constants"),
    Inert("adam_beta1", "0.9", "AdamW has its usual constants"),
    Inert("adam_beta2", "0.999", "AdamW has its usual constants"),
    Inert("adam_epsilon", "1e-8", "AdamW has its usual constants"),
    Inert("lr_scheduler", "cosine", "the learning rate rises, then falls as a cosine"),
    Inert("cosine_min_lr_ratio", "0", "the cosine ends at zero"),
    Inert("cosine_constant_lr_ratio lr_scheduler_kwargs", "", "the cosine fills all steps"),
    Inert("neftune_noise_alpha", "0", "embeddings get no noise"),
    Inert("early_stopping_patience load_best_model_at_end", "false", "all steps are made"),
    # The data.
    Inert("train_on_inputs", "false", "the loss is on answers only"),
    Inert("chat_template", "tokenizer_default", "the template is that of the model's tokenizer"),
    Inert(
        "chat_template_jinja default_system_message tokens", "", "the tokenizer is used as it is"
    ),
    Inert("group_by_length curriculum_sampling", "false", "rows are shuffled"),
    Inert("shuffle_merged_datasets", "true", "rows are shuffled"),
    Inert("pretraining_dataset", "", "training needs prompts and answers"),
    Inert("rl", "", "training is supervised"),
    Inert("reward_model process_reward_model", "false", "training is supervised"),
    Inert("dataset_exact_deduplication", "false", "rows are used as they are"),
    # Precision and devices.
    Inert("fp16 float16 fp8 tf32", "false", "precisions are float32 and bfloat16: write bfloat16"),
    Inert("float32", "true", "write bfloat16: false or true"),
    Inert("deepspeed fsdp_config", "", "devices are shared out by data, fsdp and tensor"),
    Inert("context_parallel_size sequence_parallel_degree", "1", "sequences are not split"),
    Inert("s2_attention", "false", "attention is not shifted"),
    Inert("trust_remote_code", "false", "no code of a checkpoint is ever run"),
    Inert("resume_from_checkpoint", "true", "a run goes on from its own output folder"),
    Inert("save_only_model", "false", "a checkpoint holds all that a run needs to go on"),
    Inert("plugins", "", "there are no plugins"),
    # Where numbers go.
    Inert(
        "wandb_project wandb_entity wandb_name wandb_run_id wandb_mode mlflow_experiment_name "
        "mlflow_tracking_uri hub_model_id",
        "",
        "metrics go to metrics.jsonl and TensorBoard, adapters to the output folder",
    ),
    Inert(
        "use_wandb wandb_watch wandb_log_model use_mlflow use_comet",
        "false",
        "metrics go to metrics.jsonl and TensorBoard",
    ),
    # Speed, memory, names and caches: the numbers are the same at any value.
    Inert(
        "flash_attention sdp_attention xformers_attention flex_attention eager_attention "
        "flash_attn_cross_entropy flash_attn_rms_norm lora_mlp_kernel lora_qkv_kernel "
        "lora_o_kernel torch_compile gradient_checkpointing_kwargs low_cpu_mem_usage "
        "lora_on_cpu gc_steps qlora_sharded_model_loading merge_method",
        "*",
        "XLA decides",
    ),
    Inert(
        "dataset_prepared_path dataset_processes dataset_num_proc dataset_keep_in_memory "
        "dataloader_num_workers dataloader_pin_memory dataloader_prefetch_factor "
        "skip_prepare_dataset pad_to_sequence_len eval_sample_packing eval_batch_size",
        "*",
        "the data is read once",
    ),
    Inert(
        "model_type tokenizer_type tokenizer_use_fast is_llama_derived_model "
        "is_mistral_derived_model is_qwen_derived_model lora_fan_in_fan_out fan_in_fan_out",
        "*",
        "the checkpoint says it",
    ),
    Inert(
        "strict logging_steps include_tokens_per_second save_safetensors hf_use_auth_token debug "
        "auto_resume_from_checkpoints local_rank ddp ddp_timeout axolotl_config_path",
        "*",
        "there is one way here",
    ),
)
INERT_KEYS = {name: inert for inert in INERT for name in inert.names.split()}


def markdown() -> str:
    """The table of `SPELLINGS`, for the README."""
    head = ("here", "FinLoRA's docs", "FinLoRA's JSON", "Axolotl", "PEFT, TRL")
    rows = [[", ".join(f"`{name}`" for name in cell.split()) for cell in s] for s in SPELLINGS]
    lines = [list(head), ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)
