"""Every command that README shows is run, as it is written or with less to do.

`COMMANDS` knows each: a command of README that it does not know fails, as does a row that README no longer has. The
arguments of all are read as README writes them, by the program's own options; what would take long is then run with
smaller ones. Commands that are long even so, or whose program has a test that runs it, are left to
`make test-exhaustive`, which runs all of them in a shell.
"""

import ast
import importlib
import os
import re
import shlex
import shutil
import subprocess
import sys
import tomllib
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import torch
import tyro

from ftrain.cli.main import SUBCOMMANDS, parse
from tests.helpers.rank_processes import Ended, run_program
from tests.helpers.readme_folders import Folders

ROOT = Path(__file__).resolve().parents[1]
PROGRAMS = ("make", "python", "python3", "ftrain", "torchrun", "pip")
SMALL = "--size smoke --steps 1 --tokenizer-steps 1 --held-out 1 --checkpoint-every 1 --out {here}/run"
"""The main job with as little to do as it can have."""
TRAINED = "ftrain train sft --model {chat} --data {chat}/chat.jsonl --out {here}/run --lora.rank 2 --steps 1"
"""A run with an adapter."""
SHORT_RUN = "--tokens 128 --packs 2 --steps 1"
"""A training run with as little to do."""


@dataclass(frozen=True)
class Command:
    """How a command of README is run.

    `replaced`: words that become others; `appended`: options behind all others. In both `{here}` is an empty folder of
    the test, `{hf}` a small model of Hugging Face's, with the same as a checkpoint in `{hf}/ckpt`, `{chat}` a small
    chat model with an adapter and data files, `{video}` a small pipeline of Wan's with films, a cache and an adapter.
    `ends`: the exit codes that are right, `says`: what is printed, `leaves`: a file that is there afterwards. `long`:
    more than five seconds of a core even so, or run as it is by a test of its program.
    """

    replaced: dict[str, str] = field(default_factory=dict)
    appended: str = ""
    ends: tuple[int, ...] = (0,)
    says: str = ""
    leaves: str = ""
    long: bool = False


