"""Holds one command under its public name; shards, packing and loading are the packages."""
