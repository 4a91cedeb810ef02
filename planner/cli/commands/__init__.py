"""What the commands do, once their options are parsed. Data goes to stdout, words to stderr.

Every command returns its exit code: 0 done, 1 infeasible or a failed check.
"""
