"""The models of a finished run, or an exported directory, from their files alone."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from ftdist import base as bases
from ftdist import imports, models, schema, start
from ftdist.data.rows import rows_of
from ftdist.errors import UserError
from ftdist.plan.shapes import model_shapes
from ftdist.strategies import Base, find


class Loader:
    """Base and tuned model of a run. `base_dir`: where the base lies now."""

    def __init__(self, run_dir: Path, config: dict[str, Any], plan: dict[str, Any], base_dir: Path) -> None:
        keys = config["model"]
        self.run_dir, self.plan, self.keys = run_dir, plan, keys
        self.final = run_dir / "final"
        self.base_dir = base_dir
        shapes = model_shapes(
            str(self.base_dir), None, revision=keys["revision"], trust_remote_code=keys["trust_remote_code"]
        )
        strategy = find(config["strategy"]["name"])
        asked = Base(shapes.architecture.parameters, plan["precision"], "uint8", measured=True)
        values = schema.pick(strategy, config["strategy"])
        moved = run_dir / "snr.json"
        if values.get("scan") and not Path(values["scan"]).is_file() and moved.is_file():
            values["scan"] = str(moved)  # the run lies elsewhere now
        lost = set(schema.keys_of(strategy)) - set(values)
        if lost:
            raise UserError(f"{run_dir}: made by another version of ftdist, which knew no strategy.{min(lost)}")
        self.recipe = strategy(asked, **values)

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
        put = (self.final if which == "tuned" else start.adapter(self.run_dir)) if adapter else None
        if put is not None:
            imports.bitsandbytes()
            import peft

            try:
                model = peft.PeftModel.from_pretrained(model, str(put))  # type: ignore[assignment]  # wraps it
            except (RuntimeError, ValueError, OSError) as failure:
                reason = str(failure).strip().splitlines()[0]
                raise UserError(f"{put}: its adapter does not fit {self.base_dir} ({reason})")
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
        import torch

        folder = Path(self.plan["prepared"]) / "train"
        if not folder.is_dir():
            raise UserError(f"{self.run_dir}: its prepared data are gone ({folder}); set export.parity=false")
        row = rows_of(folder)[0]
        return torch.tensor(row["input_ids"][: min(row["lengths"][0], length)])[None]


class Exported:
    """A plain model or adapter directory, with `base` beside it; an adapter stands on it."""

    def __init__(self, directory: Path, base: str | None, trust_remote_code: bool, dtype: str) -> None:
        self.directory, self.trust, self.dtype = directory, trust_remote_code, dtype
        adapter = directory / "adapter_config.json"
        self.is_adapter = adapter.is_file()
        if self.is_adapter and base is None:
            base = json.loads(adapter.read_text(encoding="utf-8"))["base_model_name_or_path"]
        if base is None:
            self.base = None
        elif self.is_adapter and (directory / bases.FILE).is_file():
            self.base = str(bases.found(directory, base, "eval.base"))
        else:
            try:
                self.base = models.local_path(base, None)
            except UserError as failure:
                raise UserError(str(failure).replace("model.path=", "eval.base="))

    def load(self, which: str) -> tuple[Any, Any]:
        """`which` (base, tuned) and the tokenizer that the tuned model has."""
        import torch

        on_base = which == "base" or self.is_adapter
        path = self.base if on_base else str(self.directory)
        assert path is not None
        model: Any = models.load(
            path=path,
            revision=None,
            dtype=self.dtype,  # type: ignore[arg-type]
            attn_implementation="sdpa",
            trust_remote_code=self.trust,
            quantization=None,
            loaded_dtype="auto",
        )
        if which == "tuned" and self.is_adapter:
            imports.bitsandbytes()
            import peft

            model = peft.PeftModel.from_pretrained(model, str(self.directory))
        model.to("cuda" if torch.cuda.is_available() else "cpu").eval()
        model.config.use_cache = True
        return model, models.tokenizer(str(self.directory), None, self.trust)
