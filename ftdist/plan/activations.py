"""Bytes that autograd keeps for one micro-batch, from a symbolic run of a decoder layer: no torch, no tensors.

A `Tape` records what each operation of transformers' own layer reads, makes and saves for its backward pass; walking
it forwards and backwards gives what is saved and the highest point of both passes. `tests/plan/test_activations.py`
compares it with the real model classes.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterable
from dataclasses import dataclass
from typing import Any

from ftdist.plan.architectures import DEFAULTS

CHUNK = 64 << 20  # of float32 logits at once, as in ftdist/loss.py
SMALLEST_CHUNK = 16  # rows
EXACT = ("llama", "mistral", "qwen2", "qwen3", "phi3", "gemma")  # families whose layer is exact
ROUGH = ("gemma2", "mixtral")  # written down, but what their layers do depends on more


class Value:
    """A tensor of the forward pass; views of one storage are one value."""

    __slots__ = ("elements", "grad", "width")

    def __init__(self, elements: int, width: int, grad: bool) -> None:
        self.elements, self.width, self.grad = elements, width, grad

    @property
    def bytes(self) -> int:
        """Of its storage."""
        return self.elements * self.width


@dataclass(frozen=True)
class Operation:
    """What one step of the forward pass reads, makes and keeps; temporary bytes of it and of its backward."""

    inputs: tuple[Value, ...]
    output: Value
    saved: tuple[Value, ...]
    forward: int
    backward: int
    shares: bool  # the gradients of the inputs are the gradient of the output itself
    holds: tuple[Value, ...] = ()  # what a name of the caller keeps alive until here
    view: bool = False  # the output is part of its input's storage
    inplace: bool = False  # the input's gradient exists by then, and is written into


@dataclass(frozen=True)
class Linear:
    """A linear layer: is its weight (and its bias) trained, how it is held, the rank of its adapter if it has one."""

    fan_in: int
    fan_out: int
    trained: bool = False
    quantized: bool = False
    rank: int = 0
    bias: bool = False  # trained


@dataclass(frozen=True)
class Setting:
    """What the layer is run with."""

    compute: int  # bytes of an element of the computation
    autocast: bool  # weights may be wider than the computation
    weight: int  # bytes of an element of a trained weight
    frozen: int  # and of a frozen one
    adapter: int  # and of an adapter
    dropout: float  # in front of the adapters
    mask: int  # bytes of an element of a dropout mask: 1 on a GPU, the input's on a CPU
    magnitude: bool = False  # DoRA
    recording: bool = True  # False: no gradients, nothing is kept


@dataclass(frozen=True)
class Usage:
    """Bytes of one pass over a layer, its input not counted."""

    saved: int  # between its forward and its backward pass
    forward: int  # highest point of the forward pass
    backward: int  # highest point of the backward pass, what is saved included, the gradient of its output too
    keeps_input: bool  # its input's own storage is among what autograd keeps
    cast: int  # weights cast for the computation, which autocast keeps until the whole forward pass is over


class Tape:
    """Records the operations of a layer under a setting."""

    def __init__(self, setting: Setting) -> None:
        self.setting = setting
        self.operations: list[Operation] = []
        self.cast_weights = 0

    def record(
        self,
        inputs: Iterable[Value],
        output: Value,
        saved: Iterable[Value] = (),
        forward: int = 0,
        backward: int = 0,
        shares: bool = False,
        holds: Iterable[Value] = (),
    ) -> Value:
        """One operation; nothing is saved where no gradient will flow."""
        kept = tuple(saved) if output.grad and self.setting.recording else ()
        self.operations.append(Operation(tuple(inputs), output, kept, forward, backward, shares, tuple(holds)))
        return output

    def cast(self, x: Value, width: int) -> Value:
        """`x.to(dtype)`: itself where nothing changes."""
        return x if x.width == width else self.record([x], Value(x.elements, width, x.grad))

    def elementwise(self, *inputs: Value, saved: Iterable[Value] = (), width: int | None = None) -> Value:
        """A new tensor of the size of the largest input."""
        made = Value(
            max(x.elements for x in inputs), width or max(x.width for x in inputs), any(x.grad for x in inputs)
        )
        return self.record(inputs, made, saved)

    def add(self, x: Value, y: Value, holds: Iterable[Value] = ()) -> Value:
        """x + y: nothing is saved, and both get the same gradient."""
        width = max(x.width, y.width)
        made = Value(x.elements, width, x.grad or y.grad)
        return self.record([x, y], made, shares=x.width == y.width, holds=holds)

    def dropout(self, x: Value) -> Value:
        """A new tensor, and the mask where a gradient flows."""
        noise = Value(x.elements, 1 if self.setting.mask == 1 else x.width, False)
        return self.record([x], Value(x.elements, x.width, x.grad), [noise] if x.grad else [])

    def product(self, x: Value, y: Value) -> Value:
        """x * y: each is saved if the other wants a gradient."""
        return self.elementwise(x, y, saved=[v for v, other in ((x, y), (y, x)) if other.grad])

    def matmul(self, x: Value, fan_in: int, fan_out: int, weight: int, trained: bool, bias: bool = False) -> Value:
        """x @ W.T with W in `weight` bytes an element."""
        s = self.setting
        rows = x.elements // fan_in
        size = fan_in * fan_out
        saved: list[Value] = []
        forward = backward = 0
        width = x.width
        if s.autocast:
            width = s.compute
            x = self.cast(x, width)
            if weight != width:  # a cast copy, kept for the backward pass where one of x's wants a gradient
                copy = Value(size, width, False)
                saved += [copy] if x.grad else []
                self.cast_weights += copy.bytes if trained else 0
                forward = 0 if x.grad else copy.bytes
        if trained:
            saved.append(x)
            backward = size * (weight + (width if weight != width else 0))
        made = Value(rows * fan_out, width, x.grad or trained or bias)
        return self.record([x], made, saved, forward, backward)

    def linear(self, x: Value, layer: Linear) -> Value:
        """A linear layer as transformers, bitsandbytes and PEFT compute it."""
        s = self.setting
        weight = s.weight if layer.trained else s.frozen
        if layer.quantized:
            given = self.cast(x, s.compute)
            made = Value(x.elements // layer.fan_in * layer.fan_out, s.compute, x.grad)
            whole = layer.fan_in * layer.fan_out * s.compute
            out = self.record([given], made, (), whole, whole)
            out = self.cast(out, x.width) if not s.autocast else out
        else:
            out = self.matmul(x, layer.fan_in, layer.fan_out, weight, layer.trained, layer.bias)
        if not layer.rank:
            return out
        if layer.quantized:
            out = self.elementwise(out)  # PEFT clones what a 4-bit layer gives
        given = inner = x if layer.quantized and s.autocast else self.cast(x, s.adapter)
        if s.dropout:
            inner = self.dropout(inner)
        low = self.matmul(inner, layer.fan_in, layer.rank, s.adapter, True)
        high = self.matmul(low, layer.rank, layer.fan_out, s.adapter, True)
        scaled = self.elementwise(high)
        if s.magnitude:  # the update is scaled by a magnitude that needs the base's output again
            again = self.matmul(inner, layer.fan_in, layer.fan_out, weight, False)
            scaled = self.product(self.elementwise(again, scaled), Value(layer.fan_out, s.adapter, True))
        scaled = self.cast(scaled, out.width) if layer.quantized else scaled
        return self.cast(self.add(out, scaled, [x, given]), out.width)  # the call holds its argument

    def norm(self, x: Value, size: int, trained: bool, gemma: bool) -> Value:
        """Root-mean-square norm over the last `size` elements, computed in float32."""
        s = self.setting
        weight = Value(size, s.weight if trained else s.frozen, trained)
        wide = self.cast(x, 4)
        squared = self.elementwise(wide, saved=[wide])
        mean = self.record([squared], Value(x.elements // size, 4, x.grad))
        scale = Value(x.elements // size, 4, x.grad)
        self.record([mean], scale, [scale])
        scaled = self.product(wide, scale)
        if gemma:
            return self.cast(self._scaled(scaled, Value(size, 4, trained)), x.width)
        return self._scaled(self.cast(scaled, x.width), weight)

    def _scaled(self, x: Value, weight: Value) -> Value:
        made = Value(x.elements, max(x.width, weight.width), x.grad or weight.grad)
        # the weight's gradient is a product of the size of x before it is summed
        back = x.bytes if weight.grad else 0
        return self.record([x], made, [x] if weight.grad else [], 0, back)

    def rotate(self, x: Value, angles: Value) -> Value:
        """x·cos + rotated(x)·sin; the angles are the whole model's, saved once and counted by the caller."""
        turned = self.elementwise(x)
        width = max(x.width, angles.width)
        return self.add(self.elementwise(x, width=width), self.elementwise(turned, width=width))


