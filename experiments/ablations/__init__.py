"""What of the recipe does what: each file takes the folder of a run of `r1` and does a stage again, changed."""
