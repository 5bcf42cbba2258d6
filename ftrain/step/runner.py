"""The program of a compiled step, and what it keeps from one run to the next."""

from collections.abc import Iterable, Mapping
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, fx

from ftrain.analysis.cuda_allocator import warn_without_expandable_segments
from ftrain.graph.failing_node import failing_node
from ftrain.graph.layouts import LayoutCheck, lies_plainly
from ftrain.graph.loop import copy_graph
from ftrain.graph.writes import has_written, written_inputs
from ftrain.report.out_of_memory import explained, is_out_of_memory
from ftrain.runtime.argument_memory import ArgumentMemory
from ftrain.runtime.borrow import Borrow, Fence
from ftrain.runtime.donation import empty, give_away
from ftrain.runtime.errors import name_line
from ftrain.runtime.execute import Program, compile_graph, waiting
from ftrain.runtime.half_new import mark_half_new
from ftrain.runtime.lockstep import lockstep_program
from ftrain.runtime.no_gradient import refusing
from ftrain.runtime.other_holders import OtherHolders, OwnReferences
from ftrain.runtime.shared_memory import SharedMemory
from ftrain.step.artifact import Compiled
from ftrain.step.pipeline import EXECUTED, run_passes
from ftrain.trace.ambient import program_modes
from ftrain.trace.captured import captured_tensors


class Runner:
    """Runs a compiled step on real tensors. The program is made at the first run."""

    def __init__(self, compiled: Compiled) -> None:
        self.compiled = compiled
        self._program: Program | None = None
        self._running: fx.GraphModule | None = None
        self._wants_gradients = False
        self._fence = Fence()
        self._borrows: list[Borrow] = []
        self._arguments: ArgumentMemory | None = None

    def wait_for(self, borrows: Mapping[int, Borrow]) -> None:
        """Note the borrowed leaves of the next call, by their positions in its arguments.

        The program waits for the donated ones just before its first write; this method waits for the others.
        """
        if borrows:
            donated = set(self.compiled.donated_leaves)
            for slot, borrow in borrows.items():
                if slot not in donated:
                    borrow.wait()
            self._borrows = [borrow for slot, borrow in borrows.items() if slot in donated]
            self._fence.add(self._borrows)

    def run(self, leaves: list[Any], *, guard_passed: bool = False) -> Any:
        """Run on the flat leaves of real arguments and return the tree of the result.

        `guard_passed`: `Signature.matches_fast` was True for these leaves, so all are contiguous and like those of the
        call before. ValueError for leaves without data and for donated leaves that share memory; `OutOfMemory` where an
        allocation fails. After a failure that came when donated leaves were being written, they are marked as half new.
        """
        signature = self.compiled.signature
        tensors = signature.tensors(leaves)
        if not guard_passed:
            self._wants_gradients = any(getattr(x, "requires_grad", False) for x in tensors)
            if self._program is not None:
                signature.learn(tensors)
        begun: list[bool] = []
        try:
            inputs, outputs = self.run_flat(tensors, guard_passed=guard_passed, begun=begun)
            results = self._with_donated(tensors, inputs, outputs, guard_passed=guard_passed)
        except BaseException as error:
            if begun:
                donation = self.compiled.donation
                mark_half_new([tensors[slot] for slot in donation.slots], donation.paths, error)
            raise
        if self._wants_gradients and torch.is_grad_enabled():
            results = _refusing(self.compiled, results)
        return self.compiled.traced.assemble(results)

    def run_flat(
        self,
        tensors: list[Tensor],
        *,
        begun: list[bool],
        guard_passed: bool = False,
        own_references: OwnReferences = lambda _: 0,
    ) -> tuple[list[Tensor], list[Tensor]]:
        """Run on the tensors of real arguments, in the shapes of the trace.

        Returns the graph's inputs and its outputs. The donated inputs hold the new state then; they are copies where a
        tensor was not contiguous or where somebody else holds its memory. The outputs are the results that are not
        donated.

        - `guard_passed`: as in `run`. `own_references`: see `OtherHolders`.
        - `begun`: an empty list, which has an entry from when donated leaves may have been written.

        ValueError for leaves without data and for donated leaves that share memory. An `OutOfMemory` explains an
        allocation that failed; any other error gets the user's line added.
        """
        donation = self.compiled.donation
        if self._program is None:
            self._program = self._start(tensors)
        contiguous = guard_passed or all(map(lies_plainly, tensors))
        inputs = tensors
        if donation.outputs and not (contiguous and self._holders.known_unshared(tensors)):
            self._shared_memory.require_none(tensors, contiguous=contiguous)
            inputs = self._copy_shared(tensors, own_references, contiguous=contiguous)
        elif not contiguous:
            inputs = self.compiled.traced.contiguous(tensors)
        begun.append(True)
        try:
            with program_modes():
                outputs = self._program(inputs)
        except BaseException as error:
            if not _has_written(self.compiled.donation.slots, self._running, error, tensors, inputs):
                begun.clear()
            if not isinstance(error, Exception):
                raise
            if isinstance(error, RuntimeError) and is_out_of_memory(error):
                step = self.compiled
                raise explained(step, error, device=step.setting.device, running=self.running) from None
            if self._running is not None:
                name_line(error, self._running)
            raise
        return inputs, outputs

    def forget_holders(self) -> None:
        """Look closer at who holds donated leaves at the next call: the tensors around their memory have changed."""
        self._holders.forget()

    def _copy_shared(self, tensors: list[Tensor], own_references: OwnReferences, *, contiguous: bool) -> list[Tensor]:
        """The graph's inputs, with copies of the donated ones whose memory somebody else holds."""
        borrows, self._borrows = self._borrows, []
        inputs = tensors if contiguous else self.compiled.traced.contiguous(tensors)
        copies = {slot for slot in self.compiled.donation.slots if inputs[slot] is not tensors[slot]}
        return self._holders.copy_shared(inputs, copies=copies, borrows=borrows, own_references=own_references)

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
        """Run all ranks of a virtual mesh in lockstep.

        Takes and returns the flat tensors of each rank; donated inputs are written over.
        """
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
        """The graph whose generated code runs; before the first run the step's own graph."""
        return self.compiled.graph if self._running is None else self._running

    def use_program(self, program: Program) -> None:
        """Replace the program of this graph from now on, e.g. by one that measures."""
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


def _refusing(compiled: Compiled, results: list[Tensor]) -> list[Tensor]:
    """Make results refuse a backward from outside, except for a new state in the memory of the old one."""
    kept = set(compiled.donation.outputs.values())
    others = iter(refusing([x for i, x in enumerate(results) if i not in kept], compiled.name))
    return [x if i in kept else next(others) for i, x in enumerate(results)]


def _has_written(
    donated: Iterable[int], running: Any, error: BaseException, tensors: list[Tensor], inputs: list[Tensor]
) -> bool:
    """True if the run that failed has written over donated leaves, or if that is not known."""
    written = [slot for slot in donated if inputs[slot] is tensors[slot]]
    if running is None or not written:
        return bool(written)
    failed = failing_node(running, error.__traceback__, inside=False)
    return failed is None or has_written(running, written, failed)