def usage(operations: list[Operation], entry: Value, output: Value, cast: int = 0) -> Usage:
    """Walk a tape forwards and backwards. Bytes of `entry` itself are the caller's."""
    uses = Counter(value for op in operations for value in set(op.saved))
    last: dict[Value, int] = {}
    for number, op in enumerate(operations):
        for value in (*op.inputs, *op.holds):
            last[value] = number
    born: set[Value] = {entry}
    live = top = saved = 0
    for number, op in enumerate(operations):
        for value in (*op.saved, *(() if op.view else (op.output,))):
            if value not in born:
                born.add(value)
                live += value.bytes
        top = max(top, live + op.forward)
        for value in {*op.inputs, *op.holds, op.output}:
            kept = value is entry or value is output or uses[value]
            if value in born and not kept and last.get(value, number) <= number:
                live -= value.bytes
    saved = sum(value.bytes for value in uses if value is not entry)
    return Usage(saved, top, _backward(operations, output, uses, saved, entry), entry in uses, cast)


def _backward(operations: list[Operation], output: Value, uses: Counter[Value], saved: int, entry: Value) -> int:
    left = Counter(uses)
    size: dict[int, int] = {}  # gradient buffer -> bytes
    shared: Counter[int] = Counter()  # gradient buffer -> values that hold it
    gradient: dict[Value, int] = {}
    serial, live = 0, saved

    def new(count: int) -> int:
        nonlocal serial, live
        serial += 1
        size[serial] = count
        shared[serial] = 1
        live += count
        return serial

    def drop(buffer: int) -> None:
        nonlocal live
        shared[buffer] -= 1
        if not shared[buffer]:
            live -= size[buffer]

    gradient[output] = new(output.bytes)
    top = live
    for op in reversed(operations):
        arriving = gradient.pop(op.output, None)
        if arriving is None:
            continue
        for value in op.inputs:
            if not value.grad:
                continue
            if op.inplace and value in gradient:
                continue
            if op.shares:
                shared[arriving] += 1
                made = arriving
            else:
                made = new(value.bytes)
            top = max(top, live + op.backward)
            if value in gradient:
                old = gradient[value]
                if shared[old] > 1:  # somebody else's too: the sum is a new tensor
                    gradient[value] = new(value.bytes)
                    top = max(top, live)
                    drop(old)
                drop(made)
            else:
                gradient[value] = made
        top = max(top, live + op.backward)
        drop(arriving)
        for value in set(op.saved):
            left[value] -= 1
            if not left[value] and value is not entry:
                live -= value.bytes
    return top


