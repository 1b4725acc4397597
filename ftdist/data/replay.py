"""General data among the special ones, by share of tokens: which sequences an epoch holds, and how often."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from ftdist.data.assemble import Sequences
from ftdist.data.encode import REPLAY
from ftdist.errors import UserError

NEAR = 0.99  # of the wanted tokens: what is nearer is enough, since rows are not cut for the share


@dataclass(frozen=True)
class Replayed:
    """Numbers of the general sequences, a number as often as an epoch holds it, and what the report says of them."""

    sequences: np.ndarray
    facts: dict[str, float | int]


def choose(sequences: Sequences, target: np.ndarray, draw: np.ndarray, *, share: float, repeats: int) -> Replayed:
    """General rows in the order of `draw`, so many that their share of all tokens is as near to `share` as whole rows
    allow.

    target: the sequences of the special data, repeated ones as often as an epoch holds them; draw: a number in [0, 1)
    for each row, of its content and the seed alone. UserError where `repeats` passes over the general data are not
    enough.
    """
    own = int(sequences.lengths[target].sum(dtype=np.int64))
    wanted = own * share / (1 - share)
    general = np.flatnonzero(sequences.side == REPLAY)
    general = general[np.argsort(draw[sequences.row[general]], kind="stable")]  # the pieces of a row stay together
    every = int(sequences.lengths[general].sum(dtype=np.int64))
    if every * repeats < NEAR * wanted:
        if not every:
            raise UserError("data.replay: no row is left of it after cleaning; see data.* filters and duplicates")
        reached = every * repeats / (own + every * repeats)
        raise UserError(
            f"data.replay_share={share:g}: {wanted:,.0f} general tokens are needed beside {own:,} special ones, and "
            f"data.replay has {every:,}; give more of them, data.replay_share={reached * 0.999:.3g} at most, or "
            f"data.replay_repeats={-(-round(wanted) // every)}"
        )
    passes, rest = divmod(min(wanted, every * repeats), every)
    row = sequences.row[general]
    last = np.flatnonzero(np.append(row[1:] != row[:-1], True))  # of each row's sequences
    ends = np.cumsum(sequences.lengths[general], dtype=np.int64)[last]
    of_row = int(np.argmin(np.abs(np.append(0, ends) - rest)))
    whole = int(passes)
    if not whole and not of_row:
        of_row = 1  # a share smaller than a row is a row
    first = int(last[of_row - 1]) + 1 if of_row else 0
    chosen = np.concatenate([np.tile(general, whole), general[:first]])
    tokens = int(sequences.lengths[chosen].sum(dtype=np.int64))
    return Replayed(
        chosen,
        {
            "share_asked": share,
            "share": round(tokens / (own + tokens), 6),
            "tokens": tokens,
            "supervised_tokens": int(sequences.trained[chosen].sum(dtype=np.int64)),
            "target_tokens": own,
            "target_supervised_tokens": int(sequences.trained[target].sum(dtype=np.int64)),
            "available_tokens": every,
            "passes": round(tokens / every, 4),
        },
    )
