"""The program of a compiled step, with what it keeps from one run to the next."""

from collections.abc import Mapping
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, fx

from ftrain.analysis.cuda_allocator import warn_without_expandable_segments
from ftrain.graph.layouts import LayoutCheck
from ftrain.graph.loop import copy_graph
from ftrain.graph.writes import written_inputs
from ftrain.report.out_of_memory import explained, is_out_of_memory
from ftrain.runtime.argument_memory import ArgumentMemory
from ftrain.runtime.borrow import Borrow, Fence
from ftrain.runtime.donation import empty, give_away
from ftrain.runtime.errors import name_line
from ftrain.runtime.execute import Program, compile_graph, waiting
from ftrain.runtime.lockstep import lockstep_program
from ftrain.runtime.no_gradient import refusing
from ftrain.runtime.other_holders import Beside, OtherHolders
from ftrain.runtime.shared_memory import SharedMemory
from ftrain.step.artifact import Compiled
from ftrain.step.pipeline import EXECUTED, run_passes
from ftrain.trace.ambient import as_a_program
from ftrain.trace.captured import captured_tensors


class Runner:
    """Runs a compiled step on real tensors; the program is made at the first run."""

    def __init__(self, compiled: Compiled) -> None:
        self.compiled = compiled
        self._program: Program | None = None
        self._running: fx.GraphModule | None = None
        self._wants_gradients = False
        self._fence = Fence()
        self._borrows: list[Borrow] = []
        self._arguments: ArgumentMemory | None = None

    def wait_for(self, borrows: Mapping[int, Borrow]) -> None:
        """Of the leaves of the next call these are still read by somebody: by their positions in its arguments.

        The program waits for those that it writes over, before its first write; the others are waited for here.
        """
        if borrows:
            donated = set(self.compiled.donated_leaves)
            for slot, borrow in borrows.items():
                if slot not in donated:
                    borrow.wait()
            self._borrows = [borrow for slot, borrow in borrows.items() if slot in donated]
            self._fence.add(self._borrows)

    def run(self, leaves: list[Any], *, guard_passed: bool = False) -> Any:
        """Run on the flat leaves of real arguments and return the result's tree; `guard_passed`: the signature has matched
        them fast.
        """
        signature = self.compiled.signature
        tensors = signature.tensors(leaves)
        if not guard_passed:
            self._wants_gradients = any(getattr(x, "requires_grad", False) for x in tensors)
            if self._program is not None:
                signature.learn(tensors)
        inputs, outputs = self.run_flat(tensors, guard_passed=guard_passed)
        results = self._with_donated(tensors, inputs, outputs, guard_passed=guard_passed)
        if self._wants_gradients and torch.is_grad_enabled():
            results = self._refusing(results)
        return self.compiled.traced.assemble(results)

    def _refusing(self, results: list[Tensor]) -> list[Tensor]:
        """The results, but for a new state in the memory of the old, refuse a backward from outside."""
        kept = set(self.compiled.donation.outputs.values())
        others = iter(refusing([x for i, x in enumerate(results) if i not in kept], self.compiled.name))
        return [x if i in kept else next(others) for i, x in enumerate(results)]

    def run_flat(
        self, tensors: list[Tensor], *, guard_passed: bool = False, beside: Beside = lambda _: 0
    ) -> tuple[list[Tensor], list[Tensor]]:
        """Run on the tensors of real arguments. Returns the graph's inputs, of which the donated hold new values then
        (copies where the tensors were not contiguous, or somebody else holds their memory), and its outputs: the
        results that are not donated.

        `guard_passed`: the guard has matched these tensors, so all are contiguous; `beside`: see `OtherHolders`.
        """
        donation = self.compiled.donation
        if self._program is None:
            self._program = self._start(tensors)
        contiguous = guard_passed or all(map(Tensor.is_contiguous, tensors))
        inputs = tensors
        if donation.outputs and not (contiguous and self._holders.known_unshared(tensors)):
            self._shared_memory.require_none(tensors, contiguous=contiguous)
            inputs = self._copy_shared(tensors, beside, contiguous=contiguous)
        elif not contiguous:
            inputs = self.compiled.traced.in_rows(tensors)
        try:
            with as_a_program():
                outputs = self._program(inputs)
        except Exception as error:
            if isinstance(error, RuntimeError) and is_out_of_memory(error):
                step = self.compiled
                raise explained(step, error, device=step.setting.device, running=self.running) from None
            if self._running is not None:
                name_line(error, self._running)
            raise
        return inputs, outputs

    def _copy_shared(self, tensors: list[Tensor], beside: Beside, *, contiguous: bool) -> list[Tensor]:
        """The graph's inputs, of which the donated lie in memory that nobody else holds."""
        borrows, self._borrows = self._borrows, []
        inputs = tensors if contiguous else self.compiled.traced.in_rows(tensors)
        copies = {slot for slot in self.compiled.donation.slots if inputs[slot] is not tensors[slot]}
        return self._holders.copy_shared(inputs, copies=copies, borrows=borrows, beside=beside)

    def _start(self, tensors: list[Any]) -> Program:
        for path, leaf in zip(self.compiled.traced.input_paths, tensors, strict=True):
            if not isinstance(leaf, Tensor) or leaf.device.type == "meta":
                raise ValueError(f"leaf {path!r} has a shape and no data: this step can be lowered but not run on it")
        warn_without_expandable_segments(self.compiled.setting.device)
        setting = self.compiled.setting
        self._running = run_passes(copy_graph(self.compiled.graph), EXECUTED, setting)
        if setting.backend == "cudagraph":
            self._arguments = ArgumentMemory(written_inputs(self._running))
        return compile_graph(
            self._running,
            setting.backend,
            before_write=self._fence.wait,
            checked=self._repair,
            arguments=self._arguments,
        )

    def _repair(self, check: LayoutCheck) -> None:
        check.repair(self.compiled.graph)
        self.compiled.forget_forms()

    def _with_donated(
        self, tensors: list[Tensor], inputs: list[Tensor], outputs: list[Tensor], *, guard_passed: bool
    ) -> list[Tensor]:
        donation = self.compiled.donation
        if not donation.outputs:
            return outputs
        slots = donation.slots
        fresh = give_away([tensors[slot] for slot in slots], donation.paths)
        if not guard_passed or self._holders.old_are_kept:
            empty(tensors[slot] for slot in slots if inputs[slot] is tensors[slot])
        if inputs is not tensors:
            fresh = [x if inputs[slot] is tensors[slot] else inputs[slot] for slot, x in zip(slots, fresh, strict=True)]
        return donation.ordered(fresh, outputs)

    def run_ranks(self, ranks: list[list[Tensor]]) -> list[list[Tensor]]:
        """Run all ranks of a virtual mesh in lockstep, on and to flat tensors; donated ones are written over."""
        self._fence.wait()
        outputs = self._lockstep(ranks)
        donation = self.compiled.donation
        if not donation.outputs:
            return outputs
        return [
            donation.ordered([own[slot] for slot in donation.slots], out)
            for own, out in zip(ranks, outputs, strict=True)
        ]

    @cached_property
    def _lockstep(self) -> Any:
        assert self.compiled.setting.mesh is not None
        return lockstep_program(self.compiled.interpreted, self.compiled.setting.mesh)

    @property
    def running(self) -> fx.GraphModule:
        """The graph whose generated code is run; before the first run the step's own."""
        return self.compiled.graph if self._running is None else self._running

    def use_program(self, program: Program) -> None:
        """Run another program for the same graph from now on, e.g. one that measures."""
        self._program = waiting(program, self._fence.wait)

    @cached_property
    def _holders(self) -> OtherHolders:
        compiled = self.compiled
        return OtherHolders(compiled.name, compiled.traced.input_paths, compiled.donation.slots, self._arguments)

    @cached_property
    def _shared_memory(self) -> SharedMemory:
        traced = self.compiled.traced
        captured = {traced.name_of(x): x for x in captured_tensors(self.compiled.graph).values()}
        return SharedMemory(traced.input_paths, self.compiled.donation.slots, captured)
