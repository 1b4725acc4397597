"""Weights → a sharded safetensors model, tensor by tensor, adapters added on the way.

Reads and writes files: no model class, no GPU, and never more in memory than a few pieces of a tensor.
"""

from __future__ import annotations

import functools
import json
import math
import os
import re
import shutil
import struct
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ftdist.errors import UserError
from ftdist.spectrum import reader
from ftdist.spectrum.reader import Stored

if TYPE_CHECKING:
    import torch

PIECE = 64 << 20  # bytes of float32 that are worked on at once
CODES = {"float64": "F64", "float32": "F32", "bfloat16": "BF16", "float16": "F16"}
WIDTHS = reader.FLOATS | {"I64": 8, "I32": 4, "I16": 2, "I8": 1, "U8": 1, "BOOL": 1}
EMBEDDINGS = ("embed_tokens", "wte", "word_embeddings", "embed_in", "tok_embeddings")
HEADS = ("lm_head", "embed_out", "output")
TURNED_STACKS = ("gpt_oss", "llama4", "llama4_text")  # experts stored (in, out)
# What these kinds of initialisation did to the base, no file of the base tells.
CHANGES_THE_BASE = ("pissa", "corda", "olora", "loftq")


@dataclass(frozen=True)
class Update:
    """What an adapter does to one matrix W (out × in): W + s·B·A; with a magnitude, its rows rescaled (DoRA).

    `whole`: a tensor that replaces it.
    """

    scale: float = 0.0
    a: torch.Tensor | None = None  # (r, in)
    b: torch.Tensor | None = None  # (out, r)
    magnitude: torch.Tensor | None = None  # (out)
    transposed: bool = False  # stored as (in, out)
    bias: torch.Tensor | None = None  # added to a vector
    whole: torch.Tensor | None = None
    stack: tuple[Update, ...] = ()  # of a stack of matrices (experts, out, in), one each

    def applied(self, piece: torch.Tensor, first: int) -> torch.Tensor:
        """Rows first … of the stored matrix in float32, with the update."""
        import torch

        last = first + len(piece)
        if self.stack:
            return torch.stack([self.stack[first + i].applied(matrix, 0) for i, matrix in enumerate(piece)])
        if self.whole is not None:
            return self.whole[first:last].float()
        if self.bias is not None:
            return piece + self.bias[first:last].float()
        assert self.a is not None and self.b is not None
        a, b = self.a.float(), self.b.float()
        if self.transposed:
            piece = piece + self.scale * (a[:, first:last].T @ b.T)
        else:
            piece = piece + self.scale * (b[first:last] @ a)
        if self.magnitude is not None:  # never with a transposed one
            piece = piece * (self.magnitude[first:last].float() / torch.linalg.norm(piece, dim=1))[:, None]
        return piece