@dataclass(frozen=True)
class Family:
    """A decoder layer in numbers, from config.json."""

    kind: str
    hidden: int
    inner: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    vocabulary: int
    experts_per_token: int  # 0: no mixture of experts
    capped: bool  # logits are changed after the output head
    exact: bool
    attention_dropout: bool = False  # of attention's shares
    residual_dropout: bool = False  # of what a block adds


def family(config: dict[str, Any]) -> Family | None:
    """The layer of a known `model_type`, else None."""
    kind = str(config.get("model_type"))
    if kind not in EXACT + ROUGH:
        return None
    facts = DEFAULTS[kind] | {key: config[key] for key in DEFAULTS[kind] if key in config}
    heads = facts["num_attention_heads"]
    return Family(
        kind=kind,
        hidden=facts["hidden_size"],
        inner=facts["intermediate_size"],
        layers=facts["num_hidden_layers"],
        heads=heads,
        kv_heads=facts["num_key_value_heads"] or heads,
        head_dim=facts["head_dim"] or facts["hidden_size"] // heads,
        vocabulary=facts["vocab_size"],
        experts_per_token=int(config.get("num_experts_per_tok", 2)) if kind == "mixtral" else 0,
        capped=kind == "gemma2" and config.get("final_logit_softcapping", 30.0) is not None,
        exact=kind in EXACT,
        attention_dropout=bool(config.get("attention_dropout")),
        residual_dropout=kind == "phi3" and bool(config.get("resid_pdrop")),
    )


@dataclass(frozen=True)
class Trained:
    """Which parameters of a layer are trained and how its linear layers are held, by name below the layer."""

    parameters: frozenset[str]
    quantized: frozenset[str]
    ranks: tuple[tuple[str, int], ...]  # linear layer -> rank of its adapter


