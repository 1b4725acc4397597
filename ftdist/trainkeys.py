"""The keys of the `train` group: TRL's and transformers' own fields, read from their source without importing torch."""

from __future__ import annotations

import ast
import functools
import importlib.util
import math
import typing
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from ftdist.errors import UserError
from ftdist.schema import nearest

# What transformers 5 and TRL 1 removed, and what replaced it.
REMOVED = {
    "warmup_ratio": "train.warmup_steps (a float below 1 is a share of all steps)",
    "max_seq_length": "train.max_length",
    "max_prompt_length": "train.max_length (the prompt has no limit of its own any more)",
    "evaluation_strategy": "train.eval_strategy",
    "overwrite_output_dir": "run_dir (a run directory is never overwritten; choose a new one)",
    "logging_dir": "tracking (the run directory holds every log)",
    "group_by_length": "train.packing=true",
    "save_safetensors": "nothing (safetensors is the only format)",
    "no_cuda": "CUDA_VISIBLE_DEVICES= in the environment",
    "per_gpu_train_batch_size": "train.per_device_train_batch_size",
    "per_gpu_eval_batch_size": "train.per_device_eval_batch_size",
    "adafactor": "train.optim=adafactor",
    "sharded_ddp": "engine=zero2 or engine=zero3",
    "half_precision_backend": "train.bf16=true",
    "fp16_backend": "train.bf16=true",
    "fp16_opt_level": "train.bf16=true",
    "use_mps_device": "nothing (the device is found)",
    "use_ipex": "nothing",
    "jit_mode_eval": "train.torch_compile=true",
    "tpu_num_cores": "nothing (ftdist runs on GPUs and CPUs)",
    "past_index": "nothing",
    "push_to_hub_token": "nothing (upload the finished directory yourself)",
    "include_inputs_for_metrics": "nothing",
    "torchdynamo": "train.torch_compile_backend",
    "ray_scope": "nothing",
}

