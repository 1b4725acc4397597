"""Best-fit decreasing bin packing, exact, in groups of equal length: a million sequences take about a
second."""

from __future__ import annotations

from bisect import bisect_left, insort

import numpy as np


def best_fit_decreasing(lengths: np.ndarray, capacity: int) -> tuple[np.ndarray, int]:
    """(bin of each sequence int32, number of bins). Every length must lie in 1 … capacity.

    The longest sequence first, each into the fullest bin that still holds it (Johnson 1974). Bins with the
    same room are interchangeable, so all sequences of one length are placed together.
    """
    assert len(lengths) == 0 or (lengths.min() >= 1 and lengths.max() <= capacity)
    order = np.argsort(-lengths, kind="stable").astype(np.int32)  # less than 2**31: a sequence is a token at least
    ordered = lengths[order]
    changes = np.ones(len(ordered), bool)
    changes[1:] = ordered[1:] != ordered[:-1]
    starts = np.flatnonzero(changes)
    bin_of = np.empty(len(lengths), np.int32)
    rooms: list[int] = []  # sorted: the rooms of which there is a bin
    with_room: dict[int, list[np.ndarray]] = {}
    bins = 0

    def put_back(room: int, which: np.ndarray) -> None:
        if room <= 0 or not len(which):
            return
        if room not in with_room:
            insort(rooms, room)
            with_room[room] = []
        with_room[room].append(which)

    for at, start in enumerate(starts):
        stop = int(starts[at + 1]) if at + 1 < len(starts) else len(ordered)
        length = int(ordered[start])
        members = order[start:stop]
        while len(members):
            place = bisect_left(rooms, length)
            if place < len(rooms):
                room = rooms.pop(place)
                free = np.concatenate(with_room.pop(room))
            else:
                room = capacity
                each = capacity // length
                count = -(-len(members) // each)
                free = np.arange(bins, bins + count, dtype=np.int32)
                bins += count
            each = room // length  # one bin is filled up before the next of the same room: it is the fuller one
            full, rest = divmod(len(members), each)
            used = min(len(free), full + (rest > 0))
            taken = min(len(members), used * each)
            bin_of[members[:taken]] = np.repeat(free[:used], each)[:taken]
            members = members[taken:]
            whole = taken // each
            put_back(room - each * length, free[:whole])
            if whole < used:
                put_back(room - (taken - whole * each) * length, free[whole:used])
            put_back(room, free[used:])
    return bin_of, bins
