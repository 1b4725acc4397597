"""The loss of the special and of the general data, apart: by-products of one forward pass."""

import pytest
import torch
from test_loss import SMALL, new, rows, token_losses, trainer
from transformers import LlamaConfig

from ftdist import trainer as trainers
from ftdist.trainer import collate

GENERAL = 3  # the number of a source


def mixed(parts, sources):
    """A packed row; each part of its own source."""
    row = {key: sum((part[key] for part in parts), []) for key in ("input_ids", "labels", "lengths")}
    return row | {"sources": list(sources)}


@pytest.mark.parametrize("kind", ["nll", "dft"])
@pytest.mark.parametrize("fused", [True, False])
def test_each_token_counts_for_its_own(tmp_path, monkeypatch, fused, kind):
    """Packed rows of both, two micro-batches a step, two steps a log line: token-weighted means over all of them."""
    parts = rows([10, 23, 7, 15, 12, 30, 9, 18])
    sources = [0, GENERAL, GENERAL, 0, 0, 0, GENERAL, 0]
    data = [mixed(parts[i : i + 2], sources[i : i + 2]) for i in range(0, 8, 2)]
    passes = []
    forward = trainers.TokenTrainer._forward
    monkeypatch.setattr(trainers.TokenTrainer, "_forward", lambda self, *a: passes.append(1) or forward(self, *a))

    config = LlamaConfig(**SMALL)

    def logged(**more):
        model = new(config)
        if not fused:
            model.lm_head.__class__ = type("Own", (torch.nn.Linear,), {})  # no plain matrix, as far as is known
        made = trainer(model, tmp_path, data, packing=True, loss_type=kind, learning_rate=1e-12,
                       gradient_accumulation_steps=2, max_steps=2, logging_steps=2, **more)  # fmt: skip
        if more:
            made.data_collator = lambda batch: collate(batch, 0, frozenset({GENERAL}))
        passes.clear()
        made.train()
        return made.state.log_history[0], len(passes), made.head.usable

    plain, fewest, _ = logged()
    got, count, usable = logged(replay=True)
    assert count == fewest and usable == fused
    assert got["loss"] == plain["loss"] and "loss_general" not in plain
    with torch.no_grad():
        each = [token_losses(new(config), [part]) for part in parts]
    if kind == "dft":
        each = [losses * (-losses).exp() for losses in each]
    for name, wanted in (("loss_target", 0), ("loss_general", GENERAL)):
        mean = torch.cat([losses for losses, source in zip(each, sources, strict=True) if source == wanted]).mean()
        assert got[name] == pytest.approx(float(mean), rel=1e-5)


def test_targets_are_marked_by_the_sequence_that_they_are_in():
    parts = rows([4, 3, 5])
    batch = collate([mixed(parts[:2], [0, GENERAL]), mixed(parts[2:], [GENERAL])], 0, frozenset({GENERAL}))
    assert batch["general"].tolist() == [
        [False, False, False, True, True, True, False],  # the last of a sequence predicts the first of the next
        [True, True, True, True, False, False, False],
    ]
    assert "general" not in collate([parts[0]], 0)
