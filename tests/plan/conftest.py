"""Fixtures of the plan's tests."""

import json

import pytest


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    """Nothing of these tests is read from or left in the user's cache."""
    monkeypatch.setenv("FTDIST_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")


@pytest.fixture
def save_model(tmp_path):
    """Writes a real tiny model; returns its directory."""

    def save(config, name="model", **kwargs):
        from transformers import AutoConfig, AutoModelForCausalLM

        kind = config["model_type"]
        built = AutoConfig.for_model(kind, **{k: v for k, v in config.items() if k != "model_type"})
        directory = tmp_path / name
        AutoModelForCausalLM.from_config(built).save_pretrained(directory, **kwargs)
        return directory

    return save


@pytest.fixture
def config_directory(tmp_path):
    """A model directory with a config.json and no weights."""

    def write(config):
        directory = tmp_path / "config-only"
        directory.mkdir()
        (directory / "config.json").write_text(json.dumps(config))
        return directory

    return write
