"""The fuzzer: random steps are equal or refused, and faults that are planted in the engine are found and made small."""

import os
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Iterator

import pytest

from experiments.bench import fuzz
from experiments.bench.fuzzing.check import Result, check, one_thread
from experiments.bench.fuzzing.generate import generate
from experiments.bench.fuzzing.program import Program
from experiments.bench.fuzzing.shrink import shrink
from experiments.bench.fuzzing.source import source_of
from experiments.bench.fuzzing.workers import Report, Shrinking, reports
from ftrain.trace import grad as grad_module

PROGRAMS = 150
OF_THE_SUITE = 60
NO_SHRINKING = Shrinking(of_a_kind=0)


@pytest.fixture(autouse=True)
def quiet() -> Iterator[None]:
    with one_thread():
        yield


@pytest.mark.slow
@pytest.mark.parametrize(
    "seeds", [range(OF_THE_SUITE), pytest.param(range(OF_THE_SUITE, PROGRAMS), marks=pytest.mark.exhaustive)], ids=str
)
def test_random_steps_are_equal_or_refused_and_never_another_number(seeds):
    found = list(reports(seeds, jobs=0, shrinking=NO_SHRINKING))
    counts = Counter(r.outcome for r in found)
    wrong = [r for r in found if r.outcome in ("different", "crash")]
    assert [f"python -m experiments.bench.fuzz --replay {r.seed}: {r.kind}" for r in wrong] == []
    assert counts["equal"] > 0.7 * len(seeds)  # a fuzzer whose programs are all refused says nothing
    assert counts["no program"] + counts["unstable"] < 0.05 * len(seeds)


def first_different(seeds: range, wanted: Callable[[Program], bool]) -> tuple[Program, Result]:
    """The first of the wanted programs that comes out different."""
    for seed in seeds:
        program = generate(seed)
        if wanted(program):
            found = check(program)
            if found.outcome == "different":
                return program, found
    pytest.fail("the fuzzer did not find the planted fault")


def has(*features: str) -> Callable[[Program], bool]:
    return lambda program: all(any(f.startswith(name) for f in program.features()) for name in features)


def still_different(program: Program) -> bool:
    return check(program).outcome == "different"


def test_a_recompute_that_draws_another_mask_is_found_and_made_small(monkeypatch):
    monkeypatch.setattr("ftrain.remat.policy.is_pure", lambda node: True)
    wanted = has('option: remat "all"', "op: random of torch")
    program, _ = first_different(
        range(5400, 6000), lambda p: wanted(p) and not has("option: mesh")(p) and micro(p) == 1
    )
    smallest = shrink(program, still_different, seconds=30)
    assert smallest.options.remat == '"all"'
    assert any(line.feature == "random of torch" for line in smallest.lines())
    assert len(list(smallest.lines())) <= 4
    monkeypatch.undo()
    assert check(smallest).outcome == "equal"


def micro(program: Program) -> int:
    return max((loss.micro_batches for loss in program.losses), default=1)


def test_a_donated_leaf_that_a_result_still_looks_at_is_found(monkeypatch):
    monkeypatch.setattr("ftrain.passes.donate._copy_kept_views", lambda graph, donated: None)
    monkeypatch.setattr("ftrain.passes.donate._copy_shared_values", lambda graph, donated: None)

    def wanted(program: Program) -> bool:
        updated = {path for path, _ in program.updates}
        returned = any(text in updated for _, text in program.metrics)
        return returned and program.options.donate and program.options.mesh is None

    program, _ = first_different(range(3000, 6000), wanted)
    smallest = shrink(program, still_different, seconds=20)
    assert smallest.options.donate
    assert any(text.startswith("state") for _, text in smallest.metrics)
    monkeypatch.undo()
    assert check(smallest).outcome == "equal"


def test_a_captured_tensor_that_is_written_over_is_found(monkeypatch):
    monkeypatch.setattr("ftrain.trace.tracer.share_memory_of_constants", lambda module: None)
    wanted = has("option: captured tensors")
    program, found = first_different(range(3050, 3100), lambda p: wanted(p) and not has("option: mesh")(p))
    assert "a captured tensor CAPTURED: apart by" in found.detail
    monkeypatch.undo()
    assert check(program).outcome == "equal"


def test_a_gradient_that_is_slightly_wrong_is_found(monkeypatch):
    right = grad_module._by_autograd

    def wrong(*args):
        found = right(*args)
        return found._replace(grads=[g * (1 + 1e-8) for g in found.grads])

    monkeypatch.setattr(grad_module, "_by_autograd", wrong)
    _, found = first_different(range(3000, 3100), lambda p: p.options.mesh is None and micro(p) == 1)
    assert "apart by" in found.detail


def test_a_refusal_that_names_no_place_or_no_way_out_is_no_refusal(monkeypatch):
    program = next(p for p in map(generate, range(3000, 3300)) if has("op: writes an argument")(p))
    assert check(program).outcome == "refused"

    def refuse(*args, **kwargs):
        raise ValueError("mutation of a functional tensor")

    monkeypatch.setattr("ftrain.trace.tracer.functionalize", refuse)
    assert check(program).outcome == "raw error"


def test_a_seed_is_always_the_same_program_and_its_source_runs_by_itself(tmp_path):
    program = next(p for p in map(generate, range(10)) if check(p).outcome == "equal")
    source = source_of(program, main=True)
    (tmp_path / "step.py").write_text(source)
    again = "import runpy\nfrom experiments.bench.fuzzing.generate import generate\n"
    again += "from experiments.bench.fuzzing.source import source_of\n"
    again += f"print(source_of(generate({program.seed}), main=True))\n"
    again += f"runpy.run_path({str(tmp_path / 'step.py')!r}, None, '__main__')"
    environment = {**os.environ, "PYTHONPATH": os.getcwd(), "PYTHONHASHSEED": "7"}
    command = [sys.executable, "-W", "ignore", "-c", again]
    shown = subprocess.run(command, capture_output=True, text=True, check=True, env=environment).stdout
    assert shown.startswith(source)
    assert "\nfound\n" in shown.removeprefix(source)


def judge_that_dies(seed: int, seen: Counter, shrinking: Shrinking) -> Report:
    if seed == 3:
        os.abort()
    return Report(seed, "equal")


def test_a_process_that_dies_is_an_outcome_and_the_rest_goes_on():
    found = {r.seed: r for r in reports(range(6), jobs=1, judge=judge_that_dies)}
    assert sorted(found) == list(range(6))
    assert [seed for seed, r in found.items() if r.outcome == "crash"] == [3]
    assert "exit code -6" in found[3].detail
    assert "def step(state, batch)" in found[3].source


def test_a_log_is_resumed_and_the_rows_have_their_goals(tmp_path, capsys):
    log, rows = tmp_path / "log.jsonl", tmp_path / "rows.json"
    fuzz.main(fuzz.Fuzz(programs=2, jobs=0, log=log, shrink_s=0))
    before = log.read_text()
    fuzz.main(fuzz.Fuzz(programs=3, jobs=0, log=log, json=rows, shrink_s=0))
    assert log.read_text().startswith(before)
    assert len(log.read_text().splitlines()) == 3
    assert '"silent differences"' in rows.read_text()
    assert '"goal": 0' in rows.read_text()