def layer(
    f: Family, trained: Trained, setting: Setting, batch: int, length: int, attention: str, packed: bool, grad: bool
) -> Usage:
    """One decoder layer over `batch` × `length` tokens; `grad`: its input wants a gradient."""
    tape = Tape(setting)
    tokens = batch * length
    ranks = dict(trained.ranks)
    gemma = f.kind.startswith("gemma")

    def linear(name: str, fan_in: int, fan_out: int) -> Linear:
        return Linear(
            fan_in,
            fan_out,
            f"{name}.weight" in trained.parameters,
            name in trained.quantized,
            ranks.get(name, 0),
            f"{name}.bias" in trained.parameters,
        )

    def norm(x: Value, name: str, size: int) -> Value:
        return tape.norm(x, size, f"{name}.weight" in trained.parameters, gemma)

    width = setting.compute
    if setting.autocast and setting.weight > width and "whole" in trained.parameters:
        width = setting.weight  # float32 embeddings make float32 hidden states
    entry = Value(tokens * f.hidden, width, grad)
    angles = Value(tokens * f.head_dim, width, False)
    q_size, kv_size = f.heads * f.head_dim, f.kv_heads * f.head_dim

    normed = norm(entry, "input_layernorm", f.hidden)
    if f.kind == "phi3":
        fused = tape.linear(normed, linear("self_attn.qkv_proj", f.hidden, q_size + 2 * kv_size))
        q = Value(tokens * q_size, fused.width, fused.grad)
        k = Value(tokens * kv_size, fused.width, fused.grad)
        v = fused  # a view: the whole is kept with it
        for part in (q, k):  # slices: each gradient is padded to the whole
            tape.operations.append(Operation((fused,), part, (), 0, 0, False, view=True))
    else:
        q = tape.linear(normed, linear("self_attn.q_proj", f.hidden, q_size))
        k = tape.linear(normed, linear("self_attn.k_proj", f.hidden, kv_size))
        v = tape.linear(normed, linear("self_attn.v_proj", f.hidden, kv_size))
    if f.kind == "qwen3":
        q = norm(q, "self_attn.q_norm", f.head_dim)
        k = norm(k, "self_attn.k_norm", f.head_dim)
    attended = _attention(tape, f, tape.rotate(q, angles), tape.rotate(k, angles), v, batch, length, attention, packed)
    out = tape.linear(attended, linear("self_attn.o_proj", q_size, f.hidden))
    if f.kind == "gemma2":
        out = norm(out, "post_attention_layernorm", f.hidden)
    out = tape.dropout(out) if f.residual_dropout else out
    middle = tape.add(entry, out, [normed])
    normed = norm(middle, "pre_feedforward_layernorm" if f.kind == "gemma2" else "post_attention_layernorm", f.hidden)
    if f.experts_per_token:
        out = _experts(tape, f, trained, normed)
    elif f.kind == "phi3":
        both = tape.linear(normed, linear("mlp.gate_up_proj", f.hidden, 2 * f.inner))
        made = _gated(tape, both)
        out = tape.linear(made, linear("mlp.down_proj", f.inner, f.hidden))
    else:
        gate = tape.linear(normed, linear("mlp.gate_proj", f.hidden, f.inner))
        active = tape.elementwise(gate, saved=[gate])
        up = tape.linear(normed, linear("mlp.up_proj", f.hidden, f.inner))
        out = tape.linear(tape.product(active, up), linear("mlp.down_proj", f.inner, f.hidden))
    if f.kind == "gemma2":
        out = norm(out, "post_feedforward_layernorm", f.hidden)
    out = tape.dropout(out) if f.residual_dropout else out
    return usage(tape.operations, entry, tape.add(middle, out, [normed]), tape.cast_weights)


def _gated(tape: Tape, both: Value) -> Value:
    """activation(gate) · up, the two being halves of one tensor."""
    half = both.elements // 2
    gate, up = (Value(half, both.width, both.grad) for _ in range(2))
    tape.operations.append(Operation((both,), gate, (), 0, 0, False, view=True, inplace=True))
    tape.operations.append(Operation((both,), up, (), 0, 0, False, view=True))
    active = tape.record([gate], Value(half, both.width, both.grad), [both])
    return tape.record([up, active], Value(half, both.width, both.grad), [both, active])


