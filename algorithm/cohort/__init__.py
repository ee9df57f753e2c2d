"""Cohorts: many pairs of scans from a table, run by Snakemake (``workflow/Snakefile``).

table       the rows, and a list of all their faults; `bids` makes the table from a BIDS-like folder
done        decides what is done: the hash of a pair's files, options and weights; the outcome of each step
plan        which rows go into which job, for the Snakefile
worker      one job: a step for some rows, with the model loaded once
steps       the steps for one pair
run         ``lungreg cohort``: table → Snakemake → report
figures     every figure of every pair in one table
page        the cohort's report

Only Snakemake chooses what runs next, waits and tries again. Planning loads neither torch nor SimpleITK.
"""
