"""Model and tokenizer as the recipe wants them. torch is imported inside: the plan reads these signatures."""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from ftdist import imports, start
from ftdist.errors import UserError
from ftdist.rundir import cache_root
from ftdist.schema import nearest

DEMO_SEED = 0
NOT_OURS = ["original/*", "*.pth", "*.gguf", "*.onnx", "*.h5", "*.msgpack"]  # other formats of the same weights

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from ftdist.strategies import Recipe


def local_path(path: str, revision: str | None) -> str:
    """The directory of `path`: itself, the demo model (made here once), a hub id's snapshot (fetched once); of a run
    what its model's shapes are read from."""
    if path == "demo":
        from ftdist import demo

        return str(demo.model(cache_root() / "demo", DEMO_SEED))
    local = Path(path).expanduser()
    if start.is_run(path):
        return str(start.shapes_directory(path))
    if local.is_dir():
        return str(local.resolve())
    from huggingface_hub import snapshot_download

    try:
        return snapshot_download(path, revision=revision, ignore_patterns=NOT_OURS)
    except Exception as failure:
        reason = str(failure).strip().splitlines()[0]
        raise UserError(f"model.path={path}: no such directory, and not to be had from the hub ({reason})")


def load(
    *,
    path: str,
    revision: str | None,
    dtype: Literal["auto", "float32", "bfloat16", "float16"],
    attn_implementation: Literal["auto", "eager", "sdpa", "flash_attention_2", "flash_attention_3", "flex_attention"],
    trust_remote_code: bool,
    quantization: Mapping[str, Any] | None,
    loaded_dtype: str,
    overrides: Mapping[str, float] | None = None,
) -> PreTrainedModel:
    """The causal language model; `dtype: auto` loads weights in `loaded_dtype`. overrides: of attributes of its
    configuration.

    Under ZeRO-3 the training arguments must exist before this call: they make `from_pretrained` shard.
    """
    assert attn_implementation != "auto"  # `job.decide` has put something in its place
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    kwargs: dict[str, Any] = dict(overrides or {})
    if quantization:
        imports.bitsandbytes()
        from transformers.integrations.deepspeed import is_deepspeed_zero3_enabled

        kwargs["quantization_config"] = BitsAndBytesConfig(**quantization)
        if not is_deepspeed_zero3_enabled():
            kwargs["device_map"] = {"": _device()}
    # Errors of a missing or broken file are the user's to mend: one line, not a traceback.
    try:
        model = AutoModelForCausalLM.from_pretrained(
            path,
            revision=revision,
            dtype=loaded_dtype if dtype == "auto" else dtype,
            attn_implementation=attn_implementation,
            trust_remote_code=trust_remote_code,
            **kwargs,
        )
    except (OSError, ValueError) as failure:
        raise UserError(f"model.path={path}: {str(failure).strip().splitlines()[0]}")
    model.config.use_cache = False
    for module in model.modules():
        # On CPUs with bfloat16, bitsandbytes 0.50 repacks 4-bit weights at the first evaluation into a layout whose
        # product has no gradient, and keeps it when training goes on: the adapters below would stop learning.
        if hasattr(module, "support_avx512bf16_for_cpu"):
            setattr(module, "support_avx512bf16_for_cpu", False)  # noqa: B010  (typed as a tensor or module)
    return model


def dropouts(config: Mapping[str, Any], wanted: float | Mapping[str, float] | None) -> dict[str, float]:
    """Attributes of a model's configuration (config.json's content) that are dropouts, and what they are to be.

    wanted: one number for all of them, or a number for each one named. UserError where the architecture has none.
    """
    if wanted is None:
        return {}
    from transformers import AutoConfig

    values, kind = dict(config), f"model type {config.get('model_type')}"
    with contextlib.suppress(ValueError):  # a class of the model's own: what its file says is all that is known
        values = AutoConfig.for_model(values.pop("model_type"), **values).to_dict()
    known = [
        name
        for name, value in values.items()
        if re.search(r"dropout|pdrop", name)
        and not re.search("summary|classifier", name)  # of heads that a language model does not have
        and isinstance(value, (int, float))
        and _acts(name, values | dict(config))
    ]
    if not known:
        raise UserError(
            f"model.dropout={wanted}: {kind} has no dropout of its own; "
            "use strategy.dropout (adapters) or train.weight_decay"
        )
    if isinstance(wanted, Mapping):
        for name in wanted:
            if name not in known:
                raise UserError(f"model.dropout.{name}: no dropout of {kind}; {nearest(name, known)}")
        return dict(wanted)
    return dict.fromkeys(known, wanted)