def _attention(
    tape: Tape, f: Family, q: Value, k: Value, v: Value, batch: int, length: int, attention: str, packed: bool
) -> Value:
    s = tape.setting
    tokens = batch * length
    scores = batch * f.heads * length * length
    masked = packed and attention in ("sdpa", "eager")
    given = q.width if not s.autocast else s.compute
    if f.attention_dropout and attention == "sdpa" and s.mask != 1:  # a CPU's own kernel has none: torch takes it apart
        attention = "eager"
        q, k, v = (tape.cast(x, 4) for x in (q, k, v))
    if f.heads != f.kv_heads and (attention == "eager" or masked):  # repeat_kv
        whole = tokens * f.heads * f.head_dim
        k = tape.record([k], Value(whole, k.width, k.grad))
        v = tape.record([v], Value(whole, v.width, v.grad))
    if s.autocast:
        q, k, v = (tape.cast(x, s.compute) for x in (q, k, v))
    width = q.width
    grad = q.grad or k.grad or v.grad
    if attention == "eager":
        scored = tape.record([q, k], Value(scores, width, q.grad or k.grad), [q, k])
        scored = tape.elementwise(scored)
        if f.kind == "gemma2":  # division, hyperbolic tangent, product
            capped = Value(scores, width, scored.grad)
            scored = tape.elementwise(tape.record([tape.elementwise(scored)], capped, [capped]))
        scored = tape.elementwise(scored) if masked or length > 1 else scored
        wide = Value(scores, 4, scored.grad)
        tape.record([scored], wide, [wide], 0, 0)
        weights = tape.cast(wide, width)
        if f.attention_dropout:
            weights = tape.dropout(weights)
        out = Value(tokens * f.heads * f.head_dim, width, grad)
        tape.record([weights, v], out, [weights, v])
        return tape.cast(tape.record([out], Value(out.elements, width, grad)), given)
    out = Value(tokens * f.heads * f.head_dim, width, grad)
    saved = [q, k, v, out, Value(batch * f.heads * length, 4, False)]
    if masked:  # the boolean mask as numbers to add, made anew in each layer
        saved.append(Value(batch * length * length, width, False))
    tape.record([q, k, v], out, saved)
    if f.kind == "phi3" and s.mask != 1:  # its queries are concatenated, and on a CPU the output has their layout
        return tape.elementwise(out)
    return out


def _experts(tape: Tape, f: Family, trained: Trained, x: Value) -> Value:
    """A mixture of experts, as if every token's choices were spread evenly; the real order of experts differs."""
    s = tape.setting
    rows = x.elements // f.hidden * f.experts_per_token
    up = "mlp.experts.gate_up_proj" in trained.parameters
    down = "mlp.experts.down_proj" in trained.parameters
    weight = s.weight if up or down else s.frozen
    chosen = tape.record([x], Value(rows * f.hidden, x.width, x.grad), [Value(2 * rows, 8, False)])
    both = tape.matmul(chosen, f.hidden, 2 * f.inner, weight, up)
    out = tape.matmul(_gated(tape, both), f.inner, f.hidden, weight, down)
    weighted = tape.record([out], Value(out.elements, out.width, out.grad), [out])
    return tape.record([weighted], Value(x.elements, x.width, weighted.grad))


@dataclass(frozen=True)
class Loss:
    """Bytes of the output head with the loss."""

    saved: int
    peak: int  # `saved` included
    hidden: int  # of `peak`, what an operation takes and gives back inside itself
    backward: int = 0  # made in the loss's own backward pass, beside `saved` and the hidden states' gradient


