"""Flax NNX modules: shelves of named weights that call `ops`. Used functionally, see `decoder.split`."""