DRY = "--dry-run --no-deps --no-build-isolation --no-index"
COMMANDS = {
    'python3 -m venv .venv && source .venv/bin/activate && pip install -e ".[data]"': Command(
        {".venv": "{here}/.venv"}, DRY, says="Would install ftrain-omni"
    ),
    "pip install torch --index-url https://download.pytorch.org/whl/cpu": Command(
        appended="--dry-run --no-deps", says="torch"
    ),
    "python -m experiments.omni_moe": Command(appended=SMALL, leaves="run/samples.png", long=True),
    "torchrun --nproc-per-node 8 -m experiments.omni_moe --sequence 2 --expert 4": Command(
        {"8": "2", "4": "2"}, SMALL, says="sequence 2, expert 2 (process)", leaves="run/summary.json", long=True
    ),
    "python -m experiments.omni_moe --shard 4 --expert 2": Command(
        appended=SMALL, says="shard 4 x sequence 1, expert 2 (virtual)", leaves="run/summary.json", long=True
    ),
    "ftrain plan experiments/decoder_plan.py --gpus 128 --gpu h100": Command(
        appended="--packs 128 --tokens 1K --traced 0", says="legal layouts were estimated and not traced"
    ),
    "ftrain convert --from-hf DIR --to DIR": Command(
        {"--from-hf DIR": "--from-hf {hf}", "--to DIR": "--to {here}/ckpt"}, leaves="ckpt/global_step_0"
    ),
    "ftrain convert --from-ckpt DIR --to-hf DIR": Command(
        {"--from-ckpt DIR": "--from-ckpt {hf}/ckpt", "--to-hf DIR": "--to-hf {here}/back"}, leaves="back/config.json"
    ),
    "ftrain replay RUN --step N --check": Command(
        {"ftrain": f"python -m experiments.omni_moe {SMALL} && ftrain", "RUN": "{here}/run", "N": "1"},
        says="every node's values are finite",
        long=True,
    ),
    **{
        f"python -m experiments.{name}": Command(
            appended=f"{less} --json {{here}}/figures.json", ends=(0, 1), leaves="figures.json", long=True
        )
        for name, less in (
            ("spoken", "--small --threads 1 --out {here}/run"),
            ("stream", "--steps 2 --batch 4"),
            ("ming", "--steps 2 --batch 4"),
            ("composed", "--steps 2 --dozens 1 --tokenizer-steps 2 --held-out 6"),
            ("pictures.janus", "--steps 2 --codec-steps 2 --batch 4"),
            ("long_context", "--small --threads 1 --out {here}/run"),
            ("agent", "--small --threads 1 --out {here}/run"),
        )
    },
    "python -m experiments.recommend": Command(
        appended="--steps 2 --batch 32 --people 40", says="CTCVR AUC", long=True
    ),
    "python -m experiments.bench.step": Command(
        appended="--quick --rounds 1 --no-compiled --only overhead", says="overhead of a call", long=True
    ),
    "python -m experiments.bench.gpu --out results": Command(  # without a card its stages end, and it says so
        {"results": "{here}/results"}, "--only machine --tiny", ends=(0, 1), leaves="results/gpu.json", long=True
    ),
    "python -m experiments.bench.generate": Command(appended="--quick --rounds 1 --only llama", says="llama"),
    "python -m experiments.bench.parallel": Command(  # goals of time are for a machine that does nothing else
        appended="--rounds 1 --ranks 4", ends=(0, 1), says="lockstep, 4 ranks", long=True
    ),
    "python -m experiments.bench.remat": Command(
        appended="--only planning", ends=(0, 1), says="planning for 48 layers", long=True
    ),
    "python -m experiments.bench.plan_vs_published": Command(
        appended="--only 'SP4, 8K'", says="VeOmni 72B, SP4, 8K", long=True
    ),
    "python -m experiments.bench.checkpoint": Command(
        appended="--mib 8 --rounds 1 --processes 1 --saves 1",
        ends=(0, 1),
        says="throughput of an async save",
        long=True,
    ),
    "python -m experiments.bench.crash": Command(appended="--kills 1 --mib 1", says="while writing"),
    "python -m experiments.bench.coverage": Command(
        appended="--set causal_lm --only gpt2 --columns equal --json {here}/coverage-causal_lm.json",
        says="gpt2",
        long=True,
    ),
    "python -m experiments.bench.pretrained": Command(
        appended="--folder {chat} --steps 2 --new 4 --sides native --meshes 'one device'", says="native", long=True
    ),
    "python -m experiments.bench.finetune": Command(
        appended="--folder {chat} --tokens 128 --steps 2 --turns 1 --pairs 2 --pair-steps 1", says="DPO", long=True
    ),
    "python -m experiments.bench.data": Command(appended="--parts packing", says="useful", ends=(0, 1), long=True),
    "python -m experiments.bench.omni": Command(
        appended="--quick --models qwen2.5-vl --tokens 512", says="useful tokens", ends=(0, 1), long=True
    ),
    "python -m experiments.bench.dit": Command(appended="--quick", says="forward passes", ends=(0, 1), long=True),
    "python -m experiments.bench.fuzz": Command(appended="--programs 1", says="silent differences", long=True),
    **{
        f"ftrain train {task} --model DIR --data {file} --out runs/{run}{lora}": Command(
            {"DIR": "{chat}", file: "{chat}/" + file, f"runs/{run}": "{here}/run"},
            SHORT_RUN,
            leaves=f"run/{leaf}",
            long=True,
        )
        for task, file, run, lora, leaf in (
            ("sft", "chat.jsonl", "chat", "", "model"),
            ("sft", "chat.jsonl", "lora", " --lora.rank 16", "adapter"),
            ("dpo", "pairs.jsonl", "dpo", " --lora.rank 16", "adapter"),
        )
    },
    **{
        f"ftrain train {task} --model DIR --data FILE{more}": Command(
            {"DIR": "{chat}", "FILE": "{chat}/" + file},
            f"{SHORT_RUN} --out {{here}}/run",
            leaves="run/metrics.jsonl",
            long=True,
        )
        for task, file, more in (
            ("sft", "chat.jsonl", " --lora.rank 16"),
            ("dpo", "pairs.jsonl", " --lora.rank 16"),
            ("sft", "chat.jsonl", ""),
            ("pretrain", "chat.jsonl", " --shard 2"),
        )
    },
    "torchrun --nproc-per-node 8 -m ftrain train sft --config sft.yaml --shard 8": Command(
        {"8": "2", "sft.yaml": "{chat}/sft.yaml"}, f"{SHORT_RUN} --out {{here}}/run", leaves="run/model", long=True
    ),
    "ftrain data stats chat.jsonl --model DIR": Command(
        {"DIR": "{chat}", "chat.jsonl": "{chat}/chat.jsonl"}, says="openai"
    ),
    "ftrain data show chat.jsonl --model DIR --n 2": Command(
        {"DIR": "{chat}", "chat.jsonl": "{chat}/chat.jsonl"}, says="it is 1"
    ),
    'ftrain generate --model DIR --adapter runs/lora/adapter --prompt "2 + 2?"': Command(
        {"DIR": "{chat}", "runs/lora/adapter": "{chat}/adapter"}, "--max-new 3", says="> 2 + 2?"
    ),
    "ftrain eval --model DIR --data chat.jsonl": Command(
        {"DIR": "{chat}", "chat.jsonl": "{chat}/chat.jsonl"}, "--tokens 128", says="perplexity"
    ),
    "ftrain merge --model DIR --adapter runs/lora/adapter --to merged": Command(
        {"DIR": "{chat}", "runs/lora/adapter": "{chat}/adapter", "merged": "{here}/merged"}, leaves="merged/config.json"
    ),
    "ftrain export runs/lora --to exported": Command(
        {"runs/lora": "{here}/run", "exported": "{here}/exported", "ftrain": f"{TRAINED} && ftrain"},
        leaves="exported/adapter",
    ),
    "ftrain plan --model DIR --tokens 4096 --gpus 8 --budget 70GiB --lora.rank 16 --apply plan.json": Command(
        {"DIR": "{chat}", "4096": "256", "--gpus 8": "--gpus 2", "plan.json": "{here}/plan.json"},
        "--traced 1 --processes 1",
        leaves="plan.json",
        long=True,
    ),
    "ftrain report runs/lora --html lora.html": Command(
        {"runs/lora": "{here}/run", "lora.html": "{here}/lora.html", "ftrain": f"{TRAINED} && ftrain"},
        leaves="lora.html",
        long=True,
    ),
    "ftrain encode --model WAN --videos clips --out cache --sizes 81x480x832": Command(
        {"WAN": "{video}/wan", "clips": "{video}/films", "--out cache": "--out {here}/cache", "81x480x832": "9x32x48"},
        leaves="cache",
        long=True,
    ),
    "ftrain train video --model WAN --data cache --out runs/video --lora.rank 32": Command(
        {"WAN": "{video}/wan", "--data cache": "--data {video}/cache", "runs/video": "{here}/run", "rank 32": "rank 2"},
        "--steps 1 --held-out 0",
        leaves="run/adapter",
        long=True,
    ),
    'ftrain sample --model WAN --adapter runs/video/adapter --prompt "a cat on a wall" --out cat.mp4': Command(
        {"WAN": "{video}/wan", "runs/video/adapter": "{video}/adapter", "cat.mp4": "{here}/cat.mp4"},
        "--size 9x32x48 --steps 2",
        leaves="cat.mp4",
        long=True,
    ),
    "ftrain params --model DIR": Command({"DIR": "{chat}"}, says="parameters"),
    "ftrain check --model DIR --shard 2": Command({"DIR": "{chat}"}, says="equal"),
    "ftrain launch slurm --out job.sh --nodes 4 -- train sft --config sft.yaml --out runs/big": Command(
        {"job.sh": "{here}/job.sh"}, leaves="job.sh"
    ),
    "ftrain doctor": Command(says="CPU cores"),
    "make omni": Command(),
    "make finetune": Command(),
    "make distill": Command(),
    "make test": Command(),
    "make test-exhaustive": Command(),
    "make test-nullgpu": Command(),
    'make omni ARGS="--steps 200 --seed 1"': Command(),
}
MENTIONED = ("ftrain plan", "ftrain convert", "ftrain train", "ftrain data")
"""Subcommands that a sentence names without arguments."""

