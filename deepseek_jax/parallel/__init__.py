"""What is computed across devices: the only shard_map and collectives of the project.

`experts` strings together what three others do: `exchange` moves rows between devices, `rows` puts them in order and
runs them through their experts, `rounds` repeats this for what did not fit. `embedding`, `logprobs` and `attention` are
what XLA's own partitioning does badly or not at all.
"""
