"""From a scan to exact names: published files, percentages, budgets, ties, experts, another model's scan."""

import json
import math
from pathlib import Path

import pytest
from architectures import build

from ftdist.errors import UserError
from ftdist.spectrum import scan as scanning
from ftdist.spectrum import select as selecting
from ftdist.spectrum.formats import Entry, Scan
from ftdist.spectrum.select import load_parameter_list, load_scan, select, write_reference_json, write_unfrozen_yaml
from ftdist.strategies import Base, spectrum

DATA = Path(__file__).parent / "data"
LLAMA = DATA / "snr_llama31_8b_instruct.json"
YAML = DATA / "snr_llama31_8b_instruct_50percent.yaml"
TINYLLAMA = DATA / "snr_tinyllama_v11.json"


def llama(layers=32, hidden=4096, inner=14336, kv=1024, vocab=128256, tied=False):
    """The parameters of a Llama; by default of Llama-3.1-8B."""
    shapes = {"model.embed_tokens.weight": (vocab, hidden)}
    for i in range(layers):
        block = f"model.layers.{i}"
        shapes |= {
            f"{block}.self_attn.q_proj.weight": (hidden, hidden),
            f"{block}.self_attn.k_proj.weight": (kv, hidden),
            f"{block}.self_attn.v_proj.weight": (kv, hidden),
            f"{block}.self_attn.o_proj.weight": (hidden, hidden),
            f"{block}.mlp.gate_proj.weight": (inner, hidden),
            f"{block}.mlp.up_proj.weight": (inner, hidden),
            f"{block}.mlp.down_proj.weight": (hidden, inner),
            f"{block}.input_layernorm.weight": (hidden,),
            f"{block}.post_attention_layernorm.weight": (hidden,),
        }
    shapes["model.norm.weight"] = (hidden,)
    return shapes if tied else shapes | {"lm_head.weight": (vocab, hidden)}


def choose(scan, shapes, **changes):
    keys = {"top_percent": 50, "types": "all", "trainable_budget": None}
    return select(scan=scan, shapes=shapes, **keys | dict.fromkeys(("embeddings", "head", "norms"), True) | changes)


def made(values, kind="mlp.up_proj"):
    """A scan of one type, a value for each layer."""
    entries = (Entry(f"model.layers.{i}.{kind}", kind, value, None) for i, value in enumerate(values))
    return Scan(Path("made.json"), tuple(entries))


def layers_of(selection, kind="mlp.up_proj"):
    return [int(module.split(".")[2]) for module in selection.modules[kind]]


def refused(call, *args, **kwargs):
    with pytest.raises(UserError) as caught:
        call(*args, **kwargs)
    assert "\n" not in str(caught.value)
    return str(caught.value)


# Published files


def test_published_scan_gives_the_published_selection(tmp_path):
    chosen = choose(load_scan(LLAMA), llama())
    write_unfrozen_yaml(tmp_path / "own.yaml", chosen.modules, chosen.whole)
    assert (tmp_path / "own.yaml").read_text() == YAML.read_text()
    assert chosen.names == load_parameter_list(YAML, llama())
    assert len(chosen.names) == 2 + 9 * 16
    assert chosen.total == 8_030_261_248
    assert chosen.trainable == sum(math.prod(llama()[name]) for name in chosen.names) == 4_540_465_152


def test_flat_and_sorted_layouts_are_the_same_scan(tmp_path):
    flat = load_scan(TINYLLAMA)
    by_type = {}
    for entry in flat.entries:
        by_type.setdefault(entry.type, {})[entry.module] = entry.snr
    (tmp_path / "sorted.json").write_text(json.dumps(by_type))
    assert {(e.module, e.type, e.snr) for e in load_scan(tmp_path / "sorted.json").entries} == {
        (e.module, e.type, e.snr) for e in flat.entries
    }
    write_reference_json(tmp_path / "flat.json", flat)
    assert json.loads((tmp_path / "flat.json").read_text()) == json.loads(TINYLLAMA.read_text())
    assert any(math.isinf(entry.snr) for entry in flat.entries)


@pytest.mark.parametrize("percent", [10, 25, 50, 75])
def test_counts_are_the_reference_tools(percent):
    chosen = choose(load_scan(TINYLLAMA), llama(22, 2048, 5632, 256, 32000), top_percent=percent)
    assert {count.selected for count in chosen.types[:-2] if count.modules == 22} == {int(22 * percent / 100)}


def test_nan_ranks_last_and_is_told(tmp_path):
    (tmp_path / "nan.json").write_text(
        '{"model.layers.0.mlp.up_proj": {"snr": NaN, "type": "mlp.up_proj"},'
        ' "model.layers.1.mlp.up_proj": {"snr": 0.1, "type": "mlp.up_proj"}}'
    )
    chosen = choose(load_scan(tmp_path / "nan.json"), llama(2))
    assert layers_of(chosen) == [1]
    assert any("nan" in note for note in chosen.notes)


