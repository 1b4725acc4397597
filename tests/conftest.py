"""Fixtures that every room may use: a cache of the tests' own, tiny models, a little data, the real console script."""

import contextlib
import json
import os
import secrets
import shutil
import signal
import subprocess
import sys
import sysconfig
from dataclasses import dataclass
from pathlib import Path

import pytest

# Before numpy and torch are imported: the cores belong to xdist.
os.environ.update(OMP_NUM_THREADS="1", OPENBLAS_NUM_THREADS="1")

# A shell that starts the suite in the background has it ignore Ctrl-C, and everything that it starts.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

SCRIPTS = sysconfig.get_path("scripts")
SEED = 7
ROWS = 120  # of the chat file, before the split
LAYERS = 4
LAUNCHED = ("SLURM_", "ACCELERATE_", "TORCHELASTIC_", "WANDB_", "HYDRA_", "FTDIST_")
RANKED = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "PYTHONPATH")


@dataclass(frozen=True)
class Finished:
    """What is left of a process."""

    status: int
    stdout: str
    stderr: str

    @property
    def run_dir(self):
        """The directory that a run names in its last line."""
        last = self.stdout.splitlines()[-1]
        assert last.startswith("run: "), self
        return Path(last.removeprefix("run: "))

    def refused(self, *parts):
        """The shape of every answer to a user's mistake: exit status 2, one line, what it must name."""
        assert self.status == 2, self
        assert self.stderr.startswith("ftdist: ") and self.stderr.count("\n") == 1, self.stderr
        assert "run: " not in self.stdout
        for part in parts:
            assert part in self.stderr, part


def _process():
    """What a test in this process must leave as it was: another test of the same worker meets it."""
    umask = os.umask(0o077)
    os.umask(umask)
    return umask, signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGUSR1), Path.cwd()


@pytest.fixture(autouse=True)
def process():
    before = _process()
    yield
    assert _process() == before


@pytest.fixture(scope="session")
def shared(tmp_path_factory):
    """A directory of this session alone, the same for all xdist workers."""
    base = tmp_path_factory.getbasetemp()
    path = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "shared"
    path.mkdir(exist_ok=True)
    return path


@pytest.fixture(scope="session")
def environment(shared):
    """Variables for every process that a test starts: one thread, no GPU, no network, no launcher around, own cache."""
    kept = {k: v for k, v in os.environ.items() if not k.startswith(LAUNCHED) and k not in RANKED}
    return kept | {
        "PATH": f"{SCRIPTS}:{os.environ['PATH']}",
        "FTDIST_CACHE": str(shared / "cache"),
        "OMP_NUM_THREADS": "1",
        "CUDA_VISIBLE_DEVICES": "",
        "WANDB_MODE": "offline",
        "HF_HUB_OFFLINE": "1",
        "PYTHONDONTWRITEBYTECODE": "1",
    }


@pytest.fixture(scope="session")
def start(environment):
    """Starts a command in a session of its own, output piped; whatever is left of it at the end is killed."""
    started = []

    def start(*command, cwd, env=()):
        process = subprocess.Popen(
            [str(word) for word in command],
            cwd=cwd,
            env={k: v for k, v in (environment | dict(env)).items() if v is not None},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )
        started.append(process)
        return process

    yield start
    for process in started:
        stop(process)


def stop(process):
    """Kill a process and its group, if there is anything left to kill."""
    if process.poll() is None:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()


@pytest.fixture(scope="session")
def execute(start, shared):
    """Runs a command to its end. A test that hangs fails here."""

    def execute(*command, cwd=None, env=(), timeout=300):
        process = start(*command, cwd=cwd or shared, env=env)
        try:
            stdout, stderr = process.communicate(timeout=timeout)
        except subprocess.TimeoutExpired:
            # SIGTERM first: `ftdist` then stops its ranks, which live in a session of their own
            process.terminate()
            try:
                stdout, stderr = process.communicate(timeout=30)
            finally:
                stop(process)
            pytest.fail(f"{command} did not end within {timeout} s\n{stdout}\n{stderr}")
        return Finished(process.returncode, stdout, stderr)

    return execute


@pytest.fixture(scope="session")
def run(execute):
    """`run("plan", "strategy=lora")`: the real console script, from its words to its exit status."""

    def run(*words, **kwargs):
        return execute(Path(SCRIPTS, "ftdist"), *words, **kwargs)

    return run


