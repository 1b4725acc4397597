"""Tasks of lm-evaluation-harness, by its own library (the extra `lm_eval`)."""

from __future__ import annotations

import importlib.util
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from ftdist.errors import UserError
from ftdist.evaluate.scores import Metric


def check(tasks: list[str]) -> None:
    """UserError when the library is not there."""
    if tasks and importlib.util.find_spec("lm_eval") is None:
        raise UserError(f"eval.lm_eval={tasks}: lm-evaluation-harness is not installed; pip install 'ftdist[lm_eval]'")


def run(model: Any, tokenizer: Any, tasks: list[str], batch_size: int) -> dict[str, Metric]:
    """`TASK/METRIC` → the harness's own number. A task is a name of the harness or a YAML file of one."""
    import lm_eval
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    manager = TaskManager()
    try:
        wrapped = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=batch_size)
        named = [str(Path(task).expanduser().absolute()) if task.endswith(".yaml") else task for task in tasks]
        answer: Any = lm_eval.simple_evaluate(model=wrapped, tasks=named, task_manager=manager)
    except (KeyError, ValueError, ConnectionError, OSError) as failure:
        reason = (str(failure).strip().splitlines() or [type(failure).__name__])[0]
        raise UserError(f"eval.lm_eval={tasks}: the harness cannot run them ({reason})")
    found = {}
    for task, values in answer["results"].items():
        for name, value in values.items():
            metric, _, filtered = name.partition(",")
            if isinstance(value, int | float) and not metric.endswith(("_stderr", "sample_len")):
                key = f"{task}/{metric}" + ("" if filtered in ("", "none") else f"/{filtered}")
                found[key] = Metric(np.zeros((0, 1)), partial(_always, float(value)), np.zeros(0))
    return found


def _always(value: float, _: np.ndarray) -> float:
    return value
