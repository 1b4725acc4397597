"""`ftdist scan` as a whole: its files agree, its table adds up, its picture shows the selection."""

import json

import pytest
from architectures import LAYERS, build
from matplotlib import image

from ftdist.spectrum import verb
from ftdist.spectrum.picture import heat_map
from ftdist.spectrum.select import load_parameter_list, load_scan, select

KEYS = {
    "processes": 1, "device": "cpu", "threshold": "reference", "group_experts": True, "types": "all", "norms": True,
    "embeddings": True, "head": True, "top_percent": 50, "trainable_budget": None,
}  # fmt: skip


@pytest.mark.parametrize("kind", ["llama", "tied"])
def test_files_and_table_agree(kind, checkpoint, tmp_path, capsys):
    path = verb.run(model_path=str(checkpoint(kind)), output_dir=tmp_path, **KEYS)
    assert path == tmp_path / "snr.json"
    reference = json.loads((tmp_path / "snr_reference.json").read_text())
    assert all(set(entry) == {"snr", "type"} for entry in reference.values())
    shapes = {name: tuple(weight.shape) for name, weight in build(kind).named_parameters()}
    chosen = choose(path, shapes)
    assert load_parameter_list(tmp_path / "snr_unfrozenparameters.yaml", shapes) == chosen.names
    said = capsys.readouterr().out
    rows = {line.split()[0]: line.split()[1:] for line in said.splitlines() if line.endswith("%")}
    assert rows["model"] == [f"{chosen.trainable:,}", f"{chosen.total:,}", f"{chosen.trainable / chosen.total:.1%}"]
    assert rows["mlp.up_proj"][:2] == [str(LAYERS), str(LAYERS // 2)]
    assert "note: input_layernorm: 10 modules tie" in said
    assert image.imread(tmp_path / "snr.png").shape[0] > 300


def choose(path, shapes, **changes):
    named = {key: KEYS[key] for key in ("top_percent", "types", "embeddings", "head", "norms", "trainable_budget")}
    return select(scan=load_scan(path), shapes=shapes, **named | changes)


def red(path):
    picture = image.imread(path)
    return int(((picture[..., 0] > 0.95) & (picture[..., 1] < 0.05) & (picture[..., 2] < 0.05)).sum())


@pytest.mark.parametrize("kind", ["llama", "mixtral"])
def test_picture_frames_what_is_selected(kind, checkpoint, tmp_path):
    shapes = {name: tuple(weight.shape) for name, weight in build(kind).named_parameters()}
    path = verb.run(model_path=str(checkpoint(kind)), output_dir=tmp_path, shapes=shapes, **KEYS)
    frames = {}
    for percent in (10, 50):
        chosen = choose(path, shapes, top_percent=percent)
        frames[percent] = red(heat_map(tmp_path / f"{percent}.png", selection=chosen))
    types = sum(count.modules == LAYERS for count in chosen.types)
    assert frames[10] > types * 100
    assert frames[50] == pytest.approx(5 * frames[10], rel=0.1)