# Percentages, types, budgets


def test_highest_first_and_ties_by_layer():
    chosen = choose(made([1.0, 3.0, 2.0, 2.0, 2.0, math.inf]), llama(6))
    assert layers_of(chosen) == [5, 1, 2]
    assert any("mlp.up_proj: 3 modules tie at SNR 2; the first 1" in note for note in chosen.notes)
    assert choose(made([1.0, 2.0, 3.0, 4.0]), llama(4)).notes == ()


def test_ties_follow_the_number_of_the_layer_and_not_its_spelling():
    assert layers_of(choose(made([1.0] * 12), llama(12), top_percent=25)) == [0, 1, 2]
    backwards = Scan(Path("x"), tuple(reversed(made([1.0] * 12).entries)))
    assert layers_of(choose(backwards, llama(12), top_percent=25)) == [0, 1, 2]


@pytest.mark.parametrize("percent", [0, 100, 101, -5, float("nan")])
def test_percentages_outside(percent):
    assert f"top_percent={percent:g}" in refused(choose, made([1.0, 2.0]), llama(2), top_percent=percent)


def test_a_percentage_that_selects_nothing():
    assert "the least is 25" in refused(choose, made([1.0] * 4), llama(4), top_percent=24)


def test_types_of_choice():
    chosen = choose(load_scan(LLAMA), llama(), types=["mlp.up_proj", "self_attn.o_proj"], embeddings=False, head=False)
    assert len(chosen.names) == 32
    assert {name.split(".", 3)[3] for name in chosen.names} == {"mlp.up_proj.weight", "self_attn.o_proj.weight"}
    assert "strategy.types=[]" in refused(choose, load_scan(LLAMA), llama(), types=[])
    assert "strategy.types=mlp.upproj" in refused(choose, load_scan(LLAMA), llama(), types=["mlp.upproj"])


def test_norms_by_key():
    chosen = choose(load_scan(LLAMA), llama(), norms=False)
    assert not [name for name in chosen.names if "norm" in name]
    assert len(chosen.names) == 2 + 7 * 16


def test_embeddings_and_head_by_key():
    names = {"model.embed_tokens.weight", "lm_head.weight"}
    assert choose(made([1.0, 2.0]), llama(2), embeddings=False).names & names == {"lm_head.weight"}
    assert choose(made([1.0, 2.0]), llama(2), head=False).names & names == {"model.embed_tokens.weight"}
    chosen = choose(made([1.0, 2.0]), llama(2), head=False, embeddings=False)
    assert chosen.trainable == 4096 * 14336
    table = {count.type: (count.selected, count.parameters) for count in chosen.types}
    assert table["lm_head"] == table["model.embed_tokens"] == (0, 0)


def test_a_tied_head_is_counted_once():
    shapes = llama(2, tied=True)
    chosen = choose(made([1.0, 2.0]), shapes)
    assert chosen.names == {"model.embed_tokens.weight", "model.layers.1.mlp.up_proj.weight"}
    assert "one tensor" in refused(choose, made([1.0, 2.0]), shapes, head=False)
    with_head = Scan(Path("x"), (*made([1.0, 2.0]).entries, Entry("lm_head", "lm_head", 1.0, None)))
    assert choose(with_head, shapes).names == chosen.names  # the reference tool lists a tied head too


def test_budget_in_parameters_and_as_a_share():
    matrix = 4096 * 14336
    keys = {"top_percent": None, "embeddings": False, "head": False}
    scan = made([float(i) for i in range(8)])
    for count in range(1, 8):
        for budget in (count * matrix, (count + 1) * matrix - 1):
            chosen = choose(scan, llama(8), trainable_budget=budget, **keys)
            assert layers_of(chosen) == list(range(7, 7 - count, -1))
            again = choose(scan, llama(8), top_percent=chosen.top_percent, embeddings=False, head=False)
            assert again.names == chosen.names
    chosen = choose(scan, llama(8), trainable_budget=0.1, **keys)
    assert chosen.trainable <= 0.1 * chosen.total < chosen.trainable + matrix
    assert "too small" in refused(choose, scan, llama(8), trainable_budget=1000, **keys)
    assert "too small" in refused(choose, scan, llama(8), trainable_budget=matrix, top_percent=None)
    assert "everything" in refused(choose, scan, llama(8), trainable_budget=1e12, **keys)
    assert "between 0 and 1" in refused(choose, scan, llama(8), trainable_budget=-1, **keys)


def test_budget_over_several_types_is_the_largest_that_fits():
    scan, shapes = load_scan(LLAMA), llama()
    chosen = choose(scan, shapes, top_percent=None, trainable_budget=0.3)
    assert chosen.trainable <= 0.3 * chosen.total
    more = choose(scan, shapes, top_percent=chosen.top_percent + 100 / 32)
    assert more.trainable > 0.3 * chosen.total


