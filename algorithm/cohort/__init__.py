"""Cohorts: many pairs of scans from a table, run by Snakemake (``workflow/Snakefile``).

table       the rows, and all that is wrong with them at once; made from a BIDS-like folder by `bids`
done        what counts as done: the hash of a pair's files, options and weights; the outcome of each step
plan        which rows go into which job, for the Snakefile
worker      one job: a step for some rows, with the model loaded once
steps       what the steps do with one pair
run         ``lungreg cohort``: table → Snakemake → report
figures     every figure of every pair in one table
page        the cohort's report

Nothing of it chooses what runs next, waits or tries again: Snakemake does. Planning loads neither torch nor SimpleITK.
"""