class Adapter:
    """A LoRA adapter directory: what it does to which tensor of a base."""

    def __init__(self, directory: Path, base: dict[str, Stored], base_config: dict[str, Any]) -> None:
        self.config: dict[str, Any] = _json(directory / "adapter_config.json")
        self.base, self.base_config = base, base_config
        self.updates: dict[str, Update] = {}
        self.added: dict[str, str] = {}  # tensors that the base does not hold → of which base tensor they start
        self._refuse()
        weights = _adapter_tensors(directory)
        parts: dict[str, dict[str, torch.Tensor]] = {}
        for key, tensor in weights.items():
            name = key.removeprefix("base_model.model.")
            match = re.fullmatch(
                r"(.+)\.(lora_(?:A|B|embedding_A|embedding_B|magnitude_vector))(?:\.(weight|bias))?", name
            )
            if match:
                module, part, kind = match.groups()
                parts.setdefault(module, {})[part + (".bias" if kind == "bias" else "")] = tensor
            elif re.search(r"\.(lora_\w+|token_adapter|trainable_tokens_delta)(\.|$)", name):
                raise UserError(f"{directory}: {key} is of a kind that cannot be merged; set export.merge=false")
            else:
                self._put(name.replace(".base_layer.", "."), Update(whole=tensor))
        for module, found in parts.items():
            plain = re.sub(r"(\.base_layer)+$", "", module)
            wrapped = [n for n in self._parameters_of(plain) if n != f"{plain}.weight" or len(self.names[n][0]) > 1]
            if wrapped:
                self._stack(directory, plain, wrapped, found)
            else:
                self._lora(directory, plain, found)

    def _refuse(self) -> None:
        kind = self.config.get("peft_type")
        if kind != "LORA":
            raise UserError(f"export.merge=true: a {kind} adapter cannot be merged, only LoRA; set export.merge=false")
        start = str(self.config.get("init_lora_weights")).lower()
        odd = [key for key in ("layer_replication", "alora_invocation_tokens", "arrow_config") if self.config.get(key)]
        odd += [f"init_lora_weights={start}"] if start.startswith(CHANGES_THE_BASE) else []
        if odd:
            raise UserError(f"export.merge=true: an adapter with {odd[0]} cannot be merged; set export.merge=false")

    def _lora(self, directory: Path, module: str, found: dict[str, torch.Tensor]) -> None:
        of_embedding = "lora_embedding_A" in found
        a, b = (found.get(f"lora_embedding_{x}" if of_embedding else f"lora_{x}") for x in "AB")
        magnitude = found.get("lora_magnitude_vector")
        if a is None or b is None or a.ndim != 2 or (magnitude is not None and of_embedding):
            raise UserError(f"{directory}: the adapter of {module} cannot be merged; set export.merge=false")
        rank = a.shape[0]
        alpha = _matching(self.config.get("alpha_pattern") or {}, module, self.config["lora_alpha"])
        scale = alpha / math.sqrt(rank) if self.config.get("use_rslora") else alpha / rank
        name = self._resolve(f"{module}.weight")
        shape, straight = self.base[self.added.get(name, name)].shape, (b.shape[0], a.shape[1])
        if shape not in (straight, straight[::-1]):
            raise UserError(
                f"{directory}: the adapter of {module} is for a matrix of {straight[0]} × {straight[1]}, the base has "
                f"{' × '.join(map(str, shape))}: it is another base; give the right one with export.base=DIR"
            )
        square = shape[0] == shape[1]
        turned = of_embedding or (bool(self.config.get("fan_in_fan_out")) if square else shape != straight)
        if turned and magnitude is not None:
            raise UserError(f"export.merge=true: DoRA on {module} cannot be merged; set export.merge=false")
        update = Update(scale, a, b, magnitude.flatten() if magnitude is not None else None, turned)
        self._put(f"{module}.weight", update)
        if "lora_B.bias" in found:
            self._put(f"{module}.bias", Update(bias=scale * found["lora_B.bias"].float()))

    def _stack(self, directory: Path, module: str, candidates: list[str], found: dict[str, torch.Tensor]) -> None:
        """Adapters of a stack of experts (PEFT's target_parameters): one A and B for each expert."""
        a, b = found.get("lora_A"), found.get("lora_B")
        for name in candidates:
            parts = self.names[name]
            alone = len(parts) == 1 and len(parts[0]) == 1  # the file holds the stack as one tensor
            stored = self.base[parts[0][0]]
            if a is None or b is None or (alone and len(stored.shape) != 3):
                continue
            experts = stored.shape[0] if alone else len(parts[0])
            rows = [stored.shape[1]] if alone else [self.base[part[0]].shape[0] for part in parts]
            inside, outside = stored.shape[-1], sum(rows)
            turned = alone and (
                self.base_config.get("model_type") in TURNED_STACKS
                if inside == outside
                else (b.shape[0], a.shape[1]) == (inside, outside)
            )
            if not turned and (b.shape[0], a.shape[1]) != (outside, inside):
                continue
            rank = a.shape[0] // experts
            alpha = _matching(self.config.get("alpha_pattern") or {}, name, self.config["lora_alpha"])
            scale = alpha / math.sqrt(rank) if self.config.get("use_rslora") else alpha / rank
            of_expert = list(
                zip(a.reshape(experts, rank, -1), b.reshape(len(b), rank, experts).unbind(-1), strict=True)
            )
            if alone:
                each = tuple(Update(scale, x, y, transposed=turned) for x, y in of_expert)
                self.updates[parts[0][0]] = Update(stack=each)
                return
            for expert, (x, y) in enumerate(of_expert):
                for part, piece in zip(parts, y.split(rows), strict=True):
                    self.updates[part[expert]] = Update(scale, x, piece)
            return
        raise UserError(f"{directory}: the adapter of {module} fits no weights of the base; set export.merge=false")

    def _parameters_of(self, module: str) -> list[str]:
        """Parameters right inside `module` that the adapter targets as such, not as a layer."""
        targets = self.config.get("target_parameters") or []
        return [
            name
            for name in (self.names if targets else ())
            if name.rpartition(".")[0] == module and any(name == t or name.endswith(f".{t}") for t in targets)
        ]

    def _put(self, name: str, update: Update) -> None:
        self.updates[self._resolve(name)] = update

    def _resolve(self, name: str) -> str:
        """The base's tensor of a module's parameter; a tied head gets a tensor of its own."""
        if name in self.base:
            return name
        head = re.fullmatch(rf"(?:.*\.)?({'|'.join(HEADS)})\.weight", name)
        if head and self.tied:
            self.added[name] = self.embedding
            return name
        for known in self.base:  # saved with or without the name of the inner model in front
            if known.partition(".")[2] == name or name.partition(".")[2] == known:
                return known
        parts = self.names.get(name)
        if parts is None or len(parts) > 1 or len(parts[0]) > 1:
            raise UserError(f"the adapter changes {name}, which the base does not hold: it is another base")
        return parts[0][0]

    @functools.cached_property
    def names(self) -> dict[str, list[list[str]]]:
        """Parameter of transformers' model → the tensors that it is made of: parts beside one another, experts in each.

        transformers loads some architectures under other names than their files have, and stacks their experts.
        """
        from transformers import conversion_mapping as conversion
        from transformers.core_model_loading import WeightConverter, WeightRenaming

        mapping = conversion.get_checkpoint_conversion_mapping(self.base_config.get("model_type")) or []
        renamings = [rule for rule in mapping if type(rule) is WeightRenaming]
        # Other operations than these (transposing, interleaving …) are not undone here: such a stack has no name.
        stacks = [
            rule
            for rule in mapping
            if type(rule) is WeightConverter
            and [(type(o).__name__, getattr(o, "dim", None)) for o in rule.operations]
            in ([("MergeModulelist", 0)], [("MergeModulelist", 0), ("Concatenate", 1)])
        ]
        found: dict[str, list[list[str]]] = {}
        for known in sorted(self.base, key=_natural):
            name, pattern = known, None
            for rename in renamings:
                name = rename.rename_source_key(name)[0]
            for stack in stacks:
                name, pattern = stack.rename_source_key(name)
                if pattern is not None:
                    parts = found.setdefault(name, [[] for _ in stack.source_patterns])
                    parts[stack.source_patterns.index(pattern)].append(known)
                    break
            if pattern is None:
                found[name] = [[known]]
        return found

    @property
    def tied(self) -> bool:
        inner = self.base_config.get("text_config") or {}
        return bool(self.base_config.get("tie_word_embeddings", inner.get("tie_word_embeddings", True)))

    @property
    def embedding(self) -> str:
        """The base's input embedding."""
        for name in self.base:
            if name.endswith(tuple(f"{part}.weight" for part in EMBEDDINGS)):
                return name
        raise UserError("export.merge=true: the base's input embedding has an unknown name; set export.merge=false")

    def untie(self) -> bool:
        """Whether head and embedding stop being one matrix; the head then has its own tensor."""
        if not self.tied or any(n.endswith(tuple(f"{h}.weight" for h in HEADS)) for n in self.base):
            return bool(self.added)
        if not self.added and any(n.endswith(tuple(f"{e}.weight" for e in EMBEDDINGS)) for n in self.updates):
            self.added["lm_head.weight"] = self.embedding
        return bool(self.added)


