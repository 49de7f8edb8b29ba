"""Thousands of damaged checkpoints, shard sets and answers, each through every command that reads it: `make fuzz`.

`subjects` are what is damaged, `cases` damages one and says what is run, `truth` proves what was written or loaded,
`worker` runs and judges, `run` deals the cases to workers.
"""
