"""Experts across devices: the only shard_map and collectives of the project.

`experts` strings together what the others do: `exchange` moves rows between devices, `rows` puts them in order and
runs them through their experts, `rounds` repeats this for what did not fit. `placement` says which device holds
which experts.
"""
