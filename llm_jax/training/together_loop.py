"""The loop over several runs as one program (together.py). Each writes the run directory that it would have
alone, by the same hands: whoever reads it need not know.

All are saved at the same steps, one after another; after a kill all go on from the newest step that all have.
One that diverges is given up and keeps its place in the program, which changes nothing for the others. The
seconds of a dispatch are the whole group's, in every run; tokens a second are a run's own.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from rich.console import Console

from llm_jax.data.batch import Batch
from llm_jax.errors import Stopped, UserError
from llm_jax.text import shards
from llm_jax.text.prepare import prepare
from llm_jax.training import loop, metrics, out_of_memory, sinks, together
from llm_jax.training.bad_steps import BadSteps, GivenUp
from llm_jax.training.checkpoint import Checkpointer
from llm_jax.training.experiment import Experiment, complete
from llm_jax.training.fitting import check_start
from llm_jax.training.policy import SavePolicy
from llm_jax.training.program import Program
from llm_jax.training.progress import say
from llm_jax.training.rundir import RunDirectory, carry_on
from llm_jax.training.samples import SampleFile, check_prompt, sample_text
from llm_jax.training.signals import Stop
from llm_jax.training.state import State
from llm_jax.training.step import Metrics
from llm_jax.training.step_log import StepLog
from llm_jax.training.together import Together

MEMBERS = "members"  # beside the axes of the mesh in environment.json: it decides the last bits as they do
KEEP = 2  # checkpoints at least: while one is written run after run, all have the one before

T = TypeVar("T")


def run(
    experiments: Sequence[Experiment],
    workdirs: Sequence[str | Path],
    say: Callable[[str], None] = say,
    stop: Stop | None = None,
) -> list[dict[str, Any] | None]:
    """Trains, or goes on training, one experiment in each directory; gives the final evaluations, None for
    a run that was given up. As ``loop.run``, in one process.

    Raises UserError where no run is left, and for experiments that cannot be one program.
    """
    together.check(experiments)
    for experiment in experiments:
        sinks.check(experiment)
    with ExitStack() as stack:
        directories = [RunDirectory.open(workdir) for workdir in workdirs]
        for directory in directories:
            stack.enter_context(directory.held())
        members = []
        for experiment, directory in zip(experiments, directories, strict=True):
            members.append(Member.open(experiment, directory, len(workdirs), say))
            stack.callback(members[-1].checkpointer.close)
        runs = Runs(members, Together.of(member.program for member in members), say)
        with out_of_memory.explained(runs.shared):
            runs.train(stop or Stop())
    if not runs.live():
        raise UserError(members[-1].given_up)
    return [None if member.given_up else loop.final_evaluation(member.directory) for member in members]


@dataclass
class Member:
    """A run of the group. given_up: why its training has ended before the others', or ""."""

    program: Program
    directory: RunDirectory
    checkpointer: Checkpointer
    policy: SavePolicy
    given_up: str
    log: StepLog | None = None  # while it trains

    @classmethod
    def open(
        cls, experiment: Experiment, directory: RunDirectory, count: int, say: Callable[[str], None]
    ) -> Member:
        """One of ``count``: its data prepared, its newest checkpoint verified, its config written."""
        e, stored, shard_set = experiment, directory.stored(), directory.data_of(experiment)
        header = prepare(e.data, e.tokenizer, shard_set, say, e.evaluation.sets)
        data = shards.content_id(header)
        directory.check_data(data)
        e = carry_on(stored, complete(e, header["vocab_size"]), extend=False)
        program = Program.build(e, shard_set)
        check_prompt(program)
        e, mesh = program.experiment, {MEMBERS: count, **program.layout.mesh.shape}
        about = {"vocab_size": e.model.vocab_size, "tokenizer": header["tokenizer"]}
        kept = dataclasses.replace(e.checkpoint, keep=max(KEEP, e.checkpoint.keep))
        checkpointer = loop.make_checkpointer(directory, dataclasses.replace(e, checkpoint=kept), about)
        newest = checkpointer.newest(e.checkpoint.damaged == "skip", say)
        if newest is not None and (moved := directory.moved(mesh)):
            say(moved)
        directory.write_config(e, mesh, data, directory.begun_from())
        checkpointer.clean(say)
        given_up = has_given_up(metrics.read(directory.metrics), e.guard.patience)
        return cls(program, directory, checkpointer, SavePolicy(e.checkpoint), given_up)


def has_given_up(story: list[metrics.Record], patience: int) -> str:
    """Why an earlier attempt gave a run up, or ""."""
    newest = next((record for record in reversed(story) if record["kind"] == "train"), {})
    bad = newest.get("bad_in_row", 0)
    return f"{bad:.0f} bad steps in a row up to step {newest['step']:,}" if bad >= patience else ""