def test_percentage_or_budget_not_both():
    scan = made([1.0, 2.0])
    assert "exactly one" in refused(choose, scan, llama(2), trainable_budget=0.5)
    assert "exactly one" in refused(choose, scan, llama(2), top_percent=None)


def test_biases_go_with_their_module():
    shapes = llama(2) | {f"model.layers.{i}.mlp.up_proj.bias": (14336,) for i in range(2)}
    chosen = choose(made([1.0, 2.0]), shapes, embeddings=False, head=False)
    assert chosen.names == {"model.layers.1.mlp.up_proj.weight", "model.layers.1.mlp.up_proj.bias"}


# Names on disk and in the loaded model


def scanned(checkpoint, tmp_path, kind, **changes):
    keys = {"processes": 1, "device": "cpu", "threshold": "reference", "group_experts": True} | changes
    return load_scan(scanning.scan(model_path=str(checkpoint(kind)), output=tmp_path / "snr.json", **keys))


@pytest.mark.parametrize("kind", ["llama", "tied", "phi3", "mixtral", "stacked", "biased"])
def test_names_are_parameters_of_the_loaded_model(kind, checkpoint, tmp_path):
    shapes = {name: tuple(weight.shape) for name, weight in build(kind).named_parameters()}
    chosen = choose(scanned(checkpoint, tmp_path, kind), shapes)
    assert chosen.names <= shapes.keys()
    assert chosen.trainable == sum(math.prod(shapes[name]) for name in chosen.names)
    assert all(count.selected == 5 for count in chosen.types if count.modules == 10)
    write_unfrozen_yaml(tmp_path / "own.yaml", chosen.modules, chosen.whole)
    assert load_parameter_list(tmp_path / "own.yaml", shapes) == chosen.names


@pytest.mark.parametrize("group_experts", [True, False])
def test_experts_that_share_a_tensor_are_ranked_by_their_mean(group_experts, checkpoint, tmp_path):
    scan = scanned(checkpoint, tmp_path, "mixtral", group_experts=group_experts)
    shapes = {name: tuple(weight.shape) for name, weight in build("mixtral").named_parameters()}
    chosen = choose(scan, shapes)
    name = "model.layers.4.mlp.experts.gate_up_proj"
    parts = [e.snr for e in scan.entries if "layers.4." in e.module and e.module.endswith((".w1", ".w3"))]
    assert len(parts) == 6
    assert chosen.scores[name] == pytest.approx(sum(parts) / 6)
    assert set(chosen.modules["mlp.experts.gate_up_proj"]) <= chosen.names
    assert any("share" in note or "mean SNR" in note for note in chosen.notes)
    missing = Scan(scan.path, tuple(e for e in scan.entries if "layers.4.block_sparse_moe.experts.1" not in e.module))
    assert "another model" in refused(choose, missing, shapes)


def test_experts_that_are_apart_are_ranked_across_layers_and_experts():
    names = [f"model.layers.{i}.mlp.experts.{j}.up_proj" for i in range(2) for j in range(4)]
    shapes = {f"{name}.weight": (8, 4) for name in names} | {"model.embed_tokens.weight": (9, 4)}
    entries = [Entry(name, "mlp.experts.up_proj", float(i), (8, 4)) for i, name in enumerate(names)]
    chosen = choose(Scan(Path("x"), tuple(entries)), shapes)
    assert chosen.modules["mlp.experts.up_proj"] == tuple(reversed(names[4:]))


def test_a_prefix_that_only_the_loaded_model_has():
    scan = Scan(Path("x"), tuple(Entry(f"h.{i}.attn.c_attn", "attn.c_attn", float(i), None) for i in range(2)))
    shapes = {f"transformer.h.{i}.attn.c_attn.weight": (4, 12) for i in range(2)} | {"transformer.wte.weight": (9, 4)}
    assert choose(scan, shapes).names == {"transformer.h.1.attn.c_attn.weight", "transformer.wte.weight"}


# A scan of another model, files that are no scan


