"""Each table of both papers as one command: `python -m nanomed.tables list | run`.

rows.py says what a table, a row and a training are, mmcp.py and medart.py hold the tables as plain data, steps.py makes
the commands of a row, running.py runs them and goes on where they stopped, printing.py writes the table, jobs.py
SLURM's files. May import everything below, `systems` and `evaluation` among it, and starts the scripts as processes of
their own, with the words that a reader could type; must not import a script, nor do anything of theirs by itself.
"""