MAKE = [command for command in COMMANDS if command.startswith("make ")]
SHORT = [command for command, how in COMMANDS.items() if command not in MAKE and not how.long]
LONG = [command for command, how in COMMANDS.items() if how.long]


def parts_of_readme() -> tuple[str, list[tuple[str, list[str]]]]:
    """The sentences of README, and its blocks: the language of each, and its lines."""
    parts = re.split(r"^```", (ROOT / "README.md").read_text(encoding="utf-8"), flags=re.MULTILINE)
    blocks = [part.splitlines() for part in parts[1::2]]
    return "".join(parts[::2]), [(lines[0], lines[1:]) for lines in blocks]


def shown() -> set[str]:
    """The commands of README: each line of a block of commands, and what stands between backticks in its sentences."""
    sentences, blocks = parts_of_readme()
    lines = [line.partition(" #")[0].strip() for language, block in blocks if language == "bash" for line in block]
    spans = [" ".join(span.split()) for span in re.findall(r"`([^`]+)`", sentences)]
    return {*filter(None, lines), *(span for span in spans if span.split(" ")[0] in PROGRAMS and " " in span)}


def test_every_command_of_the_readme_is_known_and_every_known_one_is_there() -> None:
    known = {*COMMANDS, *MENTIONED}
    assert (shown() - known, known - shown()) == (set(), set())