# What another key of ftdist decides, or what nothing in ftdist would read: refused by name, never ignored.
ELSEWHERE = {
    "output_dir": "run_dir",
    "run_name": "run_dir",
    "project": "tracking.project",
    "report_to": "tracking=wandb or tracking=none",
    "seed": "seed",
    "data_seed": "seed",
    "deepspeed": "engine=zero1, zero2 or zero3",
    "fsdp": "engine=zero3",
    "fsdp_config": "engine=zero3",
    "use_cpu": "CUDA_VISIBLE_DEVICES= in the environment",
    "local_rank": "cluster.processes",
    "ddp_backend": "nothing (nccl on GPUs, gloo on CPUs)",
    "parallelism_config": "engine",
    "accelerator_config": "engine",
    "model_init_kwargs": "model",
    "trust_remote_code": "model.trust_remote_code",
    "chat_template_path": "data.chat_template",
    "dataset_text_field": "data.columns",
    "dataset_kwargs": "data",
    "dataset_num_proc": "data.workers",
    "shuffle_dataset": "nothing (training order is shuffled by the seed)",
    "train_sampling_strategy": "train.packing (the order of rows is a function of the seed and the epoch alone)",
    "assistant_only_loss": "data.mask=assistant",
    "completion_only_loss": "data.mask=completion",
    "truncation_mode": "data.overlong",
    "eos_token": "the tokenizer of model.path",
    "pad_token": "the tokenizer of model.path",
    "packing_strategy": "train.packing (best-fit decreasing, sequences isolated)",
    "padding_free": "train.packing",
    "eval_packing": "train.packing",
    "pad_to_multiple_of": "train.packing",
    "activation_offloading": "engine=zero3_offload or train.gradient_checkpointing=true",
    "router_aux_loss_coef": "nothing (the router's auxiliary loss is not added)",
    "remove_unused_columns": "nothing",
    "label_names": "nothing",
    "do_train": "the verb (ftdist train)",
    "do_eval": "train.eval_strategy",
    "do_predict": "the verb",
    "resume_from_checkpoint": "ftdist resume RUN, or resume=auto",
    "push_to_hub": "nothing (upload the finished directory yourself)",
    "hub_model_id": "nothing (upload the finished directory yourself)",
    "hub_strategy": "nothing (upload the finished directory yourself)",
    "hub_token": "nothing (secrets never enter a config)",
    "hub_private_repo": "nothing (upload the finished directory yourself)",
    "hub_always_push": "nothing (upload the finished directory yourself)",
    "hub_revision": "nothing (upload the finished directory yourself)",
    "trackio_space_id": "tracking=wandb",
    "trackio_bucket_id": "tracking=wandb",
    "trackio_static_space_id": "tracking=wandb",
    "logging_strategy": "train.logging_steps",
    "log_level": "nothing (rank logs are in run_dir/logs)",
    "log_level_replica": "nothing (rank logs are in run_dir/logs)",
    "log_on_each_node": "nothing (rank logs are in run_dir/logs)",
    "disable_tqdm": "nothing (a live line on a terminal, plain lines elsewhere)",
    "include_num_input_tokens_seen": "nothing (tokens are always counted)",
    "include_for_metrics": "eval",
    "eval_do_concat_batches": "eval",
    "batch_eval_metrics": "eval",
    "eval_on_start": "eval.samples (the base is always evaluated beside the tuned model)",
    "prediction_loss_only": "eval",
    "eval_accumulation_steps": "eval",
    "liger_kernel_config": "nothing (with train.use_liger_kernel=true all kernels but the loss, which is ftdist's own)",
    "average_tokens_across_devices": "nothing (every token weighs the same on every rank)",
    "logging_nan_inf_filter": "nothing (a NaN is shown as it is)",
    "bf16_full_eval": "train.bf16",
    "fp16_full_eval": "train.fp16",
    "eval_use_gather_object": "nothing (held-out rows are sharded exactly)",
    "activation_checkpointing": "train.gradient_checkpointing",
    "activation_checkpointing_kwargs": "train.gradient_checkpointing_kwargs",
    "auto_find_batch_size": "train.per_device_train_batch_size (the plan's batch is the batch)",
    "use_cache": "nothing",
    "length_column_name": "nothing (lengths are in the prepared data)",
    "save_strategy": "checkpoint.every_steps or checkpoint.every_minutes",
    "save_steps": "checkpoint.every_steps",
    "save_total_limit": "checkpoint.keep_last",
    "save_only_model": "nothing (a checkpoint is what a run can go on from)",
    "save_on_each_node": "nothing (all nodes share the run directory)",
    "enable_jit_checkpoint": "nothing (a signal always saves first)",
    "load_best_model_at_end": "stopping.restore_best",
    "metric_for_best_model": "stopping.metric",
    "greater_is_better": "stopping.direction",
    "ignore_data_skip": "nothing (a resumed run takes the rows that come next)",
    "restore_callback_states_from_checkpoint": "nothing (they are restored)",
}

# Keys of `train` that are ftdist's own: annotation and choices, as `fields` gives them.
OWN: Mapping[str, tuple[str, tuple[Any, ...]]] = {"profile": ("bool", ())}

# Limits that the types do not say.
AT_LEAST = {
    "per_device_train_batch_size": 1,
    "per_device_eval_batch_size": 1,
    "gradient_accumulation_steps": 1,
    "max_length": 2,
    "weight_decay": 0,
    "max_grad_norm": 0,
    "warmup_steps": 0,
    "dataloader_num_workers": 0,
}
ABOVE = {"learning_rate": 0, "num_train_epochs": 0, "logging_steps": 0, "adam_epsilon": 0}
SHARES = ("adam_beta1", "adam_beta2", "label_smoothing_factor")


@functools.cache
def fields(owner: str = "trl.trainer.sft_config:SFTConfig") -> Mapping[str, tuple[str, tuple[Any, ...]]]:
    """Field name → (annotation text, allowed choices) of a dataclass and its parents, newest definition first."""
    module, _, name = owner.partition(":")
    found: dict[str, tuple[str, tuple[Any, ...]]] = {}
    parents = {
        "_BaseConfig": "trl.trainer.base_config:_BaseConfig",
        "TrainingArguments": "transformers.training_args:TrainingArguments",
    }
    tree = _tree(module)
    definition = next(n for n in tree.body if isinstance(n, ast.ClassDef) and n.name == name)
    for node in definition.body:
        if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
            found[node.target.id] = (ast.unparse(node.annotation), tuple(_choices(node)))
    for base in definition.bases:
        if isinstance(base, ast.Name) and base.id in parents:
            found = {**fields(parents[base.id]), **found}
    return {key: value for key, value in found.items() if not key.startswith("_")}