class Forks:
    """The forking process; one for a test session's worker."""

    def __init__(self, environment, errors):
        self.errors = errors
        self.python = errors.with_suffix(".python")  # starts modules as the interpreter does, by a fork
        self.pending = []
        self.process = subprocess.Popen(
            [sys.executable, Path(__file__).with_name("forks.py"), self.python],
            env=environment | {"DS_ACCELERATOR": "cpu", "TOKENIZERS_PARALLELISM": "false"},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=errors.open("a"),
            text=True,
        )
        assert self._answer() == {"ready": True}

    def _answer(self):
        line = self.process.stdout.readline()
        assert line, self.errors.read_text()[-3000:]
        return json.loads(line)

    def _ask(self, **command):
        self.process.stdin.write(json.dumps(command) + "\n")
        self.process.stdin.flush()
        return self._answer()["pids"]

    def freeze(self, run_dir, *words):
        """A run directory, ready to be started."""
        self._ask(freeze=[*words, f"run_dir={run_dir}"])
        assert self._answer()["statuses"] == [0], self.errors.read_text()[-3000:]
        return run_dir

    def change(self, run_dir, *words):
        """The first half of `ftdist resume RUN words`: the status of the process."""
        self._ask(change=str(run_dir), words=list(words))
        return self._answer()["statuses"][0]

    def finish(self, run_dir):
        """What follows training."""
        self._ask(finish=str(run_dir))
        assert self._answer()["statuses"] == [0], self.errors.read_text()[-3000:]

    def begin(self, run_dir, world=2):
        """Start the ranks; their pids."""
        self.pending = self._ask(start=str(run_dir), world=world)
        return self.pending

    def end(self):
        """The statuses of the ranks that were begun last."""
        statuses = self._answer()["statuses"]
        self.pending = []
        return statuses

    def clear(self):
        """End what a failed test has left running."""
        for pid in self.pending:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        if self.pending:
            self.end()

    def start(self, run_dir, world=2):
        self.begin(run_dir, world)
        return self.end()


@pytest.fixture(scope="session")
def forks(environment, tmp_path_factory):
    forks = Forks(environment, tmp_path_factory.mktemp("forks") / "errors.log")
    yield forks
    forks.process.stdin.close()
    forks.process.wait(timeout=60)


@pytest.fixture(scope="session")
def verb(execute, forks):
    """What `run` gives, from a fork that has imported everything; so are the ranks and whatever else it starts.

    For verbs that are a test's means, and for answers that do not depend on a start.
    """

    def verb(*words, **kwargs):
        return execute(forks.python, "-m", "ftdist.cli", *words, **kwargs)

    return verb


def published(target, make):
    """`target`, filled by `make(directory)` if no other worker has done it: there whole or not at all."""
    if not target.is_dir():
        draft = target.with_name(f".{target.name}.{secrets.token_hex(4)}")
        draft.mkdir(parents=True)
        make(draft)
        try:
            draft.rename(target)
        except OSError:
            shutil.rmtree(draft)
            assert target.is_dir()
    return target


@pytest.fixture(scope="session")
def demo_tokenizer(shared):
    """The directory of the demo model, whose tokenizer the tiny models share."""
    from ftdist import demo

    return demo.model(shared / "demo", SEED)


@pytest.fixture(scope="session")
def save_tiny(shared, demo_tokenizer):
    """`save_tiny(name, config)`: a directory with a seeded float32 model of that configuration and a tokenizer."""

    def save_tiny(name, config):
        def make(directory):
            import torch
            from transformers import AutoModelForCausalLM

            torch.manual_seed(SEED)
            built = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
            for parameter in built.parameters():
                if parameter.ndim == 1:  # norms start all alike
                    torch.nn.init.normal_(parameter, 1.0, 0.1)
            built.save_pretrained(directory)
            for file in ("tokenizer.json", "tokenizer_config.json"):
                shutil.copy(demo_tokenizer / file, directory)

        return published(shared / name, make)

    return save_tiny


@pytest.fixture(scope="session")
def sizes(demo_tokenizer):
    """Keyword arguments of a tiny model's configuration."""
    config = json.loads((demo_tokenizer / "config.json").read_text())
    return {
        "vocab_size": config["vocab_size"],
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 2048,
        "tie_word_embeddings": False,
        "initializer_range": 0.1,  # large enough that adapters below a frozen head can learn
        **{key: config[key] for key in ("bos_token_id", "eos_token_id", "pad_token_id")},
    }


@pytest.fixture(scope="session")
def model(save_tiny, sizes):
    """A tiny Llama with grouped-query attention."""
    from transformers import LlamaConfig

    return save_tiny("llama", LlamaConfig(**sizes))


@pytest.fixture(scope="session")
def chat(shared):
    """A JSONL file of short chats; no two are alike."""

    def make(directory):
        from ftdist import demo

        lines = [json.dumps({"messages": row["messages"]}) for row in demo.rows(SEED)[:ROWS]]
        (directory / "chat.jsonl").write_text("\n".join(lines) + "\n")

    return published(shared / "chat", make) / "chat.jsonl"


@pytest.fixture(scope="session")
def small(model, chat):
    """Overrides of the smallest run that still learns: float32, constant rate, nothing tracked."""
    return (
        f"model.path={model}",
        f"data.path={chat}",
        "train.max_length=64",
        "train.bf16=false",
        "train.warmup_steps=0",
        "train.lr_scheduler_type=constant",
        "tracking=none",
    )
