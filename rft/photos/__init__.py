"""From a folder of photos to a report and a model that can be used: every stage, by one command."""
