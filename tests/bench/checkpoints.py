"""How long a save stops a run, against DeepSpeed's own checkpoint and torch.save of the same state, in the same run.

    python tests/bench/checkpoints.py [--hidden 768] [--layers 8] [--saves 5]

Two processes on this machine. For each engine a run of a random-weight Llama saves in the background at every second
step; at the same steps the peer saves the same state, once each. Prints the pause of the run, the time until the files
are on the disk, the peer's time (which is a pause), and the time to verify and restore. Medians, with spread.
"""

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ENGINES = ("ddp", "zero2", "zero3")


def make_model(directory, hidden, layers):
    import torch
    from transformers import AutoModelForCausalLM, LlamaConfig

    from ftdist import demo

    demo_model = demo.model(directory.parent / "demo", 7)
    ids = json.loads((demo_model / "config.json").read_text())
    config = LlamaConfig(
        vocab_size=32_000, hidden_size=hidden, intermediate_size=4 * hidden, num_hidden_layers=layers,
        num_attention_heads=hidden // 64, num_key_value_heads=hidden // 64, tie_word_embeddings=False,
        **{key: ids[key] for key in ("bos_token_id", "eos_token_id", "pad_token_id")},
    )  # fmt: skip
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config, dtype=torch.float32).save_pretrained(directory)
    for file in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(demo_model / file, directory)


def freeze(run_dir, model, engine, saves):
    from ftdist import compose, job, lease, rundir

    words = [
        f"model.path={model}", f"engine={engine}", "strategy=full", "cluster.processes=2", "cluster.oversubscribe=true",
        "train.bf16=false", "train.max_length=64", "train.packing=true", "train.per_device_train_batch_size=1",
        f"train.max_steps={2 * saves + 1}", "train.eval_strategy=no", "eval.samples=0", "tracking=none",
        "checkpoint.every_minutes=null", "checkpoint.every_steps=2", f"run_dir={run_dir}",
    ]  # fmt: skip
    (config,) = compose.compose("train", words)
    job.decide(config)
    with rundir.claimed(run_dir) as token:
        job.freeze(config, run_dir)
    lease.release(run_dir, token)


def one_rank(run_dir):
    """Train, and at every save let the peer save too; what was measured goes to stdout of rank 0."""
    import torch
    import torch.distributed as dist

    from ftdist import keeper, worker

    own_save, own_choose, own_restore = keeper.Keeper.save, keeper.choose, keeper.Keeper.restore
    measured = {"peer": [], "verify": [], "restore": []}

    def timed(name, function):
        def call(*args):
            began = time.perf_counter()
            answer = function(*args)
            measured[name].append(time.perf_counter() - began)
            return answer

        return call

    def save(self):
        own_save(self)
        self._finish()  # the peer has the disk to itself
        target = Path(self.run_dir) / "peer"
        dist.barrier()
        began = time.perf_counter()
        engine = self.trainer.model_wrapped
        if hasattr(engine, "save_checkpoint"):
            engine.save_checkpoint(str(target), tag="peer")
        elif dist.get_rank() == 0:
            target.mkdir(exist_ok=True)
            torch.save([engine.state_dict(), self.trainer.optimizer.state_dict()], target / "state.pt")
        os.sync()
        dist.barrier()
        measured["peer"].append(time.perf_counter() - began)
        if dist.get_rank() == 0:
            shutil.rmtree(target, ignore_errors=True)
        dist.barrier()

    keeper.Keeper.save = save
    keeper.choose = timed("verify", own_choose)
    keeper.Keeper.restore = timed("restore", own_restore)
    worker.train(run_dir)
    if os.environ["RANK"] == "0":
        (run_dir / "measured.json").write_text(json.dumps(measured))


def start(run_dir):
    command = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", __file__, "--rank", str(run_dir)]
    environment = os.environ | {"DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1", "WANDB_MODE": "offline"}
    done = subprocess.run([sys.executable, *command], env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(done.stdout + done.stderr)
    return json.loads((run_dir / "measured.json").read_text())


def shown(values):
    return f"{statistics.median(values):.2f} ({min(values):.2f} to {max(values):.2f})"


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--hidden", type=int, default=768)
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--saves", type=int, default=5)
    parser.add_argument("--rank", type=Path)
    given = parser.parse_args()
    if given.rank:
        one_rank(given.rank)
        return
    folder = Path(tempfile.mkdtemp(prefix="ftdist-bench-"))
    make_model(folder / "model", given.hidden, given.layers)
    print("| engine | state | pause, s | until on disk, s | peer, s | pause / peer | verify, s | restore, s |")
    print("|---|---:|---:|---:|---:|---:|---:|---:|")
    for engine in ENGINES:
        run_dir = folder / engine
        freeze(run_dir, folder / "model", engine, given.saves)
        measured = start(run_dir)
        events = [json.loads(line) for line in (run_dir / "events.jsonl").open()]
        saves = [event for event in events if event["event"] == "checkpoint"]
        pauses, writes = [s["pause"] for s in saves], [s["pause"] + s["write"] for s in saves]
        shutil.rmtree(run_dir / "final")
        again = start(run_dir)  # goes on from the last checkpoint: verify and restore
        ratio = statistics.median(pauses) / statistics.median(measured["peer"])
        print(
            f"| {engine} | {saves[-1]['bytes'] / 1e9:.2f} GB | {shown(pauses)} | {shown(writes)} "
            f"| {shown(measured['peer'])} | {ratio:.2f} | {again['verify'][0]:.2f} | {again['restore'][0]:.2f} |",
            flush=True,
        )
    shutil.rmtree(folder)


if __name__ == "__main__":
    main()