def test_blocks_of_commands_say_that_they_are() -> None:
    _, blocks = parts_of_readme()
    others = [line for language, block in blocks if language != "bash" for line in block]
    assert [line for line in others if line.split(" ")[0] in PROGRAMS] == []


def test_subcommands_that_are_named_exist() -> None:
    assert {name.partition(" ")[2] for name in MENTIONED} <= set(SUBCOMMANDS)


@pytest.mark.parametrize("command", [c for c in COMMANDS if " experiments." in c or c.startswith("ftrain ")])
def test_the_arguments_that_the_readme_writes_are_understood(command: str) -> None:
    words = shlex.split(command.replace(" N ", " 1 "))
    if words[0] == "ftrain":
        parse(words[1:])
        return
    at = words.index("-m")
    if words[0] == "torchrun":
        importlib.import_module("torch.distributed.run").parse_args(words[1:])
    module = importlib.import_module(words[at + 1])
    if hasattr(module, "__path__"):  # a package, of which its __main__ is run
        module = importlib.import_module(f"{words[at + 1]}.__main__")
    tyro.cli(getattr(module, options_of(module.__file__)), args=words[at + 2 :])


def options_of(file: str) -> str:
    """The class that a module's command line is read into: the argument of its `tyro.cli`."""
    calls = [node for node in ast.walk(ast.parse(Path(file).read_text())) if isinstance(node, ast.Call)]
    (options,) = (call.args[0] for call in calls if ast.unparse(call.func) == "tyro.cli")
    return ast.unparse(options)