def test_scan_of_another_model():
    scan = load_scan(LLAMA)
    assert "another model: this one has no model.layers.22" in refused(choose, scan, llama(22))
    assert "another model: it lacks model.layers.22" in refused(choose, load_scan(TINYLLAMA), llama(32))
    assert "another model" in refused(choose, scan, {"h.0.attn.weight": (4, 4)})
    shaped = Scan(Path("x"), (Entry("model.layers.0.mlp.up_proj", "mlp.up_proj", 1.0, (11008, 4096)),))
    message = refused(choose, shaped, llama(1))
    assert "[11008, 4096]" in message
    assert "[14336, 4096]" in message


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        ("not json", "not JSON"),
        ("[]", "holds no scan"),
        ("{}", "holds no scan"),
        ('{"a": 3}', "a holds 3"),
        ('{"a": {"snr": "high", "type": "x"}}', "expected a number"),
        ('{"a": {"snr": -1, "type": "x"}}', "expected a number"),
        ('{"a": {"snr": null, "type": "x"}}', "expected a number"),
        ('{"t": {"a": 1}, "u": {"a": 2}}', "twice"),
        ('{"a": {"snr": 1, "type": "x", "threshold": "edge"}}', "expected one of reference, marchenko_pastur"),
        ('{"a": {"snr": 1, "type": "x"}, "b": {"snr": 1, "type": "x", "threshold": "marchenko_pastur"}}', "partly"),
    ],
)
def test_files_that_are_no_scan(content, reason, tmp_path):
    (tmp_path / "scan.json").write_text(content)
    assert reason in refused(load_scan, tmp_path / "scan.json")


def test_a_scan_of_the_other_threshold(tmp_path):
    """The key says how the scan that decides was measured; a published one follows the reference."""
    scan = tmp_path / "scan.json"
    entries = {f"model.layers.{i}.mlp.up_proj": {"snr": 1.0 + i, "type": "mlp.up_proj"} for i in range(4)}
    base = Base({f"{name}.weight": (64, 32) for name in entries}, "bfloat16", "uint8", True)
    keys = dict.fromkeys(("parameters", "trainable_budget", "base_bits"))
    keys |= {"embeddings": False, "head": False, "norms": True, "types": "all", "group_experts": True}
    for measured, other in (("reference", "marchenko_pastur"), ("marchenko_pastur", "reference")):
        said = {"threshold": measured} if measured != "reference" else {}
        scan.write_text(json.dumps({name: entry | said for name, entry in entries.items()}))
        made = spectrum.recipe(base, scan=str(scan), top_percent=25, threshold=measured, **keys)
        assert made.trainable == {"model.layers.3.mlp.up_proj.weight"}
        said = refused(spectrum.recipe, base, scan=str(scan), top_percent=25, threshold=other, **keys)
        assert f"strategy.threshold={other}" in said and f"strategy.threshold={measured}" in said


def test_scan_that_is_not_there(tmp_path):
    assert "ftdist scan" in refused(load_scan, tmp_path / "nothing.json")
    (tmp_path / "binary.json").write_bytes(b"\xff\xfe\x00")
    assert "not JSON" in refused(load_scan, tmp_path / "binary.json")


# Parameter lists


def listed(tmp_path, text, shapes=None):
    (tmp_path / "list.yaml").write_text(text)
    return load_parameter_list(tmp_path / "list.yaml", shapes or llama(12))


def test_parameter_lists(tmp_path):
    one = {"model.layers.1.mlp.up_proj.weight"}
    assert listed(tmp_path, "unfrozen_parameters:\n- model.layers.1.mlp.up_proj\n") == one
    assert listed(tmp_path, "- model.norm.weight\n- ^model.layers.1[01].mlp.up\n") == {
        "model.norm.weight", "model.layers.10.mlp.up_proj.weight", "model.layers.11.mlp.up_proj.weight"
    }  # fmt: skip
    assert listed(tmp_path, "lm_head.weight\nmodel.norm.weight\n") == {"lm_head.weight", "model.norm.weight"}
    assert len(listed(tmp_path, "- model.layers.1\n")) == 9


def test_head_of_a_published_list_in_a_tied_model(tmp_path):
    assert listed(tmp_path, "- ^lm_head.weight$\n", llama(2, tied=True)) == {"model.embed_tokens.weight"}


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("- model.layers.99.mlp.up_proj\n", "model.layers.99.mlp.up_proj matches no parameter"),
        ("- ^model.layers.99\n", "matches no parameter"),
        ("- model.layers.1.mlp.up\n", "matches no parameter"),
        ("- ^model.(\n", "no valid regular expression"),
        ("unfrozen_parameters: []\n", "holds no list"),
        ("unfrozen: [a]\n", "holds no list"),
        ("- 3\n", "holds no list"),
        ("a: [b\n", "not YAML"),
        ("", "holds no list"),
    ],
)
def test_parameter_lists_that_are_none(text, reason, tmp_path):
    assert reason in refused(listed, tmp_path, text)


def test_list_that_is_not_there(tmp_path):
    assert "cannot be read" in refused(load_parameter_list, tmp_path / "nothing.yaml", llama(1))


def test_selecting_needs_no_torch():
    import subprocess
    import sys

    code = f"import sys, {selecting.__name__}, ftdist.spectrum.scan, ftdist.spectrum.verb, ftdist.spectrum.picture; " \
        "sys.exit(bool({'torch', 'numpy', 'matplotlib'} & set(sys.modules)))"  # fmt: skip
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