def check_name(key: str) -> None:
    """UserError for a key that the installed trl/transformers do not have, or that ftdist would not read."""
    known = {**fields(), **OWN}
    if key in REMOVED and key not in known:
        raise UserError(f"train.{key}: removed from transformers 5 / TRL 1; use {REMOVED[key]}")
    if key in ELSEWHERE:
        instead = ELSEWHERE[key]
        advice = f"leave it out {instead[8:]}" if instead.startswith("nothing (") else f"use {instead}"
        raise UserError(f"train.{key}: not read here; {advice.replace('use nothing', 'leave it out')}")
    if key not in known:
        close = nearest(key, [name for name in known if name not in ELSEWHERE], prefix="train.")
        hint = close if close.startswith("did you mean") else "keys are the fields of TRL's SFTConfig"
        raise UserError(f"train.{key}: no such key; {hint}")


def check(values: Mapping[str, Any]) -> None:
    """UserError for the first key that has no reader or a value that it cannot have."""
    for key, value in values.items():
        check_name(key)
        _check_value(key, value, *(OWN.get(key) or fields()[key]))


def _check_value(key: str, value: Any, annotation: str, choices: tuple[Any, ...]) -> None:
    import pydantic

    if value is None and key in AT_LEAST:
        raise UserError(f"train.{key}=null: should be a number")
    allowed = choices or _enum_values(annotation)
    if allowed and not isinstance(value, bool) and not (value is None and "None" in annotation):
        if value not in allowed:
            raise UserError(f"train.{key}={value}: {nearest(str(value), [str(a) for a in allowed])}")
        return
    try:
        kind = eval(annotation, {"Any": Any, "Literal": typing.Literal, "Optional": typing.Optional})
    except NameError:  # a class of the library's own, which accepts what its constructor accepts
        kind = Any
    try:
        number = pydantic.TypeAdapter(kind).validate_python(value)
    except pydantic.ValidationError as failure:
        reason = failure.errors()[0]["msg"].replace("Input should be", "should be")
        raise UserError(f"train.{key}={value}: {reason[0].lower() + reason[1:]}")
    if isinstance(number, (int, float)) and not isinstance(number, bool):
        if not math.isfinite(number):
            raise UserError(f"train.{key}={value}: should be finite")
        if key == "max_steps" and number < 1 and number != -1:
            raise UserError(f"train.max_steps={value}: should be at least 1, or -1 for train.num_train_epochs")
        if key in AT_LEAST and number < AT_LEAST[key]:
            raise UserError(f"train.{key}={value}: should be at least {AT_LEAST[key]}")
        if key in ABOVE and number <= ABOVE[key]:
            raise UserError(f"train.{key}={value}: should be above {ABOVE[key]}")
        if key in SHARES and not 0 <= number < 1:
            raise UserError(f"train.{key}={value}: should be at least 0 and below 1")


@functools.cache
def _tree(module: str) -> ast.Module:
    package, _, rest = module.partition(".")
    spec = importlib.util.find_spec(package)  # finding a top-level package imports nothing
    if spec is None or not spec.submodule_search_locations:
        raise UserError(f"{package} is not installed; install it with: pip install {package}")
    path = Path(spec.submodule_search_locations[0]) / (rest.replace(".", "/") + ".py")
    return ast.parse(path.read_text(encoding="utf-8"))


def _choices(node: ast.AnnAssign) -> Iterator[Any]:
    for part in ast.walk(node):
        if isinstance(part, ast.Dict):
            for key, value in zip(part.keys, part.values, strict=True):
                if isinstance(key, ast.Constant) and key.value == "choices" and isinstance(value, ast.List):
                    yield from ast.literal_eval(value)


@functools.cache
def _enum_values(annotation: str) -> tuple[str, ...]:
    """The values of the first enum class that the annotation names."""
    names = {n.id for n in ast.walk(ast.parse(annotation, mode="eval")) if isinstance(n, ast.Name)}
    for module in ("transformers.training_args", "transformers.trainer_utils"):
        for node in _tree(module).body:
            if isinstance(node, ast.ClassDef) and node.name in names:
                pairs = [n.value for n in node.body if isinstance(n, ast.Assign)]
                return tuple(v.value for v in pairs if isinstance(v, ast.Constant) and isinstance(v.value, str))
    return ()
