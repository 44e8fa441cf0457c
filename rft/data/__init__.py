"""Holds one command under its public name; the code is in the packages shards, packing, loading."""
