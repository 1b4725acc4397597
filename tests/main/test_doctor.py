"""What `ftdist doctor` finds: each fault made, and named with what to do."""

import errno
import importlib.metadata
import json
import os
import resource
import socket

import pytest

from ftdist import checkup, launcher

ANSWERS = {  # a SLURM that is well
    "sbatch": 'echo "slurm 23.11.4"',
    "scontrol": 'echo "Slurmctld(primary) at head is UP"',
    "sinfo": "printf 'gpu* up 3 idle\\ngpu* up 1 down*\\nold up 2 drain\\n'",
}


@pytest.fixture
def slurm(tmp_path):
    """`slurm(scontrol="exit 1")`: the PATH of a machine whose SLURM answers so."""

    def slurm(**answers):
        for name, script in (ANSWERS | answers).items():
            (tmp_path / name).write_text(f"#!/bin/sh\n{script}\n")
            (tmp_path / name).chmod(0o755)
        return f"{tmp_path}:{os.environ['PATH']}"

    return slurm


def levels(found):
    return {finding.subject: finding.level for finding in found}


def test_the_verb(run, verb, slurm, tmp_path):
    finished = run("doctor", "--json", "--shared", tmp_path, env={"PATH": slurm()})
    found = {row["subject"]: row for row in json.loads(finished.stdout)}
    assert finished.status == int(any(row["level"] == "wrong" for row in found.values()))
    assert {"python", "torch", "versions", "devices", "4-bit", "open files", "/dev/shm", "cache", "shared", "wandb",
            "slurm", "partitions"} <= found.keys()  # fmt: skip
    assert all(row["fix"] for row in found.values() if row["level"] != "ok"), found
    assert found["torch"]["level"] == found["versions"]["level"] == found["slurm"]["level"] == "ok"
    assert "gpu* (3 nodes), old (0 nodes)" in found["partitions"]["found"]
    bad = verb("doctor", "--shared", tmp_path / "nowhere", env={"PATH": slurm(scontrol="exit 1")})
    assert bad.status == 1
    lines = [line for line in bad.stdout.splitlines() if line.startswith("wrong")]
    assert any("slurm" in line and "controller does not answer" in line for line in lines)
    assert any("nowhere: no such directory" in line for line in lines)
    bad = verb("doctor", "cluster=slurm", "cluster.gpus=0", "cluster.processes=1", env={"PATH": slurm(
        sbatch='echo "sbatch: error: Invalid account" >&2; exit 1')})  # fmt: skip
    assert "wrong  cluster" in bad.stdout and "Invalid account" in bad.stdout
    verb("doctor", "--bogus").refused("--bogus", "--shared DIR")


def test_versions_that_do_not_go_together(monkeypatch):
    needs = {"ftdist": ["torch>=2.10", "hydra-core>=1.3.8", "gone>=1", "extra; extra == 'x'"],
             "torch": ["sympy>=1.13"], "hydra-core": ["antlr4-python3-runtime==4.9.*"]}  # fmt: skip
    there = {"torch": "2.9.1", "hydra-core": "1.3.8", "antlr4-python3-runtime": "4.13.2", "sympy": "1.14"}

    def version(name):
        if name in there:
            return there[name]
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "requires", lambda name: needs.get(name))
    monkeypatch.setattr(importlib.metadata, "version", version)
    said = dict(checkup.conflicts())
    assert set(said) == {
        "ftdist needs torch>=2.10, 2.9.1 is installed",
        "ftdist needs gone, which is missing",
        "hydra-core needs antlr4-python3-runtime==4.9.*, 4.13.2 is installed",
    }
    assert said["ftdist needs gone, which is missing"] == "pip install 'gone>=1'"
    assert any("4.9.3 alone" in finding.found for finding in checkup._known_bad())


def test_drivers_and_backends():
    for build, driver, newest, level in (
        (None, "580.1", "13.0", "wrong"),
        ("13.0", "550.5", "12.4", "wrong"),
        ("12.8", "550.5", "12.4", "ok"),
        ("13.0", "580.1", "13.2", "ok"),
        ("13.0", None, None, "warn"),
    ):
        finding = checkup.driver_fits(build, driver, newest)
        assert finding.level == level and bool(finding.fix) == (level != "ok")
    assert checkup.backend("13.0", ["cpu", "cuda130"]).level == "ok"
    assert "no cuda131, only cpu, cuda130" in checkup.backend("13.1", ["cpu", "cuda130"]).found
    assert checkup.backend(None, ["cuda130"]).level == "wrong"


