"""What parameters a model has, from its files or its config, without loading it.

A local directory is checked against its config: every parameter that the model class wants must be in the
shards with the same shape, because transformers fills a missing one with random values.
"""

from __future__ import annotations

import functools
import hashlib
import json
import math
import os
import re
import secrets
import struct
from collections import Counter
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

from ftdist.errors import UserError
from ftdist.plan.architectures import Architecture, Shape, closed_form, positions
from ftdist.rundir import cache_root

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")
_DTYPES = {
    "F64": "float64",
    "F32": "float32",
    "F16": "float16",
    "BF16": "bfloat16",
    "U8": "uint8",
    "I8": "int8",
}


class Tensor(NamedTuple):
    """A tensor in a safetensors file."""

    shape: Shape
    dtype: str  # torch's name of it, or the file's own where torch has none


@dataclass(frozen=True)
class Shapes:
    """A model as far as the plan needs it."""

    architecture: Architecture
    config: dict[str, Any]  # config.json
    source: str  # where the facts come from, as a phrase
    dtype: str | None  # of the weights as stored
    directory: Path | None  # local model directory

    @functools.cached_property
    def total(self) -> int:
        """Number of parameters, a tied tensor once."""
        return sum(math.prod(shape) for shape in self.architecture.parameters.values())

    @property
    def model_type(self) -> str:
        return str(self.config.get("model_type"))

    @property
    def positions(self) -> int | None:
        """The longest sequence that the model's positions cover, in tokens."""
        return positions(self.config)

    @property
    def quantized(self) -> bool:
        """The stored weights are quantised already."""
        return bool(self.config.get("quantization_config"))


def model_shapes(
    path: str,
    architecture: dict[str, Any] | None,
    *,
    revision: str | None = None,
    trust_remote_code: bool = False,
    need_weights: bool = False,
) -> Shapes:
    """The model at `path`: a directory, or a hub id known from the cache, `architecture`, or the hub itself.

    `architecture` is a config.json as a mapping; it lets a hub id be planned without a network.
    `need_weights` refuses a directory that has only a config.json.
    """
    directory = Path(path).expanduser()
    if directory.is_dir():
        config = _read_config(directory)
        tensors = checkpoint_shapes(directory) if need_weights or _has_weights(directory) else {}
        if tensors:
            source = "config.json and safetensors headers"
        else:
            source = "config.json (" + ("weights in .bin files" if _has_weights(directory) else "no weights") + ")"
        return _shapes(config, f"{source} in {path}", tensors, directory, trust_remote_code)
    if directory.exists():
        raise UserError(f"model.path={path}: a file; give the directory that holds config.json and the weights")
    if not _HUB_ID.fullmatch(path):
        raise UserError(f"model.path={path}: no such directory; looked for {directory.absolute()}/config.json")
    cached = _cached_config(path, revision)
    if cached is not None:
        return _shapes(_read_config(cached), "config.json in the Hugging Face cache", {}, cached, trust_remote_code)
    if architecture is not None:
        return _shapes(dict(architecture), "model.architecture", {}, None, trust_remote_code)
    fetched = _fetched_config(path, revision)
    return _shapes(_read_config(fetched), "config.json on the hub", {}, fetched, trust_remote_code)


def _shapes(
    config: dict[str, Any],
    source: str,
    tensors: dict[str, Tensor],
    directory: Path | None,
    trust_remote_code: bool,
) -> Shapes:
    architecture = closed_form(config) or _built(config, directory, trust_remote_code)
    if tensors and not config.get("quantization_config"):
        assert directory is not None
        _compare(architecture, tensors, directory)
    sizes: Counter[str] = Counter()
    for tensor in tensors.values():
        sizes[tensor.dtype] += math.prod(tensor.shape)
    declared = config.get("dtype") or config.get("torch_dtype")
    dtype = sizes.most_common(1)[0][0] if sizes else declared
    return Shapes(architecture=architecture, config=config, source=source, dtype=dtype, directory=directory)


def architecture_shapes(config: dict[str, Any]) -> dict[str, Shape]:
    """Run-time parameter names and shapes of the model that `config` (a config.json) describes."""
    return (closed_form(config) or _built(config, None, False)).parameters


def _read_config(directory: Path) -> dict[str, Any]:
    file = directory / "config.json"
    if not file.is_file():
        adapter = directory / "adapter_config.json"
        if adapter.is_file():
            base = json.loads(adapter.read_text()).get("base_model_name_or_path")
            raise UserError(f"model.path={directory}: an adapter, not a model; its base is model.path={base}")
        raise UserError(f"model.path={directory}: no config.json there; give the directory of a Hugging Face model")
    try:
        config = json.loads(file.read_text())
    except (ValueError, OSError) as failure:
        raise UserError(f"{file}: cannot be read as JSON ({failure}); download the model again")
    if not isinstance(config, dict) or not isinstance(config.get("model_type"), str):
        raise UserError(f"{file}: has no model_type; give the directory of a Hugging Face causal language model")
    return config


