"""A SLURM job file for each row. A job that is preempted, or that its time limit ends, saves its state and is queued
again: SLURM sends SIGTERM two minutes before, the training saves and the command ends with 75."""

import shlex

from nanomed.run.signals import PREEMPTED
from nanomed.tables.rows import Row, Table


def text(table: Table, row: Row, words: list[str], options: list[str], folder: str, here: str) -> str:
    """The file of one row. `words` are those of the command behind `run`, `options` lines for #SBATCH, `folder` takes
    the output, `here` is where the command is started."""
    name = f"{table.name}-{row.name}"
    lines = [f"--job-name={name}", "--requeue", "--signal=TERM@120", "--open-mode=append",
             f"--output={folder}/{name}.log", f"--chdir={here}", *options]  # fmt: skip
    command = shlex.join(["python", "-m", "nanomed.tables", "run", table.name, "--rows", row.name, *words])
    return "\n".join([
        "#!/bin/bash",
        *(f"#SBATCH {line}" for line in lines),
        f"# {row.label}. Jobs that stand on one training wait for the one that began it.",
        f"srun --ntasks=1 {command}",
        "code=$?",
        f'[ "$code" = {PREEMPTED} ] && scontrol requeue "$SLURM_JOB_ID"',
        "exit $code", "",
    ])  # fmt: skip