def test_limits_of_the_machine(monkeypatch):
    assert all(finding.subject != "host name" or finding.level == "ok" for finding in checkup._limits())
    monkeypatch.setattr(resource, "getrlimit", lambda which: (256, 1024))
    monkeypatch.setattr(launcher, "devices", lambda: (1, "GPU"))

    def unknown(*_):
        raise OSError

    monkeypatch.setattr(socket, "getaddrinfo", unknown)
    monkeypatch.setattr(checkup.shutil, "disk_usage", lambda place: type("Usage", (), {"total": 64 << 20}))
    found = levels(checkup._limits())
    assert (found["open files"], found["/dev/shm"], found["host name"]) == ("wrong", "warn", "wrong")


def full(**_):
    raise OSError(errno.ENOSPC, "No space left on device")


@pytest.mark.parametrize(
    ("ping", "level"),
    [
        ("Slurmctld(primary) at super1 is DOWN", "wrong"),
        ("Slurmctld(primary) at head is DOWN\nSlurmctld(backup) at head2 is UP", "ok"),
    ],
)
def test_a_controller_that_is_down(ping, level, monkeypatch, slurm):
    monkeypatch.setenv("PATH", slurm(scontrol=f"echo '{ping}'"))
    assert levels(checkup._slurm())["slurm"] == level


def test_a_shared_directory(monkeypatch, slurm, tmp_path):
    (finding,) = checkup.shared_directory(tmp_path)
    assert finding.level in ("ok", "warn") and not list(tmp_path.glob(".ftdist-doctor*"))
    monkeypatch.setattr(os, "access", lambda *_: False)
    (finding,) = checkup.shared_directory(tmp_path)
    assert finding.level == "wrong" and "cannot be written" in finding.found
    monkeypatch.undo()
    monkeypatch.setattr(checkup.tempfile, "mkdtemp", full)
    (finding,) = checkup.shared_directory(tmp_path)
    assert finding.level == "wrong" and "No space left" in finding.found
    monkeypatch.undo()
    shared = tmp_path / "shared"
    shared.mkdir()
    seeing = 'case "$*" in *--overlap*) exit 1;; esac; for node in 0 1; do SLURM_NODEID=$node sh -c "$6"; done'
    seeing = f'[ "$SLURM_OVERLAP" ] && {{ {seeing}; }}'  # an srun before 20.11, too
    for script, level in ((seeing, "ok"), (seeing.replace("0 1", "0"), "wrong"), ("exit 1", "wrong")):
        monkeypatch.setenv("PATH", slurm(srun=script))
        monkeypatch.setenv("SLURM_JOB_NUM_NODES", "2")
        (finding,) = checkup.shared_directory(shared)
        assert finding.level == level, finding
        assert level == "ok" or "do not see it" in finding.found
    monkeypatch.setattr(checkup, "ANSWER", 0.2)
    slurm(srun="exec sleep 60")
    (finding,) = checkup.shared_directory(shared)
    assert finding.level == "wrong" and "not every node answers within" in finding.found


def test_partitions_and_logins(monkeypatch, tmp_path):
    assert checkup.partitions("").level == "wrong"
    assert checkup.partitions("gpu up 2 down\nold down 4 idle").level == "wrong"
    assert checkup.partitions("gpu up 2 mix").found == "usable: gpu (2 nodes)"
    for name in ("WANDB_MODE", "WANDB_API_KEY", "NETRC", "WANDB_BASE_URL"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert checkup._wandb().level == "warn"
    (tmp_path / ".netrc").write_text("machine api.wandb.ai\n  login user\n")
    assert checkup._wandb().level == "ok"
    monkeypatch.setenv("WANDB_BASE_URL", "https://wandb.example:8080/x")
    assert checkup._wandb().level == "warn"
    monkeypatch.setenv("WANDB_MODE", "offline")
    assert checkup._wandb().found == "WANDB_MODE=offline"