def _acts(name: str, config: Mapping[str, Any]) -> bool:
    """Whether the forward pass of the architecture reads this dropout (tests/main/test_retention.py tries them)."""
    if config.get("model_type") == "mpt":  # what acts is inside attn_config
        return False
    if config.get("model_type") == "falcon" and name == "attention_dropout":
        return bool(config.get("alibi") or not config.get("parallel_attn", True))
    return True


def tokenizer(path: str, revision: str | None, trust_remote_code: bool) -> PreTrainedTokenizerBase:
    """The tokenizer beside the model, with a padding token."""
    from transformers import AutoTokenizer

    made = AutoTokenizer.from_pretrained(path, revision=revision, trust_remote_code=trust_remote_code)
    if made.pad_token is None:
        made.pad_token = made.eos_token
    return made


def _device() -> Any:
    import torch

    return int(os.environ.get("LOCAL_RANK", "0")) if torch.cuda.is_available() else "cpu"


def apply(model: Any, recipe: Recipe, trained_dtype: str, adapter: Path | None = None) -> Any:
    """Put adapters around the model, or freeze all but the named parameters, before any engine exists.

    adapter: a directory whose adapter goes on, in the place of a fresh one.
    Trained weights are held in `trained_dtype`, frozen ones stay as loaded. UserError for a name that matches
    nothing: ZeRO fixes the trainable set when it starts.
    """
    import torch

    if recipe.trainable is not None:
        names = {name for name, _ in model.named_parameters()}
        for name in sorted(recipe.trainable - names):
            raise UserError(f"strategy: the model has no parameter {name}; {nearest(name, sorted(names))}")
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(name in recipe.trainable)
    if recipe.peft is not None:
        import peft

        config = peft.get_peft_config(dict(recipe.peft))
        try:
            model = peft.get_peft_model(model, config)
        except ValueError as failure:
            raise UserError(f"strategy.target_modules: {str(failure).strip().splitlines()[0]}")
        if adapter is not None:
            _fill(model, adapter)
    for parameter in model.parameters():
        if parameter.requires_grad and not hasattr(parameter, "ds_id"):  # ZeRO-3 holds shards in its own type
            parameter.data = parameter.data.to(getattr(torch, trained_dtype))
    return model


def _fill(model: Any, adapter: Path) -> None:
    """The adapter's weights from its files. UserError if they are not those of this model's adapter."""
    import peft
    from safetensors.torch import load_file

    state = load_file(adapter / start.WEIGHTS)
    own = peft.get_peft_model_state_dict(model)
    odd = sorted(set(own) ^ set(state))
    if odd:
        raise UserError(f"model.adapter=continue: the adapter in {adapter} is not this strategy's ({odd[0]})")
    peft.set_peft_model_state_dict(model, state)


@contextlib.contextmanager
def partly_quantized(model: Any) -> Iterator[None]:
    """transformers refuses to train a quantised model without adapters; with whole weights to train it is fine."""
    mark = hasattr(model, "hf_quantizer") and not hasattr(model, "peft_config")
    if mark:
        model._hf_peft_config_loaded = True
    try:
        yield
    finally:
        if mark:
            model._hf_peft_config_loaded = False


def trainable_elements(model: Any) -> int:
    """Trained elements, sharded ones (ZeRO-3 leaves shape 0 behind) counted whole."""
    return sum(int(getattr(p, "ds_numel", p.numel())) for p in model.parameters() if p.requires_grad)
