"""What the tests share: made-up inputs, how the programs are run, how their results are read."""