# Weights on disk


def _has_weights(directory: Path) -> bool:
    names = (
        "model.safetensors",
        "model.safetensors.index.json",
        "pytorch_model.bin",
        "pytorch_model.bin.index.json",
    )
    return any((directory / name).exists() for name in names)


def checkpoint_shapes(model_dir: Path) -> dict[str, Tensor]:
    """Name on disk -> shape and type of every tensor, from the safetensors headers; empty for `.bin` weights.

    UserError: no weights, a shard that is missing, cut short or no safetensors file.
    """
    single, index = model_dir / "model.safetensors", model_dir / "model.safetensors.index.json"
    if single.is_file():
        return _read_header(single)
    if not index.is_file():
        if _has_weights(model_dir):
            return {}
        raise UserError(
            f"model.path={model_dir}: no weights there (looked for model.safetensors, "
            "model.safetensors.index.json, pytorch_model.bin); download the whole model"
        )
    try:
        weight_map: dict[str, str] = json.loads(index.read_text())["weight_map"]
    except (ValueError, KeyError, TypeError, OSError) as failure:
        raise UserError(f"{index}: not an index of safetensors shards ({failure}); download it again")
    tensors: dict[str, Tensor] = {}
    for shard in sorted(set(weight_map.values())):
        if not (model_dir / shard).is_file():
            raise UserError(f"model.path={model_dir}: the index names {shard}, which is not there; download it")
        tensors |= _read_header(model_dir / shard)
    lost = sorted(set(weight_map) - set(tensors))
    if lost:
        raise UserError(
            f"{model_dir / weight_map[lost[0]]}: lacks {lost[0]}, which the index puts there; download it again"
        )
    return tensors


def _read_header(file: Path) -> dict[str, Tensor]:
    """A safetensors file: 8 bytes length of the header (little endian), the header as JSON, the data."""
    size = file.stat().st_size
    with file.open("rb") as stream:
        start = stream.read(8)
        length = struct.unpack("<Q", start)[0] if len(start) == 8 else 0
        if start.startswith(b"version "):
            raise UserError(f"{file}: a Git LFS pointer, not the weights; run git lfs pull")
        if not 2 <= length <= size - 8:
            raise UserError(f"{file}: cut short or no safetensors file ({size:,} bytes); download it again")
        try:
            header = json.loads(stream.read(length))
            header.pop("__metadata__", None)
            end = 8 + length + max((entry["data_offsets"][1] for entry in header.values()), default=0)
            tensors = {
                name: Tensor(tuple(entry["shape"]), _DTYPES.get(entry["dtype"], entry["dtype"]))
                for name, entry in header.items()
            }
        except (ValueError, KeyError, TypeError, AttributeError, IndexError) as failure:
            raise UserError(f"{file}: its header is damaged ({failure}); download it again")
    if size < end:
        raise UserError(f"{file}: cut short, {size:,} bytes of {end:,}; download it again")
    return tensors


def _compare(architecture: Architecture, tensors: dict[str, Tensor], directory: Path) -> None:
    if not architecture.disk_names:
        return
    for name, shape in architecture.parameters.items():
        stored = tensors.get(name) or tensors.get(name.split(".", 1)[1])
        if stored is None:
            raise UserError(
                f"model.path={directory}: the weights lack {name}, which config.json calls for (transformers "
                "would fill it with random values); config.json and weights are not of one model"
            )
        if stored.shape != shape:
            raise UserError(
                f"model.path={directory}: {name} has shape {list(stored.shape)}, config.json calls for "
                f"{list(shape)}; config.json and weights are not of one model"
            )


# The hub


def _cached_config(hub_id: str, revision: str | None) -> Path | None:
    from huggingface_hub import try_to_load_from_cache

    file = try_to_load_from_cache(hub_id, "config.json", revision=revision)
    return Path(file).parent if isinstance(file, str) else None


