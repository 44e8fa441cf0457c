"""Turns a folder of photos into a report and a usable model: all stages in one command."""