@pytest.fixture(scope="module")
def programs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the programs that an installed environment has, all of this Python."""
    folder = tmp_path_factory.mktemp("bin")
    scripts = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["scripts"]
    module, function = scripts["ftrain"].split(":")
    runs = {
        "python": '"$@"',
        "python3": '"$@"',
        "pip": '-m pip --disable-pip-version-check "$@"',
        "torchrun": '-m torch.distributed.run "$@"',
        "ftrain": f'-c "import sys; from {module} import {function}; sys.exit({function}())" "$@"',
    }
    for name, arguments in runs.items():
        (folder / name).write_text(f"#!/bin/sh\nexec {shlex.quote(sys.executable)} {arguments}\n")
        (folder / name).chmod(0o755)
    return folder


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Folders:
    return Folders(tmp_path_factory.mktemp)


def written(command: str, folders: Folders, here: Path) -> str:
    """The command with its words replaced and its options appended."""
    how, line = COMMANDS[command], command
    for old, new in how.replaced.items():
        line = re.sub(rf"(?<![\w.]){re.escape(old)}(?![\w.])", lambda _, new=new: new, line)
    line = f"{line} {how.appended}".replace("{here}", str(here))
    return re.sub(r"\{(hf|chat|video)\}", lambda named: str(folders[named[1]]), line)


def check(command: str, line: str, ended: Ended, here: Path) -> None:
    how, told = COMMANDS[command], f"{line}\n{ended.stdout[-2000:]}\n{ended.stderr[-3000:]}"
    assert ended.code in how.ends, told
    assert "Traceback" not in ended.stderr, told
    assert how.says in " ".join(ended.stdout.split()), told
    assert (here / how.leaves).exists(), told


def in_a_shell(line: str, programs: Path, here: Path) -> Ended:
    packages = [str(ROOT), str(Path(torch.__file__).parents[1])]
    env = {**os.environ, **surroundings(here), "PYTHONPATH": os.pathsep.join(packages), "OMP_NUM_THREADS": "1"}
    env["PATH"] = f"{programs}{os.pathsep}{os.environ['PATH']}"
    done = subprocess.run(["bash", "-c", line], cwd=ROOT, env=env, capture_output=True, text=True, timeout=500)
    return Ended(done.returncode, done.stdout, done.stderr)


def surroundings(here: Path) -> dict[str, str]:
    return {"FTRAIN_CACHE": str(here / "cache"), "COLUMNS": "160"}


def forked(line: str, here: Path) -> Ended:
    """The programs of a line one after the other, each in a process that need not import torch again."""
    for part in line.split(" && "):
        if (ended := run_program(shlex.split(part), here, surroundings(here), cwd=ROOT)).code != 0:
            return ended
    return ended


@pytest.mark.slow
@pytest.mark.parametrize("command", SHORT)
def test_the_command_runs(command: str, programs: Path, folders: Folders, tmp_path: Path) -> None:
    line = written(command, folders, tmp_path)
    ours = command.startswith(("ftrain ", "python -m experiments."))
    check(command, line, forked(line, tmp_path) if ours else in_a_shell(line, programs, tmp_path), tmp_path)


@pytest.mark.exhaustive
@pytest.mark.parametrize("command", [*SHORT, *LONG])
def test_the_command_runs_in_a_shell(command: str, programs: Path, folders: Folders, tmp_path: Path) -> None:
    line = written(command, folders, tmp_path)
    check(command, line, in_a_shell(line, programs, tmp_path), tmp_path)


def absent(modules: list[str]) -> list[str]:
    """Which of these modules cannot be imported, as asked by another process.

    To look for pip changes a process: setuptools' hook then gives it another distutils, and refuses to be imported.
    """
    ask = "import sys, importlib.util as u; print(*[name for name in sys.argv[1:] if u.find_spec(name) is None])"
    done = subprocess.run([sys.executable, "-c", ask, *modules], cwd=ROOT, capture_output=True, text=True, check=True)
    return done.stdout.split()


@pytest.mark.parametrize("command", MAKE)
def test_what_make_would_run_exists(command: str) -> None:
    if shutil.which("make") is None:
        pytest.skip("no make on this machine")
    done = subprocess.run(
        [*shlex.split(command), "--dry-run", "--always-make"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    recipe = done.stdout
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    modules = re.findall(r"python3? -m (\S+)", recipe)
    assert modules
    assert absent(modules) == []
    paths = re.findall(r"(?<![\w./-])(?:tests|\.ci)/[\w./-]+", recipe)
    assert [path for path in paths if not (ROOT / path).exists()] == []
    extras = {extra for listed in re.findall(r"\.\[([\w,]+)\]", recipe) for extra in listed.split(",")}
    assert extras <= set(project["project"]["optional-dependencies"])
    markers = {line.partition(":")[0] for line in project["tool"]["pytest"]["ini_options"]["markers"]}
    assert set(re.findall(r"pytest .* -m (\w+)", recipe)) <= markers