def loss(
    f: Family,
    setting: Setting,
    tokens: int,
    supervised: int,
    trained_head: bool,
    head_weight: int,
    fused: bool,
    each: bool = False,
) -> Loss:
    """The fused head and loss of ftdist/loss.py, or the full logits: where the head has an adapter, and in other
    trainers. each: a log-probability for every token, whose logits are made again in the backward pass."""
    v, width = f.vocabulary, setting.compute
    if not fused:  # logits; in float32, as log-probabilities, and two gradients of that size on the way back
        kept = tokens * v * (width + 4)
        return Loss(kept, kept + tokens * v * 8, 0)
    rows = min(max(SMALLEST_CHUNK, CHUNK // (4 * v)), supervised)
    chunk = rows * v
    grad_hidden = supervised * f.hidden * width
    grad_weight = v * f.hidden * head_weight if trained_head else 0
    matrix = v * f.hidden * width if head_weight != width else 0
    product = v * f.hidden * width if trained_head and head_weight != width else 0
    chosen = supervised * f.hidden * width  # the supervised rows of the hidden states
    kept = grad_hidden + grad_weight
    half = chunk * width if width < 4 else 0
    if each:  # in float32, as exponentials inside logsumexp or as a softmax, and once as the matrix is
        inside = (3 if f.capped else 2) * chunk * 4 + half  # the slope of the cap is one more
        return Loss(chosen, chosen + matrix + inside, chunk * 4, chosen + matrix + inside + grad_weight + product)
    # The exponentials inside logsumexp stand beside the float32 logits; a second chunk is made while the first one's
    # logits and their gradient still have a name.
    inside = (2 if f.capped else 1) * chunk * 4
    several = supervised > rows
    top = max(chunk * 4 + (half if several else 0) + inside, chunk * 4 + half + product)
    if several:
        top = max(top, 2 * (chunk * 4 + half))
    seen = max(chunk * 4 + half + product, 2 * (chunk * 4 + half) if several else 0)
    return Loss(kept, kept + chosen + matrix + top, top - seen)


@dataclass(frozen=True)
class Activations:
    """Bytes of one micro-batch on one rank."""

    kept: int  # between forward and backward: all layers' saved tensors, or their inputs alone
    backward: int  # highest point of the layers' backward pass, `kept` included
    forward: int  # what is there besides `kept` while the loss is made: masks, weights cast for the computation
    evaluation: int  # highest point of a forward pass without gradients
    loss: Loss
    exact: bool


def activations(
    f: Family,
    layers: Collection[Trained],
    setting: Setting,
    *,
    batch: int,
    length: int,
    supervised: int,
    attention: str,
    packed: bool,
    checkpointing: bool,
    embeddings_trained: bool,
    input_gradients: bool,
    final_norm_trained: bool,
    trained_head: bool,
    head_weight: int,
    tied: bool,
    fused: bool,
    each: bool = False,
) -> Activations:
    """A whole micro-batch. input_gradients: the embeddings' output is made to want one (adapters, recomputed)."""
    tokens = batch * length
    wide = setting.autocast and any("whole" in one.parameters for one in layers)
    width = setting.weight if wide else setting.compute
    hidden = tokens * f.hidden * width
    angles = 2 * tokens * f.head_dim * width
    masked = packed and attention in ("sdpa", "eager")
    mask = batch * length * length * (width if attention == "eager" else 1) if masked else 0
    ids = 8 * tokens if embeddings_trained else 0
    grad = embeddings_trained or input_gradients
    known: dict[tuple[Trained, bool], Usage] = {}
    uses: list[Usage] = []
    for one in layers:
        if (one, grad) not in known:
            known[one, grad] = layer(f, one, setting, batch, length, attention, packed, grad)
        uses.append(known[one, grad])
        grad = grad or bool(one.parameters - {"whole"} or one.ranks)
    last = Tape(setting)
    entry = Value(tokens * f.hidden, width, grad)
    closing = usage(last.operations, entry, last.norm(entry, f.hidden, final_norm_trained, f.kind.startswith("gemma")))
    end = closing.saved + (hidden if closing.keeps_input else 0)
    worst = 0
    if checkpointing:
        # each layer's input, and what is handed to all of them
        kept = hidden * len(uses) + end + angles + mask + ids
        worst = max((max(use.backward, use.forward + hidden) for use in uses), default=0) - end
        beside = sum(use.cast for use in uses)  # autocast keeps them for the whole forward pass
    else:
        kept = end + angles + ids
        for use in uses:
            kept += use.saved + (hidden if use.keeps_input else 0)
        behind = end
        for use in reversed(uses):
            worst = max(worst, use.backward - use.saved - behind)
            behind += use.saved + (hidden if use.keeps_input else 0)
        beside = mask
    made = loss(f, setting, tokens, supervised, trained_head, head_weight, fused, each)
    # A tied head's gradient waits for the embedding's, the last one of the pass.
    waiting = f.vocabulary * f.hidden * head_weight if tied and trained_head else 0
    # The embedding's gradient is made whole, when all other activations have gone.
    ending = hidden + ids + waiting + (f.vocabulary * f.hidden * setting.weight if embeddings_trained else 0)
    return Activations(
        kept=kept,
        # the gradient of the hidden states comes into being first, beside what the loss has kept
        backward=max(
            kept + max(worst + waiting, made.saved + tokens * f.hidden * setting.compute + made.backward), ending
        ),
        forward=beside,
        evaluation=max((use.forward for use in uses), default=0) + hidden + angles + mask,
        loss=made,
        exact=f.exact,
    )