@dataclass(frozen=True)
class Runs:
    """What is done with the members of a group, one after another."""

    members: list[Member]
    group: Together
    say: Callable[[str], None]

    @property
    def shared(self) -> Program:
        return self.group.shared

    def live(self) -> list[Member]:
        return [member for member in self.members if not member.given_up]

    def each(self, work: Callable[[int, Member], T]) -> dict[int, T]:
        """{index: what ``work`` gives} of those that are alive. One that turns out to have diverged is not
        any more."""
        given = {}
        for index, member in enumerate(self.members):
            if member.given_up:
                continue
            try:
                given[index] = work(index, member)
            except GivenUp as error:
                member.given_up = str(error)
                self.say(f"{member.directory.path.name} is given up: {error}")
        return given

    def train(self, stop: Stop) -> None:
        """From the newest step that all have to the end; ``stop`` as in ``loop.train``."""
        if not self.live():
            return
        e = self.shared.experiment
        start = max(set.intersection(*(set(m.checkpointer.steps()) for m in self.live())), default=0)
        check_start(e, start)
        states = self.group.stack(self.begin(start))
        self.say(loop.describe_config(self.shared))
        self.say(self.group.describe())
        self.say(loop.describe(self.shared, start))
        with stop.deferred(), ExitStack() as stack:
            batches = self.open_logs(start, stack)
            if start < e.steps:
                states = self.steps(states, start, batches, stop)
            self.sample(states, e.steps)
            self.each(lambda i, m: m.log.end(e.steps))

    def begin(self, start: int) -> list[State]:
        """The states at a step. Who is given up has any: it only keeps its place."""
        states = self.group.init()
        if start:
            read = self.each(lambda i, m: m.program.read(m.checkpointer, start))
            states = [read.get(i, state) for i, state in enumerate(states)]
        return states

    def open_logs(self, start: int, stack: ExitStack) -> Iterator[tuple[Batch, ...]]:
        """Until ``stack`` closes them. Gives what all train on, dispatch by dispatch. Who is given up has no
        log any more: a start would end its story earlier."""
        e, all_batches = self.shared.experiment, []
        first, end = start // e.steps_per_dispatch, e.steps // e.steps_per_dispatch
        for index, m in enumerate(self.members):
            batches = stack.enter_context(closing(m.program.batches.iterate(first, end)))
            if not m.given_up:
                bad_steps = BadSteps(m.directory, m.checkpointer, e.guard.patience)
                console = Console(quiet=True) if index else None  # one line for all: the first one's
                log = StepLog(m.program, m.directory, start, bad_steps, console)
                m.log, batches = stack.enter_context(closing(log)), log.timed(batches)
            all_batches.append(batches)
        return zip(*all_batches, strict=True)

    def steps(self, states: State, start: int, batches: Iterator[tuple[Batch, ...]], stop: Stop) -> State:
        """As ``loop.train``, but nobody's loss ends it."""
        e, per = self.shared.experiment, self.shared.experiment.steps_per_dispatch
        if reason := stop.reason:
            raise Stopped(f"{reason} before it went on from step {start:,}", together=True)
        for first, batch in zip(range(start, e.steps, per), batches, strict=True):
            states, results = self.group.steps(states, batch)
            self.add(first, results)
            step, last, losses = first + per, first + per == e.steps, {}
            reason, due = stop.reason, any(m.policy.due(step) for m in self.live())
            if last or loop.is_due(step, e.evaluation.every):
                losses = self.evaluate(states, step)
            if not last and loop.is_due(step, e.samples.every):
                self.sample(states, step)
            best = any(self.members[i].checkpointer.is_among_best(step, loss) for i, loss in losses.items())
            if last or reason or best or due:
                self.save(states, step, losses)
            if reason and not last:
                raise Stopped(f"{reason} at step {step:,} of {e.steps:,}, which is saved", together=True)
            if not self.live():
                break
        return states

    def add(self, first: int, results: list[Metrics]) -> None:
        def add(index: int, member: Member) -> None:
            member.log.add(first, results[index])
            member.checkpointer.check()

        self.each(add)

    def evaluate(self, states: State, step: int) -> dict[int, float]:
        def evaluate(index: int, member: Member) -> float:
            return loop.evaluate(self.shared, self.group.take(states, index), member.log, step)

        losses = self.each(evaluate)
        self.say(f"step {step:,}: losses {', '.join(f'{loss:.4f}' for loss in losses.values())}")
        return losses

    def sample(self, states: State, step: int) -> None:
        def sample(index: int, member: Member) -> None:
            with member.log.pause("samples", step):
                text = sample_text(self.shared, self.group.take(states, index).judged)
                SampleFile(member.directory.samples).add(step, text)

        self.each(sample)

    def save(self, states: State, step: int, losses: dict[int, float]) -> None:
        def save(index: int, member: Member) -> None:
            with member.log.pause("checkpoint", step):
                member.log.sync()
                member.checkpointer.save(step, self.group.take(states, index), losses.get(index))
            member.policy.saved()

        self.each(lambda i, m: m.checkpointer.wait())  # all have the one before; see KEEP
        self.each(save)