def write_model(
    source: dict[str, Stored], directory: Path, adapter: Adapter | None, dtype: str, max_shard_bytes: int
) -> dict[str, str]:
    """Write `source` (and what the adapter does to it) as safetensors files; the dtype of every tensor by its name.

    dtype: of all floating-point tensors; auto keeps each tensor's own. UserError if a value does not fit into it.
    """
    updates = adapter.updates if adapter else {}
    of = {name: name for name in source} | (adapter.added if adapter else {})
    entries = []
    for name, origin in of.items():
        stored, update = source[origin], updates.get(name)
        if stored.dtype not in WIDTHS:
            raise UserError(f"export: {name} of the base is stored as {stored.dtype}, which cannot be written here")
        code = stored.dtype if dtype == "auto" or stored.dtype not in reader.FLOATS else CODES[dtype]
        shape = tuple(update.whole.shape) if update and update.whole is not None else stored.shape
        entries.append((name, shape, code, lambda s=stored, u=update, c=code, n=name: _pieces(s, u, c, n)))
    shards: list[list[Any]] = [[]]
    size = 0
    for entry in entries:
        bytes_ = math.prod(entry[1]) * WIDTHS[entry[2]]
        if shards[-1] and size + bytes_ > max_shard_bytes:
            shards.append([])
            size = 0
        shards[-1].append(entry)
        size += bytes_
    places: dict[str, str] = {}
    for i, shard in enumerate(shards, 1):
        file = "model.safetensors" if len(shards) == 1 else f"model-{i:05}-of-{len(shards):05}.safetensors"
        _write_shard(directory / file, shard)
        places |= {entry[0]: file for entry in shard}
    if len(shards) > 1:
        total = sum(math.prod(shape) * WIDTHS[code] for _, shape, code, _ in entries)
        index = {"metadata": {"total_size": total}, "weight_map": places}
        (directory / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
    return {name: code for name, _, code, _ in entries}


def _write_shard(path: Path, entries: list[tuple[str, tuple[int, ...], str, Callable[[], Iterator[Any]]]]) -> None:
    """The safetensors format: length of the header (little endian, 8 bytes), the header, the tensors' bytes."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, shape, code, _ in entries:
        start, end = end, end + math.prod(shape) * WIDTHS[code]
        header[name] = {"dtype": code, "shape": list(shape), "data_offsets": [start, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        start = file.tell()
        for _, _, _, pieces in entries:
            for piece in pieces():
                file.write(piece)
        assert file.tell() == start + end
        file.flush()
        os.fsync(file.fileno())


def _pieces(stored: Stored, update: Update | None, code: str, name: str) -> Iterator[Any]:
    """The bytes of one tensor, some rows at a time."""
    import torch

    if update is None and code == stored.dtype:
        yield from _bytes(stored)
        return
    wanted = {"F64": torch.float64, "F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}[code]
    whole = update.whole if update else None
    shape = tuple(whole.shape) if whole is not None else stored.shape
    width = math.prod(shape[1:])
    rows = max(1, PIECE // (4 * max(width, 1)))
    for first in range(0, shape[0] if shape else 1, rows):
        last = min(first + rows, shape[0] if shape else 1)
        if whole is not None:
            piece = whole[first:last]
        else:
            block = torch.from_numpy(reader.elements(stored, first * width, last * width))
            piece = block.view(torch.bfloat16) if stored.dtype == "BF16" else block
        if update is not None:
            piece = update.applied(piece.float().reshape(last - first, *shape[1:]), first)
        result = piece.to(wanted).contiguous()
        if not torch.isfinite(result).all():
            reason = "a value that is not finite" if not torch.isfinite(piece).all() else f"values too large for {code}"
            raise UserError(f"export: {name} has {reason}; try export.dtype=bfloat16 or float32")
        yield result.flatten().view(torch.uint8).numpy().data


def _bytes(stored: Stored) -> Iterator[Any]:
    if stored.offset is None:  # of a .bin file
        for start in range(0, stored.elements, PIECE // 8):
            stop = min(start + PIECE // 8, stored.elements)
            yield reader.elements(stored, start, stop).view("u1").data
        return
    left = stored.elements * WIDTHS[stored.dtype]
    with stored.file.open("rb") as file:
        file.seek(stored.offset)
        while left:
            piece = file.read(min(left, PIECE))
            if not piece:
                raise UserError(f"{stored.file}: cut short inside {stored.name}; download it again")
            left -= len(piece)
            yield piece


def _adapter_tensors(directory: Path) -> dict[str, torch.Tensor]:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    file = directory / "adapter_model.safetensors"
    if not file.is_file():
        raise UserError(f"{directory}: no adapter_model.safetensors in it; it is not whole")
    try:
        return load_file(file)
    except SafetensorError as failure:
        raise UserError(f"{file}: damaged ({failure})")


def _matching(patterns: dict[str, Any], module: str, default: Any) -> Any:
    """PEFT's rule: the first pattern that the end of the module's name matches."""
    for pattern, value in patterns.items():
        if re.fullmatch(rf"(?:.*\.)?(?:{pattern})", module):
            return value
    return default


def _json(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as failure:
        raise UserError(f"{path}: cannot be read ({failure}); the directory is not whole")


def _natural(name: str) -> list[Any]:
    """Sorts expert 10 after expert 9."""
    return [int(part) if part.isdigit() else part for part in re.split(r"(\d+)", name)]


def copy_beside(source: Path, directory: Path, patterns: tuple[str, ...]) -> None:
    """The small files of a model that match."""
    for pattern in patterns:
        for file in sorted(source.glob(pattern)):
            if file.is_file():
                shutil.copyfile(file, directory / file.name)