def _fetched_config(hub_id: str, revision: str | None) -> Path:
    """Downloads config.json (a few kB). UserError within seconds without a network."""
    from huggingface_hub import get_hf_file_metadata, hf_hub_download, hf_hub_url
    from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError, RevisionNotFoundError

    at = f"model.path={hub_id}"
    fix = f"run `hf download {hub_id}` where there is a network, or give a local directory"
    if os.environ.get("HF_HUB_OFFLINE", "").upper() in ("1", "TRUE", "YES", "ON"):
        raise UserError(f"{at}: no directory here, not in the Hugging Face cache, and HF_HUB_OFFLINE is set; {fix}")
    try:
        # asked once first: the download alone would retry for half a minute
        get_hf_file_metadata(hf_hub_url(hub_id, "config.json", revision=revision), timeout=5)
        return Path(hf_hub_download(hub_id, "config.json", revision=revision)).parent
    except GatedRepoError:
        raise UserError(f"{at}: the hub asks for consent first; accept the terms on its page, then `hf auth login`")
    except RevisionNotFoundError:
        raise UserError(f"model.revision={revision}: {hub_id} has no such revision on the hub")
    except RepositoryNotFoundError:
        raise UserError(f"{at}: no directory here and no such model on the hub (or it is private: `hf auth login`)")
    except Exception as failure:  # one of many classes of the HTTP client; the reason is in the name
        reason = type(failure).__name__
        raise UserError(f"{at}: no directory here, not in the Hugging Face cache, hub not reached ({reason}); {fix}")


# Any other model class: build it without memory (slow: imports torch and transformers)


def _built(config: dict[str, Any], directory: Path | None, trust_remote_code: bool) -> Architecture:
    key = json.dumps([version("transformers"), version("torch"), trust_remote_code, config], sort_keys=True)
    cache = cache_root() / "shapes" / f"{hashlib.sha256(key.encode()).hexdigest()}.json"
    try:
        stored = json.loads(cache.read_text())
    except (OSError, ValueError):
        stored = asdict(describe(meta_model(config, directory, trust_remote_code)))
        _write(cache, json.dumps(stored))
    pairs = {group: {k: tuple(v) for k, v in stored[group].items()} for group in ("parameters", "linear", "embeddings")}
    return Architecture(**{**stored, **pairs, "attention": tuple(stored["attention"])})


def _write(file: Path, text: str) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    temporary = file.with_name(f".{file.name}.{os.getpid()}.{secrets.token_hex(4)}")
    with temporary.open("w") as stream:
        stream.write(text)
        stream.flush()
        os.fsync(stream.fileno())
    temporary.rename(file)


def meta_model(config: dict[str, Any], directory: Path | None, trust_remote_code: bool) -> Any:
    """The real model class without memory (torch's meta device). Slow: imports transformers."""
    import torch
    from transformers import CONFIG_MAPPING, AutoConfig, AutoModelForCausalLM

    kind = str(config.get("model_type"))
    own_code = kind not in CONFIG_MAPPING
    if own_code and not (config.get("auto_map") and trust_remote_code and directory):
        if config.get("auto_map"):
            raise UserError(
                f"model_type {kind!r} brings its own code; read it, then set model.trust_remote_code=true "
                "and model.path to a local copy"
            )
        raise UserError(
            f"model_type {kind!r}: unknown to transformers {version('transformers')}; a newer one may know it"
        )
    try:
        if own_code:
            assert directory is not None
            built = AutoConfig.from_pretrained(directory, trust_remote_code=True)
        else:
            drop = ("model_type", "quantization_config")  # a quantised checkpoint has the same parameters
            built = AutoConfig.for_model(kind, **{k: v for k, v in config.items() if k not in drop})
        with torch.device("meta"):
            return AutoModelForCausalLM.from_config(built, trust_remote_code=own_code)
    except Exception as failure:  # the config decides what the model class trips over
        reason = " ".join(str(failure).split()).partition(" Model type should be one of")[0][:200]  # a list of hundreds
        raise UserError(
            f"model.path: config.json has model_type {kind!r}, and no causal language model can be built from it "
            f"({reason}); choose one that AutoModelForCausalLM knows"
        )


def describe(model: Any) -> Architecture:
    """The architecture of a model that exists."""
    from torch import nn
    from transformers.pytorch_utils import Conv1D

    linear: dict[str, tuple[int, int]] = {}
    embeddings: dict[str, tuple[int, int]] = {}
    head = None
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear):
            linear[name] = (module.in_features, module.out_features)
        elif isinstance(module, Conv1D):
            linear[name] = (module.weight.shape[0], module.weight.shape[1])
        elif isinstance(module, nn.Embedding):
            embeddings[name] = (module.num_embeddings, module.embedding_dim)
        if module is model.get_output_embeddings():
            head = name
    first = {id(parameter): name for name, parameter in model.named_parameters()}
    every = model.named_parameters(remove_duplicate=False)
    takes = {"eager": True, "sdpa": model._supports_sdpa, "flash_attention": model._supports_flash_attn}
    takes["flex_attention"] = model._supports_flex_attn
    return Architecture(
        parameters={name: tuple(parameter.shape) for name, parameter in model.named_parameters()},
        linear=linear,
        embeddings=embeddings,
        head=head,
        tied={name: first[id(parameter)] for name, parameter in every if first[id(parameter)] != name},
        attention=tuple(name for name, taken in takes.items() if taken),
        recomputation=model.supports_gradient_checkpointing,
        disk_names=False,  # a model class may rename what it loads
    )
