"""The models of a finished run, or an exported directory, from their files alone."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from ftdist import base as bases
from ftdist import models, schema
from ftdist.errors import UserError
from ftdist.plan.shapes import model_shapes
from ftdist.strategies import Base, find


class Loader:
    """Base and tuned model of a run. `base_dir`: where the base lies now; None: where it was in training."""

    def __init__(self, run_dir: Path, config: dict[str, Any], plan: dict[str, Any], base_dir: Path | None) -> None:
        keys = config["model"]
        self.run_dir, self.plan, self.keys = run_dir, plan, keys
        self.final = run_dir / "final"
        self.base_dir = base_dir or bases.found(run_dir, keys["path"], "eval.base")
        shapes = model_shapes(
            str(self.base_dir), None, revision=keys["revision"], trust_remote_code=keys["trust_remote_code"]
        )
        strategy = find(config["strategy"]["name"])
        asked = Base(shapes.architecture.parameters, plan["precision"], "uint8", measured=True)
        self.recipe = strategy(asked, **schema.pick(strategy, config["strategy"]))

    def load(self, which: str, *, quantised: bool, dtype: str) -> tuple[Any, Any]:
        """`which` (base, tuned) and the tokenizer; computed in `dtype`, with the run's quantisation or without."""
        import torch

        adapter = self.recipe.peft is not None
        whole = which == "tuned" and not adapter
        attention = self.keys["attn_implementation"]
        if attention not in ("eager", "sdpa") and (dtype == "float32" or not torch.cuda.is_available()):
            attention = "eager"  # those kernels are for 16 bits on GPUs
        model = models.load(
            path=str(self.final if whole else self.base_dir),
            revision=None,
            dtype="auto",
            attn_implementation=attention,
            trust_remote_code=self.keys["trust_remote_code"],
            quantization=self.recipe.quantization if quantised else None,
            loaded_dtype=dtype,
        )
        if which == "tuned" and adapter:
            import peft

            try:
                model = peft.PeftModel.from_pretrained(model, str(self.final))  # type: ignore[assignment]
            except (RuntimeError, ValueError, OSError) as failure:
                reason = str(failure).strip().splitlines()[0]
                raise UserError(f"{self.final}: its adapter does not fit {self.base_dir} ({reason})")
        if not (quantised and self.recipe.quantization):
            model.to("cuda" if torch.cuda.is_available() else "cpu")  # type: ignore[arg-type]
        model.eval()
        model.config.use_cache = True
        return model, self.tokenizer()

    def tokenizer(self) -> Any:
        """The tokenizer that was saved with the run."""
        return models.tokenizer(str(self.final), None, self.keys["trust_remote_code"])

    def rounded_merge(self, model: Any, dtypes: dict[str, str]) -> Any:
        """PEFT's merge of a float32 model, with the merged weights rounded to the types named (safetensors' names)."""
        import torch

        types = {"F64": torch.float64, "F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}
        merged = model.merge_and_unload()
        for name, parameter in merged.named_parameters():
            if name in dtypes:
                parameter.data = parameter.data.to(types[dtypes[name]]).float()
        return merged

    def probe(self, length: int) -> Any:
        """Token ids (1, L) of a training row, for a run that recorded none; UserError when its data are gone."""
        import datasets
        import torch

        folder = Path(self.plan["prepared"]) / "train"
        if not folder.is_dir():
            raise UserError(f"{self.run_dir}: its prepared data are gone ({folder}); set export.parity=false")
        row = datasets.load_from_disk(str(folder))[0]
        return torch.tensor(row["input_ids"][: min(row["lengths"][0], length)])[None]


class Exported:
    """A plain model or adapter directory, with `base` beside it where one is given."""

    def __init__(self, directory: Path, base: str | None, trust_remote_code: bool, dtype: str) -> None:
        self.directory, self.base, self.trust, self.dtype = directory, base, trust_remote_code, dtype

    def load(self, which: str) -> tuple[Any, Any]:
        """`which` (base, tuned) and the tokenizer that the tuned model has."""
        import torch

        path = str(self.directory) if which == "tuned" else self.base
        assert path is not None
        adapter = Path(path, "adapter_config.json")
        stack = [path]
        if adapter.is_file():
            stack.insert(0, json.loads(adapter.read_text(encoding="utf-8"))["base_model_name_or_path"])
        model: Any = models.load(
            path=stack[0],
            revision=None,
            dtype=self.dtype,  # type: ignore[arg-type]
            attn_implementation="sdpa",
            trust_remote_code=self.trust,
            quantization=None,
            loaded_dtype="auto",
        )
        if len(stack) > 1:
            import peft

            model = peft.PeftModel.from_pretrained(model, path)
        model.to("cuda" if torch.cuda.is_available() else "cpu").eval()
        model.config.use_cache = True
        return model, models.tokenizer(str(self.directory), None, self.trust)
