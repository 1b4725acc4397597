"""A learning-rate schedule as transformers would make it, made once before anything is launched."""

from __future__ import annotations

import inspect
from typing import Any

from ftdist.errors import UserError

GIVEN = ("optimizer", "num_warmup_steps", "num_training_steps", "last_epoch", "kwargs")  # by the trainer


def check(name: str, keywords: dict[str, Any], learning_rate: float) -> None:
    """UserError for keyword arguments that the schedule does not take, lacks, or whose values it refuses."""
    import torch
    from torch.optim.lr_scheduler import ReduceLROnPlateau
    from transformers import SchedulerType, get_scheduler
    from transformers.optimization import TYPE_TO_SCHEDULER_FUNCTION, GreedyLR

    kind = SchedulerType(name)
    classes: dict[Any, Any] = {SchedulerType.REDUCE_ON_PLATEAU: ReduceLROnPlateau, SchedulerType.GREEDY: GreedyLR}
    made: Any = classes.get(kind) or TYPE_TO_SCHEDULER_FUNCTION[kind]
    taken = [key for key in inspect.signature(made).parameters if key not in GIVEN]
    what, has = f"train.lr_scheduler_kwargs={keywords}: ", f"train.lr_scheduler_type={name}"
    for key in keywords:
        if key not in taken:
            raise UserError(f"{what}{has} takes no {key}; it takes {', '.join(taken) or 'none'}")
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=learning_rate)
    try:
        get_scheduler(
            kind, optimizer, num_warmup_steps=1, num_training_steps=10, scheduler_specific_kwargs=dict(keywords)
        )
    except (TypeError, ValueError, ZeroDivisionError) as failure:
        raise UserError(f"{what}{has} refuses that ({failure}); it takes {', '.join(taken)}")
